"""The suite with a plan of one's own jobs, and its search for the breaking point: real processes.

The programs and the card are those of `test_benchmark_suite.py`; the script that runs commands is
the real one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from recorded_rows import read_plain
from test_benchmark_suite import Bench, bench, gpu_bench, start_daemon, verdicts

from benchmarking.records import run_folder
from benchmarking.report.runs import read_run

PROJECT_ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = PROJECT_ROOT / "examples" / "plans" / "own-commands.toml"
GPU_COMMAND = PROJECT_ROOT / "tests" / "fakes" / "gpu_command.py"

__all__ = ["bench", "gpu_bench"]  # fixtures


def plan_of(bench: Bench, text: str) -> str:
    """Write a plan file, and bring the script that runs commands to the copied suite."""
    for folder in ("common", "custom"):
        target = bench.root / "workloads" / folder
        shutil.copytree(PROJECT_ROOT / "workloads" / folder, target, dirs_exist_ok=True)
    path = bench.root / "own.toml"
    path.write_text(text)
    return str(path)


def command_table(*words: str, **more: str) -> str:
    lines = [f"command = {json.dumps([sys.executable, str(GPU_COMMAND), *words])}"]
    return "\n".join(["[[client]]", *lines, *(f"{key} = {value}" for key, value in more.items())])


def test_the_example_plan_runs_alone_and_together_and_is_kept_with_the_run(bench: Bench) -> None:
    plan_of(bench, "")
    run = bench.must("--plan", str(EXAMPLE))
    assert [record["co_run"] for record in run.co_run_records] == [
        "baseline-batch_inference", "baseline-command", "baseline-command-2", "own-commands-4-r0",
    ]  # fmt: skip
    records = run.clients_of("own-commands-4-r0")
    assert [record["label"] for record in records] == [
        "Batch inference", "hashing", "hashing", "a shell line"]  # fmt: skip
    assert [record["status"] for record in records] == ["ok"] * 4
    for record in records[1:]:
        assert record["units"]["command"]["count"] > 0.9  # one, to what the window's edge cuts
        assert record["slowdown"] > 0
    assert [bool(record["latency_ms"]) for record in records] == [False, False, False, True]
    assert (run.folder / "plan.toml").read_text() == EXAMPLE.read_text()
    assert run.manifest["mix"] == "own-commands"
    assert run.manifest["plan_file"]["path"] == str(EXAMPLE)
    assert run.manifest["plan_file"]["sha256"] == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()


def test_jobs_without_a_file_run_and_are_kept_as_a_plan_without_their_secrets(
    bench: Bench,
) -> None:
    plan_of(bench, "")
    done = bench.run(
        "--job", "sleep 0.1", "--job", "env PASSWORD=hunter2-hunter2 sleep 0.1", "--workloads", "3"
    )
    assert done.returncode == 0, done.stderr
    run = bench.only_run()
    assert [record["co_run"] for record in run.co_run_records] == [
        "baseline-command", "baseline-command-2", "sleep-env-3-r0"]  # fmt: skip
    members = run.clients_of("sleep-env-3-r0")
    assert [record["label"] for record in members] == ["sleep", "env", "sleep"]
    assert len({record["job_key"] for record in members}) == 2
    assert all(record["slowdown"] > 0 for record in members)
    files = [path.read_text() for path in run.folder.rglob("*") if path.is_file()]
    assert not any("hunter2-hunter2" in text for text in (*files, done.stdout, done.stderr))
    assert "hidden:PASSWORD:" in (run.folder / "plan.toml").read_text()
    both = bench.run("--job", "true", "--mix", "training")
    assert "not allowed with argument" in both.stderr


def test_a_command_that_fails_is_a_failed_client_with_its_last_words(bench: Bench) -> None:
    plan = plan_of(bench, '[[client]]\ncommand = "echo lost it >&2; exit 3"\nshell = true\n')
    done = bench.run("--plan", plan)
    assert done.returncode == 1
    assert "ended with exit code 3: lost it" in done.stderr
    (record,) = bench.only_run().client_records
    assert record["status"] == "failed"
    assert record["stderr_tail"][0] == "lost it"
    assert bench.only_run().co_run_records[0]["stop_reason"]["kind"] == "crash"


def test_a_plan_with_mistakes_is_code_2_with_a_sentence_each(bench: Bench) -> None:
    plan = plan_of(bench, '[[client]]\nworkload = "bert"\ncount = 0\n')
    done = bench.run("--plan", plan)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.startswith("benchmark_suite.py: error: /") for line in lines] == [True, True]
    both = bench.run("--plan", plan, "--mix", "training")
    assert "not allowed with argument" in both.stderr


# --- proof, by the processes that a command starts --------------------------------------------


def test_a_grandchild_on_the_card_proves_a_command_and_one_that_is_never_listed_does_not(
    gpu_bench: Callable,
) -> None:
    bench = gpu_bench()
    # Long enough for a list of processes, however late a busy machine makes it.
    line = f"{sys.executable} {GPU_COMMAND} 1.0 & wait"
    shell = f'[[client]]\ncommand = "{line}"\nshell = true\n'
    run = bench.must("--plan", plan_of(bench, f"{shell}{command_table('1.0', 'hidden')}"))
    assert verdicts(run, "baseline") == ["verified", "unverified"]
    assert verdicts(run) == ["verified", "unverified"]
    evidence = run.clients_of("own-2-r0")[1]["proof"]["evidence"]
    assert any("processes is listed" in item["found"] for item in evidence)


def test_a_command_under_mps_is_proved_by_its_own_process_and_invalid_past_the_daemon(
    gpu_bench: Callable,
) -> None:
    bench = gpu_bench()
    start_daemon(bench)
    plan = plan_of(bench, f"{command_table('1.0')}\n{command_table('1.0', 'without_mps')}")
    done = bench.run("--mode", "mps", "--plan", plan)
    assert done.returncode == 5
    run = bench.only_run()
    assert verdicts(run, "baseline") == ["verified", "verified"]
    assert verdicts(run) == ["verified", "invalid"]
    assert [record["status"] for record in run.clients_of("own-2-r0")] == ["ok", "invalid"]


# --- limits of MPS clients ---------------------------------------------------------------------


def test_limits_of_mps_clients_reach_them_together_but_not_alone(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    start_daemon(bench)
    run = bench.must(
        "--mode", "mps", "--mix", "training", "--workloads", "2", "--quick",
        "--mps-percentage", "even", "--mps-memory-limit", "8G,4G",
    )  # fmt: skip
    seen = [record["identity"]["sharing_environment"] for record in run.client_records]
    percentages = [found.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for found in seen]
    limits = [found.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") for found in seen]
    assert percentages == [None, "50", "50"]
    assert limits == [None, "0=8G", "0=4G"]
    assert run.manifest["mix"] == "training"
    assert run.manifest["mps_limits"] == {
        "partitions": False, "percentages": ["even"], "memory_limits": ["8G", "4G"],
        "priorities": [],
    }  # fmt: skip
    assert run.co_run_records[-1]["co_run"] == "training-mps-even-mem-8G-4G-2-r0"
    read = read_run(run.folder)
    assert (read.settings, read.variant) == ("even, 8G/4G of memory", "mps:even,8G/4G")


# --- the breaking point -----------------------------------------------------------------------


def reasons(run: run_folder.Run) -> dict[str, str | None]:
    """Why each co-run did not hold, by its name."""
    found = {record["co_run"]: record["stop_reason"] for record in run.co_run_records}
    return {name: reason and reason["kind"] for name, reason in found.items()}


CAUSES = [
    (
        "oom",
        {"cause": "out_of_memory", "memory": {"where": "gpu", "tried_mib": 2560.0}},
        "tried 2.50 GiB with 1.00 GiB of 80.00 GiB free",
    ),
    (
        "error",
        {"cause": "diverged", "memory": None},
        "the training diverged: the loss of epoch 2 became nan (learning rate 1e+30, bf16)",
    ),
]


def test_a_cause_reaches_the_records_the_terminal_and_the_report(bench: Bench) -> None:
    for kind, told, sentence in CAUSES:
        rule = {"match": "*:interactive-2-r0/1", "fail": kind, "fail_at": 0.05}
        bench.script({**rule, "error": {**told, "message": sentence}})
        done = bench.run("--mix", "interactive", "--workloads", "2", "--run-id", told["cause"])
        assert done.returncode == 1
        assert sentence in done.stderr
        run = read_plain(bench.results / told["cause"])
        assert not run.warnings
        neighbor, record = run.clients_of("interactive-2-r0")
        assert {name: record[name] for name in told} == told
        assert (neighbor["status"], neighbor["cause"]) == ("ok", None)
    report = bench.report()
    assert [sentence for *_, sentence in CAUSES if sentence not in report] == []


def test_bisection_finds_the_count_between_with_everything_that_the_others_had(
    bench: Bench,
) -> None:
    bench.script(
        {"match": "*", "figures_once": {"cell_repeats": "3"}},
        {"match": "*:interactive-[4-9]-r0/3", "fail": "oom", "fail_at": 0.05},
    )
    done = bench.run("--mix", "interactive", "--workloads", "1,2,6", "--bisect")
    assert done.returncode == 1
    run = bench.only_run()
    assert reasons(run) == {
        "baseline-jupyter_simulation": None, "interactive-1-r0": None, "interactive-2-r0": None,
        "interactive-6-r0": "oom", "interactive-4-r0": "oom", "interactive-3-r0": None,
    }  # fmt: skip
    assert run.co_run_records[3]["stop_reason"]["client"] == 3
    assert "interactive-6-r0 does not hold: client 3 (Jupyter session) ran out" in done.stderr
    assert "breaking point: 4 at once; 3 held" in run.manifest["notes"][-2]
    added = run.manifest["plan"]["co_runs"][-1]["clients"][0]
    assert "--resolved yes" in " ".join(added["command"])
    assert "--cell-repeats 3 " in " ".join(added["command"])
    assert "OMP_NUM_THREADS" in added["environment"]


def test_a_bound_that_is_passed_ends_the_ramp_as_a_result(bench: Bench) -> None:
    bench.script(
        {"match": "*", "latency": True},
        {"match": "*:inference-4-r0/*", "unit_seconds": 0.2},
    )
    run = bench.must(
        "--mix", "inference", "--workloads", "1,2,4,6", "--slo-ms", "150", "--until-break"
    )
    assert reasons(run)["inference-4-r0"] == "p99"
    assert run.co_run_records[-1]["co_run"] == "inference-4-r0"
    assert run.manifest["outcome"] == "complete"
    assert run.manifest["bounds"] == {"max_slowdown": None, "max_p99_ms": 150.0}
