"""README and docs/: links lead somewhere, commands exist with their flags, pages stay short."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from test_flags_table import ALIASES, FLAG, flags_on_page

from benchmarking import PROJECT_VERSION

PAGES = sorted(
    [
        *PROJECT_ROOT.glob("*.md"),
        *PROJECT_ROOT.glob("docs/*.md"),
        PROJECT_ROOT / "examples/README.md",
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_LINES, MOST_LINES_OF_README = 149, 115


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT_ROOT))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command that a page shows with a script of the project."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [
        *"\n".join(blocks).replace("\\\n", " ").splitlines(),
        *re.findall(r"`((?:\./|python3 |sudo \./)[^`]+)`", text.replace("\n", " ")),
    ]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and words[0] in ("sudo", "python3"):
            words = words[1:]
        if words and re.fullmatch(r"(\./)?[\w/-]+\.(py|sh)", words[0]):
            found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_of_scripts_that_are_there_and_of_flags_that_they_take(page):
    known = flags_on_page()
    for words in commands_of(page):
        script = PROJECT_ROOT / words[0]
        assert script.exists(), words
        # What stands behind `--` goes to another program.
        own = words[: words.index("--")] if "--" in words else words
        flags = {flag for word in own[1:] for flag in FLAG.findall(word.partition("=")[0])[:1]
                 if word.startswith("--")}  # fmt: skip
        if script.name in known and script.name != "run_tests.sh":
            assert flags <= known[script.name] | ALIASES, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_stay_short(page):
    most = (
        MOST_LINES_OF_README
        if page.parent == PROJECT_ROOT and page.stem == "README"
        else MOST_LINES
    )
    assert len(page.read_text().splitlines()) <= most


def test_every_page_is_found_from_the_readme():
    seen, todo = set(), [PROJECT_ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        linked = {
            (page.parent / t.partition("#")[0]).resolve() for t in LINK.findall(page.read_text())
        }
        todo += [one for one in linked & set(PAGES) if one not in seen]
    assert seen == set(PAGES)


def test_the_version_to_cite_and_to_record_is_the_newest_of_the_changes():
    (cited,) = re.findall(
        r"^version: (.*)$", (PROJECT_ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )
    assert (
        re.findall(r"^## (\S+)", (PROJECT_ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
        == cited
        == PROJECT_VERSION
    )


def test_the_constraints_are_the_versions_of_the_recorded_run():
    text = (PROJECT_ROOT / "constraints.txt").read_text()
    manifests = sorted(PROJECT_ROOT.glob("examples/h200-mixed-4/*/manifest.json"))
    recorded = [json.loads(path.read_text())["environment"] for path in manifests]
    python = recorded[0]["versions"]["python"]
    assert f"Python {python}" in text and recorded[0]["driver_version"] in text
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))
    assert [one["versions"] for one in recorded] == [{"python": python} | pinned] * len(recorded)


def test_places_of_recorded_figures_are_marked_from_begin_to_end():
    for page in PAGES:
        marks = re.findall(r"<!-- record: (begin|end)", page.read_text())
        assert marks == ["begin", "end"] * (len(marks) // 2), page
