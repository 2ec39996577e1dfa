"""stress_test.sh: which counts are tried, the mode around them, what counts as a result.

GPU, suite and analysis are pretended (fakes/), the driver and the scripts of gpu-configs/ are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from driver_runner import (
    AS_BEFORE,
    UUID,
    DriverRunner,
    driver_runner,
    without_gpu_programs,
)
from mode_script_runner import PROJECT_ROOT, needs_root

from benchmarking.measuring import locks
from benchmarking.records import run_folder

SCRIPT = "stress_test.sh"
EXAMPLE = "examples/plans/own-commands.toml"


def test_one_suite_run_ramps_up_training_jobs_under_time_slicing_then_the_table_is_made(
    runner: DriverRunner,
) -> None:
    result = runner.must_drive(SCRIPT)
    (call,) = runner.suite_calls().values()
    assert call["flags"] == {
        "--mode": "time-slicing", "--mix": "training", "--workloads": "1,2,4,6,8",
        "--repeats": "1", "--bisect": "", "--results-dir": str(runner.output),
        "--run-id": "time-slicing", "--device": "auto", "--gpu": UUID,
    }  # fmt: skip
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert "scaling-" not in result.stderr
    assert runner.left_behind() == []


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["mps", "1"], "1"),
        (["mps", "7"], "1,2,4,6,7"),
        (["mps", "10", "--mix", "inference"], "1,2,4,6,8,10"),
        (["--mix", "mixed", "mps", "12"], "4,8,12"),
        (["mps", "--mix=serving"], "4,8"),
        (["mps", "12", "--plan", EXAMPLE], "4,8,12"),
        (["mps", "4", "--mix", "inference", "--max-slowdown=2.5", "--slo-ms", "50",
          "--until-break", "--no-bisect"], "1,2,4"),
    ],
)  # fmt: skip
def test_the_counts_go_up_in_steps_and_bounds_and_search_reach_the_suite(
    asked: DriverRunner, arguments: list[str], counts: str
) -> None:
    flags = asked.planned(SCRIPT, *arguments)["mps"]
    assert flags["--workloads"] == counts
    assert flags.get("--plan") == (EXAMPLE if EXAMPLE in arguments else None)
    assert ("--mix" in flags) is (EXAMPLE not in arguments)
    is_bounded = "--no-bisect" in arguments
    assert ("--until-break" in flags, "--bisect" in flags) == (is_bounded, not is_bounded)
    bounds = (flags.get("--max-slowdown"), flags.get("--slo-ms"))
    assert bounds == (("2.5", "50") if is_bounded else (None, None))


def test_the_mode_is_on_during_the_ramp_and_off_before_its_chart_which_is_named(
    runner: DriverRunner,
) -> None:
    runner.rule(analysis={"files": {"scaling-training.png": ""}})
    result = runner.must_drive(SCRIPT, "mps", "2")
    assert "(the ramp is scaling-training.png)" in result.stderr
    assert runner.suite_calls()["mps"]["gpu"]["daemons"] == 1
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


def test_a_ramp_under_static_partitions_has_one_for_each_job_of_the_largest_count(
    runner: DriverRunner,
) -> None:
    reason = "mps:partitions cannot be used: static SM partitions need nvidia-cuda-mps-control"
    refused = runner.drive(SCRIPT, "mps:partitions", "4")
    assert refused.returncode == 1 and reason in refused.stderr
    runner.machine.change(mps_version=13010)
    runner.must_drive(SCRIPT, "mps:partitions", "4")
    call = runner.suite_calls()["mps-partitions"]
    assert (call["flags"]["--mode"], call["gpu"]["daemons"]) == ("mps", 1)
    assert "--mps-partitions" in call["flags"]
    made = [one for one in runner.machine.changing_calls() if "sm_partition add" in one]
    assert len(made) == 4
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


@needs_root
def test_mig_gets_an_instance_for_each_job_of_the_largest_count(runner: DriverRunner) -> None:
    runner.must_drive(SCRIPT, "mig", "6", "--mig", as_root=True)
    assert runner.suite_calls()["mig"]["gpu"]["instances"] == 6
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


@pytest.mark.parametrize(
    ("last_good", "words", "code", "said"),
    [
        (4, None, 0, ""),
        (None, None, 1, "a co-run failed before anything could be compared"),
        # a full disk is no breaking point
        (4, "cannot write to /x (No space left on device): make room there", 1,
         "error: cannot write to /x (No space left on device)"),
    ],
)  # fmt: skip
def test_a_count_that_breaks_is_a_result_and_a_job_that_already_fails_alone_is_none(
    runner: DriverRunner, last_good: int | None, words: str | None, code: int, said: str
) -> None:
    ramp = {"mode": "mps", "breaking_point": {"last_good_clients": last_good}}
    text = json.dumps({"sections": [{"ramps": [ramp]}]}, indent=1)
    rule = {"exit": 1, **({"words": words} if words else {})}
    runner.rule(mps=rule, analysis={"files": {"comparison.json": text}})
    result = runner.drive(SCRIPT, "mps")
    assert result.returncode == code
    assert said in result.stderr


def test_what_the_suite_refuses_keeps_its_exit_code_and_names_no_report(tmp_path: Path) -> None:
    plan = tmp_path / "mine.toml"
    plan.write_text('[[client]]\ncommand = "true"\n')
    script = [sys.executable, str(PROJECT_ROOT / "benchmarking" / "stress_test.py")]
    flags = ["time-slicing", "1", "--device", "cpu", "--plan", str(plan), "--slo-ms", "5"]
    environment = {**os.environ, locks.FOLDER_VARIABLE: str(tmp_path), "PYTHON": sys.executable}
    refused = subprocess.run(
        [*script, *flags, "--output", str(tmp_path / "out")], env=environment, cwd=tmp_path,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "error: --slo-ms needs jobs with response times" in refused.stderr.splitlines()[-1]
    assert "report" not in refused.stderr


def test_a_run_without_proof_is_no_result_and_still_undone_and_reported(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"exit": 5})
    result = runner.drive(SCRIPT, "mps")
    assert result.returncode == 1
    assert "no proof" in result.stderr
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("h100", ["mig", "4"], "mig cannot be used: MIG is off; --mig allows switching it on"),
        ("t4", ["mig", "4", "--mig"], "mig cannot be used: Tesla T4 has no MIG"),
    ],
)
def test_a_mode_that_cannot_be_had_ends_with_one_sentence_which_is_all_that_it_leaves(
    kind: str, arguments: list[str], words: str
) -> None:
    with driver_runner(kind) as runner:
        result = runner.drive(SCRIPT, *arguments)
        assert result.returncode == 1
        assert words in result.stderr
        assert words in runner.refusal()["sentence"]


def test_a_mode_that_cannot_be_enabled_is_kept_as_refused(runner: DriverRunner) -> None:
    runner.machine.fail("nvidia-cuda-mps-control -d", exit=1, text="no")
    assert runner.drive(SCRIPT, "mps", "2", GPU_SHARING_WAIT_SECONDS="1").returncode == 1
    (refusal,), _ = run_folder.read_refusals(runner.output)
    assert "the MPS daemon did not answer within 1 s" in refusal.sentence


def test_without_a_gpu_it_is_a_demonstration(runner: DriverRunner) -> None:
    result = runner.must_drive(SCRIPT, "mps", "2", PATH=without_gpu_programs())
    assert "CPU demonstration" in result.stderr
    assert "--gpu" not in runner.suite_calls()["cpu-demo"]["flags"]


def test_a_ramp_that_was_killed_goes_on_as_the_same_run(runner: DriverRunner) -> None:
    runner.rule(mps={"kill_driver": True})
    assert runner.drive(SCRIPT, "mps", "4", "--max-slowdown", "2").returncode == -9
    runner.rule()
    done_before = len(runner.python_calls())
    runner.must_drive(SCRIPT, "--resume", str(runner.output))
    suite, analysis = runner.python_calls()[done_before:]
    assert suite["arguments"] == ["--resume", str(runner.output / "mps")]
    assert analysis["program"] == "analyze_results.py"
    assert not runner.machine.state()["mps"]
