"""run_experiments.sh: order of phases, modes enabled and undone, failures, signals, dry run.

GPU, suite and analysis are pretended (fakes/), the driver and the scripts of gpu-configs/ are real.
"""

from __future__ import annotations

import os
import signal

import pytest
from driver_runner import (
    AS_BEFORE,
    SYSTEM_PYTHON,
    UUID,
    DriverRunner,
    driver_runner,
    without_gpu_programs,
)
from mode_script_runner import AS_USER, needs_root, require_reachable

from benchmarking.measuring import locks
from benchmarking.records import run_folder

SCRIPT = "run_experiments.sh"
PLAN = "examples/plans/own-commands.toml"
START = "nvidia-cuda-mps-control -d"


# --- the course of an experiment ------------------------------------------------------------------


def test_the_phases_take_turns_each_with_its_mode_alone_and_no_card_setting_touched(
    runner: DriverRunner,
) -> None:
    runner.must_drive(SCRIPT, "--quick", "--engine=eager", "--seed", "7", "--repeats", "2")
    assert runner.turns() == [
        "1 baseline", "1 time-slicing", "1 mps", "1 mps-even",
        "2 baseline", "2 mps-even", "2 mps", "2 time-slicing",
    ]  # fmt: skip
    daemons = [call["gpu"]["daemons"] for call in runner.all_suite_calls()]
    assert daemons == [0, 0, 1, 1, 0, 1, 1, 0]
    changes = runner.machine.changing_calls()
    assert not [command for command in changes if command.startswith("nvidia-smi")]
    assert sum(START in command for command in changes) == 2  # one serves both kinds of MPS
    assert runner.python_calls()[-1]["program"] == "analyze_results.py"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []
    phases = sorted(runner.phases(), key=lambda phase: (phase["phase"], phase["name"]))
    assert [set(phase) for phase in phases] == [
        {"phase", "name", "status", "reason", "run_folder", "seconds"}
    ] * 6
    assert [(p["phase"], p["name"], p["status"], p["run_folder"]) for p in phases] == [
        (1, "baseline", "ok", "baseline"), (2, "time-slicing", "ok", "time-slicing"),
        (3, "mps", "ok", "mps"), (3, "mps:even", "ok", "mps-even"),
        (4, "mig", "skipped", ""), (5, "analysis", "ok", ""),
    ]  # fmt: skip
    assert "--mig" in runner.reason("mig")


def test_the_suite_is_told_mode_size_window_gpu_and_baseline_as_a_dry_run_promises(
    runner: DriverRunner,
) -> None:
    promised = runner.planned(SCRIPT, "--modes", "mps", "--gpu", "0")
    runner.drive(SCRIPT, "--modes", "mps", "--gpu", "0")
    calls = {name: call["flags"] for name, call in runner.suite_calls().items()}
    session = calls["mps"]["--session"]
    assert session.startswith("output-")
    shared = {
        "--mix": "mixed", "--workloads": "4", "--repeats": "1", "--round": "1",
        "--session": session, "--results-dir": str(runner.output), "--device": "auto",
        "--quick": "", "--settle": "3", "--gpu": UUID,
    }  # fmt: skip
    assert calls == {
        "baseline": {**shared, "--mode": "exclusive", "--null": "", "--min-seconds": "7",
                     "--run-id": "baseline"},
        "mps": {**shared, "--mode": "mps", "--window": "14", "--run-id": "mps",
                "--baseline": str(runner.output / "baseline")},
    }  # fmt: skip
    assert {name: {**flags, "--session": session} for name, flags in promised.items()} == calls
    assert runner.reason("time-slicing") == "not asked for (--modes mps)"
    # an earlier baseline takes the place of phase 1
    earlier = str(runner.output.rename(runner.folder / "earlier") / "baseline")
    runner.drive(SCRIPT, "--modes", "time-slicing", "--baseline", earlier)
    assert runner.outcomes()["baseline"] == "skipped"
    assert runner.suite_calls()["time-slicing"]["flags"]["--baseline"] == earlier


