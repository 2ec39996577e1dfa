"""The analysis as a user starts it: a subprocess on folders of runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_up_reports
import pytest
import synthetic_runs
from conftest import PROJECT_ROOT
from test_refusals import ends_of

SCRIPT = PROJECT_ROOT / "benchmarking" / "analyze_results.py"


def analyze(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=200,
        cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


def comparison_of(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder in which MPS is twice as good as time slicing, by construction."""
    folder = tmp_path_factory.mktemp("results")
    slicing = {4: [4.0, 4.08, 4.16]}
    synthetic_runs.write(folder, synthetic_runs.run("slicing", "time-slicing", slicing, seed=1))
    synthetic_runs.write(folder, synthetic_runs.run("mps", "mps", {4: [2.0, 2.04, 2.1]}, seed=2))
    return folder


@pytest.fixture(scope="module")
def analyzed(two_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The two runs, analyzed once: the output folder and what was printed."""
    output = tmp_path_factory.mktemp("report")
    done = analyze("--results-dir", two_runs, "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_the_decision_is_printed_and_the_flat_table_and_the_json_say_the_same(two_runs, analyzed):
    output, printed = analyzed
    assert printed.startswith("For this mix on this card: MPS delivers 1.95")
    assert re.search(r"whole card: work delivered +0.98 +\*1.95 +sure: 99 % more", printed)
    assert "report.md" in printed.splitlines()[-1]
    with (output / "comparison.csv").open(newline="") as stream:
        rows = {row["mode"]: row for row in csv.DictReader(stream)}
    groups = comparison_of(output)["sections"][0]["groups"]
    assert set(rows) == {"time-slicing", "mps"}
    for group in groups:
        assert float(rows[group["mode"]]["stp_mean"]) == group["stp"]["mean"]
        assert float(rows[group["mode"]]["stp_low"]) == group["stp"]["low"]
        assert group["cost_per_1000_work"] is None
    assert sorted(path.name for path in two_runs.iterdir()) == ["mps", "slicing"]


def test_prices_requirements_and_each_runs_page_are_given_when_asked_for(two_runs, tmp_path):
    shutil.copytree(two_runs, tmp_path / "results")
    done = analyze(
        "--results-dir", tmp_path / "results", "--output", tmp_path, "--gpu-price", "3.6",
        "--kwh-price", "0.5", "--slo-ms", "7", "--each-run",
        "--require", "mps:work>1.9", "--require", "mps:batch_inference:p99<0.1s",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    compared = comparison_of(tmp_path)
    assert compared["prices"] == {"gpu_price_per_hour": 3.6, "kwh_price": 0.5}
    for group in compared["sections"][0]["groups"]:
        assert group["cost_per_1000_work"] == pytest.approx(1 / group["stp"]["mean"])
        joules = group["joules_per_work"]["mean"]
        assert group["energy_cost_per_1000_work"] == pytest.approx(500 * joules / 3.6e6)
    pages = {path.parent.name: path.read_text() for path in tmp_path.glob("results/*/report.html")}
    assert set(pages) == {"mps", "slicing"}
    for said in ("no other mode can be compared", "% in 7.00 ms", "<svg"):
        assert said in pages["mps"]
    assert not list(tmp_path.glob("results/*/*.png"))


def test_a_pipeline_ends_with_code_7_and_a_sentence_for_each_requirement_that_is_missed(
    two_runs, tmp_path
):
    required = ("work>1.1", "mps:Batch inference:p99 < 5ms", "mig:work>1", "mps:cost<0.1",
                "success>=100", "mps:no_such_job:slowdown<9")  # fmt: skip
    words = [word for text in required for word in ("--require", text)]
    done = analyze("--results-dir", two_runs, "--output", tmp_path, "--gpu-price", "2.5", *words)
    assert done.returncode == 7
    said = ("work is 0.98", "p99 of Batch inference is 6.", "mig:work>1: nothing was measured",
            "cost is 0.35", "mps:no_such_job:slowdown<9: nothing was measured")  # fmt: skip
    assert len(done.stderr.splitlines()) == len(said)
    assert [part for part in said if part not in done.stderr] == []
    assert (tmp_path / "report.html").exists()


def test_without_output_the_report_lands_next_to_the_runs_and_can_be_made_again(two_runs, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(two_runs, results / "deeper" / "down")
    truncated = results / "deeper" / "down" / "slicing"
    for name in ("records.jsonl", "gpu_samples.jsonl"):
        with (truncated / name).open("a") as stream:
            stream.write('{"record": "cli')
    (results / "broken").mkdir()
    (results / "broken" / "manifest.json").write_text("{")
    (results / "phases.jsonl").write_text(
        '{"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG mode is off"}\n'
        '{"phase": [], "name": "mig", "status": "ok"}\n'
    )
    reports = []
    for _ in range(2):
        done = analyze("--results-dir", results)
        assert done.returncode == 0, done.stderr
        reports.append((results / "report.md").read_text())
    assert reports[0] == reports[1]
    assert "| 4 | mig | skipped | MIG mode is off |" in reports[0]
    problems = reports[0].split("## Problems while reading")[1]
    for said in ("phases.jsonl: line 2 is truncated or edited, skipped", "records.jsonl: line",
                 "gpu_samples.jsonl: line",
                 "broken/manifest.json is no manifest of schema version 3 ("):  # fmt: skip
        assert problems.count(said) == 1


def test_one_runs_folder_gets_its_own_report_with_the_baseline_of_the_run_next_to_it(tmp_path):
    alone = synthetic_runs.run("alone", "exclusive", {}, created_at="2025-12-31T00:00:00+00:00")
    reusing = synthetic_runs.run("mps", "mps", {4: [2.0]}, baseline_run_id="alone")
    reusing["records"] = [r for r in reusing["records"] if r["phase"] == "co_run"]
    for made in (alone, reusing):
        synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path / "mps")
    assert done.returncode == 0, done.stderr
    (group,) = comparison_of(tmp_path / "mps")["sections"][0]["groups"]
    assert group["client_rows"][1]["tail_slowdown"]["95"] == pytest.approx(2.0, rel=0.1)
    assert "Each job alone" in (tmp_path / "mps" / "report.html").read_text()
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_done_ends_with_code_2_and_one_sentence(two_runs, tmp_path):
    refused = {
        "--slo-ms nan": "--slo-ms",
        "--colour": "--colour",
        "--require speed>1": "--require",
        "--require work=1": "--require",
        "--require slowdown<2s": "'slowdown<2s': slowdown is in x, not in s",
        f"--results-dir {tmp_path}/missing": f"{tmp_path}/missing",
        f"--results-dir {tmp_path}": f"{tmp_path}",
        f"--results-dir {tmp_path}/file": f"{tmp_path}/file",
        f"--results-dir {tmp_path}/skipped": "(mps: no card)",
        f"--results-dir {two_runs} --output {tmp_path}/file/below": "another --output",
    }
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped" / "phases.jsonl").write_text(
        '{"phase": 1, "name": "mps", "status": "skipped", "reason": "no card"}\n'
    )
    ends = ends_of(SCRIPT, [words.split() for words in refused])
    for said, (code, complaint, shown) in zip(refused.values(), ends, strict=True):
        (sentence,) = complaint.splitlines()
        assert (code, shown, said in sentence) == (2, "", True), sentence
        assert sentence.startswith("analyze_results.py: error: ")


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [("| true", 7, "requirement work>9"), ("", 7, "requirement work>9"),
     (">/dev/full", 1, "cannot write to standard output (No space left on device)")],
)  # fmt: skip
def test_output_that_nobody_reads_is_full_or_knows_no_dash_is_no_traceback(
    tmp_path: Path, to: str, code: int, said: str
) -> None:
    synthetic_runs.write(tmp_path, made_up_reports.failed(synthetic_runs.run("m", "mps", {4: [2]})))
    words = f"{sys.executable} {SCRIPT} --results-dir {tmp_path} --require 'work>9' {to}"
    done = subprocess.run(
        ["bash", "-c", f"{words}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert said in sentence
