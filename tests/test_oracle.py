"""The figures of the recorded runs stay as they are, to the twelfth digit.

Pythons before 3.11 and from 3.12 on round the last digit of some sums and roots otherwise.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT

EXAMPLES = PROJECT_ROOT / "examples"
RECORDED = {path.parent.name: path for path in sorted(EXAMPLES.glob("*/comparison.json*"))}


def test_every_recorded_experiment_has_its_figures() -> None:
    experiments = {path.parents[1].name for path in EXAMPLES.glob("*/*/manifest.json")}
    assert experiments == RECORDED.keys()


@pytest.mark.parametrize("experiment", RECORDED)
def test_the_analysis_of_a_recorded_experiment_gives_the_figures_that_it_gave(
    tmp_path: Path, experiment: str
) -> None:
    results, output = tmp_path / experiment, tmp_path / "output"
    shutil.copytree(EXAMPLES / experiment, results)
    analyze = [sys.executable, PROJECT_ROOT / "benchmarking" / "analyze_results.py"]
    done = subprocess.run(
        [*analyze, "--results-dir", results, "--output", output],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recorded = RECORDED[experiment].read_bytes()
    if RECORDED[experiment].suffix == ".gz":
        recorded = gzip.decompress(recorded)
    assert rounded((output / "comparison.json").read_bytes()) == rounded(recorded)


def rounded(content: bytes) -> object:
    """Read JSON; its numbers have twelve digits."""
    return json.loads(content, parse_float=lambda text: float(f"{float(text):.12g}"))