def test_a_budget_is_for_all_rounds_together_and_said_before_the_first(
    runner: DriverRunner,
) -> None:
    # A round of baseline and time slicing takes two pretended minutes.
    result = runner.drive(SCRIPT, "--modes", "time-slicing", "--phase-minutes", "5.5")
    assert (
        "2 rounds of baseline, time-slicing: about 4 min (4 do not fit in 5.5 min); a claim needs 3"
    ) in result.stderr
    assert runner.turns()[-1] == "2 time-slicing"


# Flags, and what of them the suite is told for a run; None: nothing.
FLAGS = [
    (["--quick", "--modes", "time-slicing"], {
        "baseline": {"--settle": "2", "--min-seconds": "8", "--repeats": "3"},
        "time-slicing": {"--window": "8", "--repeats": "3"}}),
    (["--full", "--modes", "time-slicing"], {
        "baseline": {"--quick": None, "--settle": None, "--min-seconds": None, "--repeats": "4"},
        "time-slicing": {"--quick": None, "--window": None}}),
    (["--noise-floor", "--repeats", "3", "--modes", "time-slicing"], {
        "baseline": {"--null": "", "--repeats": "3"}, "time-slicing": {"--null": None}}),
    (["--mix", "pairs", "--phase-minutes", "99", "--modes", "time-slicing"], {
        "baseline": {"--settle": "3", "--repeats": "1", "--mix": "pairs", "--workloads": None},
        "time-slicing": {"--window": None, "--mix": "pairs", "--workloads": None}}),
    *((flags, {run: told for run in ("baseline", "time-slicing", "mps", "mps-even")})
      for flags, told in ((["--mix", "serving"], {"--mix": "serving"}),
                          (["--plan", PLAN], {"--plan": PLAN, "--workloads": "4", "--mix": None}))),
    *((["--modes", f"mps,{mode}", "--mps-percentage", "75"], {
        "baseline": {"--mps-percentage": None}, "mps": {"--mps-percentage": "75"},
        folder: {"--mps-percentage": share}})
      for mode, folder, share in (("mps:even", "mps-even", "even"), ("mps:50", "mps-50", "50"),
                                  ("mps:60/20", "mps-60-20", "60,20"))),
    (["--modes", "time-slicing,mps", "--mps-percentage", "even", "--mps-memory-limit=8G"], {
        "baseline": {"--mps-percentage": None, "--mps-memory-limit": None},
        "time-slicing": {"--mps-percentage": None, "--mps-memory-limit": None},
        "mps": {"--mps-percentage": "even", "--mps-memory-limit": "8G"}}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "told"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_flags_reach_the_runs_that_they_are_for(
    asked: DriverRunner, flags: list[str], told: dict[str, dict]
) -> None:
    planned = asked.planned(SCRIPT, *flags)
    assert list(planned) == list(told)
    for name, wanted in told.items():
        assert {flag: planned[name].get(flag) for flag in wanted} == wanted


# --- failures -------------------------------------------------------------------------------------


def test_a_phase_that_fails_says_why_and_does_not_stop_the_others(runner: DriverRunner) -> None:
    sentence = 'r0: client 1 ("ResNet50") ran out of\tmemory; choose \\ fewer'
    runner.rule(
        baseline={"exit": 1, "words": sentence}, time_slicing={"exit": 5},
        mps_even={"crash": "ValueError"}, mps_25={"crash": "SystemExit"},
        mps={"exit": 1, "outcome": "failed"}, analysis={"exit": 1, "words": "no room"},
    )  # fmt: skip
    result = runner.drive(
        SCRIPT, "--modes", "time-slicing,mps,mps:even,mps:25,mps:50", "--repeats", "2"
    )
    assert result.returncode == 1
    assert runner.outcomes() == {
        "baseline": "failed", "time-slicing": "failed", "mps": "failed", "mps:even": "failed",
        "mps:25": "failed", "mps:50": "ok", "mig": "skipped", "analysis": "failed",
    }  # fmt: skip
    assert runner.reason("baseline") == sentence.replace("\t", " ")
    assert f"Phase 1: baseline: failed ({runner.reason('baseline')})" in result.stderr
    assert runner.reason("time-slicing") == "there is no proof that the mode was in force"
    assert runner.reason("mps:even") == "the suite crashed (ValueError: the suite has a fault)"
    assert runner.reason("mps:25") == "the suite crashed (SystemExit: the suite has a fault)"
    assert "Traceback" in result.stderr
    assert runner.reason("analysis") == "no room"
    # what has failed is not measured on in the second round
    assert [turn for turn in runner.turns() if turn.startswith("2")] == ["2 mps-50"]
    # the baseline of a failed phase is not reused: the suite takes its own
    assert "--baseline" not in runner.suite_calls()["mps"]["flags"]
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


def test_a_gpu_that_torch_cannot_use_ends_the_run_with_3(runner: DriverRunner) -> None:
    runner.rule(baseline={"exit": 3})
    assert runner.drive(SCRIPT).returncode == 3
    assert list(runner.suite_calls()) == ["baseline"]
    assert runner.reason("mps") == "the GPU cannot be used"
    assert runner.machine.changing_calls() == []


def test_a_gpu_that_is_lost_leaves_the_rounds_that_are_missing_to_resume(
    runner: DriverRunner,
) -> None:
    runner.rule(time_slicing={"exit": 3})
    assert runner.drive(SCRIPT, "--modes", "time-slicing", "--repeats", "2").returncode == 3
    assert runner.turns() == ["1 baseline", "1 time-slicing"]
    assert runner.outcomes()["baseline"] == "failed"
    assert runner.reason("baseline") == "the GPU cannot be used"
    runner.rule()
    runner.must_drive(SCRIPT, "--resume", str(runner.output))
    assert runner.turns()[-2:] == ["2 baseline", "2 time-slicing"]


def test_a_card_that_another_run_is_at_work_on_is_refused_before_any_mode_is_enabled(
    runner: DriverRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(runner.locks))
    secret = "hunter2-hunter2"
    job = ("--job", f"sleep 1 --token {secret}")
    with locks.hold(UUID):
        refused = runner.drive(SCRIPT, "--modes", "mps", *job)
        assert refused.returncode == 4
        assert f"another run is at work on GPU {UUID}: pid {os.getpid()}" in refused.stderr
        assert runner.suite_calls() == {}
        assert runner.machine.changing_calls() == []
        allowed = runner.drive(SCRIPT, "--modes", "mps", "--allow-contention", *job)
    assert allowed.returncode == 0, allowed.stderr
    refusals = (runner.output / "refusals.jsonl").read_text()
    assert not any(secret in text for text in (refusals, refused.stderr, allowed.stderr))
    assert "hidden:TOKEN:" in refusals
    assert "hidden:TOKEN:" in allowed.stderr
    assert secret in runner.suite_calls()["mps"]["flags"]["--job"]
    assert "--allow-contention" in runner.suite_calls()["mps"]["flags"]


# --- signals --------------------------------------------------------------------------------------


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
    *_, told, analysis = runner.python_calls()
    assert told == {"program": "benchmark_suite.py", "signal": 1}
    assert (analysis["program"], analysis["gpu"]) == ("analyze_results.py", AS_BEFORE)
    assert runner.left_behind() == []
    assert runner.outcomes() == {
        "baseline": "ok", "time-slicing": "skipped", "mps": "failed", "mig": "skipped",
        "analysis": "ok",
    }  # fmt: skip
    assert runner.reason("mps") == "interrupted"
    assert runner.reason("mig") == "interrupted before it began"
    last = stderr.splitlines()[-1]
    assert last == f"Interrupted; to go on: ./run_experiments.sh --resume {runner.output}"


def test_a_baseline_with_rounds_left_is_interrupted_too_and_a_closed_terminal_keeps_a_log(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"wait": True, "slow_to_end": 0.5})
    runner.rounds = ("--repeats", "2")
    status = runner.drive_until_hangup(SCRIPT, "--modes", "mps,mig", run_id="mps")
    assert status == 129, (runner.output / "after-hangup.log").read_text()
    told, ended = runner.python_calls()[-3:-1]
    assert told == {"program": "benchmark_suite.py", "signal": 1}
    # the daemon was still there when the suite had ended its clients
    assert ended["ended"] == "mps"
    assert ended["gpu"]["daemons"] == 1
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.outcomes()["analysis"] == "ok"
    assert runner.reason("baseline") == runner.reason("mps") == "interrupted"
    assert "MPS is off" in (runner.output / "after-hangup.log").read_text()


def test_a_second_ctrl_c_ends_a_suite_that_does_not_listen(runner: DriverRunner) -> None:
    runner.rule(baseline={"wait": True, "deaf": True})
    status, stderr = runner.drive_until_signal(
        SCRIPT, run_id="baseline", signals=[signal.SIGINT, signal.SIGINT]
    )
    assert status == 130, stderr
    assert [call["signal"] for call in runner.python_calls() if "signal" in call] == [1, 2]
    assert list(runner.suite_calls()) == ["baseline"]


# --- going on -------------------------------------------------------------------------------------


def test_an_experiment_that_was_killed_goes_on_with_its_flags_and_the_phases_that_are_missing(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"kill_driver": True})
    folder = str(runner.folder / "a folder; with $words")
    os.mkdir(folder)
    flags = ("--modes", "time-slicing,mps", "--seed", "7", "--data-dir", folder, "--repeats", "2")
    assert runner.drive(SCRIPT, *flags).returncode == -signal.SIGKILL
    assert not (runner.output / "phases.jsonl").exists()
    assert runner.machine.state()["mps"]
    (runner.output / "time-slicing" / "manifest.json").unlink()  # as if it had not begun
    before = runner.all_suite_calls()

    runner.rule()
    result = runner.must_drive(SCRIPT, "--resume", str(runner.output))
    assert "mps was left in force when the script was cut off" in result.stderr
    # Word for word: the suite keeps what a round has already.
    again = runner.all_suite_calls()[len(before) :]
    assert [call["arguments"] for call in again[:3]] == [call["arguments"] for call in before]
    assert {call["flags"]["--data-dir"] for call in again} == {folder}
    assert runner.turns()[len(before) :] == [
        "1 baseline", "1 time-slicing", "1 mps", "2 baseline", "2 mps", "2 time-slicing",
    ]  # fmt: skip
    assert set(runner.outcomes().values()) == {"ok", "skipped"}
    assert not runner.machine.state()["mps"]
    assert runner.left_behind() == []

    calls = len(runner.python_calls())
    assert runner.drive(SCRIPT, "--resume", str(runner.output)).returncode == 0
    assert [call["program"] for call in runner.python_calls()[calls:]] == ["analyze_results.py"]


