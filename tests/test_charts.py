"""What the charts of modes show and say, and that a print in grey still tells the modes apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import synthetic_runs
from compared_runs import change, compare, mps, time_slicing

from benchmarking.analysis import charts, mode_charts, ramp_chart
from benchmarking.analysis.comparison import Comparison
from benchmarking.analysis.document import Picture

STYLES = {**charts._STYLES, "another mode": charts._OTHER_STYLE}


def luminance(color: str) -> float:
    """0 (black) to 255 (white), as a grey print weighs the colors."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("pair", list(itertools.combinations(STYLES, 2)), ids=" and ".join)
def test_two_modes_differ_in_grey_in_hatch_and_in_marker(pair: tuple[str, str]) -> None:
    one, other = (STYLES[mode] for mode in pair)
    assert abs(luminance(one["color"]) - luminance(other["color"])) >= 25
    assert one["hatch"] != other["hatch"]
    assert one["marker"] != other["marker"]


def tail(compared: Comparison, folder: Path) -> Picture | None:
    return mode_charts.tail(compared.sections[0].groups, folder / "tail.png")


def test_the_chart_of_tails_shows_the_worst_copy(tmp_path: Path) -> None:
    run = synthetic_runs.run("mps", "mps", {4: [2.0]}, mix="inference")
    change(run, lambda r: r.update(latency_ms=[90.0] * 100), phase="co_run", client=3)
    drawn = tail(compare(run), tmp_path)
    assert "Batch inference, the worst of 4 under MPS (inference, 4 clients)" in drawn.message
    assert "(90.0 ms)" in drawn.svg


def test_there_is_no_chart_of_the_tails_of_few_responses(tmp_path: Path) -> None:
    run = mps([2.0])
    assert tail(compare(run), tmp_path) is not None
    change(run, lambda r: r.update(latency_ms=r["latency_ms"][:40]), phase="co_run", client=1)
    assert tail(compare(run), tmp_path) is None


def test_a_mode_that_missed_requests_has_no_short_bar_and_is_named(tmp_path: Path) -> None:
    def drop(record: dict) -> None:
        record["units"] = {
            "request": {"count": 200, "seconds": 1.0, "latency": True},
            "missed_request": {"count": 50, "seconds": 0.0, "latency": False},
        }

    dropping = change(mps([2.0]), drop, phase="co_run", client=1)
    drawn = tail(compare(time_slicing([4.0]), dropping), tmp_path)
    assert drawn.message == (
        "Batch inference under MPS has no p99: 20.0 % of its requests were missed "
        "(mixed, 4 clients)"
    )


def test_a_ramps_chart_has_one_message_whatever_the_number_of_modes(tmp_path: Path) -> None:
    slowdowns = {1: [1.0], 2: [1.5], 4: [2.5]}
    runs = [
        synthetic_runs.run("slicing", "time-slicing", slowdowns, mix="training"),
        synthetic_runs.run("mps", "mps", {**slowdowns, 4: [2.0]}, mix="training"),
    ]
    drawn = ramp_chart.scaling(compare(*runs).sections[0].ramps, tmp_path / "scaling.png")
    assert drawn.message == (
        "STP is the highest with 4 clients under MPS: 2.00, n = 1 (copies of the training mix)"
    )
