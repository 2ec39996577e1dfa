"""Each job beside each other one through the whole suite: real processes, scripted clients."""

from __future__ import annotations

import re
from collections.abc import Callable

from test_benchmark_suite import Bench, bench, gpu_bench

from benchmarking.records.run_folder import PHASE_CO_RUN

__all__ = ["bench", "gpu_bench"]  # fixtures


def test_each_job_runs_beside_each_other_one_and_itself(bench: Bench) -> None:
    run = bench.must("--mix", "pairs", "--window", "0.3")
    pairs = [record["co_run"] for record in run.co_run_records if record["phase"] == PHASE_CO_RUN]
    assert pairs == [
        "pairs-resnet_training-resnet_training-r0",
        "pairs-resnet_training-batch_inference-r0",
        "pairs-batch_inference-batch_inference-r0",
    ]
    assert all(record["slowdown"] for pair in pairs for record in run.clients_of(pair))
    assert run.manifest["is_pairs"] is True
    windows = [record["window_end_seconds"] - record["window_start_seconds"]
               for record in run.co_run_records if record["phase"] == PHASE_CO_RUN]  # fmt: skip
    assert 0.3 <= min(windows) < 3  # as asked for


def test_a_pair_that_fails_leaves_the_others_to_be_measured(bench: Bench) -> None:
    bench.script(
        {"match": "*:pairs-resnet_training-batch_inference-r0/1", "fail": "crash", "fail_at": 0.1}
    )
    done = bench.run("--mix", "pairs", "--window", "0.3")
    assert done.returncode == 1
    outcomes = [r["outcome"] for r in bench.only_run().co_run_records if r["phase"] == PHASE_CO_RUN]
    assert outcomes == ["ok", "failed", "ok"]


def test_pairs_are_of_small_jobs_since_a_window_of_seconds_holds_no_others(
    gpu_bench: Callable,
) -> None:
    done = gpu_bench().run("--mix", "pairs", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--num-operations 8 --burst-seconds 0.4" in done.stdout
    assert "--num-operations 11" not in done.stdout
    assert len(re.findall(r"^  pairs-\S+: 2 together", done.stdout, re.MULTILINE)) == 10


def test_noisy_puts_each_job_next_to_each_antagonist(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    done = bench.run("--mix", "noisy", "--dry-run", "--duty-steps")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  (noisy-\S+): 2 together", done.stdout, re.MULTILINE)
    jobs = ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training",
            "llm_inference")  # fmt: skip
    steps = [f"noisy-llm_inference-hbm-{percent}-r0" for percent in (25, 50, 75)]
    kinds = ("hbm", "sm", "pcie")
    assert names == [f"noisy-{job}-{kind}-r0" for job in jobs for kind in kinds] + steps
    # Each alone as well, an antagonist for each kind and duty.
    assert len(re.findall(r"^  baseline-\S+: ", done.stdout, re.MULTILINE)) == 5 + 3 + 3


def test_noisy_on_the_cpu_is_a_demonstration_of_two_jobs(bench: Bench) -> None:
    run = bench.must("--mix", "noisy", "--window", "0.3")
    pairs = [record["co_run"] for record in run.co_run_records if record["phase"] == PHASE_CO_RUN]
    jobs = ("resnet_training", "batch_inference")
    assert pairs == [f"noisy-{job}-{kind}-r0" for job in jobs for kind in ("hbm", "sm")]
    assert (run.manifest["mix"], run.manifest["is_pairs"]) == ("noisy", False)