def test_a_folder_that_was_renamed_goes_on_with_the_session_that_its_runs_have(
    runner: DriverRunner,
) -> None:
    runner.rule(**{"baseline": {"session": "first"}, "time-slicing": {"exit": 1}})
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 1
    runner.output = runner.output.rename(runner.folder / "renamed")
    runner.rule()
    runner.must_drive(SCRIPT, "--resume", str(runner.output))
    assert runner.all_suite_calls()[-1]["flags"]["--session"] == "first"


def test_a_row_that_a_full_disk_cut_off_is_neither_done_nor_part_of_the_next_one(
    runner: DriverRunner,
) -> None:
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 0
    path = runner.output / "phases.jsonl"
    rows = path.read_text().splitlines()
    torn = rows[1][: rows[1].index('"seconds"')]
    assert '"status":"ok"' in torn
    path.write_text(f"{rows[0]}\n{torn}")
    done_before = len(runner.all_suite_calls())
    assert runner.drive(SCRIPT, "--resume", str(runner.output)).returncode == 0
    assert len(runner.all_suite_calls()) > done_before
    phases, warnings = run_folder.read_phases(runner.output)
    assert [phase.name for phase in phases] == [
        "baseline", "time-slicing", "mps", "mig", "analysis",
    ]  # fmt: skip
    (warning,) = warnings
    assert "line 2 is truncated" in warning


