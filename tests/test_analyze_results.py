"""The analysis as a user starts it: a subprocess on folders of runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_runs
from conftest import PROJECT_ROOT
from PIL import Image

from benchmarking.records import run_folder

FIXTURE = PROJECT_ROOT / "tests" / "fixtures" / "synthetic_gpu"
SCRIPT = PROJECT_ROOT / "benchmarking" / "analyze_results.py"


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The committed fixture, analyzed once: the output folder and what was printed."""
    output = tmp_path_factory.mktemp("report")
    done = analyze("--results-dir", FIXTURE, "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_the_table_and_the_decision_are_printed(analyzed):
    _, printed = analyzed
    assert printed.startswith("For this mix on this card: MPS delivers 1.95")
    assert re.search(r"whole card: work delivered +0.98 +\*1.95 +sure: 99 % more", printed)
    assert "report.md" in printed.splitlines()[-1]


def test_the_flat_table_and_the_json_say_the_same(analyzed):
    output, _ = analyzed
    with (output / "comparison.csv").open(newline="") as stream:
        rows = {row["mode"]: row for row in csv.DictReader(stream)}
    groups = json.loads((output / "comparison.json").read_text())["sections"][0]["groups"]
    assert set(rows) == {"time-slicing", "mps"}
    for group in groups:
        assert float(rows[group["mode"]]["stp_mean"]) == group["stp"]["mean"]
        assert float(rows[group["mode"]]["stp_low"]) == group["stp"]["low"]


def test_every_chart_of_the_report_is_a_picture_with_content(analyzed):
    output, _ = analyzed
    text = (output / "report.md").read_text()
    drawn = sorted(output.glob("*.png"))
    assert {path.name.split("-")[0] for path in drawn} >= {"throughput", "slowdown", "timeline"}
    for path in drawn:
        assert f"]({path.name})" in text
        with Image.open(path) as picture:
            grey = picture.convert("L")
            assert grey.width > 600
            assert len(grey.getcolors(maxcolors=256)) > 20


def test_the_fixture_is_not_written_to(analyzed):
    assert sorted(path.name for path in FIXTURE.iterdir()) == [
        "README.md", "mps-mixed-20260101-001000", "time-slicing-mixed-20260101-000000",
    ]  # fmt: skip


def test_without_output_the_report_lands_beside_the_runs_and_can_be_made_again(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(FIXTURE, results / "deeper" / "down")
    (results / "phases.jsonl").write_text(
        '{"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG mode is off"}\n'
        '{"phase": [], "name": "mig", "status": "ok"}\n'
    )
    first = analyze("--results-dir", results)
    assert first.returncode == 0, first.stderr
    before = (results / "report.md").read_text()
    assert "| 4 | mig | skipped | MIG mode is off |" in before
    assert "phases.jsonl: line 2 is truncated or edited, skipped" in before
    assert analyze("--results-dir", results).returncode == 0
    assert (results / "report.md").read_text() == before


def test_truncated_lines_and_unreadable_runs_are_said(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(FIXTURE, results)
    truncated = results / "time-slicing-mixed-20260101-000000"
    for name in ("records.jsonl", "gpu_samples.jsonl"):
        with (truncated / name).open("a") as stream:
            stream.write('{"record": "cli')
    (results / "broken").mkdir()
    (results / "broken" / "manifest.json").write_text("{")
    done = analyze("--results-dir", results)
    assert done.returncode == 0, done.stderr
    problems = (results / "report.md").read_text().split("## Problems while reading")[1]
    assert "records.jsonl: line" in problems
    assert "gpu_samples.jsonl: line" in problems
    assert "broken/manifest.json is no manifest of schema version 3 (" in problems


def test_runs_that_share_an_id_are_all_kept_and_named_by_their_paths(tmp_path):
    unlike = synthetic_runs.GPU | {"driver_version": "590.00"}
    for experiment, environment in (("first", synthetic_runs.GPU), ("second", unlike)):
        for run_id, mode in (("mps", "mps"), (f"only-{experiment}", "time-slicing")):
            made = synthetic_runs.run(run_id, mode, {4: [2.0]}, environment=environment)
            synthetic_runs.write(tmp_path / experiment, made)
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        named = {row["run_id"] for row in csv.DictReader(stream)}
    assert named == {"first/mps", "second/mps", "only-first", "only-second"}
    assert len(list(tmp_path.glob("*timeline-*-mps-mixed-4-r0.png"))) == 2
    assert "Problems while reading" not in (tmp_path / "report.md").read_text()


def test_a_copy_of_a_run_is_listed_as_left_out(tmp_path):
    made = synthetic_runs.run("mps", "mps", {4: [2.0]})
    for experiment in ("first", "second"):
        synthetic_runs.write(tmp_path / experiment, made)
    assert analyze("--results-dir", tmp_path).returncode == 0
    assert (
        "first/mps (mps, mixed, 4 clients): a copy of second/mps"
        in (tmp_path / "report.md").read_text()
    )


def test_one_runs_folder_gets_its_own_report_with_the_baseline_of_the_run_beside_it(tmp_path):
    alone = synthetic_runs.run("alone", "exclusive", {}, created_at="2025-12-31T00:00:00+00:00")
    reusing = synthetic_runs.run("mps", "mps", {4: [2.0]}, baseline_run_id="alone")
    reusing["records"] = [r for r in reusing["records"] if r["phase"] == "co_run"]
    for made in (alone, reusing):
        synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path / "mps")
    assert done.returncode == 0, done.stderr
    (group,) = json.loads((tmp_path / "mps" / "comparison.json").read_text())["sections"][0][
        "groups"
    ]
    assert group["client_rows"][1]["tail_slowdown"]["95"] == pytest.approx(2.0, rel=0.1)
    page = (tmp_path / "mps" / "report.html").read_text()
    assert "Each job alone" in page
    assert not (tmp_path / "report.html").exists()


def test_each_run_gets_a_page_of_its_own_when_asked_for(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "results")
    done = analyze("--results-dir", tmp_path / "results", "--each-run", "--slo-ms", "7")
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name: path.read_text() for path in tmp_path.glob("results/*/report.html")}
    assert set(pages) == {"mps-mixed-20260101-001000", "time-slicing-mixed-20260101-000000"}
    page = pages["mps-mixed-20260101-001000"]
    assert "no other mode was measured" in page
    assert "% in 7.00 ms" in page
    assert "<svg" in page
    assert not list(tmp_path.glob("results/*/*.png"))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--slo-ms", "0"],
        ["--slo-ms", "nan"],
        ["--colour"],
        ["--require", "speed>1"],
        ["--require", "work=1"],
    ],
)
def test_wrong_arguments_end_with_code_2_and_one_sentence(wrong):
    done = analyze(*wrong)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("analyze_results.py: error: ")
    assert wrong[0] in sentence


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys\n"
        "import benchmarking.analyze_results\n"
        "print([name for name in ('pandas', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_ramp_gets_its_own_chart(tmp_path):
    for mode, run_id in (("time-slicing", "ts-ramp"), ("mps", "mps-ramp")):
        made = synthetic_runs.run(run_id, mode, {1: [1.0], 2: [1.5], 4: [2.5]}, mix="training")
        synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling-training.png").stat().st_size > 5000
    assert "not reached by 4 clients" in done.stdout


