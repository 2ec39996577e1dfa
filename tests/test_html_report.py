"""The report as HTML: nothing from records gets out of its place, and a browser shows it whole."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import markupsafe
import pytest
import synthetic_runs
from compared_runs import change, compare, document, mps, time_slicing
from conftest import PROJECT_ROOT, find_browser
from PIL import Image

from benchmarking import analyze_results
from benchmarking.analysis import html_report, markdown_report
from benchmarking.analysis.document import Bullets, Chapter, Document, Paragraph, Table, plain

HOSTILE = "</style></svg><script>document.title='broken'</script><img src=x onerror=alert(1)> $x_$"


def hostile_runs() -> list[dict]:
    """Two runs whose card, labels, notes, paths and reasons try to be markup."""
    environment = synthetic_runs.GPU | {"gpu_name": HOSTILE, "git_commit": HOSTILE}
    runs = []
    for run in (
        time_slicing([4.0, 4.04, 4.08], environment=environment, notes=[HOSTILE]),
        mps([2.0, 2.02, 2.04], environment=environment, command=["suite.py", "--data", HOSTILE]),
    ):
        change(run, lambda r: r.update(label=HOSTILE), record="client", client=1)
        change(run, lambda r: r.update(outcome="failed", reason=HOSTILE), co_run="mixed-4-r2",
               record="co_run")  # fmt: skip
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with charts, made of what a malicious or careless user may have recorded."""
    results = tmp_path_factory.mktemp("results")
    for run in hostile_runs():
        synthetic_runs.write(results, run)
    folders, compared = analyze_results.read_and_compare(results)
    return html_report.render(analyze_results.draw_and_build(compared, folders, results))


def test_text_from_records_stays_text_in_the_page_and_in_its_charts(report):
    assert "<script" not in report
    assert "<img" not in report
    assert report.count("<style") == 1 + report.count("<svg")  # the page's, and each chart's own
    assert str(markupsafe.escape(HOSTILE)) in report
    assert report.count("<svg") == report.count("</svg>") == 9


def test_the_page_holds_all_that_it_shows_and_asks_nobody_for_more(report):
    assert not re.search(r"""(?:src|href)=["'](?!#)""", report)
    assert not re.search(r"url\((?!#)", report)
    assert "default-src 'none'" in report
    ids = re.findall(r'\bid="([^"]+)"', report)
    assert len(ids) == len(set(ids))
    assert {name for name in re.findall(r"url\(#([^)]+)\)", report)} <= set(ids)


def test_both_reports_hold_the_same_sentences_and_cells():
    made = document(compare(time_slicing([4.0]), mps([2.0])))
    page = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", html_report.render(made))))
    text = markdown_report.render(made)
    for chapter in made.chapters:
        for block in chapter.blocks:
            if isinstance(block, Table):
                said = [cell for row in block.rows for cell in row]
            elif isinstance(block, Bullets):
                said = [item.text for item in block.items]
            else:
                said = [block.text] if isinstance(block, Paragraph) else []
            for sentence in said:
                assert plain(sentence) in page
                assert markdown_report.inline(sentence) in text


def test_markdown_keeps_html_and_links_from_records_as_text():
    text = markdown_report.inline("<b>bold</b> [x](javascript:y) **so `a<b`** *run `c`*")
    assert text == r"\<b>bold\</b> [x\](javascript:y) **so `a<b`** *run `c`*"


def test_unbalanced_marks_and_globs_are_plain_text():
    texts = ["a * b * c", "data/*.jpg and *.png", "half `open", "2 ** 3 ** 4", "**"]
    made = Document("t", [Chapter("c", [Paragraph(text) for text in texts])])
    page = html.unescape(html_report.render(made))
    assert all(f"<p>{text}</p>" in page for text in texts)


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
        "const small = [...page.querySelectorAll('p, li, td')].filter("
        "e => e.getClientRects().length && parseFloat(getComputedStyle(e).fontSize) < 12);"
        "document.body.textContent = JSON.stringify({width: root.scrollWidth, "
        "height: root.querySelector('main').offsetHeight, title: page.title, "
        "charts: page.querySelectorAll('figure svg').length, small: small.length, "
        "scripts: page.querySelectorAll('script, img').length}); }</script>"
    )
    dumped = browse(frame, "--dump-dom", "--virtual-time-budget=3000")
    return json.loads(re.search(r"<body[^>]*>(\{.*?\})</body>", dumped, re.DOTALL).group(1))


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_report_without_sideways_scrolling(report, tmp_path, width):
    found = measured(report, width, tmp_path)
    assert found["width"] == width
    assert found["height"] > 2000
    assert found["title"] == "GPU sharing: what was found"
    assert (found["charts"], found["scripts"], found["small"]) == (9, 0, 0)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "charts"),
    [("h100-mixed-4", 6), ("h100-pairs", 4), ("h100-single-image", 12), ("h100-mps-percentage", 1)],
)
def test_the_recorded_pages_fit_a_phone(name, charts, tmp_path):
    page = (PROJECT_ROOT / "examples" / name / "report.html").read_text(encoding="utf-8")
    found = measured(page, 390, tmp_path)
    assert found["width"] == 390
    assert (found["charts"], found["scripts"], found["small"]) == (charts, 0, 0)


@pytest.mark.browser
def test_a_browser_paints_and_prints_the_report(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report, encoding="utf-8")
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,3000")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 3000)
        lower = picture.convert("L").crop((0, 1500, 1200, 3000))
        assert len(lower.getcolors(maxcolors=256)) > 50
    browse(page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n") >= 3
