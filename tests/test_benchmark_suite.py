"""The suite as a program: real processes end to end, with scripted clients for the workloads."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import msgspec
import nvml_stub
import pytest
from msgspec.structs import asdict, replace
from program_copy import processes_of
from recorded_rows import client, co_run, read_plain
from suite_bench import Bench, names, outcomes, statuses, verdicts, window_seconds

from benchmarking.cli import EXIT_USAGE
from benchmarking.measuring import co_run_records as records
from benchmarking.measuring import sampler
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.measuring.progress import Progress
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.records import run_folder
from benchmarking.records.types import ClientRecord, Environment, Manifest, Proof
from benchmarking.report.runs import read_run
from benchmarking.suite import baselines
from benchmarking.suite.session import run_suite

MIXED = ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training")
TWO = ("--mix", "training", "--workloads", "2", "--quick")
INSTANCES = [(f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}", 7 + i, 16, 9984, 0) for i in range(2)]
ONE_INSTANCE = {"mig_mode_current": 1, "mig_devices": INSTANCES[:1]}
# What a GPU that has left the bus no longer answers.
LOST = dict.fromkeys((
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUUID",
    "nvmlDeviceGetComputeMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetName",
    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetUtilizationRates",
), 15)  # fmt: skip


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
    assert "BERT fine-tuning: weights are random" in manifest["notes"]
    assert set(verdicts(run)) == {"not_applicable"}

    # each job alone first, then all together
    assert names(run) == [*(f"baseline-{job}" for job in MIXED), "mixed-4-r0"]
    alone = [record for record in run.client_records if record["phase"] == "baseline"]
    assert [record["slowdown"] for record in alone] == [pytest.approx(1.0)] * 4
    together = run.clients_of("mixed-4-r0")
    assert all(any(job["in_window"] for job in record["jobs"]) for record in together)
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
    # alone the STP is 1, but for the gaps between jobs
    assert 0.95 < run.co_run_records[0]["summary"]["stp"] < 1.0
    (null,) = run.clients_of("null-r1")
    assert null["phase"] == "null"
    assert 0.9 < null["slowdown"] < 1.1

    together = (*common, "--baseline", str(run.folder), "--run-id", "together", "--round")
    for number in ("1", "2"):
        assert bench.run(*together, number).returncode == 0
    other = bench.run(*together, "2", "--seed", "7")
    assert other.returncode == 2
    assert "together was made with other flags: name another --run-id" in other.stderr
    assert names(read_plain(bench.results / "together")) == ["interactive-2-r0", "interactive-2-r1"]


def test_a_baseline_that_was_disturbed_is_measured_again_and_the_first_counts_no_longer(
    bench: Bench,
) -> None:
    # Together it is faster than it was alone, which nobody is.
    slow_once = {"match": "*:baseline-*", "unit_seconds": 0.05}
    path = bench.root / "benchmarking" / "suite" / "baselines.py"
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
     (["--window", "10", "--timeout", "5"], 2, "--timeout"),
     (["--mode", "exclusive", "--baseline", "x"], 2, "leave --baseline away"),
     (["--data-dir", "/no/such/folder"], 2, "no folder"), (["--baseline", "nothing"], 2, "no run"),
     (["--run-id", "a/b"], 2, "not a folder name"),
     (["--mix", "training", "--slo-ms", "50"], 2, "--slo-ms needs jobs with response times"),
     (["--mode", "mig", "--until-break"], 2, "as many clients as instances"),
     (["--plan", "/no/plan.toml"], 2, "/no/plan.toml cannot be read"),
     (["--job", "true", "--mix", "training"], 2, "not allowed with argument"),
     (["--mode", "mps", "--mps-percentage", "0"], 2, "not a percentage over 0 and up to 100"),
     (["--mps-percentage", "50"], 2, "limits of MPS clients need --mode mps"),
     (["--resume", "mine", "--quick"], 2, "leave --quick away"),
     (["--gpu", "1"], 3, "GPU")],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    where = [] if "--resume" in arguments else ["--results-dir", str(tmp_path)]
    result = run_suite([*arguments, *where], from_driver=True)
    assert (result.exit_code, result.folder) == (code, None)
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("benchmark_suite.py: error: ")
    assert said.count("\n") == 1
    if code == EXIT_USAGE and result.reason.endswith("--help)"):  # no driver's call: it ends here
        with pytest.raises(SystemExit, match="2"):
            run_suite([*arguments, *where])


# --- on a card --------------------------------------------------------------------------------


def test_time_slicing_on_a_card_is_verified_client_by_client(card_bench: Bench) -> None:
    bench = card_bench
    bench.change_card(utilization_gpu_percent=97, power_draw_watts=300, gpm_sm_util=35)
    bench.environment["CUDA_MPS_PIPE_DIRECTORY"] = "/somebody/elses"
    bench.add_program("nvidia-smi", "#!/bin/sh\necho '|   0   Timeslice  Long  |'\n")
    run = bench.must("--mode", "time-slicing", *TWO)
    assert verdicts(run, "baseline") == ["verified"]
    assert verdicts(run) == ["verified", "verified"]
    identities = [record["identity"] for record in run.client_records]
    assert [identity["client_index"] for identity in identities] == [0, 0, 1]
    assert identities[-1]["gpu_uuid"] == nvml_stub.GPU_UUID
    assert "no-mps-" in identities[-1]["sharing_environment"]["CUDA_MPS_PIPE_DIRECTORY"]
    manifest, environment = run.manifest, run.manifest["environment"]
    assert (manifest["effective_mode"], manifest["job_size"]) == ("time-slicing", "quick")
    assert manifest["is_contended"] is False
    assert environment["timeslice"] == "Long"
    assert environment["gpu_name"] == "NVIDIA H100 80GB HBM3"
    assert environment["driver_version"] == "580.159.04"
    assert environment["multiprocessor_count"] == 132
    last = run.co_run_records[-1]
    assert last["gpu"]["utilization_gpu_percent"] == pytest.approx(97)
    assert last["gpu"]["sm_activity_percent"] == pytest.approx(35)
    assert last["gpu"]["energy_joules"] == pytest.approx(300 * window_seconds(last), rel=0.05)
    assert last["summary"]["energy_ratio"] > 0


@pytest.mark.parametrize(
    ("state", "lacks", "verdict", "has_energy"),
    [(nvml_stub.GTX_1080_TI, (), "verified", False),
     # no process lists, so nothing proves the mode
     (nvml_stub.RTX_2080, nvml_stub.DRIVER_440_LACKS, "unverified", True)],
    ids=["GTX 1080 Ti", "RTX 2080 with an old driver"],
)  # fmt: skip
def test_an_older_card_is_measured_with_null_for_what_it_lacks(
    card_bench: Bench, state: dict, lacks: tuple, verdict: str, has_energy: bool
) -> None:
    card_bench.change_card(**state)
    nvml_stub.build_nvml_stub(card_bench.root, lacks)
    run = card_bench.must("--mode", "time-slicing", *TWO)
    assert verdicts(run) == [verdict, verdict]
    assert run.manifest["environment"]["gpu_memory_mib"] == state["memory_total_mib"]
    gpu, summary = run.co_run_records[-1]["gpu"], run.co_run_records[-1]["summary"]
    assert {key for key, value in gpu.items() if value is None} == {
        "sm_activity_percent", "sm_occupancy_percent", "tensor_activity_percent",
        "dram_activity_percent", *(() if has_energy else ("energy_joules",)),
    }  # fmt: skip
    assert (summary["energy_ratio"] is not None) is has_energy
    assert summary["stp"] > 0


@pytest.mark.parametrize(
    ("state", "arguments", "code", "words"),
    [
        ({}, "--mode mps", 4, "./gpu-configs/enable_mps.sh"),
        ({"compute_mode": 3}, "--mode time-slicing", 4, "Exclusive_Process"),
        ({}, "--gpu 5", 2, nvml_stub.GPU_UUID),
        (nvml_stub.GTX_1080_TI, "--mode mig", 4, "MIG mode is Enabled: not supported by this GPU"),
        (ONE_INSTANCE, "--mode mig --workloads 4", 4, "1 MIG instances for 4 clients"),
        (ONE_INSTANCE, "--mode mig --mig-layout 3g.40gb", 4,
         "run sudo ./gpu-configs/setup_mig.sh 3g.40gb"),
        ({"fail": {"nvmlInitWithFlags": 18, "nvmlInit_v2": 18}}, "", 3,
         "driver was upgraded while the old"),
        ({"fail": {"nvmlDeviceGetHandleByIndex_v2": 15}}, "", 3,
         "GPU is lost (the GPU has left the bus"),
        ({"fail": {"nvmlDeviceGetCount_v2": 4}}, "", 3, "let this account open /dev/nvidia*"),
        ({"fail": {"nvmlDeviceGetUUID": 15}}, "", 3, "does not tell the GPU's UUID"),
    ],
)  # fmt: skip
def test_a_gpu_or_mode_that_cannot_be_had_is_a_sentence_that_is_kept_and_no_demonstration(
    card_bench: Bench, state: dict, arguments: str, code: int, words: str
) -> None:
    card_bench.change_card(**state)
    done = card_bench.run("--mix", "training", *arguments.split())
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code != EXIT_USAGE:
        refusal = card_bench.refusal()
        assert (refusal["exit_code"], words in refusal["sentence"]) == (code, True)


def test_a_gpu_that_others_use_is_refused_naming_them_or_the_run_is_marked_contended(
    card_bench: Bench,
) -> None:
    bench, flags = card_bench, ("--mix", "training", "--workloads", "1", "--quick")
    bench.change_card(pids={os.getpid(): 900})
    done = bench.run(*flags)
    assert done.returncode == 4
    assert f"other processes are on the GPU: pid {os.getpid()} (" in done.stderr
    assert "--allow-contention" in done.stderr
    refusal = bench.refusal()
    assert (refusal["exit_code"], refusal["command"][-1]) == (4, "--quick")
    assert done.stderr == f"benchmark_suite.py: error: {refusal['sentence']}\n"
    assert bench.run(*flags, "--dry-run").returncode == 0
    assert bench.refusal() == refusal
    nothing = bench.analyze()
    assert nothing.returncode == 2
    assert f"(refused: {refusal['sentence']})" in nothing.stderr

    with (bench.results / run_folder.REFUSALS_FILE).open("a") as stream:
        stream.write('{"exit_code": 0}\n')
    run = bench.must(*flags, "--beside-others")
    assert any("the GPU is contended" in note for note in run.manifest["notes"])
    assert run.manifest["is_contended"] is True
    for record in run.co_run_records:
        assert record["is_contended"] is True
        assert any(f"meanwhile, pid {os.getpid()} (" in warning for warning in record["warnings"])
    report = bench.report()
    assert "## What was refused, and why" in report
    assert refusal["sentence"] in report
    assert f"{run_folder.REFUSALS_FILE}: line 2 is truncated or edited, skipped" in report


def test_a_gpu_that_is_lost_meanwhile_ends_the_run_which_goes_on_once_it_is_back(
    card_bench: Bench,
) -> None:
    bench = card_bench
    flags = ("--mix", "training", "--workloads", "1,2", "--quick", "--window", "2")
    process = bench.start(*flags, until="training-1-r0/0", said='"units"')
    bench.change_card(fail=LOST)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    run = bench.only_run()
    assert run.manifest["outcome"] == "invalid"
    assert outcomes(run) == ["ok", "invalid"]  # nothing more is tried on it
    sentence = "the GPU was lost, the driver no longer answers for it: look for Xid"
    assert run.co_run_records[-1]["reason"].startswith(sentence)
    assert run.co_run_records[-1]["stop_reason"]["kind"] == "gpu_lost"
    assert f"training-1-r0 does not hold: {sentence}" in stderr
    assert f"REASON: {sentence}" in stdout
    # the functions that failed are named, once
    notes = [note for note in run.manifest["notes"] if "nvmlDeviceGetUtilizationRates" in note]
    assert len(notes) == 1
    bench.change_card()
    assert bench.resume(run.run_id).returncode == 0
    assert outcomes(bench.only_run()) == ["ok"] * 3


def test_mps_clients_are_verified_with_their_limits_and_their_baselines_run_without(
    card_bench: Bench,
) -> None:
    card_bench.start_daemon()
    limits = ("--mps-percentage", "even", "--mps-memory-limit", "8G,4G")
    run = card_bench.must("--mode", "mps", *TWO, *limits)
    assert verdicts(run, "baseline") == ["verified"]
    assert verdicts(run) == ["verified", "verified"]
    seen = [record["identity"]["sharing_environment"] for record in run.client_records]
    assert "no-mps-" in seen[0]["CUDA_MPS_PIPE_DIRECTORY"]
    pipe = str(card_bench.root / "pipe")
    assert [one["CUDA_MPS_PIPE_DIRECTORY"] for one in seen[1:]] == [pipe, pipe]
    percentages = [one.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for one in seen]
    assert percentages == [None, "50", "50"]
    assert [one.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") for one in seen] == [None, "0=8G", "0=4G"]
    assert run.manifest["mps_limits"] == {
        "percentages": ["even"], "memory_limits": ["8G", "4G"], "priorities": [],
    }  # fmt: skip
    assert names(run)[-1] == "training-mps-even-mem-8G-4G-2-r0"
    read = read_run(run.folder)
    assert (read.settings, read.variant) == ("even, 8G/4G of memory", "mps:even,8G/4G")


@pytest.mark.parametrize(
    ("mode", "flaw", "words"),
    [("time-slicing", "hidden", "is not among"), ("mps", "without_mps", "MPS")],
)
def test_a_client_that_is_not_on_the_card_as_the_mode_has_it_makes_the_run_invalid(
    card_bench: Bench, mode: str, flaw: str, words: str
) -> None:
    card_bench.start_daemon() if mode == "mps" else None
    card_bench.script({"match": "*:training-2-r0/1", flaw: True})
    run = card_bench.must("--mode", mode, *TWO, code=5)
    assert (run.manifest["outcome"], outcomes(run)[-1]) == ("invalid", "invalid")
    assert statuses(run, "training-2-r0") == ["ok", "invalid"]
    invalid = run.clients_of("training-2-r0")[1]
    assert invalid["slowdown"] is None
    assert words in invalid["reason"]
    assert run.co_run_records[-1]["summary"]["stp"] is None


def test_mig_gives_each_client_its_instance_and_uses_an_earlier_whole_gpu_baseline(
    card_bench: Bench,
) -> None:
    bench = card_bench
    bench.must("--mode", "exclusive", *TWO, "--run-id", "alone")
    bench.change_card(mig_mode_current=1, mig_devices=INSTANCES)
    bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    assert bench.run("--mode", "mig", *TWO, "--run-id", "sliced").returncode == 0
    run = read_plain(bench.results / "sliced")
    assert run.manifest["baseline_run_id"] == "alone"
    assert [record["phase"] for record in run.co_run_records] == ["share_baseline", "co_run"]
    assert verdicts(run) == ["verified", "verified"]
    seen = [record["identity"]["gpu_uuid"] for record in run.clients_of("training-2-r0")]
    assert seen == [instance[0] for instance in INSTANCES]
    summary = run.co_run_records[-1]["summary"]
    assert summary["stp"] > 0
    assert summary["interference_overhead_percent"] == pytest.approx(0, abs=30)


def test_a_mig_layout_gives_clients_instances_of_its_sizes_and_without_a_whole_gpu_no_stp(
    card_bench: Bench,
) -> None:
    small, large = (instance[0] for instance in INSTANCES)
    card_bench.change_card(
        mig_mode_current=1,
        mig_devices=[(small, 7, 16, 9984, 0, "1g.10gb"), (large, 5, 16, 20096, 0, "2g.20gb")],
    )
    card_bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    flags = ("--mix", "training", "--quick", "--mig-layout", "2g.20gb,1g.10gb")
    run = card_bench.must("--mode", "mig", *flags)
    seen = [record["identity"]["gpu_uuid"] for record in run.clients_of("training-2-r0")]
    assert seen == [large, small]
    assert verdicts(run)[-2:] == ["verified", "verified"]
    assert run.manifest["mig_layout"] == ["2g.20gb", "1g.10gb"]
    assert run.co_run_records[-1]["summary"]["stp"] is None
    for words in ("instances of unlike size", "STP and overhead stay unknown"):
        assert any(words in note for note in run.manifest["notes"])


def test_a_baseline_of_another_run_is_reused_or_refused_naming_the_field(
    card_bench: Bench,
) -> None:
    bench, jobs = card_bench, ("--mix", "training", "--workloads", "1", "--quick")
    bench.must("--mode", "exclusive", *jobs, "--run-id", "alone")
    assert bench.run(*jobs, "--baseline", "alone", "--run-id", "again").returncode == 0
    again = read_plain(bench.results / "again")
    assert again.manifest["baseline_run_id"] == "alone"
    assert [record["phase"] for record in again.co_run_records] == ["co_run"]
    assert again.co_run_records[0]["summary"]["stp"] > 0

    def refused(*more: str) -> str:
        done = bench.run(*jobs, "--baseline", "alone", *more)
        assert done.returncode == 2
        return done.stderr

    assert "engine was graph, now it is eager" in refused("--engine", "eager")
    bench.change_card(driver_version="999.1")
    assert "driver_version was 580.159.04, now it is 999.1" in refused()
    bench.change_card()
    bench.script({"match": "*", "resolve_arguments": ["--dataset", "folder"]})
    said = refused("--run-id", "other")
    assert "was `--resolved yes`, now it is `--dataset folder`" in said
    assert read_plain(bench.results / "other").client_records == []


def test_a_gpu_that_torch_cannot_use_is_code_3(card_bench: Bench) -> None:
    card_bench.script({"match": "*", "identity": {"device": "cpu"}})
    run = card_bench.must("--mix", "training", "--quick", code=3)
    assert (run.manifest["outcome"], outcomes(run)) == ("failed", ["failed"])
    (record,) = run.client_records
    assert record["status"] == "failed"
    assert "driver 580.159.04" in record["reason"]
    assert "torch scripted cannot use it" in record["reason"]
    assert run.co_run_records[0]["reason"] == record["reason"]
    assert processes_of(card_bench.root) == []


# --- records and baselines, without processes -------------------------------------------------


def co_run_of(outcome: str, *clients: ClientResult, phase: str = "co_run") -> CoRunResult:
    planned = PlannedCoRun("c", phase, "mps", 0, tuple(client.planned for client in clients))
    return CoRunResult(planned, outcome, None, list(clients), 0.5, 0.0, 1.0, 11.0, 0.1)


def client_of(seconds_a_step: float, number: int = 0) -> ClientResult:
    steps = int(10 / seconds_a_step)
    events = [
        {"event": "loaded", "startup_seconds": 2.0},
        {"event": "units", "kind": "step", "latency": False,
         "start_seconds": [1 + i * seconds_a_step for i in range(steps)],
         "duration_seconds": [seconds_a_step] * steps},
        {"event": "job", "index": 0, "start_seconds": 1.0, "end_seconds": 9.0, "figures": {"x": 1}},
        {"event": "done", "jobs": 1, "host_cpu_seconds": 3.0, "peak_memory_mib": 7.0},
    ]  # fmt: skip
    planned = PlannedClient(number, "w", "W", "job", ("x",))
    return ClientResult(
        planned, "ok", events=events, identity={"pid": 1}, exit_code=0,
        window_host_cpu_fraction=0.5, busiest_thread_cpu_fraction=0.25,
    )  # fmt: skip


PROVED = Proof("verified", [])


def test_a_client_record_holds_slowdown_against_its_baseline() -> None:
    alone, client = client_of(0.5), client_of(1.0)
    baseline = records.client_record(
        co_run_of("ok", alone, phase="baseline"), alone, PROVED, None, None
    )
    record = records.client_record(co_run_of("ok", client), client, PROVED, baseline, None)
    assert (baseline.slowdown, baseline.units["step"].count) == (1.0, 20)
    assert record.slowdown == pytest.approx(2.0)
    assert record.normalized_progress == pytest.approx(0.5)
    assert record.jobs[0].duration_seconds == 8.0
    assert record.window_host_cpu_fraction == pytest.approx(0.5)
    assert record.busiest_thread_cpu_fraction == pytest.approx(0.25)
    assert record.figures == {"x": 1}
    assert (record.startup_seconds, record.peak_memory_mib) == (2.0, 7.0)
    assert msgspec.convert(msgspec.to_builtins(record), ClientRecord) == record


def test_the_start_skew_is_between_the_first_units_of_all_clients() -> None:
    early, late = client_of(1.0), client_of(1.0, number=1)
    late.events[1]["start_seconds"][0] = 1.03
    assert records.start_skew_ms([early, late]) == pytest.approx(30.0)
    assert records.start_skew_ms([early]) is None
    assert records.start_skew_ms([early, dataclasses.replace(late, events=[])]) is None


def test_a_co_run_that_lost_its_mode_is_invalid() -> None:
    client = client_of(1.0)
    seen = co_run_of("ok", client)
    row = records.client_record(seen, client, PROVED, None, None)
    record = records.co_run_record(
        seen, [row], None, mode_failure="the daemon is gone", baselines={"job": row},
        energy_alone_joules={},
    )  # fmt: skip
    assert (record.outcome, record.reason) == ("invalid", "the daemon is gone")
    assert record.summary.stp is None


def test_a_sampler_that_does_not_start_well_is_a_failure_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "truncated.py"
    script.write_text("import sys\nopen(sys.argv[2], 'w').write('{\"record\": \"mon\\n')\n")
    monkeypatch.setattr(sampler, "MONITOR_SCRIPT", script)
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert "it said nothing" in started.failure
    monkeypatch.setattr(sampler.sys, "executable", str(tmp_path / "no-python"))
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert "did not start" in started.failure


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    with open("/dev/full", "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with pytest.raises(OSError, match="No space"):
            print("lost", file=sys.stderr, flush=True)
        progress.say("nobody reads this")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def manifest(**environment: object) -> Manifest:
    known = {"gpu_name": "H100", "driver_version": "580",
             "versions": {"python": "3.11", "torch": "2.11"}}  # fmt: skip
    return Manifest(
        schema_version=3, run_id="r", created_at="", mode="mps", effective_mode="mps", mix="mixed",
        job_size="guide", plan={}, notes=[], environment=Environment(**{**known, **environment}),
    )  # fmt: skip


def test_the_newest_reusable_run_is_one_on_the_same_data(tmp_path: Path) -> None:
    for number, data in enumerate(["here", "elsewhere", None]):
        noted = {} if data is None else {"resolved_arguments": {"job": ["--data-dir", data]}}
        made = asdict(replace(manifest(), **noted, created_at=f"2026-01-0{3 - number}"))
        made["run_id"] = f"run-{number}"
        run = run_folder.create_run(tmp_path, made, run_id=made["run_id"])
        run.append_record(client("alone", 0, phase="baseline"))
        run.append_record(co_run("alone"))

    # The oldest did not note its data: it is taken where nothing better is there.
    for data, expected in (("here", "run-0"), ("elsewhere", "run-1"), ("a third place", "run-2")):
        ours = replace(manifest(), resolved_arguments={"job": ["--data-dir", data]})
        assert baselines.newest_reusable(tmp_path, ours, ["job"]).run_id == expected


def test_unlike_environments_sizes_and_demonstrations_are_named_by_field() -> None:
    demonstration = replace(manifest(gpu_name="A100"), job_size="quick", effective_mode="cpu-demo")
    found = baselines.differences(demonstration, manifest())
    for words in ("gpu_name was A100, now it is H100", "job size was quick", "cpu-demo was True"):
        assert any(words in difference for difference in found)
    assert baselines.differences(manifest(), manifest()) == []
