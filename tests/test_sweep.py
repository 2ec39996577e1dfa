"""A sweep as a program: the real suite for each value, with scripted clients for the workloads."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import made_up_reports
import pytest
import synthetic_runs
from conftest import PROJECT_ROOT
from nvml_stub import GPU_UUID
from program_copy import processes_of
from suite_bench import Bench
from tiny_disk import needs_mount, tiny_disk
from waiting import wait_until

from benchmarking import sweep_report as report
from benchmarking.metrics.estimates import estimate
from benchmarking.records import run_folder
from benchmarking.report.comparison import compare
from benchmarking.report.runs import read_results
from benchmarking.sweep_knobs import KNOBS
from benchmarking.sweep_report import NOT_RUN, Point, read_point

# A job alone is faster, or a busy machine could show the impossible, which has no figures.
ALONE = {"match": "*:baseline-*", "unit_seconds": 0.01}
MODE_SCRIPT = """#!/bin/sh
echo "$(basename "$0") $*" >>"{log}"
case "$(basename "$0") $*" in
    *long*) echo "error: this driver has no long slices" >&2; exit 4 ;;
    reset*) ! grep -q medium "{log}" || {{ printf 'error: in the way: \\370\\n' >&2; exit 6; }} ;;
esac
"""


class Sweeper(Bench):
    """A copy of the programs with scripted workloads, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.output = root / "sweep"

    def script(self, *rules: dict) -> None:
        super().script(ALONE, {"match": "batch_inference*", "latency": True}, *rules)

    def command(self, knob: str, values: str, *words: str, change: bool = False) -> list[str]:
        script = str(self.root / "benchmarking" / "sweep.py")
        allow = ["--change-card"] if change else []
        fixed = ["--knob", knob, "--values", values, "--output", str(self.output), *allow]
        return [sys.executable, script, *fixed, "--", "--min-seconds", "0.2", *words]

    def run(self, *arguments: str, **more: bool) -> subprocess.CompletedProcess[str]:
        return self.to_its_end(self.command(*arguments, **more))

    def resume(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Go on from another folder than the one where the sweep was started."""
        script = str(self.root / "benchmarking" / "sweep.py")
        command = [sys.executable, script, "--resume", str(self.output), *words]
        return self.to_its_end(command, cwd="/")

    def content(self) -> dict:
        return json.loads((self.output / "sweep.json").read_text())


@pytest.fixture
def sweeper(tmp_path: Path) -> Sweeper:
    """A machine without a GPU."""
    return Sweeper(tmp_path)


def test_every_value_is_measured_against_one_baseline_and_charted(sweeper: Sweeper) -> None:
    enough_for_a_tail = {"match": "batch_inference*", "unit_seconds": 0.0005, "units": 600}
    sweeper.script(enough_for_a_tail, ALONE | {"unit_seconds": 0.0002})
    sweeper.environment["MPLBACKEND"] = "nonsense"
    done = sweeper.run("workloads", "1,2", "--mix", "inference", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = sweeper.content()
    assert (found["outcome"], found["baseline"]) == ("complete", "baseline")
    assert [(p["value"], p["clients"], p["outcome"]) for p in found["points"]] == [
        ("1", 1, "ok"), ("2", 2, "ok"),
    ]  # fmt: skip
    assert all(p["stp"]["mean"] > 0 and p["tails"][0]["merged_ms"] > 0 for p in found["points"])
    for point in found["points"]:
        manifest = json.loads((sweeper.output / point["run_id"] / "manifest.json").read_text())
        assert manifest["baseline_run_id"] == "baseline"
    page = (sweeper.output / "report.html").read_text()
    assert "<svg" in page
    assert "CPU demonstration: no GPU was used" in page
    assert (sweeper.output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "CPU demonstration" in done.stdout
    assert "GPUs' worth" not in done.stdout + page
    assert re.search(r"^ 2 +\d\.\d\d .* ok +2 clients", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == f"report: {sweeper.output / 'report.html'}"
    # a baseline that was taken before serves all values
    baseline = sweeper.output.rename(sweeper.root / "earlier") / "baseline"
    jobs = ("--mix", "inference", "--device", "cpu")
    done = sweeper.run("workloads", "1", *jobs, "--baseline", str(baseline))
    assert done.returncode == 0, done.stderr
    assert sweeper.content()["baseline"] == str(baseline)
    assert not (sweeper.output / "baseline").exists()
    assert all(point["stp"]["mean"] > 0 for point in sweeper.content()["points"])


def test_a_flag_of_the_jobs_is_swept_with_a_baseline_for_each_value(sweeper: Sweeper) -> None:
    done = sweeper.run("job-flag=--batch-size", "1,8", "--mix", "inference", "--workloads", "2",
                       "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sweeper.content()
    assert (found["knob"], found["baseline"]) == ("batch-size", None)
    for point, size in zip(found["points"], (1, 8), strict=True):
        assert point["run_id"] == f"batch-size-{size}"
        assert point["stp"]["mean"] > 0
        run = run_folder.read_run(sweeper.output / point["run_id"])
        records = run.client_records
        assert [record.phase for record in records] == ["baseline", "co_run", "co_run"]
        assert {record.identity["batch_size"] for record in records} == {size}
        assert {record.job_key.endswith(f"--batch-size {size}") for record in records} == {True}
    assert (
        "each value against the baseline of its own run"
        in (sweeper.output / "report.md").read_text()
    )


def test_a_value_that_fails_is_said_and_the_others_go_on(sweeper: Sweeper) -> None:
    sweeper.script({"match": "resnet_training:training-3-r0/2", "fail": "error"})
    done = sweeper.run("workloads", "3,2", "--mix", "training", "--device", "cpu")
    assert done.returncode == 1
    assert [p["outcome"] for p in sweeper.content()["points"]] == ["failed", "ok"]
    assert sweeper.content()["points"][0]["stp"] is None
    text = (sweeper.output / "report.md").read_text()
    assert "### Values without figures\n\n- 3: failed" in text


def test_values_that_share_a_folder_or_that_nothing_could_run_are_refused(sweeper: Sweeper) -> None:
    done = sweeper.run("job-flag=--model", "a/b,a-b", "--mix", "inference", "--device", "cpu")
    assert done.returncode == 2
    assert "two would be measured in one folder, model-a-b" in done.stderr
    done = sweeper.run("workloads", "1,99999999999", "--mix", "training", "--device", "cpu")
    assert (done.returncode, "9999 at most" in done.stderr) == (2, True)
    done = sweeper.run("workloads", "1/2,4", "--mix", "training", "--device", "cpu")
    assert (done.returncode, "takes one count a value" in done.stderr) == (2, True)
    done = sweeper.run("job-flag=--model", "z" * 300, "--mix", "inference", "--device", "cpu")
    assert (done.returncode, "too long for the name of its folder" in done.stderr) == (2, True)
    assert not sweeper.output.exists()
    sweeper.output = sweeper.root / ("x" * 300)
    for more, said in (((), "File name too long"), (("--baseline", "y" * 300), "there is no run")):
        done = sweeper.run("workloads", "1", "--mix", "training", "--device", "cpu", *more)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_finished_values_and_no_process_and_the_command_to_go_on(
    sweeper: Sweeper,
) -> None:
    sweeper.script({"match": "resnet_training:training-2-r0/*", "unit_seconds": 0.2, "units": 100})
    process = subprocess.Popen(
        sweeper.command("workloads", "1,2,3", "--mix", "training", "--device", "cpu"),
        env=sweeper.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = sweeper.output / "workloads-2"
    wait_until(
        lambda: any('"ready"' in path.read_text() for path in events.rglob("1.events.jsonl")),
        "the second value's client is ready",
    )
    running = sweeper.resume()
    assert running.returncode == 2
    assert "that sweep is still going on" in running.stderr
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    found = sweeper.content()
    assert found["outcome"] == "interrupted"
    assert [p["outcome"] for p in found["points"]] == ["ok", "interrupted", NOT_RUN]
    assert "- 3: not run" in (sweeper.output / "report.md").read_text()
    assert "Traceback" not in errors
    assert processes_of(sweeper.root) == []

    script = sweeper.root / "benchmarking" / "sweep.py"
    assert f"to go on: python3 {script} --resume {sweeper.output}" in output.splitlines()
    kept = sweeper.output / "sweep.json"
    whole = kept.read_text()
    for content, mode, said in (
        ("[" * 9999, 0o600, "is no sweep that can go on"),
        (whole.replace('"points": [', '"points": [7, '), 0o600, "is no sweep that can go on"),
        (whole, 0o620, "is not yours alone, and what it says would be run"),
        (whole, 0o600, "leave the others out"),
    ):
        kept.write_text(content)
        kept.chmod(mode)
        refused = sweeper.resume(*(["--values", "1"] if "leave" in said else []))
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    sweeper.script()
    manifests = [sweeper.output / run / "manifest.json" for run in ("baseline", "workloads-1")]
    before = [path.read_bytes() for path in manifests]
    rest = sweeper.resume()
    assert rest.returncode == 0, rest.stderr
    assert [path.read_bytes() for path in manifests] == before
    found = sweeper.content()
    assert (found["outcome"], [p["outcome"] for p in found["points"]]) == ("complete", ["ok"] * 3)
    assert all(p["stp"]["mean"] > 0 for p in found["points"])
    assert found["command"][-8:] == process.args[-8:]
    again = sweeper.resume()
    assert again.returncode == 2
    assert "that sweep is complete: look at its report.html" in again.stderr


def test_a_secret_of_a_job_is_in_no_file_of_a_sweep_and_is_needed_again_to_go_on(
    sweeper: Sweeper,
) -> None:
    secret = "hunter2-hunter2"
    job = f"--job-arguments=--api-key {secret}"
    done = sweeper.run("workloads", "1", "--mix", "training", "--device", "cpu", job)
    assert done.returncode == 0, done.stderr
    files = [path for path in sweeper.output.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert "hidden:API_KEY:" in (sweeper.output / "report.md").read_text()
    kept = sweeper.output / "sweep.json"
    kept.write_text(kept.read_text().replace('"outcome": "complete"', '"outcome": "interrupted"'))
    refused = sweeper.resume()
    assert refused.returncode == 2
    assert "set the variable API_KEY to what it was" in refused.stderr
    sweeper.environment["API_KEY"] = secret
    assert sweeper.resume().returncode == 0
    assert secret not in kept.read_text()


def test_of_two_sweeps_that_begin_in_one_folder_one_is_refused(sweeper: Sweeper) -> None:
    where = ("--device", "cpu", "--allow-contention")  # or the card's lock may refuse it before
    command = sweeper.command("workloads", "1", "--mix", "training", *where)
    both = [
        subprocess.Popen(command, env=sweeper.environment, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = {process.communicate(timeout=60)[1]: process.returncode for process in both}
    assert sorted(said.values()) == [0, 2], said
    (refused,) = (text for text, code in said.items() if code == 2)
    assert re.search("another sweep is at work there|is not empty", refused), refused
    assert sweeper.content()["outcome"] == "complete"


@needs_mount
def test_a_disk_that_runs_full_is_one_sentence_and_the_sweep_goes_on_once_there_is_room(
    sweeper: Sweeper,
) -> None:
    command = sweeper.command("workloads", "1,2", "--mix", "training", "--device", "cpu")
    with tiny_disk(sweeper.output) as disk:
        process = subprocess.Popen(
            disk.command(sweeper.root, *command), env=sweeper.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_until(lambda: (disk.seen / "workloads-1").exists(), "the first value runs")
        disk.fill()
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 1
        script = sweeper.root / "benchmarking" / "sweep.py"
        assert errors.splitlines()[-1] == (
            f"sweep.py: error: cannot write to {sweeper.output} (No space left on device): make "
            f"room there, then go on with python3 {script} --resume {sweeper.output}"
        )
        assert "Traceback" not in errors
        disk.make_room()
        resume = disk.command(Path("/"), *command[:2], "--resume", sweeper.output)
        rest = subprocess.run(
            resume, env=sweeper.environment, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        assert rest.returncode == 0, rest.stderr
        found = json.loads((disk.seen / "sweep.json").read_text())
        assert [p["outcome"] for p in found["points"]] == ["ok", "ok"]


def test_a_knob_of_the_card_is_put_in_force_for_its_value_and_taken_back(tmp_path: Path) -> None:
    sweeper = Sweeper(tmp_path)
    log = tmp_path / "calls.log"
    for name in ("setup_time_slicing.sh", "reset_time_slicing.sh"):
        script = tmp_path / "gpu-configs" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(MODE_SCRIPT.format(log=log))
        script.chmod(0o755)
    sweeper.add_card()
    refused = sweeper.run("timeslice", "short", "--mix", "training")
    assert refused.returncode == 2
    assert "changes the card: allow it by --change-card" in refused.stderr
    sweeper.environment["GPU_SETTINGS_LOCKED"] = "1"
    locked = sweeper.run("timeslice", "short", change=True)
    assert locked.returncode == 2
    assert "GPU_SETTINGS_LOCKED=1 forbids" in locked.stderr
    assert not log.exists()
    del sweeper.environment["GPU_SETTINGS_LOCKED"]
    no_daemon = sweeper.run("mps-percentage", "50", "--mode", "mps")
    assert no_daemon.returncode == 4
    assert "enable_mps.sh" in no_daemon.stderr
    assert not sweeper.output.exists()
    jobs = ("--workloads", "1", "--mix", "training")
    done = sweeper.run("timeslice", "short,long,medium", *jobs, change=True)
    assert done.returncode == 1, done.stderr
    first, back, failed, *_ = log.read_text().splitlines()
    assert first.startswith("setup_time_slicing.sh 1 --timeslice short --gpu GPU-")
    assert back.startswith("reset_time_slicing.sh --gpu GPU-")
    assert failed.startswith("setup_time_slicing.sh 1 --timeslice long")
    short, long, medium = sweeper.content()["points"]
    assert short["outcome"] == "ok"
    assert (long["outcome"], long["run_id"]) == ("failed", None)
    assert "this driver has no long slices" in long["reason"]
    # a setting that is not taken back is an error, and every run of a script is on record
    assert medium["outcome"] == "ok"
    assert "error: reset_time_slicing.sh: in the way: \ufffd\n" in done.stderr
    scripts = (sweeper.output / "mode_scripts.jsonl").read_text().splitlines()
    *_, set_up, last = map(json.loads, scripts)
    assert (set_up["arguments"], set_up["exit_code"]) == (["1", "--timeslice", "medium"], 0)
    assert (last["script"], last["exit_code"]) == ("reset_time_slicing.sh", 6)
    assert last["message"] == "in the way: \ufffd"
    assert 0 < last["seconds"] < 10 and last["gpu_uuid"] == GPU_UUID
    # nor does a suite that crashes keep it
    with (tmp_path / "benchmarking" / "suite" / "session.py").open("a") as program:
        program.write("\n\ndef run_suite(*words, **more):\n    raise ValueError('inside')\n")
    jobs = (*jobs, "--baseline", str(sweeper.output / "baseline"))
    sweeper.output = tmp_path / "crashed"
    log.unlink()
    assert sweeper.run("timeslice", "short", *jobs, change=True).returncode == 1
    assert [line.split(".")[0] for line in log.read_text().splitlines()] == [
        "setup_time_slicing", "reset_time_slicing",
    ]  # fmt: skip


def test_a_baseline_without_proof_is_a_failed_sweep_since_5_is_the_suites_code(
    tmp_path: Path,
) -> None:
    sweeper = Sweeper(tmp_path)
    sweeper.add_card()
    sweeper.environment = {
        name: value for name, value in sweeper.environment.items() if not name.startswith("CUDA_")
    }
    sweeper.script({"match": "*", "identity": {"gpu_uuid": "GPU-another"}})
    done = sweeper.run("workloads", "1,2", "--mix", "training")
    assert done.returncode == 1, done.stderr
    assert sweeper.content()["outcome"] == "failed"
    assert [point["outcome"] for point in sweeper.content()["points"]] == [NOT_RUN] * 2


def test_values_of_a_limit_stay_apart_in_the_sweep_and_in_the_report_of_its_folder(
    tmp_path: Path,
) -> None:
    knob = KNOBS["mps-percentage"]
    for value, slowdown in (("even", 2.0), ("50/25", 2.5)):
        percentages = value.split("/")
        limits = {"percentages": percentages, "memory_limits": [], "priorities": []}
        run = synthetic_runs.run(knob.slug(value), "mps", {4: [slowdown]}, mps_limits=limits)
        synthetic_runs.write(tmp_path, run)
    points = [read_point(value, tmp_path / knob.slug(value), None, None)
              for value in ("even", "50/25")]  # fmt: skip
    assert [point.stp["mean"] for point in points] == pytest.approx([2.0, 1.6])
    comparison, _ = compare(read_results(tmp_path))
    (section,) = comparison["sections"]
    assert [group["settings"] for group in section["groups"]] == ["50/25 %", "even"]


def test_a_value_whose_co_runs_are_pairs_has_a_reason_why_it_has_no_figures() -> None:
    for recorded in ("h200-pairs", "h200-noisy"):
        point = read_point("50", PROJECT_ROOT / "examples" / recorded / "mps", None, None)
        assert (point.outcome, point.run_id, point.stp) == ("failed", "mps", None)
        assert "pairs of jobs are compared by analyze_results.py" in point.reason


def test_a_value_that_failed_once_or_was_faster_than_alone_is_not_ranked(tmp_path: Path) -> None:
    failed = made_up_reports.failed(made_up_reports.mps([2.0, 2.0], "failed"), repeat=1)
    folders = [synthetic_runs.write(tmp_path, made)
               for made in (failed, made_up_reports.mps([0.5, 0.5], "impossible"))]  # fmt: skip
    points = [read_point("50", folder, None, None) for folder in folders]
    assert [(point.outcome, point.reason) for point in points] == [
        ("failed", "no memory"), ("invalid", "invalid: the baseline was disturbed"),
    ]  # fmt: skip
    assert {(point.stp, point.antt, tuple(point.tails)) for point in points} == {(None, None, ())}


def sweep_of(**values: list[float]) -> report.Sweep:
    points = [
        Point(value[1:], "ok", "run", None, 4, "mps", stp=estimate_of(stp))
        for value, stp in values.items()
    ]
    return report.Sweep("mps-percentage", ["sweep.py"], "2026-01-01", "baseline", points)


def estimate_of(values: list[float]) -> dict:
    return dataclasses.asdict(estimate(values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"v50": [1.2, 1.21, 1.22], "v100": [1.0, 1.01, 1.02]},
         "mps-percentage 50 delivers the most, 1.21 GPUs' worth of work, against 1.01 at 100, the "
         "lowest: sure."),
        ({"v50": [1.2, 1.3, 1.1], "v100": [1.2, 1.15, 1.22]},
         "mps-percentage 50 delivered the most, 1.20 GPUs' worth of work, against 1.19 at 100, "
         "the lowest: cannot tell between it and 100."),
        ({"v50": [1.2], "v100": [1.0]},
         "mps-percentage 50 delivered the most, 1.20 GPUs' worth of work, against 1.00 at 100, "
         "the lowest: seen once, repeat (--repeats 3) before relying on it."),
        ({"v50": [1.2]},
         "mps-percentage 50 delivers 1.20 GPUs' worth of work, the only value with figures."),
    ],
    ids=["sure", "cannot tell", "once", "alone"],
)  # fmt: skip
def test_the_best_value_is_named_with_how_sure_it_is(
    values: dict[str, list[float]], said: str, tmp_path: Path
) -> None:
    sweep = sweep_of(**values)
    reason = "line one\n- line two"
    sweep.points.append(report.read_point("7", tmp_path / "none", None, reason))
    report.write(sweep, tmp_path)
    assert "\n- 7: failed (line one - line two)\n" in (tmp_path / "report.md").read_text()
    assert f"## {said}\n" in (tmp_path / "report.md").read_text()
    shown = report.terminal_text(sweep, 80)
    assert " ".join(shown.split()).startswith(said)
    assert max(map(len, shown.splitlines())) <= 80


def test_a_p99_of_missed_requests_is_infinite_and_not_the_lowest(tmp_path: Path) -> None:
    sweep = sweep_of(v50=[1.2] * 3, v100=[1.0] * 3)
    tails = [
        {"label": "Service", "p99_ms": None, "merged_ms": math.inf, "slowdown": math.inf},
        {"label": "Service", "p99_ms": estimate_of([10.0, 11.0, 12.0]), "merged_ms": 12.0,
         "slowdown": 2.4},
    ]  # fmt: skip
    sweep.points = [replace(point, tails=[tail])
                    for point, tail in zip(sweep.points, tails, strict=True)]  # fmt: skip
    report.write(sweep, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "- p99 latency of Service was the lowest in these runs at mps-percentage 100, 12.0 ms, "
        "against ∞ at 50, the highest." in text
    )
    assert "| ∞ (∞) |" in text
    kept = json.loads(json.dumps(sweep.to_dict(), allow_nan=False))
    assert kept["points"][0]["tails"][0]["merged_ms"] is None