# --- what the user has set up, and card settings --------------------------------------------------


def by_hand(runner: DriverRunner, **daemon: object) -> str:
    """Somebody's daemon, at the pipe directory that the environment shall name."""
    pipe = runner.folder / "by-hand"
    pipe.mkdir()
    (pipe / "control").touch()
    runner.machine.add_mps_daemon(str(pipe), **daemon)
    return str(pipe)


@needs_root
def test_a_daemon_that_was_started_by_hand_is_used_and_left_running(runner: DriverRunner) -> None:
    pipe = by_hand(runner, uid=os.geteuid(), user="me")
    runner.must_drive(SCRIPT, "--modes", "mps", CUDA_MPS_PIPE_DIRECTORY=pipe)
    assert runner.outcomes()["mps"] == "ok"
    # which is no daemon whose compute mode the script may change
    runner.output = runner.folder / "second"
    refused = runner.drive(
        SCRIPT, "--modes=mps", "--exclusive", as_root=True, CUDA_MPS_PIPE_DIRECTORY=pipe
    )
    assert refused.returncode == 1
    assert "that enable_mps.sh did not start is running" in runner.reason("mps")
    assert runner.machine.changing_calls() == []
    assert runner.python_calls()[-1]["gpu"]["daemons"] == 1


SHORT, LONG = {**AS_BEFORE, "timeslice": "Short"}, {**AS_BEFORE, "timeslice": "Long"}
SHORT_SLICES = ("setup_time_slicing.sh", "2", "--timeslice", "short")
LONG_SLICES = ("setup_time_slicing.sh", "2", "--timeslice", "long")
DAEMON = {**AS_BEFORE, "daemons": 1}
EXCLUSIVE = {**DAEMON, "compute_mode": "Exclusive_Process"}
MIG = ("--mig", "--mig-layout", "2g.20gb,1g.10gb,1g.10gb")
IS_USED = "is set up already; it is used as it is and left so"
LOCKED = "GPU_SETTINGS_LOCKED=1"


