"""What the charts show, and that a print in grey still tells the modes apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs
from PIL import Image
from test_report import RAMP, mps, slicing

from benchmarking.report import drawing, render
from benchmarking.report.comparison import compare
from benchmarking.report.drawing import Picture
from benchmarking.report.runs import read_results
from benchmarking.report.wording import figure_text

STYLES = {**drawing.STYLES, "another mode": drawing.OTHER_STYLE}


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


def charts_of(folder: Path, *made: dict) -> tuple[dict[str, Any], dict[str, Picture]]:
    """The only section of made-up runs, and its charts by what their files' names begin with."""
    for run in made:
        synthetic_runs.write(folder, run)
    comparison, clients = compare(read_results(folder))
    (drawn,) = render.draw(comparison, clients, lambda folder: [], folder)
    pictures = [picture for kind in drawn.values() for picture in kind]
    assert all((folder / picture.file_name).read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    (section,) = comparison["sections"]
    return section, {picture.file_name.split("-")[0]: picture for picture in pictures}


def many_responses(run: dict, client: int, milliseconds: float) -> dict:
    """The run whose client answered 600 times in that time, a fifth of that alone."""
    for record in run["records"]:
        if record["record"] == "client" and record["workload"] == "batch_inference":
            is_alone = record["phase"] == "baseline"
            record["latency_ms"] = [milliseconds / 5 if is_alone else milliseconds] * 600
    return run


def test_the_bars_are_the_figures_of_the_first_table(tmp_path: Path) -> None:
    runs = slicing(4.0, 4.04, 4.08), mps(2.0, 2.02, 2.04)
    section, drawn = charts_of(tmp_path, *(many_responses(run, 1, 30.0) for run in runs))
    assert set(drawn) == {"throughput", "slowdown", "tail", "timeline"}
    for conclusion in section["conclusions"]:
        names = {"work": "throughput", "slowdown": "slowdown", "tail_ms": "tail"}
        name = names.get(conclusion["figure"])
        for mode in conclusion["modes"] if name else ():
            shown = figure_text(conclusion, mode["estimate"])
            assert shown in drawn[name].svg
            assert shown in drawn[name].description
    assert "Batch inference, p99, MPS 30.0 ms" in drawn["tail"].description


def test_few_responses_are_shown_by_the_percentile_that_they_can_tell(tmp_path: Path) -> None:
    run = mps(2.0)
    for record in run["records"]:
        if record["record"] == "client":
            record["latency_ms"] = (record["latency_ms"] or [])[:40] or None
    _, drawn = charts_of(tmp_path, slicing(4.0), run)
    assert "Batch inference, p50, MPS" in drawn["tail"].description
    assert "p99" not in drawn["tail"].description


def test_a_ramp_is_drawn_for_all_modes_on_one_sheet_with_its_breaking_points(
    tmp_path: Path,
) -> None:
    broken = synthetic_runs.run("mps", "mps", RAMP, mix="training")
    for record in broken["records"]:
        if record["co_run"] == "training-4-r0":
            is_client = record["record"] == "client"
            record |= {"status": "oom"} if is_client else {"outcome": "failed", "reason": "no"}
    whole = synthetic_runs.run("slicing", "time-slicing", RAMP, mix="training")
    _, drawn = charts_of(tmp_path, whole, broken)
    assert drawn["scaling"].file_name == "scaling-training.png"
    assert "MPS breaks at 4" in drawn["scaling"].svg
    assert "time slicing" in drawn["scaling"].svg


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_charts_need_no_backend_that_the_shell_left(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", backend)
    _, drawn = charts_of(tmp_path, mps(2.0))
    assert drawn["throughput"].svg.startswith("<svg")


def test_a_link_in_the_place_of_a_chart_is_replaced_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    results = tmp_path / "results"
    results.mkdir()
    (results / "throughput-mixed-4.png").symlink_to(kept)
    charts_of(results, mps(2.0))
    assert kept.read_text() == "mine"
    assert not (results / "throughput-mixed-4.png").is_symlink()


def test_a_name_from_a_record_leads_a_chart_to_no_other_folder(tmp_path: Path) -> None:
    run = mps(2.0)
    run["manifest"]["mix"] = "../../../mix"
    _, drawn = charts_of(tmp_path, run)
    assert all("/" not in picture.file_name for picture in drawn.values())


def test_records_of_hundreds_of_clients_are_drawn_in_a_figure_of_bounded_height(
    tmp_path: Path,
) -> None:
    run = synthetic_runs.run("mps", "mps", {400: [3.0]}, mix="training")
    _, drawn = charts_of(tmp_path, run)
    with Image.open(tmp_path / drawn["timeline"].file_name) as picture:
        assert picture.height <= drawing.MOST_INCHES * drawing.DPI
