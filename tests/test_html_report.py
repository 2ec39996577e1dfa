"""The report as HTML: nothing from records gets out of its place, and a browser shows it whole."""

from __future__ import annotations

import csv
import html
import json
import re
import subprocess
from pathlib import Path

import markupsafe
import pytest
import synthetic_runs
from conftest import PROJECT_ROOT, find_browser
from made_up_reports import as_markdown, as_page, change, compare, mps, mps_limits, time_slicing
from markdown_it import MarkdownIt
from PIL import Image
from test_analyze_results import analyze

STEERING = "\x1b[2J\x1b]0;title\x07\u202e\u2028\r\n\n# title"
MARKUP = "</style></svg><script>document.title='broken'</script><img src=x onerror=alert(1)> $x_$"
HOSTILE = "=cmd|' /C calc'!A0" + MARKUP + STEERING
MARKDOWN = "a`b`\n\n# <b>x</b> [y](javascript:z) \\<b>x [y\\](javascript:z) \\| " + STEERING
MARKDOWN = "[place]: https://elsewhere/x.png ![seen][place] " + MARKDOWN


def hostile_runs() -> list[dict]:
    """Two runs whose card, labels, notes, paths and reasons try to be markup, or a formula."""
    environment = synthetic_runs.GPU | {
        "gpu_name": HOSTILE, "git_commit": HOSTILE, "project_version": "2.0.0",
    }  # fmt: skip
    runs = [
        time_slicing([4.0, 4.04, 4.08], environment=environment, notes=[HOSTILE, MARKDOWN]),
        mps([2.0, 2.02, 2.04], environment=environment, command=["suite.py", "--data", HOSTILE]),
    ]
    for run in runs:
        run["manifest"]["mode_evidence"] = [{"check": MARKDOWN, "found": HOSTILE, "ok": True}]
        change(run, lambda r: r.update(label=HOSTILE, apart_latency_ms={"ttft": []}),
               workload="batch_inference")  # fmt: skip
        change(run, lambda r: r.update(label=MARKDOWN), workload="bert_training")
        change(run, lambda r: r.update(outcome="failed", reason=HOSTILE + MARKDOWN),
               record="co_run", co_run="mixed-4-r2")  # fmt: skip
    return runs


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a report on what a malicious user may have recorded, and what it printed."""
    results = tmp_path_factory.mktemp("results")
    for run in hostile_runs():
        synthetic_runs.write(results, run)
    done = analyze("--results-dir", results)
    assert done.returncode == 0, done.stderr
    return results, done.stdout


@pytest.fixture(scope="module")
def report(reported: tuple[Path, str]) -> str:
    return (reported[0] / "report.html").read_text(encoding="utf-8")


def test_text_from_records_stays_text_in_the_page_and_in_its_charts(report: str) -> None:
    for markup in ("<script", "<img", "<b>"):
        assert markup not in report
    assert report.count("<style") == 1 + report.count("<svg")  # the page's, and each chart's own
    assert str(markupsafe.escape(MARKUP)) in report
    assert report.count("<svg") == report.count("</svg>") >= 4
    assert re.search(r"project version</th>\s*<td>2.0.0<", report)


def test_the_page_holds_all_that_it_shows_and_asks_nobody_for_more(report: str) -> None:
    assert not re.search(r"""(?:src|href)=["'](?!#)""", report)
    assert not re.search(r"url\((?!#)", report)
    assert "default-src 'none'" in report
    ids = re.findall(r'\bid="([^"]+)"', report)
    assert len(ids) == len(set(ids))
    assert {name for name in re.findall(r"url\(#([^)]+)\)", report)} <= set(ids)


def test_names_make_no_markup_in_markdown_are_no_formula_and_steer_no_terminal(
    reported: tuple[Path, str], report: str
) -> None:
    folder, printed = reported
    text, table = ((folder / name).read_text() for name in ("report.md", "comparison.csv"))
    outside_code = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)(\\\\)*<", outside_code)
    assert not re.search(r"(?<!\\)(\\\\)*\](\(javascript|\[place|: https:)", outside_code)
    assert text.count("`") % 2 == 0
    assert not re.search(r"^#+ (\\?<b>|title)", text, re.MULTILINE)
    for shown in (text, printed, table, report):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", shown.replace("\r", ""))
    for row in csv.DictReader(table.splitlines()):
        assert row["gpu_name"].startswith("'=cmd")
    assert "\\u001b" not in (folder / "comparison.json").read_text()


