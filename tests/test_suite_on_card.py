"""The suite as a program on a scripted card: modes proved or refused, baselines, a lost GPU."""

from __future__ import annotations

import json
import os
import signal

import nvml_stub
import pytest
from program_copy import processes_of
from recorded_rows import read_plain
from suite_bench import Bench, names, outcomes, statuses, verdicts, window_seconds

from benchmarking.cli import EXIT_USAGE
from benchmarking.records import run_folder
from benchmarking.report.runs import read_run

TWO = ("--mix", "training", "--workloads", "2", "--quick")
INSTANCES = [(f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}", 7 + i, 16, 9984, 0) for i in range(2)]
ONE_INSTANCE = {"mig_mode_current": 1, "mig_devices": INSTANCES[:1]}
# What a GPU that has left the bus no longer answers.
LOST = dict.fromkeys((
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUUID",
    "nvmlDeviceGetComputeMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetName",
    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetUtilizationRates",
), 15)  # fmt: skip


def test_time_slicing_on_a_card_is_verified_client_by_client(card_bench: Bench) -> None:
    bench = card_bench
    bench.change_card(utilization_gpu_percent=97, power_draw_watts=300, gpm_sm_util=35)
    bench.environment["CUDA_MPS_PIPE_DIRECTORY"] = "/somebody/elses"
    bench.add_program("nvidia-smi", "#!/bin/sh\necho '|   0   Timeslice  Long  |'\n")
    run = bench.must("--mode", "time-slicing", *TWO)
    assert [record["mode"] for record in run.co_run_records] == ["exclusive", "time-slicing"]
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
        (nvml_stub.GTX_1080_TI, "--mode mps --mps-percentage even", 4,
         "MPS passes over limits of its clients on NVIDIA GeForce GTX 1080 Ti"),
        (ONE_INSTANCE, "--mode mig --workloads 4", 4, "1 MIG instances for 4 clients"),
        (ONE_INSTANCE, "--mode mig --mig-layout 3g.40gb", 4,
         "run sudo ./gpu-configs/setup_mig.sh 3g.40gb"),
        ({"fail": {"nvmlInitWithFlags": 18, "nvmlInit_v2": 18}}, "", 3,
         "driver was upgraded while the old"),
        ({"fail": {"nvmlDeviceGetHandleByIndex_v2": 15}}, "", 3,
         "GPU is lost (the GPU has left the bus"),
        ({"fail": {"nvmlDeviceGetCount_v2": 4}}, "", 3, "let this account open /dev/nvidia*"),
        ({"fail": {"nvmlDeviceGetUUID": 15}}, "", 3, "does not tell the GPU's UUID"),
        ({"name": "Orin (nvgpu)", "uuid": "54d0709b-558d-5a59-9c65-0c5fc14a21a4"}, "", 3,
         "Orin (nvgpu) cannot be measured: its UUID 54d0709b-558d"),
        ({"fail": {"nvmlDeviceGetMigMode": 999}}, "--mode mig", 4, "MIG mode is Enabled: unknown"),
    ],
)  # fmt: skip
def test_a_gpu_or_mode_that_cannot_be_had_is_a_sentence_that_is_kept_and_no_demonstration(
    card_bench: Bench, state: dict, arguments: str, code: int, words: str
) -> None:
    card_bench.change_card(**state)
    card_bench.start_daemon() if "--mps-percentage" in arguments else None
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


def test_a_sampler_that_stands_still_is_named_as_the_reason_why_nothing_is_proved(
    card_bench: Bench,
) -> None:
    process = card_bench.start(
        "--mode", "time-slicing", *TWO, until="training-2-r0/0", said='"ready"'
    )
    (samples,) = card_bench.results.glob("*/gpu_samples.jsonl")
    sampler = json.loads(samples.read_text().partition("\n")[0])["pid"]
    os.kill(sampler, signal.SIGSTOP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    run = card_bench.only_run()
    assert verdicts(run) == ["unverified", "unverified"]
    assert run.manifest["notes"] == ["the sampler stood still: it said nothing"]
    assert processes_of(card_bench.root) == []


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
        "partitions": False, "percentages": ["even"], "memory_limits": ["8G", "4G"],
        "priorities": [],
    }  # fmt: skip
    assert names(run)[-1] == "training-mps-even-mem-8G-4G-2-r0"
    read = read_run(run.folder)
    assert (read.settings, read.variant) == ("even, 8G/4G of memory", "mps:even,8G/4G")


