"""The suite as a program without a GPU: real processes end to end, with scripted clients."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from recorded_rows import read_plain
from suite_bench import Bench, names, outcomes, verdicts, window_seconds

from benchmarking import PROJECT_VERSION
from benchmarking.cli import EXIT_USAGE
from benchmarking.suite.session import run_suite

MIXED = ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training")


# --- without a GPU ----------------------------------------------------------------------------


def test_without_a_gpu_the_whole_flow_runs_as_a_labelled_cpu_demonstration(bench: Bench) -> None:
    bench.script(
        {"match": "bert_training:-/-", "resolve_notes": ["weights are random"]},
        {"match": "jupyter*", "figures_once": {"cell_repeats": "matrix=3"}},
        {"match": "batch_inference*", "latency": True},
    )
    done = bench.run("--mode", "mps", "--workloads", "4")
    assert done.returncode == 0, done.stderr
    run = bench.only_run()
    *_, report, results = done.stdout.splitlines()
    assert results == f"results: {run.folder}"
    assert report.endswith(f"benchmarking/analyze_results.py --results-dir {run.folder}")
    assert done.stdout.count("CPU DEMONSTRATION") == 2
    for name in ("Success rate", "Average duration", "Total GPU time", "Overhead", "STP", "ANTT",
                 "Fairness", "slowdown"):  # fmt: skip
        assert name in done.stdout
    manifest = run.manifest
    assert run.run_id.startswith("cpu-demo-mixed-")
    assert (manifest["mode"], manifest["effective_mode"]) == ("mps", "cpu-demo")
    assert (manifest["job_size"], manifest["outcome"]) == ("cpu", "complete")
    assert manifest["environment"]["versions"] == {"torch": "scripted"}
    assert manifest["environment"]["project_version"] == PROJECT_VERSION
    assert "BERT fine-tuning: weights are random" in manifest["notes"]
    assert set(verdicts(run)) == {"not_applicable"}
    seen = [record["identity"]["sharing_environment"] for record in run.client_records]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {""}  # its clients see no GPU
    indices = [record["identity"]["client_index"] for record in run.client_records]
    assert indices == [0, 0, 0, 0, 0, 1, 2, 3]  # alone each is the first

    # each job alone first, then all together
    assert names(run) == [*(f"baseline-{job}" for job in MIXED), "mixed-4-r0"]
    alone = [record for record in run.client_records if record["phase"] == "baseline"]
    assert [record["slowdown"] for record in alone] == [pytest.approx(1.0)] * 4
    together = run.clients_of("mixed-4-r0")
    for record in together:
        assert any(job["in_window"] for job in record["jobs"])
        assert record["slowdown"] * record["normalized_progress"] == pytest.approx(1.0)
        assert (record["startup_seconds"], record["peak_memory_mib"]) == (0.25, 100.0)
        assert record["window_host_cpu_fraction"] >= record["busiest_thread_cpu_fraction"] >= 0
    last = run.co_run_records[-1]
    # Scripted jobs pause only from job to job.
    expected = sum(record["normalized_progress"] for record in together)
    assert 0.95 * expected < last["summary"]["stp"] < expected
    assert last["summary"]["success_rate_percent"] == 100
    assert last["gpu"]["host_cpu_percent"] > 0
    assert last["gpu"]["utilization_gpu_percent"] is None
    latencies = [record["latency_ms"] for record in together]
    assert [found is None for found in latencies] == [True, False, True, True]
    assert abs(len(latencies[1]) - together[1]["units"]["step"]["count"]) < 1

    # resolved flags, a share of the host, and what the baseline calibrated reach the clients
    clients = manifest["plan"]["co_runs"][0]["clients"]
    assert all("--resolved yes" in " ".join(client["command"]) for client in clients)
    assert all("OMP_NUM_THREADS" in client["environment"] for client in clients)
    assert "--cell-repeats" not in manifest["plan"]["baseline"][2]["command"]
    assert ["--cell-repeats" in client["command"] for client in clients] == [
        False, False, True, False]  # fmt: skip


@pytest.mark.parametrize(
    "line", ['exec "$@" <&- >&- 2>&-', '"$@" | true', 'PYTHONIOENCODING=ascii exec "$@"']
)
def test_a_run_is_whole_though_nobody_can_read_what_it_says(bench: Bench, line: str) -> None:
    bench.results = bench.results / "caf\udce9 é"
    command = bench.command("--mix", "training", "--workloads", "1", "--run-id", "mine")
    shell = ["bash", "-o", "pipefail", "-c", line, "bash", *command]
    done = subprocess.run(
        shell, env=bench.environment, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"Traceback") == 0
    assert bench.only_run().manifest["outcome"] == "complete"
    assert (bench.results / "mine" / "run.lock").read_bytes() == b""


def test_rounds_go_into_one_run_the_first_calibrates_and_each_is_measured_once(
    bench: Bench,
) -> None:
    bench.script({"match": "jupyter_simulation:*", "figures_once": {"cell_repeats": "matrix=3"}})
    common = ("--mix", "interactive", "--workloads", "2", "--repeats", "2")
    flags = (*common, "--mode", "exclusive", "--null", "--run-id", "alone", "--session", "mine")
    for number in (1, 2, 2):
        run = bench.must(*flags, "--round", str(number))
    assert names(run) == [
        name for number in (0, 1)
        for name in (f"baseline-jupyter_simulation-r{number}", f"null-r{number}")
    ]  # fmt: skip
    assert (run.manifest["outcome"], run.manifest["resumptions"]) == ("complete", [])
    assert (run.manifest["session"], run.manifest["method"]) == ("mine", 2)
    commands = {row["co_run"]: row["command"] for row in run.manifest["plan"]["baseline"]}
    assert "--cell-repeats" not in commands["baseline-jupyter_simulation-r0"]
    assert "--cell-repeats" in commands["baseline-jupyter_simulation-r1"]
    (first, _, second, null) = run.client_records
    steps = [record["units"]["step"] for record in (first, second, null)]
    # alone the STP is 1, but for the gaps between jobs
    stp = run.co_run_records[0]["summary"]["stp"]
    assert stp == pytest.approx(steps[0]["seconds"] / window_seconds(first)) and stp < 1.0
    assert (null["co_run"], null["phase"]) == ("null-r1", "null")
    # the same job once more, against it alone over all rounds so far
    *alone, again = [(step["seconds"], step["count"]) for step in steps]
    seconds, count = map(sum, zip(*alone, strict=True))
    assert null["slowdown"] == pytest.approx(again[0] / again[1] / (seconds / count))

    together = (*common, "--baseline", str(run.folder), "--run-id", "together", "--round")
    for number in ("1", "2"):
        assert bench.run(*together, number).returncode == 0
    other = bench.run(*together, "2", "--seed", "7")
    assert other.returncode == 2
    assert "together was made with other flags or another version: start a new run" in other.stderr
    run = read_plain(bench.results / "together")
    assert run.manifest["request"]["baseline"] == "alone"  # which may be moved with it
    assert names(run) == ["interactive-2-r0", "interactive-2-r1"]
    # without shares of their own the job alone on the whole card is what counts
    assert run.co_run_records[-1]["summary"]["interference_overhead_percent"] is not None


def test_a_round_that_may_not_go_on_is_no_success_though_those_before_it_were(bench: Bench) -> None:
    flags = ("--mix", "interactive", "--workloads", "1", "--repeats", "2", "--run-id", "rounds")
    assert bench.run(*flags, "--round", "1").returncode == 0
    path = bench.results / "rounds" / "manifest.json"
    manifest = json.loads(path.read_text())
    for arguments in manifest["resolved_arguments"].values():
        arguments[:] = ["--resolved", "otherwise"]
    path.write_text(json.dumps(manifest))
    done = bench.run(*flags, "--round", "2")
    assert done.returncode != 0
    assert "otherwise" in done.stdout + done.stderr
    run = read_plain(bench.results / "rounds")
    assert (run.manifest["outcome"], names(run)[-1]) == ("complete", "interactive-1-r0")


def test_a_baseline_that_was_disturbed_is_measured_again_and_the_first_counts_no_longer(
    bench: Bench,
) -> None:
    # Together it is faster than it was alone, which nobody is.
    slow_once = {"match": "*:baseline-*", "unit_seconds": 0.05}
    path = bench.root / "benchmarking" / "measuring" / "baselines.py"
    path.write_text(
        re.sub("(?m)^TOLERATED_FRACTION = .*$", "TOLERATED_FRACTION = 0.5", path.read_text())
    )
    bench.script(slow_once, {"match": "*:inference-1-*", "unit_seconds": 0.02})
    run = bench.must("--mix", "inference", "--workloads", "1")
    (note,) = [note for note in run.manifest["notes"] if "disturbed" in note]
    assert "baseline-batch_inference: the baseline was disturbed (client 0:" in note
    assert "faster together than alone); it is repeated" in note
    rows = map(json.loads, (run.folder / "records.jsonl").read_text().splitlines())
    co_runs = [row["co_run"] for row in rows if row["record"] == "co_run"]
    assert co_runs.count("baseline-batch_inference") == 2


def test_a_budget_leaves_out_all_repeats_but_the_first_and_a_window_is_as_long_as_asked_for(
    bench: Bench,
) -> None:
    bench.script({"match": "*:inference-*", "units": 40, "unit_seconds": 0.05})
    flags = ("--mix", "inference", "--workloads", "1,2", "--repeats", "3", "--window", "1.2")
    plan = bench.run(*flags, "--dry-run").stdout
    assert "--model resnet18 --batch-size 1 " in plan
    planned = re.findall(r"^  (inference-\S+): ", plan, re.M)
    assert planned == [f"inference-{count}-r{repeat}" for count in (1, 2) for repeat in range(3)]
    assert not bench.results.exists()
    run = bench.must(*flags, "--budget-minutes", "0.01")
    assert names(run)[1:] == ["inference-1-r0", "inference-2-r0"]
    assert sum("left out" in note for note in run.manifest["notes"]) == 4
    (record,) = run.clients_of("inference-1-r0")
    assert 1.2 <= window_seconds(record) < 6
    assert record["units"]["step"]["count"] >= 10  # of 40 a job: units count without whole jobs
    assert {tuple(one["warnings"]) for one in run.co_run_records} == {()}


def test_a_client_with_fewer_units_than_the_window_waits_for_is_marked(bench: Bench) -> None:
    bench.script({"match": "*:inference-2-r0/1", "unit_seconds": 0.3})
    run = bench.must("--mix", "inference", "--workloads", "2", "--window", "0.4")
    (together,) = [one for one in run.co_run_records if one["phase"] == "co_run"]
    (warning,) = together["warnings"]
    assert re.fullmatch(
        r"client 1 \(Batch inference\) finished [345] units of work in the window, fewer than 10: "
        r"its figures are rough, a longer --window makes them better",
        warning,
    )


# --- failures ---------------------------------------------------------------------------------


def test_a_ramp_stops_at_the_first_count_that_fails_whose_cause_is_told_everywhere(
    bench: Bench,
) -> None:
    told = {"cause": "out_of_memory", "memory": {"where": "gpu", "tried_mib": 2560.0}}
    sentence = "tried 2.50 GiB with 1.00 GiB of 80.00 GiB free"
    rule = {"match": "*:training-2-r0/1", "fail": "oom", "fail_at": 0.05}
    bench.script({**rule, "error": {**told, "message": sentence}})
    done = bench.run("--mix", "training", "--workloads", "1,2,4")
    assert done.returncode == 1
    assert sentence in done.stderr
    run = bench.only_run()
    assert run.manifest["outcome"] == "failed"
    assert outcomes(run) == ["ok", "ok", "failed"]
    last = run.co_run_records[-1]
    assert last["summary"]["stp"] is None
    assert last["summary"]["success_rate_percent"] == 50
    assert "client 1 (ResNet50 training): oom" in last["reason"]
    neighbor, record = run.clients_of("training-2-r0")
    assert (neighbor["status"], neighbor["cause"], record["status"]) == ("ok", None, "oom")
    assert {name: record[name] for name in told} == told
    assert "scripted failure: oom" in record["stderr_tail"]
    assert sentence in bench.report()


@pytest.mark.parametrize(
    ("rule", "code", "words", "rows"),
    [({"match": "*:baseline-*", "fail": "crash", "fail_at": 0.05}, 1, "exit code 7", 1),
     ({"match": "*:-/-", "resolve_exit": 3}, 3, "cannot resolve: scripted", 0)],
)  # fmt: skip
def test_a_failed_baseline_or_preparation_ends_the_run_with_its_reason(
    bench: Bench, rule: dict, code: int, words: str, rows: int
) -> None:
    bench.script(rule)
    done = bench.run("--mix", "training")
    assert done.returncode == code
    assert words in done.stderr
    assert len(bench.only_run().co_run_records) == rows
    assert bench.only_run().manifest["outcome"] == "failed"


# --- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--workloads", "0"], 2, "1 or more"), (["--workloads", "4,2"], 2, "smallest first"),
     (["--timeout", "x"], 2, "above 0"), (["--mix", "other"], 2, "invalid choice"),
     (["--window", "10", "--timeout", "5"], 2, "--window 10 needs a --timeout above it"),
     (["--settle", "1e300"], 2, "--settle 1e+300 needs a --timeout"),
     (["--window", "2", "--min-seconds", "1800"], 2, "--min-seconds 1800 needs a --timeout"),
     (["--mode", "exclusive", "--baseline", "x"], 2, "leave --baseline out"),
     (["--data-dir", "/no/such/folder"], 2, "no folder"), (["--baseline", "nothing"], 2, "no run"),
     (["--run-id", "a/b"], 2, "not a folder name"),
     (["--run-id", "a/b", "--dry-run"], 2, "not a folder name"),
     (["--run-id", "taken", "--dry-run"], 2, "there is a run 'taken'"),
     (["--results-dir", "/dev/null/x", "--dry-run"], 2, "/dev/null is no folder that you may"),
     (["--mix", "training", "--slo-ms", "50"], 2, "--slo-ms needs jobs with response times"),
     (["--mode", "mig", "--until-break"], 2, "as many clients as instances"),
     (["--mode", "mig", "--null"], 2, "--null needs the whole GPU"),
     (["--plan", "/no/plan.toml"], 2, "/no/plan.toml cannot be read"),
     (["--job", "true", "--mix", "training"], 2, "not allowed with argument"),
     (["--mode", "mps", "--mps-percentage", "0"], 2, "not a percentage over 0 and up to 100"),
     (["--mps-percentage", "50"], 2, "limits of MPS clients need --mode mps"),
     (["--mps-partitions"], 2, "limits of MPS clients need --mode mps"),
     (["--mode", "mps", "--mps-partitions", "--until-break"], 2, "as many clients as static"),
     (["--mode", "mps", "--mps-partitions", "--mps-percentage", "50"], 2, "percentage is ignored"),
     (["--resume", "mine", "--quick"], 2, "leave --quick out"),
     (["--resume", "mine", "--beside-others"], 2, "there is no run 'mine'"),
     (["--gpu", "1"], 3, "GPU")],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "taken").mkdir()
    where = [] if "--resume" in arguments else ["--results-dir", str(tmp_path)]
    result = run_suite([*where, *arguments], from_driver=True)
    assert result.exit_code == code
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("benchmark_suite.py: error: ")
    assert said.count("\n") == 1
    if code == EXIT_USAGE and result.reason.endswith("--help)"):  # no driver's call: it ends here
        with pytest.raises(SystemExit, match="2"):
            run_suite([*where, *arguments])


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_pause_of_all_jobs_together_is_warned_of_and_one_of_the_suite_alone_is_none(
    bench: Bench, is_whole: bool
) -> None:
    """As Ctrl-Z, and a scheduler that suspends a job."""
    process = bench.start(
        "--mix", "training", "--workloads", "1", "--run-id", "mine", "--window", "2",
        until="training-1-r0/0", said='"units"',
    )  # fmt: skip
    time.sleep(0.5)  # the window opens
    below = psutil.Process(process.pid).children(recursive=True)
    suspended = [*below, psutil.Process(process.pid)] if is_whole else [process]
    for one in suspended:
        one.send_signal(signal.SIGSTOP)
    time.sleep(4.5)
    for one in suspended:
        one.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    warned = re.search(r"WARNING: jobs and sampler stood still for \d s in the window", output)
    assert bool(warned) == is_whole, output
    assert ("stood still" in bench.report()) == is_whole