def test_a_name_reads_in_rendered_markdown_as_it_is_written() -> None:
    name = "__main__.py *fast* ~~old~~ &lt; a_b [cfg] [1, 2] ![x](y) ~/data"
    runs = [change(made, lambda r: r.update(label=name), workload="bert_training")
            for made in (time_slicing([4.0]), mps([2.0]))]  # fmt: skip
    page = MarkdownIt().enable(["table", "strikethrough"]).render(as_markdown(compare(*runs)))
    assert "<strong>2.00</strong>" in page  # the best mode, in bold
    rows = [html.unescape(row) for row in re.findall(r"<td>(.*?)</td>", page)]
    assert f"{name}: times as long" in rows and name in rows
    assert all("<" not in row or row.startswith("<") for row in rows)


def browse(page: Path, *arguments: str) -> str:
    """Open a page in the browser; returns what it printed."""
    done = subprocess.run(
        [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()],
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    return done.stdout


def measured(page: str, width: int, folder: Path) -> dict:
    """Lay a page out at a width in pixels; return what the browser says of it."""
    # Same origin as the page around it, which may therefore measure it; a window may not be
    # as narrow as a phone.
    frame = folder / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe srcdoc="{html.escape(page)}" '
        f'style="width:{width}px;height:9000px;border:0"></iframe><script>'
        "onload = () => { const page = frames[0].document; const root = page.documentElement;"
        "const small = [...page.querySelectorAll('p, li, td, dd, small')].filter("
        "e => e.getClientRects().length && parseFloat(getComputedStyle(e).fontSize) < 12);"
        "const table = page.querySelector('.first');"
        "const best = [...page.querySelectorAll('.first .best')].map(e => e.offsetHeight);"
        "document.body.textContent = JSON.stringify({width: root.scrollWidth, "
        "height: root.querySelector('main').offsetHeight, title: page.title, "
        "table: table && table.getBoundingClientRect().bottom, small: small.length, best, "
        "scripts: page.querySelectorAll('script, img').length}); }</script>"
    )
    dumped = browse(frame, "--dump-dom", "--virtual-time-budget=3000")
    return json.loads(re.search(r"<body[^>]*>(\{.*?\})</body>", dumped, re.DOTALL).group(1))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_a_browser_shows_the_decision_on_the_first_screen(
    width: int, height: int, tmp_path: Path
) -> None:
    for made in (time_slicing([4.0, 4.04, 4.08]), mps([2.0, 2.02, 2.04])):
        synthetic_runs.write(tmp_path / "results", made)
    assert analyze("--results-dir", tmp_path / "results").returncode == 0
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    found = measured(page, width, tmp_path)
    assert found["width"] == width
    assert found["table"] < height
    assert found["height"] < 4000
    assert found["title"] == "GPU sharing: what was found"
    assert (found["scripts"], found["small"]) == (0, 0)


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_hostile_names_push_nothing_sideways(report: str, width: int, tmp_path: Path) -> None:
    found = measured(report, width, tmp_path)
    assert found["width"] == width
    assert (found["scripts"], found["title"]) == (0, "GPU sharing: what was found")
    compared = compare(*(change(made, lambda r: r.update(label="long_name_" * 20), client=1)
                         for made in (time_slicing([4.0]), mps([2.0]))))  # fmt: skip
    assert measured(as_page(compared), width, tmp_path)["width"] == width


@pytest.mark.browser
def test_the_best_value_of_seven_modes_stands_in_one_line_of_a_phone(tmp_path: Path) -> None:
    shares = ("even", "50", "40", "30", "20")
    variants = [mps([2.1, 2.2, 2.3], share, mps_limits=mps_limits(share)) for share in shares]
    compared = compare(time_slicing([4.0, 4.04, 4.08]), mps([1.01, 1.011, 1.012]), *variants)
    best = measured(as_page(compared), 390, tmp_path)["best"]
    assert best and max(best) < 30


@pytest.mark.browser
@pytest.mark.parametrize("example", ["h200-mixed-4", "h200-pairs", "h200-single-image"])
def test_the_recorded_runs_are_reported_on_less_than_4000_pixels(
    example: str, tmp_path: Path
) -> None:
    example_folder = PROJECT_ROOT / "examples" / example
    assert analyze("--results-dir", example_folder, "--output", tmp_path).returncode == 0
    found = measured((tmp_path / "report.html").read_text(encoding="utf-8"), 390, tmp_path)
    assert found["width"] == 390
    assert found["height"] < 4000
    assert (found["scripts"], found["small"]) == (0, 0)


@pytest.mark.browser
def test_a_browser_paints_and_prints_the_report(report: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report, encoding="utf-8")
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,900")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 900)
        assert len(picture.convert("L").getcolors(maxcolors=256)) > 50
    browse(page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    # What is folded on the screen is on paper.
    assert (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n") >= 3