@needs_root
@pytest.mark.parametrize(
    ("set_up", "mode", "flags", "during", "after", "said"),
    [
        ((), "time-slicing", ("--timeslice=long",), LONG, AS_BEFORE, ""),
        ((), "mps", ("--exclusive",), EXCLUSIVE, AS_BEFORE, ""),
        ((), "mig", ("--mig",), {**AS_BEFORE, "mig": "Enabled", "instances": 4}, AS_BEFORE, ""),
        ((), "mig", MIG, {**AS_BEFORE, "mig": "Enabled", "instances": 3}, AS_BEFORE, ""),
        (SHORT_SLICES, "time-slicing", (), SHORT, SHORT, IS_USED),
        (SHORT_SLICES, "time-slicing", ("--timeslice", "short"), SHORT, SHORT, IS_USED),
        (SHORT_SLICES, "time-slicing", ("--timeslice=long",), LONG, SHORT,
         "--timeslice short --gpu"),
        # as if the driver had been loaded anew since
        (LONG_SLICES, "time-slicing", ("--timeslice=long",), LONG, LONG, ""),
        (("enable_mps.sh", "--exclusive"), "mps", ("--exclusive",), EXCLUSIVE, EXCLUSIVE, IS_USED),
        (("enable_mps.sh",), "mps", ("--exclusive",), EXCLUSIVE, AS_BEFORE,
         "switched off altogether at the end"),
        # what the script refuses fails the phase
        ((), "mig", ("--mig",), None, AS_BEFORE, LOCKED),
        (SHORT_SLICES, "time-slicing", ("--timeslice=long",), None, SHORT, LOCKED),
    ],
)  # fmt: skip
def test_a_mode_is_in_force_for_its_phase_and_then_what_the_user_had_set_up(
    runner: DriverRunner, set_up: tuple[str, ...], mode: str, flags: tuple[str, ...],
    during: dict | None, after: dict, said: str,
) -> None:  # fmt: skip
    if set_up:
        runner.must(*set_up)
    saved = runner.saved(mode)
    if set_up == LONG_SLICES:
        runner.machine.change_gpu(timeslice="Default")
    locked = {"GPU_SETTINGS_LOCKED": "1"} if said == LOCKED else {}
    result = runner.drive(SCRIPT, f"--modes={mode}", *flags, as_root=True, **locked)
    assert result.returncode == (0 if during else 1), result.stderr
    assert said in result.stderr
    calls = runner.suite_calls()
    assert (calls[mode]["gpu"] if mode in calls else None) == during
    if mode in calls and mode == "mig":
        assert calls[mode]["flags"].get("--mig-layout") == (MIG[2] if flags == MIG else None)
        assert calls[mode]["flags"]["--workloads"] == str(during["instances"])
    if set_up != LONG_SLICES:
        assert runner.python_calls()[-1]["gpu"] == after
        assert runner.saved(mode) == (None if after == AS_BEFORE else saved)


