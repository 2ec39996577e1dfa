"""What the charts show, and that a print in grey still tells the modes apart."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import synthetic_runs
from made_up_reports import change, failed, mps, mps_limits, ramp, time_slicing
from PIL import Image
from test_analyze_results import analyze

from benchmarking.report import charts, drawing

STEPS = {1: [1.0], 2: [1.5], 4: [3.0]}
OF_NO_MODE = {"#000000", "#ffffff", "#808080", "#1f77b4"}  # axes, labels, text, caps of error bars
MOST_PIXELS = 12_800  # of height


def many_responses(run: dict) -> dict:
    """The run whose inference client answered 600 times in 30 ms, a fifth of that alone."""
    return change(
        run,
        lambda r: r.update(latency_ms=[6.0 if r["phase"] == "baseline" else 30.0] * 600),
        workload="batch_inference",
    )


@pytest.fixture(scope="module")
def illustrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three modes, a ramp that breaks, many clients, and a run from a stranger.

    The program is started as from a notebook, whose backend it must not use.
    """
    results = tmp_path_factory.mktemp("charts") / "results"
    mixed = [time_slicing([4.0, 4.08]), mps([2.0, 2.04]),
             synthetic_runs.run("mig", "mig", {4: [3.0, 3.04]})]  # fmt: skip
    broken = failed(ramp(STEPS), co_run="training-4-r0")
    many = synthetic_runs.run("many", "mps", {150: [3.0]}, mix="training")
    for run in (*map(many_responses, mixed), ramp(STEPS, "time-slicing"), broken, many):
        synthetic_runs.write(results, run)
    unlike = synthetic_runs.GPU | {"driver_version": "590.00"}
    stranger = mps([2.0], environment=unlike)  # of the same id as a run above
    stranger["manifest"]["mix"] = "../../../mix"
    few = change(stranger, lambda r: r.update(latency_ms=[3.0] * 40), workload="batch_inference")
    synthetic_runs.write(results / "elsewhere", few)
    backend = "module://matplotlib_inline.backend_inline"
    done = analyze("--results-dir", results, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    return results


def drawings(folder: Path) -> list[str]:
    """The SVG charts of the page."""
    return re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)


def test_every_chart_is_a_picture_in_the_reports_folder_and_of_bounded_height(illustrated) -> None:
    described = re.findall(r"!\[.*?\]\((.*?\.png)\)", (illustrated / "report.md").read_text())
    drawn = sorted(illustrated.glob("*.png"))
    assert sorted(described) == [path.name for path in drawn]
    assert len(drawn) == len(drawings(illustrated))
    kinds = {path.name.split("-")[1] for path in drawn}
    assert kinds == {"throughput", "slowdown", "tail", "scaling", "timeline"}
    assert len([path for path in drawn if path.name.endswith("-mps-mixed-4-r0.png")]) == 2
    assert not [path for path in illustrated.parent.rglob("*.png") if path not in drawn]
    for path in drawn:
        with Image.open(path) as picture:
            grey = picture.convert("L")
        assert grey.width > 600
        assert grey.height <= MOST_PIXELS
        assert len(grey.getcolors(maxcolors=256)) > 20


def test_the_bars_are_the_figures_of_the_first_table(illustrated) -> None:
    section = json.loads((illustrated / "comparison.json").read_text())["sections"][0]
    page, described = "".join(drawings(illustrated)), (illustrated / "report.md").read_text()
    shown = [one for one in section["conclusions"] if one["figure"] in ("work", "slowdown")]
    assert len(shown) >= 5
    for mode in itertools.chain.from_iterable(one["modes"] for one in shown):
        text = f"{mode['estimate']['mean']:.2f}"
        assert f">{text}" in page
        assert f" {text}" in described
    assert "Batch inference, p99, MPS 30.0 ms" in described
    # Few responses are shown by the percentile that they can tell.
    assert "Batch inference, p50, MPS 3.00 ms" in described


