"""Every script explains itself: --help ends well, shows the usage and imports nothing heavy.

The seconds it took are recorded and printed, not judged: they are the machine's as much as the
script's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "transformers", "matplotlib", "pandas", "flask"}
FOLDERS_OF_SCRIPTS = (".", "gpu-configs")
FOLDERS_OF_PROGRAMS = ("benchmarking", "benchmarking/*", "workloads", "workloads/*")
# Sourced by the scripts, never run itself.
SOURCED = {"setup_environment.sh"}
# A process of inference_server.py, which hands it open sockets.
STARTED_BY_A_PROGRAM = ("workloads/inference/web_worker.py",)


def entry_scripts() -> list[str]:
    """Shell and Python files that are run by name, as paths from the project's folder."""
    scripts = [
        path for folder in FOLDERS_OF_SCRIPTS for path in (PROJECT_ROOT / folder).glob("*.sh")
    ]
    programs = [
        path
        for folder in FOLDERS_OF_PROGRAMS
        for path in PROJECT_ROOT.glob(f"{folder}/*.py")
        if '__name__ == "__main__"' in path.read_text()
    ]
    names = {str(path.relative_to(PROJECT_ROOT)) for path in [*scripts, *programs]}
    return sorted(names - SOURCED)


def test_the_scripts_are_found() -> None:
    assert {
        "run_experiments.sh",
        "stress_test.sh",
        "gpu-configs/enable_mps.sh",
        "benchmarking/benchmark_suite.py",
        "workloads/training/resnet_training.py",
        "workloads/inference/load_test.py",
    } <= set(entry_scripts())


@pytest.mark.parametrize("name", entry_scripts())
def test_help_ends_well_shows_the_usage_and_imports_nothing_heavy(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    python = [sys.executable, "-X", "importtime", name]  # which lists what is imported
    command = [f"./{name}"] if name.endswith(".sh") else python
    started = time.monotonic()
    result = subprocess.run(
        [*command, "--help"],
        cwd=PROJECT_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    record_property("help_seconds", round(time.monotonic() - started, 2))
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported or name.endswith(".sh")
    assert name in STARTED_BY_A_PROGRAM or not imported & HEAVY


def test_the_checks_do_not_start_where_help_stands_behind_other_words() -> None:
    result = subprocess.run(
        ["./run_tests.sh", "-k", "metrics", "--help"],
        cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert result.stdout.startswith("Usage: ./run_tests.sh")


@pytest.mark.parametrize("arguments", [(), ("seven",), ("-1",)])
@pytest.mark.parametrize("name", STARTED_BY_A_PROGRAM)
def test_who_starts_a_programs_process_by_hand_is_told_which_program(
    name: str, arguments: tuple[str, ...]
) -> None:
    result = subprocess.run(
        [sys.executable, name, *arguments],
        cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "usage: python3 workloads/inference/" in result.stderr
    assert "Traceback" not in result.stderr
