"""The figures of the recorded runs stay as they are, to the twelfth digit.

Pythons before 3.11 and from 3.12 on round the last digit of some sums and roots otherwise.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT_ROOT
from made_up_reports import as_markdown, as_page, on_terminal
from test_analyze_results import analyze

from benchmarking.report import comparison, export, runs

EXAMPLES = PROJECT_ROOT / "examples"
# A run of version 1, whose records are still read.
METHOD_1 = PROJECT_ROOT / "tests/data/method-1/comparison.json.gz"
RECORDED = {
    path.parent.name: path for path in [*sorted(EXAMPLES.glob("*/comparison.json*")), METHOD_1]
}
# Whose charts are drawn too, by the program: matrices of pairs, neighbors.
CHARTED = ("h200-noisy", "h200-pairs")


def test_every_recorded_experiment_has_its_figures() -> None:
    experiments = {path.parents[1].name for path in EXAMPLES.glob("*/*/manifest.json")}
    assert experiments == RECORDED.keys() - {METHOD_1.parent.name}


@pytest.mark.parametrize("experiment", RECORDED)
def test_the_analysis_of_a_recorded_experiment_gives_the_figures_that_it_gave(
    tmp_path: Path, experiment: str
) -> None:
    folder = RECORDED[experiment].parent
    if experiment in CHARTED:
        done = analyze("--results-dir", folder, "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        made = (tmp_path / "comparison.json").read_text()
    else:
        compared, _ = comparison.compare(runs.read_results(folder))
        made = export.json_text(compared)
        for shown in (as_markdown(compared), as_page(compared), on_terminal(compared)):
            assert "None" not in shown
    recorded = RECORDED[experiment].read_bytes()
    if RECORDED[experiment].suffix == ".gz":
        recorded = gzip.decompress(recorded)
    found, wanted = (flat(json.loads(text)) for text in (made, recorded))
    assert found.keys() == wanted.keys()
    assert {place: (found[place], value) for place, value in wanted.items()
            if not alike(found[place], value)} == {}  # fmt: skip


def alike(one: Any, other: Any) -> bool:
    """Whether two figures agree; the smallest are p-values, what is left of 1 in its digits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-13)
    return one == other


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Return every figure by its place."""
    if not isinstance(value, (dict, list)):
        return {place: value}
    if not value:
        return {place: str(value)}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, part in parts for k, v in flat(part, f"{place}/{name}").items()}
