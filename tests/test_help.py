"""Every script explains itself: --help ends well, shows the usage and imports nothing heavy.

The seconds it took are recorded and printed, not judged: they are the machine's as much as the
script's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

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


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", entry_scripts())
def test_help_ends_well_shows_the_usage_and_imports_nothing_heavy(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    # Which lists what is imported; without docstrings, as under PYTHONOPTIMIZE=2.
    python = (sys.executable, "-OO", "-X", "importtime", name)
    started = time.monotonic()
    result = run(*((f"./{name}",) if name.endswith(".sh") else python), "--help")
    record_property("help_seconds", round(time.monotonic() - started, 2))
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported or name.endswith(".sh")
    assert name == STARTED_BY_A_PROGRAM or not imported & HEAVY


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
    result = run(sys.executable, "-S", name, "--help")  # which finds no installed package
    assert result.returncode == 1
    assert "is missing here: source .venv/bin/activate" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_checks_do_not_start_where_help_stands_behind_other_words() -> None:
    result = run("./run_tests.sh", "-k", "metrics", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ./run_tests.sh")


@pytest.mark.parametrize("arguments", [(), ("seven",), ("-1",)])
def test_who_starts_a_programs_process_by_hand_is_told_which_program(
    arguments: tuple[str, ...],
) -> None:
    result = run(sys.executable, STARTED_BY_A_PROGRAM, *arguments)
    assert result.returncode == 2
    assert "usage: python3 workloads/inference/" in result.stderr
    assert "Traceback" not in result.stderr