@needs_root
def test_instances_of_the_users_are_used_and_left_and_never_replaced(runner: DriverRunner) -> None:
    runner.must("setup_mig.sh", "1g.10gb", "4")
    runner.must_drive(SCRIPT)
    assert runner.outcomes() == {
        "baseline": "skipped", "time-slicing": "skipped", "mps": "skipped", "mps:even": "skipped",
        "mig": "ok", "analysis": "ok",
    }  # fmt: skip
    assert "MIG is on" in runner.reason("mps")
    more = ("--workloads", "8")
    runner.output = runner.folder / "second"
    assert runner.drive(SCRIPT, *more, as_root=True).returncode == 0
    assert runner.reason("mig").startswith("4 MIG instances for 8 clients")
    runner.output = runner.folder / "third"
    assert runner.drive(SCRIPT, *more, "--mig", as_root=True).returncode == 1
    assert "of an earlier run are there" in runner.reason("mig")
    assert len(runner.gpu()["instances"]) == 4


@pytest.mark.parametrize(
    ("kind", "mig_mode", "flags", "reason"),
    [("t4", "[N/A]", ["--mig"], "Tesla T4 has no MIG"),
     ("t4", "[Not Supported]", ["--mig", "--mig-layout", "1g.5gb,1g.5gb"], "Tesla T4 has no MIG"),
     ("h100", "Disabled", ["--mig-layout", "1g.10gb,2g.20gb"],
      "MIG is off; --mig allows switching it on")],
)  # fmt: skip
def test_mig_that_cannot_be_or_was_not_allowed_skips_its_phase(
    kind: str, mig_mode: str, flags: list[str], reason: str
) -> None:
    with driver_runner(kind) as other:
        other.machine.change_gpu(mig_current=mig_mode, mig_pending=mig_mode)
        assert other.drive(SCRIPT, "--modes", "mig", *flags).returncode == 0
        assert other.reason("mig") == reason
        assert other.machine.changing_calls() == []


def test_profiles_that_could_not_be_listed_are_not_taken_for_none(runner: DriverRunner) -> None:
    said = "Failed to display GPU instance profiles: Unknown Error"  # as a Jetson Thor does
    text = f"+------+\n| GPU instance profiles: |\n|======|\n{said}"
    runner.machine.fail("nvidia-smi mig -lgip", exit=255, text=text)
    refused = runner.drive(SCRIPT, "--modes", "mig", "--mig-layout", "1g.10gb,2g.20gb")
    assert refused.returncode == 3
    assert f"could not be asked; nvidia-smi said: {said}" in refused.stderr


@pytest.mark.parametrize(
    ("capability", "outcome"), [("6.1", "skipped"), ("7.0", "ok"), (None, "ok")]
)
def test_limits_of_mps_clients_are_for_gpus_that_have_them(
    capability: str | None, outcome: str
) -> None:
    with driver_runner("t4") as other:
        other.machine.change_gpu(compute_capability=capability or "7.5")
        other.machine.change(unknown_fields=[] if capability else ["compute_cap"])
        other.must_drive(SCRIPT, "--modes", "mps,mps:even")
        assert other.outcomes()["mps"] == "ok"
        assert other.outcomes()["mps:even"] == outcome
        if outcome == "skipped":
            assert "it has them since Volta" in other.reason("mps:even")


# --- static partitions ----------------------------------------------------------------------------

PARTITIONS = ("--modes", "mps,mps:partitions,mps:even", "--repeats", "2")