def test_clients_on_static_partitions_are_verified_alone_and_together(card_bench: Bench) -> None:
    partitions = [f"{nvml_stub.GPU_UUID}/Dx{i}AAAAAAAAA" for i in (4, 8)]
    card_bench.start_daemon(f"partitions={','.join(partitions)}\n")
    rows = [f"{nvml_stub.GPU_UUID[:12]} Dx{i}AAAAA - 8 - 64 Yes\n" for i in (4, 8)]
    (card_bench.root / "pipe" / "partitions").write_text("".join(rows))
    card_bench.script({"match": "*", "identity": {"multiprocessor_count": 64}})
    for number in ("1", "2"):
        rounds = ("--repeats", "3", "--round", number, "--run-id", "rounds")
        run = card_bench.must("--mode", "mps", *TWO, "--mps-partitions", *rounds)
    phases = [record["phase"] for record in run.co_run_records]
    assert phases == ["baseline", "share_baseline", "co_run", "co_run"]
    assert names(run)[-1] == "training-mps-partitions-2-r1"
    assert [record["proof"]["verdict"] for record in run.client_records] == ["verified"] * 6
    told = [record["identity"]["sharing_environment"].get("CUDA_MPS_SM_PARTITION")
            for record in run.client_records]  # fmt: skip
    assert told == [None, partitions[0], *partitions, *partitions]
    assert run.co_run_records[-1]["summary"]["interference_overhead_percent"] is not None
    assert "MPS with static partitions" in card_bench.report()

    (card_bench.root / "pipe" / "partitions").write_text("".join(rows).replace(" 64 ", " 32 "))
    card_bench.script({"match": "*", "identity": {"multiprocessor_count": 32}})
    rounds = ("--repeats", "3", "--round", "3", "--run-id", "rounds")
    smaller = card_bench.run("--mode", "mps", *TWO, "--mps-partitions", *rounds)
    assert smaller.returncode == 2
    assert "its baseline: multiprocessor_count was 64, now it is 32" in smaller.stderr

    plain = card_bench.run("--mode", "mps", *TWO)
    assert plain.returncode == 4
    assert "started for clients with one (--mps-partitions)" in plain.stderr


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
    sizes = ("1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb")
    instances = [(f"MIG-aaaaaaaa-{i}", 7 + i, 16, 9984, 0, name) for i, name in enumerate(sizes)]
    card_bench.change_card(mig_mode_current=1, mig_devices=instances)
    card_bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    flags = ("--mode", "mig", "--mix", "training", "--quick", "--mig-layout")
    run = card_bench.must(*flags, "2g.20gb,1g.10gb,1g.10gb", "--run-id", "unlike")
    seen = [record["identity"]["gpu_uuid"] for record in run.clients_of("training-3-r0")]
    assert seen == ["MIG-aaaaaaaa-2", "MIG-aaaaaaaa-0", "MIG-aaaaaaaa-1"]
    assert verdicts(run)[-3:] == ["verified"] * 3
    assert [record["phase"] for record in run.co_run_records] == ["co_run"]
    assert run.manifest["mig_layout"] == ["2g.20gb", "1g.10gb", "1g.10gb"]
    assert run.co_run_records[-1]["summary"]["stp"] is None
    for words in ("instances of unlike size", "STP and overhead stay unknown"):
        assert any(words in note for note in run.manifest["notes"])
    alike = card_bench.must(*flags, "1g.10gb,1g.10gb", "--run-id", "z-alike")
    assert [record["phase"] for record in alike.co_run_records] == ["share_baseline", "co_run"]
    card_bench.change_card(mig_mode_current=1, mig_devices=instances[:2])
    refused = card_bench.run(*flags, "2g.20gb,1g.10gb,1g.10gb")
    assert "run sudo ./gpu-configs/setup_mig.sh 2g.20gb,1g.10gb,1g.10gb" in refused.stderr


def test_a_baseline_of_another_run_is_reused_or_refused_naming_the_field(
    card_bench: Bench,
) -> None:
    bench, jobs = card_bench, ("--mix", "training", "--workloads", "1", "--quick")
    bench.script({"match": "*", "git_commit": "beef" * 10})
    bench.must("--mode", "exclusive", *jobs, "--run-id", "alone")
    bench.script({"match": "*", "git_commit": "cafe" * 10})
    assert bench.run(*jobs, "--baseline", "alone", "--run-id", "again").returncode == 0
    again = read_plain(bench.results / "again")
    (note,) = (note for note in again.manifest["notes"] if "by commit" in note)
    assert note == (
        "the baselines of run alone were measured by commit beefbeefbeef of the project, now it "
        "is cafecafecafe"
    )
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
