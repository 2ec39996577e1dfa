"""A results folder from a stranger is reported on without harm: numbers, links, sizes, plans.

Names that try to be markup: test_html_report.py.
"""

from __future__ import annotations

import gzip
import re
import time
from pathlib import Path

import pytest
import synthetic_runs
from made_up_reports import change, compare, mps
from test_analyze_results import analyze, comparison_of


@pytest.mark.parametrize("number", [1e300, -1e300, 1e19, 10**30])
def test_a_number_that_nothing_measures_excludes_its_co_run_with_a_sentence(number: float) -> None:
    made = mps([2.0])
    made["records"][-2]["figures"] = {"epoch_seconds": number}
    (problem,) = compare(made)["problems"]
    assert "mixed-4-r0 excluded: it holds a number beyond 1e18" in problem


def test_tiny_and_huge_numbers_and_plans_that_are_none_end_in_a_report(tmp_path: Path) -> None:
    for number, value in enumerate((1e-320, 1e18)):
        made = mps([2.0], f"run{number}")
        changes = {"window_end_seconds": value, "peak_memory_mib": value}
        change(made, lambda r, c=changes: r.update(c), record="client")
        for record in made["records"]:
            for unit in record.get("units", {}).values():
                unit.update(count=value, seconds=1e18 - value)
        synthetic_runs.write(tmp_path, made)
    no_pair = {"co_run": "mixed-4-r0", "clients": [{"label": "four"}] * 4}
    plans = ({"co_runs": 7}, {"co_runs": [7, {"clients": [3]}]}, {"co_runs": [{"clients": [{}]}]},
             {"co_runs": [no_pair]}, {})  # fmt: skip
    for number, plan in enumerate(plans):
        for is_pairs in (True, False):
            made = mps([2.0], f"plan{number}-{is_pairs}", plan=plan, is_pairs=is_pairs)
            synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr


def test_mixes_whose_names_are_long_or_differ_in_signs_alone_have_charts_of_their_own(
    tmp_path: Path,
) -> None:
    for number, mix in enumerate(("a b", "a/b", "日本語" * 90)):
        made = mps([2.0 + number], f"run{number}")
        made["manifest"]["mix"] = mix
        synthetic_runs.write(tmp_path, made)
    # What is at work elsewhere on the machine is no rule for these charts; nor is a damaged file.
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "matplotlibrc").write_bytes(b"\xff\xfe: 1\n")
    done = analyze("--results-dir", tmp_path, cwd=tmp_path / "cwd", MATPLOTLIBRC=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    charts = re.findall(r"\]\((.*?\.png)\)", (tmp_path / "report.md").read_text())
    assert len(charts) == len(set(charts)) == len([*tmp_path.glob("*.png")]) == 12


def test_links_to_files_are_not_followed(tmp_path: Path) -> None:
    results = tmp_path / "results"
    synthetic_runs.write(results, mps([2.0], "good"))
    for name in ("manifest.json", "records.jsonl"):
        folder = synthetic_runs.write(results, mps([2.0], f"linked-{name}"))
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    done = analyze("--results-dir", results)
    assert done.returncode == 0, done.stderr
    found = comparison_of(results)
    assert sum("link" in problem for problem in found["problems"]) == 2
    assert [group["run_ids"] for one in found["sections"] for group in one["groups"]] == [["good"]]


def test_reports_replace_links_instead_of_writing_through_them(tmp_path: Path) -> None:
    results, victim = tmp_path / "results", tmp_path / "victim"
    victim.write_text("mine")
    synthetic_runs.write(results, mps([2.0]))
    written: list[Path] = []
    for _ in range(2):
        done = analyze("--results-dir", results, "--each-run")
        assert done.returncode == 0, done.stderr
        assert [path for path in written if path.is_symlink()] == []
        written = [path for path in results.rglob("*")
                   if path.suffix in {".html", ".md", ".png", ".csv"}
                   or path.name == "comparison.json"]  # fmt: skip
        assert len(written) > 4
        for path in written:
            path.unlink()
            path.symlink_to(victim)
    assert victim.read_text() == "mine"


def test_a_file_that_unpacks_to_gigabytes_costs_seconds_and_is_one_sentence(tmp_path: Path) -> None:
    folder = synthetic_runs.write(tmp_path, mps([2.0]))
    (folder / "records.jsonl").unlink()
    with gzip.open(folder / "records.jsonl.gz", "wb", compresslevel=9) as stream:
        for _ in range(600):
            stream.write(b" " * 1024**2)
    start = time.monotonic()
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    (problem,) = comparison_of(tmp_path)["problems"]
    assert "holds more than 256 MiB" in problem
