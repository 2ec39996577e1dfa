"""stress_test.sh: which counts are tried, the mode around them, what counts as a result.

GPU, suite and analysis are pretended (fakes/), the driver and the scripts of gpu-configs/ are real.
"""

from __future__ import annotations

import json
import signal

import pytest
from driver_runner import (
    AS_BEFORE,
    UUID,
    DriverRunner,
    driver_runner,
    without_gpu_programs,
)
from mode_script_runner import needs_root

from benchmarking.records import run_folder

SCRIPT = "stress_test.sh"
EXAMPLE = "examples/plans/own-commands.toml"


def leave_ramp(runner: DriverRunner, last_good_clients: int | None) -> None:
    """What the pretended analysis leaves as its comparison."""
    ramp = {"mode": "mps", "breaking_point": {"last_good_clients": last_good_clients}}
    text = json.dumps({"sections": [{"ramps": [ramp]}]}, indent=1)
    runner.rule(mps={"exit": 1}, analysis={"files": {"comparison.json": text}})


def test_one_suite_run_ramps_up_training_jobs_under_time_slicing_then_the_table_is_made(
    runner: DriverRunner,
) -> None:
    result = runner.must_drive(SCRIPT)
    (call,) = runner.suite_calls().values()
    assert call["flags"] == {
        "--mode": "time-slicing",
        "--mix": "training",
        "--workloads": "1,2,4,6,8",
        "--repeats": "1",
        "--bisect": "",
        "--results-dir": str(runner.output),
        "--run-id": "time-slicing",
        "--device": "auto",
        "--gpu": UUID,
    }
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert "scaling-" not in result.stderr
    assert runner.left_behind() == []


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["mps", "1"], "1"),
        (["mps", "2"], "1,2"),
        (["mps", "7"], "1,2,4,6,7"),
        (["mps", "10", "--mix", "inference"], "1,2,4,6,8,10"),
        (["mps", "4", "--mix=mixed"], "4"),
        (["--mix", "mixed", "mps", "12"], "4,8,12"),
        (["mps", "--mix", "serving"], "4,8"),
    ],
)
def test_the_counts_go_up_in_steps_and_end_with_the_largest(
    asked: DriverRunner, arguments: list[str], counts: str
) -> None:
    result = asked.drive(SCRIPT, *arguments, "--dry-run")
    assert f"--workloads {counts} --repeats" in result.stdout


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


def test_bounds_and_the_search_for_the_exact_count_reach_the_suite(asked: DriverRunner) -> None:
    planned = asked.planned(
        SCRIPT, "mps", "4", "--mix", "inference", "--max-slowdown=2.5", "--slo-ms", "50",
        "--until-break", "--no-bisect",
    )  # fmt: skip
    flags = planned["mps"]
    assert (flags["--max-slowdown"], flags["--slo-ms"]) == ("2.5", "50")
    assert "--until-break" in flags
    assert "--bisect" not in flags


def test_jobs_of_a_plan_go_up_in_multiples_of_its_clients(asked: DriverRunner) -> None:
    refused = asked.drive(SCRIPT, "mps", "6", "--plan", EXAMPLE)
    assert refused.returncode == 2
    assert "MAX needs to be a multiple of 4" in refused.stderr
    flags = asked.planned(SCRIPT, "mps", "12", "--plan", EXAMPLE)["mps"]
    assert (flags["--plan"], flags["--workloads"]) == (EXAMPLE, "4,8,12")
    assert "--mix" not in flags


@needs_root
def test_mig_gets_an_instance_for_each_job_of_the_largest_count(runner: DriverRunner) -> None:
    runner.must_drive(SCRIPT, "mig", "6", "--mig", as_root=True)
    assert runner.suite_calls()["mig"]["gpu"]["instances"] == 6
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


def test_a_count_that_breaks_is_a_result(runner: DriverRunner) -> None:
    leave_ramp(runner, last_good_clients=4)
    assert runner.drive(SCRIPT, "mps").returncode == 0


def test_a_job_that_already_fails_alone_is_no_result(runner: DriverRunner) -> None:
    leave_ramp(runner, last_good_clients=None)
    result = runner.drive(SCRIPT, "mps")
    assert result.returncode == 1
    assert "a co-run failed before anything could be compared" in result.stderr


def test_a_run_without_proof_is_no_result_and_still_undone_and_reported(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"exit": 5})
    result = runner.drive(SCRIPT, "mps")
    assert result.returncode == 1
    assert "no proof" in result.stderr
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


def test_ctrl_c_undoes_the_mode_and_reports_what_was_done(runner: DriverRunner) -> None:
    runner.rule(mps={"wait": True})
    status, stderr = runner.drive_until_signal(SCRIPT, "mps", run_id="mps", signals=[signal.SIGINT])
    assert status == 130, stderr
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("h100", ["mig", "4"], "mig cannot be used: MIG is off; --mig allows to switch it on"),
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


def test_a_disk_that_is_full_is_no_breaking_point(runner: DriverRunner) -> None:
    leave_ramp(runner, last_good_clients=4)
    rules = json.loads((runner.suite_state / "rules.json").read_text())
    rules["mps"]["words"] = "cannot write to /x (No space left on device): make room there"
    runner.rule(**rules)
    result = runner.drive(SCRIPT, "mps", "8")
    assert result.returncode == 1
    assert "error: cannot write to /x (No space left on device)" in result.stderr


def test_without_a_gpu_it_is_a_demonstration(runner: DriverRunner) -> None:
    result = runner.must_drive(SCRIPT, "mps", "2", PATH=without_gpu_programs())
    assert "CPU demonstration" in result.stderr
    assert "--gpu" not in runner.suite_calls()["cpu-demo"]["flags"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exclusive"], "MODE needs one of: time-slicing mps mps:partitions mig"),
        (["mps", "none"], "MAX needs a whole number from 1 on"),
        (["mps", "4", "4"], "unexpected argument: 4"),
        (["mps", "6", "--mix", "mixed"], "MAX needs to be a multiple of 4"),
        (["--slo-ms", "0"], "--slo-ms needs a number above 0"),
        (["--slo-ms", "50"], "--slo-ms needs jobs with response times"),
        (["mig", "--until-break"], "as many jobs as instances"),
        (["mps:partitions", "--until-break"], "each on its own partition"),
        (["mps:partitions", "--mps-percentage", "50"], "--mps-percentage: under mps:partitions"),
        (["--mps-percentage", "50"], "--mps-percentage needs MODE mps"),
        (["--plan", "no.toml"], "'no.toml' is not a file"),
        (["--plan", EXAMPLE, "--mix", "mixed"], "give one of the two"),
        (["--mix", "all"], "--mix needs one of: training inference interactive mixed"),
    ],
)
def test_a_wrong_argument_is_exit_2_before_anything_is_done(
    asked: DriverRunner, arguments: list[str], words: str
) -> None:
    result = asked.drive(SCRIPT, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert not asked.output.exists()


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