def test_a_cpu_demonstration_shows_the_host_and_makes_no_statement_about_modes(tmp_path):
    made = synthetic_runs.run("demo", "time-slicing", {4: [3.9]}, gpu=False)
    synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "say nothing about GPU sharing modes" in " ".join(done.stdout.split())
    assert "GPUs' worth" not in done.stdout


def test_a_run_without_any_sample_or_co_run_still_gets_a_report(tmp_path):
    made = synthetic_runs.run("alone", "exclusive", {})
    made["samples"] = []
    synthetic_runs.write(tmp_path, made)
    done = analyze("--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "### Each job alone" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("prepare", ["missing", "empty", "file"])
def test_nothing_to_analyze_ends_with_code_2_and_one_sentence(tmp_path, prepare):
    folder = tmp_path / "results"
    if prepare == "empty":
        folder.mkdir()
    elif prepare == "file":
        folder.write_text("not a folder")
    done = analyze("--results-dir", folder)
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("analyze_results.py: error: ")
    assert str(folder) in sentence


def test_an_output_that_cannot_be_written_ends_with_code_2(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = analyze("--results-dir", FIXTURE, "--output", blocker / "below")
    assert done.returncode == 2
    assert "choose another --output" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_recorded_run_gives_the_figures_that_the_readme_shows(tmp_path):
    folder = PROJECT_ROOT / "examples" / "h200-mixed-4"
    done = analyze("--results-dir", folder, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (section,) = json.loads((tmp_path / "comparison.json").read_text())["sections"]
    lines = (PROJECT_ROOT / "README.md").read_text().splitlines()
    rows = {
        line.split("|")[1].split(",")[0].strip(): line for line in lines if line.count("|") == 5
    }
    names = {"whole card": "work delivered (STP)", "Batch inference": "batch inference",
             "Jupyter session": "notebook session"}  # fmt: skip
    shown = [one for one in section["conclusions"] if one["is_claim"]]
    assert len(shown) == 5
    for one in shown:
        row = rows[names.get(one["subject"], one["subject"])].replace("*", "")
        cells = [cell.strip() for cell in row.split("|")[2:5]]
        for cell, mode in zip(cells, one["modes"], strict=True):
            assert cell.startswith(f"{mode['estimate']['mean']:.2f}")
    assert f"{section['own_error']['percent']:.2f} % off its baseline" in "\n".join(lines)


def test_the_latencies_of_single_images_among_the_findings_are_those_of_the_records():
    row = "| {} | {} | {:.3f} ms{} | {} | {:.3f} ms{} |"
    findings = (PROJECT_ROOT / "docs" / "findings.md").read_text()
    folder = PROJECT_ROOT / "examples" / "h100-single-image"
    runs = [run_folder.read_run(folder / mode) for mode in ("time-slicing", "mps")]

    def mean_ms(run, clients):
        records = run.clients_of(f"single-image-{clients}-r0")
        return statistics.fmean(ms for record in records for ms in record.latency_ms)

    alone = [mean_ms(run, 1) for run in runs]
    for clients in (1, 3, 5, 7):
        (line,) = [line for line in findings.splitlines()
                   if line.startswith(f"| {clients} | ") and line.count(" ms") == 4]  # fmt: skip
        theirs = [cell.strip() for cell in line.split("|")[2:6:2]]
        cells = [clients]
        for run, solo, other in zip(runs, alone, theirs, strict=True):
            mean = mean_ms(run, clients)
            cells += [other, mean, f" ({mean / solo:.1f})" if clients > 1 else ""]
        assert line == row.format(*cells)


# --- requirements and prices --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("required", "missed"),
    [
        (["mps:work>1.9", "mps:slowdown<2.2", "mps:batch_inference:p99<0.1s"], []),
        (["work>1.1"], ["time-slicing", "work is 0.98"]),
        (["mps:Batch inference:p99 < 5ms"], ["p99 of Batch inference is 6."]),
        (["mps:work>1.9", "mig:work>1"], ["mig:work>1: nothing was measured"]),
        (["mps:no_such_job:slowdown<9"], ["nothing was measured"]),
        (["success>=100", "mps:cost<0.36", "mps:cost<0.1"], ["cost is 0.35"]),
    ],
)
def test_a_pipeline_ends_with_code_7_and_the_sentence_where_a_requirement_is_missed(
    tmp_path, required, missed
):
    words = [word for text in required for word in ("--require", text)]
    done = analyze("--results-dir", FIXTURE, "--output", tmp_path, "--gpu-price", "2.5", *words)
    assert done.returncode == (7 if missed else 0), done.stderr
    assert bool(done.stderr) == bool(missed)
    for part in missed:
        assert part in done.stderr
    assert (tmp_path / "report.html").exists()


def test_prices_become_the_cost_of_a_thousand_seconds_of_work(analyzed, tmp_path):
    done = analyze(
        "--results-dir", FIXTURE, "--output", tmp_path, "--gpu-price", "3.6", "--kwh-price", "0.5"
    )
    assert done.returncode == 0, done.stderr
    priced, free = (
        json.loads((folder / "comparison.json").read_text()) for folder in (tmp_path, analyzed[0])
    )
    assert priced["prices"] == {"gpu_price_per_hour": 3.6, "kwh_price": 0.5}
    for group in priced["sections"][0]["groups"]:
        assert group["cost_per_1000_work"] == pytest.approx(1 / group["stp"]["mean"])
        joules = group["joules_per_work"]["mean"]
        assert group["energy_cost_per_1000_work"] == pytest.approx(500 * joules / 3.6e6)
    assert free["sections"][0]["groups"][0]["cost_per_1000_work"] is None