def test_static_partitions_are_a_mode_of_their_own_whose_daemon_is_started_for_them(
    runner: DriverRunner,
) -> None:
    runner.machine.change(mps_version=13010)
    runner.must_drive(SCRIPT, *PARTITIONS, "--mps-percentage", "50", "--mps-memory-limit", "8G")
    assert runner.turns() == [
        "1 baseline", "1 mps", "1 mps-partitions", "1 mps-even",
        "2 baseline", "2 mps-even", "2 mps-partitions", "2 mps",
    ]  # fmt: skip
    starts = [command for command in runner.machine.changing_calls() if START in command]
    assert [command.endswith("-S") for command in starts] == [False, True, False] * 2
    chunks = [one for one in runner.machine.changing_calls() if "sm_partition add" in one]
    assert len(chunks) == 2 * 4 and all(one.endswith(f"{UUID} 4") for one in chunks)
    flags = runner.suite_calls()["mps-partitions"]["flags"]
    assert (flags["--mode"], flags["--mps-memory-limit"]) == ("mps", "8G")
    assert "--mps-partitions" in flags and "--mps-percentage" not in flags
    assert runner.outcomes()["mps:partitions"] == "ok"
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


def test_static_partitions_that_the_control_program_lacks_are_skipped_with_the_reason(
    runner: DriverRunner,
) -> None:
    for flags in ((), ("--dry-run",)):
        result = runner.must_drive(SCRIPT, *PARTITIONS, *flags)
        assert (
            "mps:partitions: skipped (static SM partitions need nvidia-cuda-mps-control 13010 "
            "(CUDA 13.1); this one is 13000)"
        ) in result.stderr
        runner.output = runner.folder / "second"
    assert "--mps-partitions" not in result.stdout
    assert "mps-partitions" not in runner.suite_calls()


def test_a_plan_with_percentages_is_refused_for_partitions_before_anything_is_done(
    runner: DriverRunner,
) -> None:
    plan = runner.folder / "plan.toml"
    plan.write_text('[[client]]\ncommand = "true"\nknobs = { mps_percentage = 50 }\n')
    result = runner.drive(SCRIPT, "--modes", "mps:partitions", "--plan", str(plan))
    assert result.returncode == 2
    assert "leave mps_percentage out of the plan" in result.stderr
    assert runner.machine.changing_calls() == []


def test_partitions_that_were_there_are_used_and_left_and_plain_mps_is_not_measured_on_them(
    runner: DriverRunner,
) -> None:
    runner.machine.change(mps_version=13010)
    runner.must("enable_mps.sh", "--static-partitions", "4")
    assert runner.drive(SCRIPT, *PARTITIONS).returncode == 1
    assert runner.outcomes()["mps:partitions"] == "ok"
    assert "started with 4 static partitions" in runner.reason("mps")
    assert len((runner.saved("mps") or {})["partitions"].split(",")) == 4


def test_a_killed_driver_leaves_static_partitions_to_the_next_start_or_to_restore(
    runner: DriverRunner,
) -> None:
    runner.machine.change(mps_version=13010)
    runner.rule(**{"mps-partitions": {"kill_driver": True}})
    assert runner.drive(SCRIPT, "--modes", "mps:partitions").returncode != 0
    assert runner.machine.state()["mps"]
    runner.must("gpu_status.sh", "--restore")
    assert not runner.machine.state()["mps"]
    assert runner.left_behind() == []


# --- dry runs -------------------------------------------------------------------------------------


def test_a_dry_run_prints_every_command_and_changes_nothing(runner: DriverRunner) -> None:
    before = runner.all_files()
    result = runner.must_drive(SCRIPT, "--dry-run", "--mig")
    assert runner.all_files() == before
    assert runner.python_calls() == []
    assert not runner.output.exists()
    lines = [line.removeprefix("would run: ") for line in result.stdout.splitlines()]
    expected = [
        "mkdir", "--mode exclusive", "setup_time_slicing.sh 4", "--mode time-slicing",
        "reset_time_slicing.sh", "enable_mps.sh", "--mode mps", "--mode mps", "disable_mps.sh",
        "setup_mig.sh 1g.5gb 4", "--mode mig", "disable_mig.sh", "analyze_results.py",
    ]  # fmt: skip
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True))


