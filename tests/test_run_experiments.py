"""run_experiments.sh: order of phases, modes enabled and undone, failures, signals, dry run.

GPU, suite and analysis are pretended (fakes/), the driver and the scripts of gpu-configs/ are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from driver_runner import (
    AS_BEFORE,
    SYSTEM_PYTHON,
    UUID,
    DriverRunner,
    driver_runner,
    without_gpu_programs,
)
from mode_script_runner import needs_root

from benchmarking.records import run_folder
from benchmarking.suite import locks

SCRIPT = "run_experiments.sh"
# What makes a command run without root's rights.
AS_NOBODY = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
SECOND_UUID = "GPU-55555555-6666-7777-8888-999999999999"


def test_the_phases_take_turns_each_with_its_mode_alone_and_no_card_setting_touched(
    runner: DriverRunner,
) -> None:
    result = runner.drive(SCRIPT, "--quick", "--engine=eager", "--seed", "7", "--repeats", "2")
    assert result.returncode == 0, result.stderr
    assert runner.turns() == [
        "1 baseline", "1 time-slicing", "1 mps", "1 mps-even",
        "2 baseline", "2 mps-even", "2 mps", "2 time-slicing",
    ]  # fmt: skip
    daemons = [call["gpu"]["daemons"] for call in runner.all_suite_calls()]
    assert daemons == [0, 0, 1, 1, 0, 1, 1, 0]
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    changes = runner.machine.changing_calls()
    assert not [command for command in changes if command.startswith("nvidia-smi")]
    assert runner.left_behind() == []
    phases = sorted(runner.phases(), key=lambda phase: (phase["phase"], phase["name"]))
    assert [set(phase) for phase in phases] == [
        {"phase", "name", "status", "reason", "run_folder", "seconds"}
    ] * 6
    assert [(phase["phase"], phase["name"], phase["status"]) for phase in phases] == [
        (1, "baseline", "ok"),
        (2, "time-slicing", "ok"),
        (3, "mps", "ok"),
        (3, "mps:even", "ok"),
        (4, "mig", "skipped"),
        (5, "analysis", "ok"),
    ]
    folders = [phase["run_folder"] for phase in phases]
    assert folders == ["baseline", "time-slicing", "mps", "mps-even", "", ""]
    assert "--mig" in runner.reason("mig")


def test_the_suite_is_told_mode_size_window_gpu_and_baseline(runner: DriverRunner) -> None:
    runner.drive(SCRIPT, "--modes", "mps", "--gpu", "0")
    calls = runner.suite_calls()
    session = calls["mps"]["flags"]["--session"]
    shared = {
        "--mix": "mixed",
        "--workloads": "4",
        "--repeats": "4",
        "--round": "4",
        "--session": session,
        "--results-dir": str(runner.output),
        "--device": "auto",
        "--quick": "",
        "--settle": "3",
        "--gpu": UUID,
    }
    assert session.startswith("output-")
    assert calls["baseline"]["flags"] == {
        **shared,
        "--mode": "exclusive",
        "--null": "",
        "--min-seconds": "7",
        "--run-id": "baseline",
    }
    assert calls["mps"]["flags"] == {
        **shared,
        "--mode": "mps",
        "--window": "14",
        "--baseline": str(runner.output / "baseline"),
        "--run-id": "mps",
    }
    assert runner.reason("time-slicing") == "not asked for (--modes mps)"


@pytest.mark.parametrize(
    ("flags", "alone", "together", "rounds"),
    [
        (["--quick"], {"--settle": "2", "--min-seconds": "8"}, {"--window": "8"}, "3"),
        (["--full"], {"--quick": None, "--settle": None, "--min-seconds": None},
         {"--quick": None, "--window": None}, "4"),
        (["--mix", "pairs"], {"--settle": "3"}, {"--window": None, "--workloads": None}, "1"),
        (["--noise-floor", "--repeats", "3"], {"--null": ""}, {"--null": None}, "3"),
    ],
)  # fmt: skip
def test_job_sizes_windows_and_rounds(
    runner: DriverRunner, flags: list[str], alone: dict, together: dict, rounds: str
) -> None:
    assert runner.drive(SCRIPT, *flags, "--modes", "time-slicing").returncode == 0
    calls = runner.suite_calls()
    assert list(calls) == ["baseline", "time-slicing"]
    for call, wanted in zip(calls.values(), (alone, together), strict=True):
        assert {name: call["flags"].get(name) for name in wanted} == wanted
        assert call["flags"]["--repeats"] == call["flags"]["--round"] == rounds


def test_a_budget_is_for_all_rounds_together_and_said_before_the_first(
    runner: DriverRunner,
) -> None:
    # A round of baseline and time slicing takes two pretended minutes.
    result = runner.drive(SCRIPT, "--modes", "time-slicing", "--phase-minutes", "5.5")
    assert (
        "2 rounds of baseline, time-slicing: about 4 min (4 do not fit in 5.5 min); a claim needs 3"
    ) in result.stderr
    assert runner.turns()[-1] == "2 time-slicing"


@pytest.mark.parametrize(
    ("mode", "share"), [("mps:even", "even"), ("mps:50", "50"), ("mps:60/20", "60,20")]
)
def test_mps_with_a_limit_is_a_mode_of_its_own(runner: DriverRunner, mode: str, share: str) -> None:
    flags = ("--modes", f"mps,{mode}", "--repeats", "1", "--mps-percentage", "75")
    assert runner.drive(SCRIPT, *flags).returncode == 0
    calls = runner.suite_calls()
    given = [call["flags"].get("--mps-percentage") for call in calls.values()]
    assert given == [None, "75", share]
    assert list(calls)[2] == mode.replace(":", "-").replace("/", "-")
    # One daemon serves both.
    assert (
        sum("nvidia-cuda-mps-control -d" in line for line in runner.machine.changing_calls()) == 1
    )


@pytest.mark.parametrize("mode", ["mps:0", "mps:101", "mps:", "mps:even/", "time-slicing:50", "x"])
def test_a_mode_that_there_is_not_is_a_usage_error(runner: DriverRunner, mode: str) -> None:
    refused = runner.drive(SCRIPT, "--modes", mode)
    assert refused.returncode == 2
    assert "--modes needs some of: time-slicing mps mps:even mps:PERCENT mig" in refused.stderr


def test_a_phase_that_fails_does_not_stop_the_others(runner: DriverRunner) -> None:
    runner.rule(baseline={"exit": 1}, time_slicing={"exit": 5})
    result = runner.drive(SCRIPT)
    assert result.returncode == 1
    assert runner.outcomes() == {
        "baseline": "failed",
        "time-slicing": "failed",
        "mps": "ok",
        "mps:even": "ok",
        "mig": "skipped",
        "analysis": "ok",
    }
    assert [turn for turn in runner.turns() if "baseline" in turn or "slicing" in turn] == [
        "1 baseline", "1 time-slicing",
    ]  # fmt: skip
    assert runner.reason("time-slicing") == "there is no proof that the mode was in force"
    # the baseline of a failed phase is not reused: the suite takes its own
    assert "--baseline" not in runner.suite_calls()["mps"]["flags"]


def test_a_mode_that_cannot_be_enabled_is_a_failed_phase_with_the_scripts_words(
    runner: DriverRunner,
) -> None:
    runner.machine.fail("nvidia-cuda-mps-control -d", exit=1, text='not a "good" day')
    result = runner.drive(SCRIPT, GPU_SHARING_WAIT_SECONDS="1")
    assert result.returncode == 1
    assert runner.outcomes()["mps"] == "failed"
    assert "did not answer within 1 s" in runner.reason("mps")
    assert list(runner.suite_calls()) == ["baseline", "time-slicing"]
    assert runner.left_behind() == []


def test_a_gpu_that_torch_cannot_use_ends_the_run_with_3(runner: DriverRunner) -> None:
    runner.rule(baseline={"exit": 3})
    assert runner.drive(SCRIPT).returncode == 3
    assert list(runner.suite_calls()) == ["baseline"]
    assert runner.reason("mps") == "the GPU cannot be used"
    assert runner.machine.changing_calls() == []


def test_a_card_that_another_run_is_at_work_on_is_refused_before_any_mode_is_enabled(
    runner: DriverRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(runner.locks))
    with locks.hold(UUID):
        refused = runner.drive(SCRIPT, "--modes", "mps")
        assert refused.returncode == 4
        assert f"another run is at work on GPU {UUID}: pid {os.getpid()}" in refused.stderr
        assert runner.suite_calls() == {}
        assert runner.machine.changing_calls() == []
        allowed = runner.drive(SCRIPT, "--modes", "mps", "--allow-contention")
    assert allowed.returncode == 0, allowed.stderr
    assert "--allow-contention" in runner.suite_calls()["mps"]["flags"]


def test_an_earlier_baseline_takes_the_place_of_phase_1(runner: DriverRunner) -> None:
    earlier = runner.folder / "earlier"
    earlier.mkdir()
    (earlier / "manifest.json").write_text("{}")
    runner.drive(SCRIPT, "--modes", "time-slicing", "--baseline", str(earlier))
    assert runner.outcomes()["baseline"] == "skipped"
    flags = runner.suite_calls()["time-slicing"]["flags"]
    assert flags["--baseline"] == str(earlier)


def test_limits_of_mps_clients_are_for_mps_alone(runner: DriverRunner) -> None:
    result = runner.drive(SCRIPT, "--mps-percentage", "even", "--mps-memory-limit=8G")
    assert result.returncode == 0, result.stderr
    given = {name: call["flags"].get("--mps-percentage") for name, call in
             runner.suite_calls().items()}  # fmt: skip
    assert given == {"baseline": None, "time-slicing": None, "mps": "even", "mps-even": "even"}
    assert runner.suite_calls()["mps"]["flags"]["--mps-memory-limit"] == "8G"


def test_a_plan_takes_the_place_of_the_mix_in_every_phase(runner: DriverRunner) -> None:
    plan = "examples/plans/own-commands.toml"
    result = runner.drive(SCRIPT, "--plan", plan)
    assert result.returncode == 0, result.stderr
    for call in runner.suite_calls().values():
        assert (call["flags"]["--plan"], call["flags"]["--workloads"]) == (plan, "4")
        assert "--mix" not in call["flags"]


def test_another_mix_is_run_in_every_phase_but_not_beside_a_plan(runner: DriverRunner) -> None:
    assert runner.drive(SCRIPT, "--mix", "serving").returncode == 0
    assert {call["flags"]["--mix"] for call in runner.suite_calls().values()} == {"serving"}
    refused = runner.drive(SCRIPT, "--mix", "serving", "--plan", "examples/plans/own-commands.toml")
    assert refused.returncode == 2
    assert "--mix and --plan: give one of the two" in refused.stderr


def test_pairs_are_run_in_every_phase_and_have_no_count(runner: DriverRunner) -> None:
    assert runner.drive(SCRIPT, "--mix", "pairs").returncode == 0
    for call in runner.suite_calls().values():
        assert call["flags"]["--mix"] == "pairs"
        assert "--workloads" not in call["flags"]
    refused = runner.drive(SCRIPT, "--mix", "pairs", "--workloads", "4")
    assert refused.returncode == 2
    assert "two jobs in each co-run: leave --workloads" in refused.stderr


def test_a_plan_with_mistakes_is_exit_2_before_anything_is_done(
    runner: DriverRunner, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[client]]\nworkload = "resnet"\n')
    result = runner.drive(SCRIPT, "--plan", str(plan))
    assert result.returncode == 2
    assert "there is no workload 'resnet'" in result.stderr
    assert not runner.output.exists()


def test_an_analysis_that_fails_makes_the_exit_code_1(runner: DriverRunner) -> None:
    runner.rule(analysis={"exit": 2})
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 1
    assert runner.outcomes()["analysis"] == "failed"


def assert_mps_was_interrupted(runner: DriverRunner) -> None:
    """The phase counts as interrupted, everything is undone, and then the analysis ran."""
    analysis = runner.python_calls()[-1]
    assert analysis["program"] == "analyze_results.py"
    assert analysis["gpu"] == AS_BEFORE
    assert runner.left_behind() == []
    assert runner.outcomes() == {
        "baseline": "failed",
        "time-slicing": "skipped",
        "mps": "failed",
        "mig": "skipped",
        "analysis": "ok",
    }
    assert runner.reason("baseline") == runner.reason("mps") == "interrupted"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_the_suite_first_then_undoes_the_mode_then_reports(
    runner: DriverRunner, number: signal.Signals, code: int
) -> None:
    runner.rule(mps={"wait": True})
    status, stderr = runner.drive_until_signal(
        SCRIPT, "--modes", "mps,mig", run_id="mps", signals=[number]
    )
    assert status == code, stderr
    assert {"program": "benchmark_suite.py", "signal": 1} in runner.python_calls()
    assert_mps_was_interrupted(runner)
    assert runner.reason("mig") == "interrupted before it began"
    last = stderr.splitlines()[-1]
    assert last == f"Interrupted; to go on: ./run_experiments.sh --resume {runner.output}"


def test_a_closed_terminal_stops_the_suite_then_undoes_the_mode_then_reports(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"wait": True, "slow_to_end": 0.5})
    status = runner.drive_until_hangup(SCRIPT, "--modes", "mps,mig", run_id="mps")
    assert status == 129, (runner.output / "after-hangup.log").read_text()
    told, ended = runner.python_calls()[-3:-1]
    assert told == {"program": "benchmark_suite.py", "signal": 1}
    # the daemon was still there when the suite had ended its clients
    assert ended["ended"] == "mps"
    assert ended["gpu"]["daemons"] == 1
    assert_mps_was_interrupted(runner)
    assert "MPS is off" in (runner.output / "after-hangup.log").read_text()


@pytest.mark.parametrize("crash", ["ValueError", "SystemExit", "MemoryError"])
def test_a_suite_that_crashes_is_a_failed_phase_and_its_mode_is_undone(
    runner: DriverRunner, crash: str
) -> None:
    runner.rule(mps={"crash": crash})
    result = runner.drive(SCRIPT, "--modes", "mps")
    assert result.returncode == 1
    assert runner.reason("mps") == f"the suite crashed ({crash}: the suite has a fault)"
    assert "Traceback" in result.stderr
    assert runner.outcomes()["analysis"] == "ok"
    assert not runner.machine.state()["mps"]
    assert runner.left_behind() == []


def test_a_second_ctrl_c_ends_a_suite_that_does_not_listen(runner: DriverRunner) -> None:
    runner.rule(baseline={"wait": True, "deaf": True})
    status, stderr = runner.drive_until_signal(
        SCRIPT, run_id="baseline", signals=[signal.SIGINT, signal.SIGINT]
    )
    assert status == 130, stderr
    assert [call["signal"] for call in runner.python_calls() if "signal" in call] == [1, 2]
    assert list(runner.suite_calls()) == ["baseline"]


def test_an_experiment_that_was_killed_goes_on_with_its_flags_and_the_phases_that_are_missing(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"kill_driver": True})
    flags = ("--modes", "time-slicing,mps", "--seed", "7", "--data-dir", "/tmp", "--repeats", "2")
    assert runner.drive(SCRIPT, *flags).returncode == -signal.SIGKILL
    assert not (runner.output / "phases.jsonl").exists()
    assert runner.machine.state()["mps"]
    before = runner.all_suite_calls()

    runner.rule()
    result = runner.drive(SCRIPT, "--resume", str(runner.output))
    assert result.returncode == 0, result.stderr
    assert "mps was left in force when the script was cut off" in result.stderr
    # Word for word: the suite keeps what a round has already.
    again = runner.all_suite_calls()[len(before) :]
    assert [call["arguments"] for call in again[:3]] == [call["arguments"] for call in before]
    assert runner.turns()[len(before) :] == [
        "1 baseline", "1 time-slicing", "1 mps", "2 baseline", "2 mps", "2 time-slicing",
    ]  # fmt: skip
    assert set(runner.outcomes().values()) == {"ok", "skipped"}
    assert not runner.machine.state()["mps"]
    assert runner.left_behind() == []

    calls = len(runner.python_calls())
    assert runner.drive(SCRIPT, "--resume", str(runner.output)).returncode == 0
    assert [call["program"] for call in runner.python_calls()[calls:]] == ["analyze_results.py"]


def test_a_mode_whose_run_broke_keeps_that_for_its_reason(runner: DriverRunner) -> None:
    runner.rule(mps={"exit": 1, "outcome": "failed", "words": "client 3 ran out of memory"})
    assert runner.drive(SCRIPT, "--modes", "mps").returncode == 1
    assert runner.reason("mps") == "client 3 ran out of memory"
    assert runner.turns()[-1] == "4 baseline"


def test_a_phase_without_a_run_is_resumed_with_the_saved_flags(runner: DriverRunner) -> None:
    runner.rule(baseline={"kill_driver": True})
    folder = str(runner.folder / "a folder; with $words")
    os.mkdir(folder)
    assert runner.drive(SCRIPT, "--modes", "time-slicing", "--data-dir", folder).returncode == -9
    (runner.output / "baseline" / "manifest.json").unlink()
    runner.rule()
    result = runner.drive(SCRIPT, "--resume", str(runner.output))
    assert result.returncode == 0, result.stderr
    assert runner.suite_calls()["time-slicing"]["flags"]["--data-dir"] == folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume", "/nowhere"), "'/nowhere' holds no arguments.nul"),
        (("--resume", "/tmp", "--quick"), "--resume needs a folder and takes no other flags"),
        (("--quick", "--resume", "/tmp"), "give no others"),
    ],
)
def test_a_resume_that_makes_no_sense_is_exit_2_with_one_sentence(
    runner: DriverRunner, arguments: tuple[str, ...], words: str
) -> None:
    result = runner.drive(SCRIPT, *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_a_daemon_that_enable_mps_started_before_is_used_and_left_running(
    runner: DriverRunner,
) -> None:
    runner.must("enable_mps.sh")
    before = runner.saved("mps")
    result = runner.drive(SCRIPT, "--modes", "time-slicing,mps")
    assert result.returncode == 0, result.stderr
    assert runner.saved("mps") == before
    assert runner.python_calls()[-1]["gpu"]["daemons"] == 1
    assert runner.outcomes()["time-slicing"] == "ok"


def test_a_daemon_that_was_started_by_hand_is_used_and_left_running(runner: DriverRunner) -> None:
    pipe = runner.folder / "by-hand"
    pipe.mkdir()
    (pipe / "control").touch()
    runner.machine.add_mps_daemon(str(pipe), uid=os.geteuid(), user="me")
    result = runner.drive(SCRIPT, "--modes", "mps", CUDA_MPS_PIPE_DIRECTORY=str(pipe))
    assert result.returncode == 0, result.stderr
    assert runner.outcomes()["mps"] == "ok"
    assert runner.machine.changing_calls() == []
    assert runner.python_calls()[-1]["gpu"]["daemons"] == 1


@needs_root
def test_with_mig_allowed_it_is_switched_on_for_its_phase_and_off_again(
    runner: DriverRunner,
) -> None:
    result = runner.drive(SCRIPT, "--modes", "mig", "--mig", as_root=True)
    assert result.returncode == 0, result.stderr
    assert runner.suite_calls()["mig"]["gpu"] == {**AS_BEFORE, "mig": "Enabled", "instances": 4}
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


@needs_root
def test_a_mig_layout_is_made_given_to_the_suite_and_removed_again(runner: DriverRunner) -> None:
    layout = "2g.20gb,1g.10gb,1g.10gb"
    result = runner.drive(SCRIPT, "--modes", "mig", "--mig", "--mig-layout", layout, as_root=True)
    assert result.returncode == 0, result.stderr
    call = runner.suite_calls()["mig"]
    assert call["gpu"] == {**AS_BEFORE, "mig": "Enabled", "instances": 3}
    words = " ".join(call["arguments"])
    assert f"--mig-layout {layout}" in words
    assert "--workloads 3" in words
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


def test_a_mig_layout_is_refused_without_its_flag_and_with_profiles_that_the_card_lacks(
    runner: DriverRunner,
) -> None:
    assert runner.drive(SCRIPT, "--modes", "mig", "--mig-layout", "1g.10gb,2g.20gb").returncode == 0
    assert runner.reason("mig") == "MIG is off; --mig allows to switch it on"
    assert runner.machine.changing_calls() == []
    for words, said in (
        (["1g.5gb,1g.5gb,9g.90gb"], "has no profile 1g.5gb,9g.90gb; it has 1g.10gb 1g.10gb+me"),
        (["1g.10gb,2g.20gb", "--workloads", "4"], "has 2 instances for 4 jobs; name one for each"),
        (["2g,1g"], "needs MIG profiles with commas between"),
    ):
        refused = runner.drive(SCRIPT, "--mig", "--mig-layout", *words)
        assert refused.returncode == 2
        assert said in refused.stderr


@needs_root
def test_exclusive_and_timeslice_are_undone_after_their_phase(runner: DriverRunner) -> None:
    result = runner.drive(
        SCRIPT, "--modes=time-slicing,mps", "--exclusive", "--timeslice=long", as_root=True
    )
    assert result.returncode == 0, result.stderr
    calls = runner.suite_calls()
    assert calls["time-slicing"]["gpu"] == {**AS_BEFORE, "timeslice": "Long"}
    assert calls["mps"]["gpu"] == {**AS_BEFORE, "daemons": 1, "compute_mode": "Exclusive_Process"}
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE


SHORT, LONG = {**AS_BEFORE, "timeslice": "Short"}, {**AS_BEFORE, "timeslice": "Long"}
SHORT_SLICES = ("setup_time_slicing.sh", "2", "--timeslice", "short")
EXCLUSIVE = {**AS_BEFORE, "daemons": 1, "compute_mode": "Exclusive_Process"}
IS_USED = "is set up already; it is used as it is and left so"


@needs_root
@pytest.mark.parametrize(
    ("set_up", "flags", "during", "after", "said"),
    [
        (SHORT_SLICES, (), SHORT, SHORT, IS_USED),
        (SHORT_SLICES, ("--timeslice", "short"), SHORT, SHORT, IS_USED),
        (SHORT_SLICES, ("--timeslice=long",), LONG, SHORT, "--timeslice short --gpu"),
        (("enable_mps.sh", "--exclusive"), ("--exclusive",), EXCLUSIVE, EXCLUSIVE, IS_USED),
        (("enable_mps.sh",), ("--exclusive",), EXCLUSIVE, AS_BEFORE,
         "switched off altogether at the end"),
    ],
)  # fmt: skip
def test_what_the_user_had_set_up_is_used_where_it_is_what_was_asked_for_and_else_set_up_again(
    runner: DriverRunner, set_up: tuple[str, ...], flags: tuple[str, ...], during: dict,
    after: dict, said: str,
) -> None:  # fmt: skip
    mode = "mps" if set_up[0] == "enable_mps.sh" else "time-slicing"
    runner.must(*set_up)
    saved = runner.saved(mode)
    result = runner.drive(SCRIPT, f"--modes={mode}", *flags, as_root=True)
    assert result.returncode == 0, result.stderr
    assert said in result.stderr
    assert runner.suite_calls()[mode]["gpu"] == during
    assert runner.python_calls()[-1]["gpu"] == after
    assert runner.saved(mode) == (None if after == AS_BEFORE else saved)


@needs_root
def test_a_saved_time_slice_that_a_driver_reload_has_reset_is_set_anew(
    runner: DriverRunner,
) -> None:
    runner.must("setup_time_slicing.sh", "2", "--timeslice", "long")
    runner.machine.change_gpu(timeslice="Default")
    result = runner.drive(SCRIPT, "--modes=time-slicing", "--timeslice=long", as_root=True)
    assert result.returncode == 0, result.stderr
    assert runner.suite_calls()["time-slicing"]["gpu"]["timeslice"] == "Long"


@needs_root
def test_a_length_or_exclusive_mode_that_the_script_refuses_fails_the_phase(
    runner: DriverRunner,
) -> None:
    runner.must("setup_time_slicing.sh", "2", "--timeslice", "short")
    result = runner.drive(
        SCRIPT, "--modes=time-slicing", "--timeslice=long", as_root=True, GPU_SETTINGS_LOCKED="1"
    )
    assert result.returncode == 1
    assert "GPU_SETTINGS_LOCKED" in runner.reason("time-slicing")
    assert "time-slicing" not in runner.suite_calls()
    assert runner.gpu()["timeslice"] == "Short"
    assert runner.saved("time-slice")["set"] == "Short"


@needs_root
def test_exclusive_with_a_daemon_started_by_hand_fails_the_phase_with_one_sentence(
    runner: DriverRunner,
) -> None:
    pipe = runner.folder / "by-hand"
    pipe.mkdir()
    (pipe / "control").touch()
    runner.machine.add_mps_daemon(str(pipe), uid=0, user="root")
    result = runner.drive(
        SCRIPT, "--modes=mps", "--exclusive", as_root=True, CUDA_MPS_PIPE_DIRECTORY=str(pipe)
    )
    assert result.returncode == 1
    assert "that enable_mps.sh did not start is running" in runner.reason("mps")
    assert runner.python_calls()[-1]["gpu"]["daemons"] == 1


@needs_root
def test_instances_that_were_there_are_used_and_left_and_the_whole_gpu_phases_are_skipped(
    runner: DriverRunner,
) -> None:
    runner.must("setup_mig.sh", "1g.10gb", "4")
    result = runner.drive(SCRIPT)
    assert result.returncode == 0, result.stderr
    assert runner.outcomes() == {
        "baseline": "skipped",
        "time-slicing": "skipped",
        "mps": "skipped",
        "mps:even": "skipped",
        "mig": "ok",
        "analysis": "ok",
    }
    assert "MIG is on" in runner.reason("mps")
    assert runner.gpu()["mig_current"] == "Enabled"
    assert len(runner.gpu()["instances"]) == 4


@needs_root
def test_too_few_instances_of_the_users_are_never_replaced(runner: DriverRunner) -> None:
    runner.must("setup_mig.sh", "1g.10gb", "2")
    assert runner.drive(SCRIPT, as_root=True).returncode == 0
    assert runner.reason("mig").startswith("2 MIG instances for 4 clients")
    runner.output = runner.folder / "second"
    assert runner.drive(SCRIPT, "--mig", as_root=True).returncode == 1
    assert "of an earlier run are there" in runner.reason("mig")
    assert len(runner.gpu()["instances"]) == 2


@needs_root
def test_locked_settings_are_not_changed_even_when_allowed(runner: DriverRunner) -> None:
    before = runner.gpu()
    result = runner.drive(SCRIPT, "--modes", "mig", "--mig", as_root=True, GPU_SETTINGS_LOCKED="1")
    assert result.returncode == 1
    assert "GPU_SETTINGS_LOCKED" in runner.reason("mig")
    assert runner.machine.changing_calls() == []
    assert runner.gpu() == before


def test_a_gpu_without_mig_skips_that_phase(runner: DriverRunner) -> None:
    with driver_runner("t4") as other:
        assert other.drive(SCRIPT, "--modes", "mig", "--mig").returncode == 0
        assert other.reason("mig") == "Tesla T4 has no MIG"


def test_a_dry_run_prints_every_command_and_changes_nothing(runner: DriverRunner) -> None:
    before = runner.all_files()
    result = runner.drive(SCRIPT, "--dry-run", "--mig")
    assert result.returncode == 0, result.stderr
    assert runner.all_files() == before
    assert runner.python_calls() == []
    assert not runner.output.exists()
    lines = [line.removeprefix("would run: ") for line in result.stdout.splitlines()]
    expected = [
        "mkdir",
        "--mode exclusive",
        "setup_time_slicing.sh 4",
        "--mode time-slicing",
        "reset_time_slicing.sh",
        "enable_mps.sh",
        "--mode mps",
        "--mode mps",
        "disable_mps.sh",
        "setup_mig.sh 1g.5gb 4",
        "--mode mig",
        "disable_mig.sh",
        "analyze_results.py",
    ]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True))


def test_without_root_sudo_is_used_for_card_settings_alone_and_never_asks(
    runner: DriverRunner,
) -> None:
    programs = runner.folder / "programs"
    programs.mkdir()
    (programs / "sudo").write_text('#!/bin/sh\n[ "$1 $2" = "-n true" ]\n')
    (programs / "sudo").chmod(0o755)
    result = subprocess.run(
        [*AS_NOBODY, f"./{SCRIPT}", "--dry-run", "--mig", "--output", str(runner.output)],
        cwd=runner.project,
        env={
            **runner.environment,
            "PYTHON": SYSTEM_PYTHON,
            "PATH": f"{programs}:{runner.environment['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    scripts = [line for line in result.stdout.splitlines() if "gpu-configs" in line]
    with_sudo = [line for line in scripts if line.startswith("would run: sudo -n ")]
    assert [line.partition("gpu-configs/")[2].split()[0] for line in with_sudo] == [
        "setup_mig.sh",
        "disable_mig.sh",
    ]
    assert len(scripts) == 6


def test_without_a_gpu_the_cpu_demonstration_runs(runner: DriverRunner) -> None:
    result = runner.drive(SCRIPT, PATH=without_gpu_programs())
    assert result.returncode == 0, result.stderr
    assert "CPU demonstration" in result.stderr
    assert runner.outcomes() == {
        "baseline": "ok",
        "cpu-demo": "ok",
        "mps": "skipped",
        "mig": "skipped",
        "analysis": "ok",
    }
    assert runner.reason("mps") == runner.reason("mig") == "no NVIDIA GPU"
    flags = runner.suite_calls()["cpu-demo"]["flags"]
    assert flags["--repeats"] == "1"
    assert "--gpu" not in flags


@pytest.mark.parametrize("how", [("--device", "cpu"), ("--modes", "time-slicing")])
def test_a_gpu_that_is_hidden_or_not_wanted_is_left_alone(
    runner: DriverRunner, how: tuple[str, str]
) -> None:
    result = runner.drive(SCRIPT, *how, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert runner.outcomes()["cpu-demo"] == "ok"
    assert runner.machine.calls() == []


@pytest.mark.parametrize("driver", ["not-loaded", "Driver/library version mismatch"])
def test_a_driver_that_does_not_answer_is_exit_3_and_no_demonstration(
    runner: DriverRunner, driver: str
) -> None:
    runner.machine.change(driver=driver)
    result = runner.drive(SCRIPT)
    assert result.returncode == 3
    assert "mend the driver, or choose --device cpu" in result.stderr
    refusal = runner.refusal()
    assert refusal["exit_code"] == 3
    assert refusal["command"] == [f"./{SCRIPT}", "--output", str(runner.output)]
    assert f"error: {refusal['sentence']}" in result.stderr.splitlines()
    # the folder is as good as a new one
    runner.machine.change(driver="ok")
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 0


def test_a_dry_run_that_is_refused_leaves_nothing(runner: DriverRunner) -> None:
    runner.machine.change(driver="not-loaded")
    assert runner.drive(SCRIPT, "--dry-run").returncode == 3
    assert not runner.output.exists()


def test_what_the_suite_said_at_its_end_is_the_reason_of_its_phase(runner: DriverRunner) -> None:
    sentence = 'r0: client 1 ("ResNet50") ran out of\tmemory; choose \\ fewer'
    runner.rule(baseline={"exit": 1, "words": sentence}, analysis={"exit": 1, "words": "no room"})
    result = runner.drive(SCRIPT, "--modes", "time-slicing")
    assert result.returncode == 1
    said = sentence.replace("\t", " ")
    assert runner.reason("baseline") == said
    assert f"Phase 1: baseline: failed ({said})" in result.stderr
    assert runner.reason("time-slicing") == ""
    assert runner.reason("analysis") == "no room"


def test_a_row_that_a_full_disk_cut_off_is_neither_done_nor_part_of_the_next_one(
    runner: DriverRunner,
) -> None:
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 0
    path = runner.output / "phases.jsonl"
    rows = path.read_text().splitlines()
    torn = rows[1][: rows[1].index('"seconds"')]
    assert '"status":"ok"' in torn
    path.write_text(f"{rows[0]}\n{torn}")
    done_before = len(runner.suite_calls())
    assert runner.drive(SCRIPT, "--resume", str(runner.output)).returncode == 0
    assert len(runner.python_calls()) > done_before
    phases, warnings = run_folder.read_phases(runner.output)
    assert [phase.name for phase in phases] == [
        "baseline", "time-slicing", "mps", "mig", "analysis",
    ]  # fmt: skip
    (warning,) = warnings
    assert "line 2 is truncated" in warning


def test_without_a_gpu_one_demonstration_runs_whichever_mode_is_asked_for(
    runner: DriverRunner,
) -> None:
    result = runner.drive(SCRIPT, "--modes", "mps", PATH=without_gpu_programs())
    assert result.returncode == 0, result.stderr
    assert list(runner.suite_calls()) == ["baseline", "cpu-demo"]
    assert runner.suite_calls()["cpu-demo"]["flags"]["--mode"] == "mps"
    assert runner.reason("mps") == "no NVIDIA GPU"


def test_the_first_visible_gpu_is_taken_and_passed_on_by_uuid(runner: DriverRunner) -> None:
    with driver_runner("h100x2") as two:
        result = two.drive(SCRIPT, "--modes", "mig", CUDA_VISIBLE_DEVICES="1,0")
        assert result.returncode == 0, result.stderr
        assert two.suite_calls()["baseline"]["flags"]["--gpu"] == SECOND_UUID


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--modes", "mps,mpz"],
            "--modes needs some of: time-slicing mps mps:even mps:PERCENT mig",
        ),
        (["--modes", ""], "--modes needs some of"),
        (["--workloads", "0"], "--workloads needs a whole number from 1 on"),
        (["--repeats"], "--repeats needs a whole number from 1 on"),
        (["--phase-minutes", "0.0"], "--phase-minutes needs a number of minutes over 0"),
        (["--engine", "fast"], "--engine needs one of: eager graph compile"),
        (["--data-dir", "/nonexistent"], "--data-dir: '/nonexistent' is not a folder"),
        (["--baseline", "/nonexistent"], "--baseline: '/nonexistent' is no run folder"),
        (["--seed", "-1"], "--seed needs a whole number from 0 on"),
        (["--nonsense"], "unknown option: --nonsense"),
        (["extra"], "unexpected argument: extra"),
    ],
)
def test_a_wrong_argument_is_exit_2_with_one_sentence_before_anything_is_done(
    runner: DriverRunner, arguments: list[str], words: str
) -> None:
    result = runner.drive(SCRIPT, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Try './run_experiments.sh --help'" in result.stderr
    assert not runner.output.exists()


def test_a_folder_that_holds_something_is_not_written_into(runner: DriverRunner) -> None:
    runner.output.mkdir()
    (runner.output / "mine.txt").write_text("mine")
    result = runner.drive(SCRIPT)
    assert result.returncode == 2
    assert "is not empty; name another folder" in result.stderr
    assert [path.name for path in runner.output.iterdir()] == ["mine.txt"]


def test_help_tells_phases_flags_and_exit_codes_and_touches_nothing(runner: DriverRunner) -> None:
    result = runner.drive(SCRIPT, "--help")
    assert result.returncode == 0
    for word in ("Phase 5 analysis", "--phase-minutes", "--mig", "--dry-run", "Exit codes"):
        assert word in result.stdout
    assert runner.machine.calls() == []