def test_a_ramp_is_drawn_for_all_modes_on_one_sheet_with_its_breaking_points(illustrated) -> None:
    (sheet,) = [one for one in drawings(illustrated) if "MPS breaks at 4" in one]
    assert "time slicing" in sheet


def test_modes_differ_in_grey_and_in_hatch(illustrated) -> None:
    bars = drawings(illustrated)[0]
    colors = set(re.findall(r"fill(?:: |=\")(#\w{6})", bars)) - OF_NO_MODE
    assert len(colors) == 3

    def luminance(color: str) -> float:  # as a grey print weighs the colors, 255 is white
        red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    for one, other in itertools.combinations(colors, 2):
        assert abs(luminance(one) - luminance(other)) >= 25
    assert len(set(re.findall(r"<pattern.*?<path d=\"(.*?)\"", bars, re.DOTALL))) == 2


def test_of_many_settings_of_one_mode_each_has_its_look_and_its_name_its_room(tmp_path) -> None:
    results = tmp_path / "results"
    for number, share in enumerate(("100", "90", "80", "70", "60")):
        limits = mps_limits(share, share, share, share)
        synthetic_runs.write(results, mps([2.0 + number], f"mps-{share}", mps_limits=limits))
    synthetic_runs.write(results, mps([2.0]))
    assert analyze("--results-dir", results).returncode == 0
    work, slowdown, *_ = drawings(results)
    assert len(set(re.findall(r"<pattern.*?<path d=\"(.*?)\"", slowdown, re.DOTALL))) == 6
    lines = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)\">[^<]*[/%]", work)]
    assert len(lines) >= 10 and all(below - y > 8 for y, below in itertools.pairwise(lines))
    width = float(re.findall(r"viewBox=\"0 0 ([\d.]+)", slowdown)[0])
    legend = re.findall(r"text-anchor: start\" x=\"([\d.]+)\"[^>]*>([^<]+)", slowdown)
    assert len(legend) == 6
    for x, name in legend:  # a sign is more than half as wide as high
        assert float(x) + 4.5 * len(name) < width


@pytest.mark.parametrize(
    ("counts", "wanted"), [((1, 2, 4, 48), ["1", "4", "48"]), (range(1, 65, 3), None)]
)
def test_names_and_counts_of_a_ramp_lie_on_nothing_and_take_no_room_from_it(
    tmp_path: Path, counts: Iterable[int], wanted: list[str] | None
) -> None:
    counts = {count: [3.0 + count] for count in counts}
    made = ramp(counts, mps_limits={"partitions": True}, bounds={"max_slowdown": 3.0})
    synthetic_runs.write(tmp_path / "results", made)
    assert analyze("--results-dir", tmp_path / "results").returncode == 0
    (sheet,) = [one for one in drawings(tmp_path / "results") if " breaks at 1<" in one]
    label = r"middle\" x=\"([\d.]+)\"[^>]*>(\d+)<"
    shown = {name: float(x) for x, name in re.findall(label, sheet)}
    assert list(shown) == (wanted or list(shown))
    assert shown["1"] < 80  # of 331
    for (name, x), (other, beyond) in itertools.pairwise(shown.items()):
        assert beyond - x > 4 * (len(name) + len(other))


def test_figures_in_cells_stand_out_from_their_shade() -> None:
    from matplotlib import colormaps

    def luminance(share: float) -> float:  # as WCAG has it
        parts = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                 for c in colormaps["Blues"](share)[:3])  # fmt: skip
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for share in (step / 100 for step in range(101)):
        dark = luminance(share)
        contrast = 1.05 / (dark + 0.05) if share > charts.DARK else (dark + 0.05) / 0.05
        assert contrast > 4.3, share


def test_of_a_long_ramp_the_first_counts_have_a_timeline_and_names_in_a_row_are_narrow() -> None:
    section = {"groups": [{"co_runs": [f"run/{n}"]} for n in range(30)]}
    assert charts.shown_timelines(section) == [f"run/{n}" for n in range(20)]
    assert drawing.wrapped("Jupyter session", 4) == "Jupyter\nsession"