def test_without_root_sudo_is_used_for_card_settings_alone_and_never_asks(
    runner: DriverRunner,
) -> None:
    programs = runner.folder / "programs"
    programs.mkdir()
    (programs / "sudo").write_text('#!/bin/sh\n[ "$1 $2" = "-n true" ]\n')
    (programs / "sudo").chmod(0o755)
    path = f"{programs}:{runner.environment['PATH']}"
    if AS_USER:
        require_reachable()
    runner.prefix = AS_USER
    result = runner.must_drive(SCRIPT, "--dry-run", "--mig", PYTHON=SYSTEM_PYTHON, PATH=path)
    scripts = [line for line in result.stdout.splitlines() if "gpu-configs" in line]
    with_sudo = [line for line in scripts if line.startswith("would run: sudo -n ")]
    assert [line.partition("gpu-configs/")[2].split()[0] for line in with_sudo] == [
        "setup_mig.sh", "disable_mig.sh",
    ]  # fmt: skip
    assert len(scripts) == 6


# --- which GPU, or none ---------------------------------------------------------------------------


@pytest.mark.parametrize(("modes", "mode"), [((), "time-slicing"), (("--modes", "mps"), "mps")])
def test_without_a_gpu_one_demonstration_runs_whichever_mode_is_asked_for(
    runner: DriverRunner, modes: tuple[str, ...], mode: str
) -> None:
    runner.rounds = ()
    result = runner.must_drive(SCRIPT, *modes, PATH=without_gpu_programs())
    assert "CPU demonstration" in result.stderr
    assert runner.outcomes() == {
        "baseline": "ok", "cpu-demo": "ok", "mps": "skipped", "mig": "skipped", "analysis": "ok",
    }  # fmt: skip
    assert runner.reason("mps") == "no NVIDIA GPU"
    assert list(runner.suite_calls()) == ["baseline", "cpu-demo"]
    flags = runner.suite_calls()["cpu-demo"]["flags"]
    assert (flags["--mode"], flags["--repeats"]) == (mode, "1")
    assert "--gpu" not in flags


def test_a_gpu_that_is_hidden_or_not_wanted_is_left_alone(runner: DriverRunner) -> None:
    runner.must_drive(SCRIPT, "--device", "cpu")
    runner.output = runner.folder / "second"
    runner.must_drive(SCRIPT, "--modes", "time-slicing", CUDA_VISIBLE_DEVICES="")
    assert runner.outcomes()["cpu-demo"] == "ok"
    assert runner.machine.calls() == []


@pytest.mark.parametrize("driver", ["not-loaded", "Driver/library version mismatch"])
def test_a_driver_that_does_not_answer_is_exit_3_and_no_demonstration(
    runner: DriverRunner, driver: str
) -> None:
    runner.machine.change(driver=driver)
    assert runner.drive(SCRIPT, "--dry-run").returncode == 3
    assert not runner.output.exists()
    runner.rounds = ()
    result = runner.drive(SCRIPT)
    assert result.returncode == 3
    assert "mend the driver, or choose --device cpu" in result.stderr
    refusal = runner.refusal()
    assert refusal["exit_code"] == 3
    assert refusal["command"] == [f"./{SCRIPT}", "--output", str(runner.output)]
    assert f"error: {refusal['sentence']}" in result.stderr.splitlines()
    # the folder is as good as a new one
    runner.machine.change(driver="ok")
    assert runner.drive(SCRIPT, "--modes", "time-slicing", "--repeats=1").returncode == 0


# --- what is refused ------------------------------------------------------------------------------


def test_a_plan_with_mistakes_and_a_folder_that_is_in_use_are_exit_2_and_left(
    runner: DriverRunner,
) -> None:
    plan = runner.folder / "plan.toml"
    plan.write_text('[[client]]\nworkload = "resnet"\n')
    result = runner.drive(SCRIPT, "--plan", str(plan))
    assert result.returncode == 2
    assert "there is no workload 'resnet'" in result.stderr
    assert not runner.output.exists()
    runner.output.mkdir()
    (runner.output / "mine.txt").write_text("mine")
    result = runner.drive(SCRIPT)
    assert result.returncode == 2
    assert "is not empty; name another folder" in result.stderr
    assert [path.name for path in runner.output.iterdir()] == ["mine.txt"]
