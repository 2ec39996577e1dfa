"""Every --help ends well and imports nothing heavy, and docs/flags.md says the same.

The seconds it took are recorded and printed, not judged: they are the machine's as much as the
script's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT

HEAVY = {"torch", "torchvision", "transformers", "matplotlib", "pandas", "flask"}
# Sourced by the scripts, never run itself.
SOURCED = "setup_environment.sh"
# A process of inference_server.py, which hands it open sockets.
STARTED_BY_A_PROGRAM = "workloads/inference/web_worker.py"


def entry_scripts() -> list[str]:
    """Shell and Python files that are run by name, as paths from the project's folder."""
    scripts = [*PROJECT_ROOT.glob("*.sh"), *PROJECT_ROOT.glob("gpu-configs/*.sh")]
    programs = [
        path
        for folder in ("benchmarking", "workloads")
        for path in PROJECT_ROOT.glob(f"{folder}/**/*.py")
        if '__name__ == "__main__"' in path.read_text()
    ]
    names = {str(path.relative_to(PROJECT_ROOT)) for path in [*scripts, *programs]}
    assert len(scripts) > 8 and len(programs) > 15
    return sorted(names - {SOURCED})


@cache
def run(
    name: str, *words: str, options: tuple[str, ...] = ("-X", "importtime")
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, a program with options of Python's.

    By default they list on standard error what is imported.
    """
    start = [f"./{name}"] if name.endswith(".sh") else [sys.executable, *options, name]
    return subprocess.run(
        [*start, *words], cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", entry_scripts())
def test_help_ends_well_shows_the_usage_and_imports_nothing_heavy(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    started = time.monotonic()
    result = run(name, "--help")
    record_property("help_seconds", round(time.monotonic() - started, 2))
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported or name.endswith(".sh")
    assert name == STARTED_BY_A_PROGRAM or not imported & HEAVY


@pytest.mark.parametrize("name", [one for one in entry_scripts() if one.endswith(".py")])
def test_help_ends_well_where_python_drops_docstrings(name: str) -> None:
    assert run(name, "--help", options=("-OO",)).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "benchmarking/benchmark_suite.py",
        "benchmarking/gpu_monitor.py",
        "benchmarking/sweep.py",
        "workloads/custom/command_client.py",
    ],
)
def test_a_python_without_the_packages_is_told_in_one_sentence_what_to_do(name: str) -> None:
    result = run(name, "--help", options=("-S",))  # which finds no installed package
    assert result.returncode == 1
    assert "is missing here: source .venv/bin/activate" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_checks_do_not_start_where_help_stands_behind_other_words() -> None:
    result = run("run_tests.sh", "-k", "metrics", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ./run_tests.sh")


@pytest.mark.parametrize("arguments", [(), ("seven",), ("-1",)])
def test_who_starts_a_programs_process_by_hand_is_told_which_program(
    arguments: tuple[str, ...],
) -> None:
    result = run(STARTED_BY_A_PROGRAM, *arguments)
    assert result.returncode == 2
    assert "usage: python3 workloads/inference/" in result.stderr
    assert "Traceback" not in result.stderr


# --- the page ------------------------------------------------------------------------------------

PAGE = (PROJECT_ROOT / "docs" / "flags.md").read_text()
# Their --help is their shell script's; pytest's flags are not ours.
SAID_ELSEWHERE = {
    "benchmarking/run_experiments.py", "benchmarking/stress_test.py", "run_tests.sh",
    *STARTED_BY_A_PROGRAM,
}  # fmt: skip
PROGRAMS = sorted(set(entry_scripts()) - SAID_ELSEWHERE)
SUBCOMMANDS = {
    "benchmarking/fleet.py": ("run", "unit", "report"),
    "benchmarking/environment.py": ("set-up", "missing"),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# An option's line of --help: its names, then two blanks or the end of the line.
OPTION_LINE = re.compile(r"^  (?:-h, )?(--[a-z].*?)(?: {2,}|$)", re.MULTILINE)
ALIASES = {"--beside-others", "--frontends", "--leash"}


def help_of(path: str) -> str:
    """The text of --help, of a program's subcommands, too."""
    return "\n".join(
        run(path, *words, "--help").stdout
        for words in ((), *((name,) for name in SUBCOMMANDS.get(path, ())))
    )


def flags_in_help(path: str) -> set[str]:
    """Every flag that --help lists, old names apart."""
    return {
        flag
        for line in OPTION_LINE.findall(help_of(path))
        for flag in FLAG.findall(re.sub(r"\(or:.*?\)", "", line))
    } - ALIASES


def table(title: str) -> list[list[str]]:
    """The cells of the rows of the page's table that begins with this title."""
    (rows,) = re.findall(rf"^\| {title} \|.*\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [re.split(r"\s*\|\s*", row)[1:-1] for row in rows.splitlines()]


def groups() -> dict[str, set[str]]:
    """The page's names for several programs, as file names."""
    named = {
        name: set(re.findall(r"`([\w.]+)`", line))
        for name, line in re.findall(r"^- \*\*(.+?)\*\*: (.*)$", PAGE, re.MULTILINE)
    }
    named["jobs"] |= named["GPU jobs"]
    return named


def flags_on_page() -> dict[str, set[str]]:
    """The flags of each program, by the file's name."""
    found: dict[str, set[str]] = {Path(path).name: set() for path in PROGRAMS}
    for flags, _, programs, _ in table("flag"):
        for word in re.split(r", ", programs):
            names = groups().get(word, {word.strip("`")})
            for name in found if word == "every one" else names:
                found[name] |= set(FLAG.findall(flags))
    return found


@pytest.mark.parametrize("path", PROGRAMS)
def test_the_page_has_the_flags_of_each_programs_help(path):
    on_page, in_help = flags_on_page()[Path(path).name], flags_in_help(path)
    assert on_page == in_help | {"--help"}  # the drivers do not list it


def test_every_old_name_stands_next_to_the_new_one_that_help_gives_it():
    pairs = {
        (FLAG.findall(cells[0])[0], cells[1].strip("`")) for cells in table("flag") if cells[1]
    }
    helps = {" ".join(help_of(path).split()) for path in PROGRAMS}
    assert {old for _, old in pairs} == ALIASES
    for new, old in pairs:
        said = rf"{new}( \w+)?, {old}|{old} \w+ former name of {new}"
        assert any(re.search(said, text) for text in helps), (new, old)


def test_the_page_has_the_exit_codes_of_each_programs_help():
    said = {}
    for path in PROGRAMS:
        text = " ".join(help_of(path).split())
        for codes in re.findall(r"Exit codes: (.*?)(?:; `unit`|\. | options:| positional|$)", text):
            said[path] = set(re.findall(r"(?:^|, )(\d+)(?= |,)", codes))
    assert len(said) >= 14 and all({"0", "2"} <= codes for codes in said.values()), said
    for path, codes in said.items():
        column = 2 if Path(path).name in groups()["modes"] else 1
        rows = [cells[0] for cells in table("code") if cells[column]]
        assert codes <= set(re.findall(r"\d+", " ".join(rows))), path
