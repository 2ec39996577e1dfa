"""The page of all flags and exit codes says what every --help says, no more and no less."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from test_help import PROJECT_ROOT, STARTED_BY_A_PROGRAM, entry_scripts

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


@cache
def help_of(path: str) -> str:
    """The text of --help, of a program's subcommands, too."""
    command = [f"./{path}"] if path.endswith(".sh") else [sys.executable, path]
    texts = [
        subprocess.run([*command, *words, "--help"], cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL,
                       capture_output=True, text=True, timeout=100, check=True).stdout
        for words in ([], *([name] for name in SUBCOMMANDS.get(path, ())))
    ]  # fmt: skip
    return "\n".join(texts)


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
