"""A results folder from a stranger is reported on without harm: names, numbers, links, sizes."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic_runs
from conftest import PROJECT_ROOT

SCRIPT = PROJECT_ROOT / "benchmarking" / "analyze_results.py"
STEERING = "\x1b[2J\u202e\u2028<script>`x`|a|\r\n\n# title"


def analyze(folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--results-dir", folder, *map(str, more)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def hostile_run(run_id: str = "mps", **changes: object) -> dict:
    made = synthetic_runs.run(run_id, "mps", {4: [2.0]})
    for record in made["records"]:
        record.update({name: value for name, value in changes.items() if name in record})
    return made


def test_names_steer_no_terminal_break_no_line_and_are_no_formula(tmp_path: Path) -> None:
    made = hostile_run(label=f"=HYPERLINK(1){STEERING}", reason=STEERING)
    made["manifest"]["environment"] = synthetic_runs.GPU | {
        "gpu_name": f"=cmd|' /C calc'!A0{STEERING}"
    }
    made["manifest"]["notes"] = [STEERING]
    synthetic_runs.write(tmp_path, made)
    done = analyze(tmp_path)
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, *((tmp_path / name).read_text() for name in ("report.md", "report.html"))]
    for text in texts:
        assert not set("\x1b\u202e\u2028\r") & set(text)
        assert "\n# title" not in text
    assert "<script>" not in texts[2]
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["gpu_name"].startswith("'=cmd")
    assert "\\u001b" not in (tmp_path / "comparison.json").read_text()


@pytest.mark.parametrize("number", [1e300, -1e300, 1e19, 10**30])
def test_a_number_that_nothing_measures_excludes_its_co_run_with_a_sentence(
    tmp_path: Path, number: float
) -> None:
    made = hostile_run()
    made["records"][-2]["figures"] = {"epoch_seconds": number}
    synthetic_runs.write(tmp_path, made)
    done = analyze(tmp_path)
    assert done.returncode == 0, done.stderr
    (problem,) = json.loads((tmp_path / "comparison.json").read_text())["problems"]
    assert "mixed-4-r0 excluded: it holds a number beyond 1e18" in problem


def test_tiny_and_huge_numbers_within_reason_end_in_a_report(tmp_path: Path) -> None:
    for number, value in enumerate((1e-320, 1e18)):
        made = hostile_run(f"run{number}", window_end_seconds=value, peak_memory_mib=value)
        for record in made["records"]:
            for unit in record.get("units", {}).values():
                unit.update(count=value, seconds=1e18 - value)
        synthetic_runs.write(tmp_path, made)
    done = analyze(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["manifest.json", "records.jsonl"])
def test_links_to_files_are_not_followed(tmp_path: Path, name: str) -> None:
    results = tmp_path / "results"
    folder = synthetic_runs.write(results, hostile_run())
    synthetic_runs.write(results, hostile_run("good"))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    done = analyze(results)
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "comparison.json").read_text())
    assert any("link" in problem for problem in found["problems"])
    assert [group["run_ids"] for one in found["sections"] for group in one["groups"]] == [["good"]]


def test_reports_replace_links_instead_of_writing_through_them(tmp_path: Path) -> None:
    results, victim = tmp_path / "results", tmp_path / "victim"
    victim.write_text("mine")
    synthetic_runs.write(results, hostile_run())
    first = analyze(results, "--each-run")
    assert first.returncode == 0, first.stderr
    written = [path for path in results.rglob("*") if path.suffix in
               {".html", ".md", ".png", ".csv"} or path.name == "comparison.json"]  # fmt: skip
    assert len(written) > 4
    for path in written:
        path.unlink()
        path.symlink_to(victim)
    done = analyze(results, "--each-run")
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "mine"
    assert not [path for path in written if path.is_symlink()]


def test_a_file_that_unpacks_to_gigabytes_costs_seconds_and_is_one_sentence(tmp_path: Path) -> None:
    folder = synthetic_runs.write(tmp_path, hostile_run())
    (folder / "records.jsonl").unlink()
    with gzip.open(folder / "records.jsonl.gz", "wb", compresslevel=9) as stream:
        for _ in range(600):
            stream.write(b" " * 1024**2)
    start = time.monotonic()
    done = analyze(tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    (problem,) = json.loads((tmp_path / "comparison.json").read_text())["problems"]
    assert "holds more than 256 MiB" in problem


@pytest.mark.parametrize(
    "plan",
    [{"co_runs": 7}, {"co_runs": [7, {"clients": [3]}]}, {"co_runs": [{"clients": [{}]}]}, {}],
)
def test_a_plan_that_is_none_is_no_crash(tmp_path: Path, plan: dict) -> None:
    for number, is_pairs in enumerate((True, False)):
        made = hostile_run(f"run{number}")
        made["manifest"] |= {"plan": plan, "is_pairs": is_pairs}
        synthetic_runs.write(tmp_path, made)
    done = analyze(tmp_path)
    assert done.returncode == 0, done.stderr
