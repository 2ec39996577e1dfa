"""enable_mps.sh and disable_mps.sh against the pretended machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from mode_script_runner import (
    AS_NOBODY,
    NOBODY,
    UUID,
    ModeScripts,
    mode_scripts,
    needs_real_root,
    needs_root,
)
from waiting import wait_until

SET_MODE = "nvidia-smi -i * -c *"
START = "nvidia-cuda-mps-control -d"
QUESTION = "nvidia-cuda-mps-control < get_default_active_thread_percentage"


def daemons(scripts: ModeScripts) -> dict[str, dict]:
    return scripts.machine.state()["mps"]


def assert_as_before(scripts: ModeScripts) -> None:
    """No daemon, nothing in the state folder, compute mode Default."""
    assert daemons(scripts) == {}
    assert scripts.left_behind() == []
    assert scripts.gpu()["compute_mode"] == "Default"


def test_enabling_starts_a_daemon_in_folders_of_its_own_and_names_them_in_the_state(
    scripts: ModeScripts,
) -> None:
    result = scripts.must("enable_mps.sh")
    saved = scripts.saved("mps")
    assert saved is not None
    pipe, log = Path(saved["pipe_directory"]), Path(saved["log_directory"])
    assert list(daemons(scripts)) == [str(pipe)]
    assert saved == {
        "gpu_uuid": UUID,
        "user": "root" if os.geteuid() == 0 else saved["user"],
        "uid": str(os.geteuid() if os.geteuid() == 0 else saved["uid"]),
        "pipe_directory": str(pipe),
        "log_directory": str(log),
        "previous_compute_mode": "Default",
        "compute_mode": "Default",
    }
    for folder in (pipe, log, pipe.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert len(f"{pipe}/control_privileged") < 108
    assert str(pipe) in result.stdout
    assert scripts.gpu()["compute_mode"] == "Default"


def test_disabling_ends_the_daemon_and_removes_what_the_start_created(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    result = scripts.must("disable_mps.sh")
    assert "MPS is off" in result.stdout
    assert_as_before(scripts)


def test_enabling_twice_keeps_the_one_daemon(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    before = daemons(scripts)
    scripts.machine.forget_calls()
    result = scripts.must("enable_mps.sh")
    assert "answers already" in result.stderr
    assert daemons(scripts) == before
    assert scripts.machine.changing_calls() == []


def test_disabling_twice_or_without_a_daemon_does_nothing(scripts: ModeScripts) -> None:
    result = scripts.must("disable_mps.sh")
    assert "nothing to undo" in result.stdout
    assert scripts.machine.changing_calls() == []


def test_the_daemon_inherits_no_limits_that_are_meant_for_clients(scripts: ModeScripts) -> None:
    result = scripts.run(
        "enable_mps.sh",
        CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="10",
        CUDA_VISIBLE_DEVICES="3",
        CUDA_MPS_PIPE_DIRECTORY="/nonexistent",
    )
    assert result.returncode == 0, result.stderr
    (daemon,) = daemons(scripts).values()
    assert daemon["percentage"] == 100.0
    assert daemon["visible_devices"] is None


def test_on_a_machine_with_several_gpus_the_daemon_is_kept_to_the_one_asked_for() -> None:
    with mode_scripts("h100x2") as scripts:
        scripts.must("enable_mps.sh", "--gpu", "1")
        (daemon,) = daemons(scripts).values()
        assert daemon["visible_devices"] == "GPU-55555555-6666-7777-8888-999999999999"
        # a daemon for each GPU is fine: both are of this user, and both are known
        scripts.must("enable_mps.sh", "--gpu", "0")
        assert len(daemons(scripts)) == 2
        scripts.must("disable_mps.sh", "--gpu", "1")
        assert len(daemons(scripts)) == 1


def test_a_percentage_is_set_and_read_back_also_while_the_daemon_runs(scripts: ModeScripts) -> None:
    assert "percentage:      25.0" in scripts.must("enable_mps.sh", "--percentage", "25").stdout
    assert "percentage:      12.5" in scripts.must("enable_mps.sh", "--percentage=12.5").stdout
    (daemon,) = daemons(scripts).values()
    assert daemon["percentage"] == 12.5


@pytest.mark.parametrize("value", ["0", "-1", "101", "250", "abc", "", "1e1", "nan"])
def test_a_percentage_out_of_range_is_refused_before_the_daemon_could_ignore_it(
    scripts: ModeScripts, value: str
) -> None:
    result = scripts.run("enable_mps.sh", "--percentage", value)
    assert result.returncode == 2
    assert "over 0 and up to 100" in result.stderr
    assert scripts.machine.calls() == []


def test_a_percentage_that_the_daemon_ignored_ends_the_start_and_leaves_nothing(
    scripts: ModeScripts,
) -> None:
    scripts.machine.fail("nvidia-cuda-mps-control < set_default*", exit=0, text="100.0")
    result = scripts.run("enable_mps.sh", "--percentage", "25")
    assert result.returncode == 1
    assert "percentage of 100.0, not 25" in result.stderr
    assert_as_before(scripts)


@needs_root
def test_exclusive_sets_the_compute_mode_and_disabling_puts_it_back(scripts: ModeScripts) -> None:
    result = scripts.must("enable_mps.sh", "--exclusive")
    assert "sudo ./gpu-configs/disable_mps.sh" in result.stdout
    assert scripts.gpu()["compute_mode"] == "Exclusive_Process"
    saved = scripts.saved("mps")
    assert saved is not None
    assert saved["previous_compute_mode"] == "Default"
    assert saved["compute_mode"] == "Exclusive_Process"
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


@needs_root
def test_exclusive_can_be_asked_for_later_and_twice(scripts: ModeScripts) -> None:
    for arguments in ([], ["--exclusive"], ["--exclusive"], []):
        scripts.must("enable_mps.sh", *arguments)
    assert scripts.machine.changing_calls().count(START) == 1
    saved = scripts.saved("mps")
    assert saved is not None
    assert saved["previous_compute_mode"] == "Default"
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


@needs_root
def test_a_compute_mode_that_was_exclusive_before_stays_so(scripts: ModeScripts) -> None:
    scripts.machine.change_gpu(compute_mode="Exclusive_Process")
    scripts.must("enable_mps.sh", "--exclusive")
    scripts.must("disable_mps.sh")
    assert scripts.gpu()["compute_mode"] == "Exclusive_Process"
    assert all("-c" not in call.split() for call in scripts.machine.changing_calls())


@needs_root
def test_after_a_daemon_that_died_the_compute_mode_from_before_it_is_still_known(
    scripts: ModeScripts,
) -> None:
    scripts.must("enable_mps.sh", "--exclusive")
    scripts.machine.change(mps={})  # killed; its socket files stay behind
    result = scripts.must("enable_mps.sh")
    assert "no longer answers" in result.stderr
    assert len([name for name in scripts.left_behind() if name.startswith("mps.")]) == 1
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


def test_disabling_after_the_daemon_died_still_cleans_up(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    scripts.machine.change(mps={})
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


def test_a_daemon_that_takes_its_time_is_waited_for(scripts: ModeScripts) -> None:
    words = "Cannot find MPS control daemon process"
    scripts.machine.fail(QUESTION, exit=1, text=words, times=3)
    scripts.must("enable_mps.sh")
    assert [call["exit"] for call in scripts.machine.calls() if call["command"] == QUESTION][
        :4
    ] == [
        1,
        1,
        1,
        0,
    ]


def test_a_daemon_that_never_answers_is_exit_code_1_and_nothing_stays(scripts: ModeScripts) -> None:
    scripts.machine.fail(START, exit=1, text="Failed to start")
    result = scripts.run("enable_mps.sh")
    assert result.returncode == 1
    assert "did not answer" in result.stderr
    assert "Failed to start" in result.stderr  # its own words are shown
    assert_as_before(scripts)


def test_socket_files_that_lie_about_prove_nothing(scripts: ModeScripts) -> None:
    scripts.machine.fail(START, exit=0, text="")  # ends well and starts nothing
    assert scripts.run("enable_mps.sh").returncode == 1
    assert_as_before(scripts)


def test_without_the_control_program_the_exit_code_is_3(scripts: ModeScripts) -> None:
    only_smi = scripts.folder / "bin"
    only_smi.mkdir()
    fakes = scripts.environment["PATH"].split(":")[0]
    for name in ("nvidia-smi", "ps"):
        (only_smi / name).symlink_to(f"{fakes}/{name}")
    (only_smi / "gpu_machine.py").symlink_to(f"{fakes}/gpu_machine.py")
    rest = scripts.environment["PATH"].split(":", 1)[1]
    result = scripts.run("enable_mps.sh", PATH=f"{only_smi}:{rest}")
    assert result.returncode == 3
    assert "nvidia-cuda-mps-control was not found" in result.stderr


def test_a_gpu_that_is_too_old_is_exit_code_4() -> None:
    with mode_scripts("k40") as scripts:
        result = scripts.run("enable_mps.sh")
        assert result.returncode == 4
        assert "MPS needs compute capability 3.5" in result.stderr


@needs_real_root
def test_without_root_exclusive_is_refused_with_5_and_the_sudo_line(scripts: ModeScripts) -> None:
    result = scripts.run("enable_mps.sh", "--exclusive", prefix=AS_NOBODY)
    assert result.returncode == 5
    assert "sudo ./gpu-configs/enable_mps.sh --exclusive" in result.stderr
    assert scripts.machine.changing_calls() == []


@needs_root
def test_a_compute_mode_that_the_driver_refuses_is_exit_code_5_and_the_daemon_goes_again(
    scripts: ModeScripts,
) -> None:
    text = "Unable to set the compute mode for GPU 00000000:00:06.0: Insufficient Permissions"
    scripts.machine.fail(SET_MODE, exit=4, text=text)
    result = scripts.run("enable_mps.sh", "--exclusive")
    assert result.returncode == 5
    assert "Insufficient Permissions" in result.stderr
    assert START in scripts.machine.changing_calls()
    assert_as_before(scripts)


@needs_root
def test_a_failure_while_the_daemon_already_ran_leaves_it_as_it_was(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh", "--percentage", "50")
    before, saved = daemons(scripts), scripts.saved("mps")
    scripts.machine.fail(SET_MODE, exit=0, text="All done.")
    result = scripts.run("enable_mps.sh", "--percentage", "25", "--exclusive")
    assert result.returncode == 1
    assert daemons(scripts) == before
    assert scripts.saved("mps") == saved


def test_another_users_daemon_is_exit_code_6_and_is_named(scripts: ModeScripts) -> None:
    scripts.machine.add_mps_daemon("/nonexistent/pipe", user="alice", pid=777)
    result = scripts.run("enable_mps.sh")
    assert result.returncode == 6
    assert "pid 777 of user alice" in result.stderr
    assert scripts.machine.changing_calls() == []
    assert scripts.left_behind() == []


def test_another_users_daemon_is_left_alone_by_disable_mps(scripts: ModeScripts) -> None:
    scripts.machine.add_mps_daemon("/nonexistent/pipe", user="alice", pid=777)
    result = scripts.must("disable_mps.sh")
    assert "left alone: MPS control daemon, pid 777 of user alice" in result.stdout
    assert len(daemons(scripts)) == 1


@needs_real_root
def test_a_daemon_of_ones_own_that_was_started_by_hand_is_neither_taken_over_nor_ended(
    scripts: ModeScripts,
) -> None:
    scripts.machine.add_mps_daemon("/nonexistent/pipe", user="root", uid=0, pid=778)
    result = scripts.run("enable_mps.sh")
    assert result.returncode == 6
    assert "pid 778" in result.stderr
    assert "echo quit | nvidia-cuda-mps-control" in result.stderr
    scripts.must("disable_mps.sh")
    assert len(daemons(scripts)) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mig_current": "Enabled", "mig_pending": "Enabled"}, "sudo ./gpu-configs/disable_mig.sh"),
        ({"compute_mode": "Prohibited"}, "compute mode is Prohibited"),
    ],
)
def test_a_gpu_that_is_set_otherwise_is_exit_code_6(
    scripts: ModeScripts, fields: dict[str, str], words: str
) -> None:
    scripts.machine.change_gpu(**fields)
    result = scripts.run("enable_mps.sh")
    assert result.returncode == 6
    assert words in result.stderr
    assert_nothing_started(scripts)


def assert_nothing_started(scripts: ModeScripts) -> None:
    assert daemons(scripts) == {}
    assert scripts.left_behind() == []


@needs_root
def test_processes_without_mps_are_listed_and_only_exclusive_is_refused(
    scripts: ModeScripts,
) -> None:
    scripts.machine.add_process(pid=4242, user="alice")
    result = scripts.run("enable_mps.sh", "--exclusive")
    assert result.returncode == 6
    assert "pid 4242 (user alice): python3" in result.stderr
    assert_nothing_started(scripts)
    assert "pid 4242 (user alice): python3" in scripts.must("enable_mps.sh").stderr


def test_a_daemon_with_clients_is_not_ended_and_the_clients_are_listed(
    scripts: ModeScripts,
) -> None:
    scripts.must("enable_mps.sh")
    scripts.machine.add_mps_client(938)
    result = scripts.run("disable_mps.sh", GPU_SHARING_WAIT_SECONDS="0")
    assert result.returncode == 6
    assert "pid 938" in result.stderr
    assert "nvidia-cuda-mps-control < quit" not in scripts.machine.changing_calls()
    scripts.machine.remove_process(938)
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


def test_a_daemon_that_does_not_quit_is_exit_code_1_and_stays_known(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    scripts.machine.fail("nvidia-cuda-mps-control < quit", exit=0, text="")
    result = scripts.run("disable_mps.sh", GPU_SHARING_WAIT_SECONDS="0")
    assert result.returncode == 1
    assert scripts.saved("mps") is not None
    scripts.machine.forget_rules()
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


@needs_root
@pytest.mark.parametrize("during", [START, SET_MODE])
@pytest.mark.parametrize(
    ("number", "group", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_in_the_middle_of_enabling_puts_everything_back(
    scripts: ModeScripts, during: str, number: signal.Signals, group: bool, status: int
) -> None:
    code, stderr = scripts.interrupt(
        "enable_mps.sh", "--exclusive", during=during, number=number, group=group
    )
    assert code == status, stderr
    assert_as_before(scripts)


@needs_root
@pytest.mark.parametrize("during", [START, SET_MODE])
@pytest.mark.parametrize("group", [True, False])
def test_what_enabling_had_changed_when_it_was_killed_is_brought_back_by_restore(
    scripts: ModeScripts, during: str, group: bool
) -> None:
    code, stderr = scripts.interrupt(
        "enable_mps.sh", "--exclusive", during=during, number=signal.SIGKILL, group=group
    )
    assert code == -signal.SIGKILL, stderr
    assert scripts.saved("mps") is not None
    if not group:  # what the script had started does its work to the end
        wait_until(
            lambda: daemons(scripts) if during == START
            else scripts.gpu()["compute_mode"] == "Exclusive_Process",
            f"the end of {during}",
        )  # fmt: skip
    scripts.must("gpu_status.sh", "--restore")
    assert_as_before(scripts)


def test_a_folder_of_pipes_is_removed_only_by_who_made_it(scripts: ModeScripts) -> None:
    of_another = scripts.state_directory / "mps.AAAAAAAA"
    of_another.mkdir(parents=True, mode=0o700)
    scripts.state_directory.chmod(0o700)
    programs = scripts.folder / "bin"
    programs.mkdir()
    (programs / "mktemp").write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    (programs / "mktemp").chmod(0o755)
    path = f"{programs}:{scripts.environment['PATH']}"
    result = scripts.run("enable_mps.sh", PATH=path)
    assert result.returncode == 5
    assert "set GPU_SHARING_STATE_DIR to a folder that this user may write" in result.stderr
    assert "rm -rf" not in result.stderr
    assert of_another.exists()
    assert daemons(scripts) == {}


@needs_root
def test_disabling_that_was_interrupted_is_finished_by_the_next_one(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh", "--exclusive")
    code, _ = scripts.interrupt(
        "disable_mps.sh", during=SET_MODE, number=signal.SIGTERM, group=False
    )
    assert code == 143
    scripts.must("disable_mps.sh")
    assert_as_before(scripts)


def test_a_state_folder_too_long_for_a_socket_leaves_the_sockets_elsewhere(
    scripts: ModeScripts,
) -> None:
    long = scripts.folder / ("x" * 90)
    result = scripts.run("enable_mps.sh", GPU_SHARING_STATE_DIR=str(long))
    assert result.returncode == 0, result.stderr
    (pipe,) = daemons(scripts)
    assert len(f"{pipe}/control_privileged") < 108
    assert Path(pipe).parent.stat().st_mode & 0o777 == 0o700
    result = scripts.run("disable_mps.sh", GPU_SHARING_STATE_DIR=str(long))
    assert result.returncode == 0, result.stderr
    assert not Path(pipe).parent.exists()


@pytest.fixture
def nobodys_state(scripts: ModeScripts) -> Path:
    """A state folder for the account `nobody`, whose home does not exist."""
    folder = scripts.folder / "of-nobody"
    folder.mkdir()
    os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
    return folder


@needs_real_root
def test_under_sudo_daemon_folders_and_state_belong_to_the_user_who_called_it(
    scripts: ModeScripts, nobodys_state: Path
) -> None:
    # The guide's two lines: sudo enables, then everything runs as the plain user. sudo hands no
    # variables through, so the state folder of the caller has to be found without them.
    environment = {"GPU_SHARING_STATE_DIR": str(nobodys_state / "state")}
    result = scripts.run("enable_mps.sh", "--exclusive", prefix=["sudo"], **environment)
    assert result.returncode == 0, result.stderr
    (daemon,) = daemons(scripts).values()
    assert (daemon["uid"], daemon["user"]) == (NOBODY.pw_uid, "nobody")
    for path in [nobodys_state / "state", *(nobodys_state / "state").rglob("*")]:
        assert path.stat().st_uid == NOBODY.pw_uid, path
    state = nobodys_state / "state" / f"mps-{UUID}.state"
    assert state.stat().st_mode & 0o777 == 0o600
    assert f"user=nobody\nuid={NOBODY.pw_uid}\n" in state.read_text()
    assert scripts.gpu()["compute_mode"] == "Exclusive_Process"

    # the plain user sees it, and is told to use sudo for the compute mode
    status = scripts.run("gpu_status.sh", prefix=AS_NOBODY, **environment)
    assert "mode in force: mps" in status.stdout
    refused = scripts.run("disable_mps.sh", prefix=AS_NOBODY, **environment)
    assert refused.returncode == 5
    assert "sudo ./gpu-configs/disable_mps.sh" in refused.stderr
    assert len(daemons(scripts)) == 1

    result = scripts.run("disable_mps.sh", prefix=["sudo"], **environment)
    assert result.returncode == 0, result.stderr
    assert daemons(scripts) == {}
    assert list((nobodys_state / "state").iterdir()) == []
    assert scripts.gpu()["compute_mode"] == "Default"


@needs_real_root
def test_what_sudo_started_without_exclusive_the_plain_user_ends_without_sudo(
    scripts: ModeScripts, nobodys_state: Path
) -> None:
    environment = {"GPU_SHARING_STATE_DIR": str(nobodys_state)}
    assert scripts.run("enable_mps.sh", prefix=["sudo"], **environment).returncode == 0
    result = scripts.run("disable_mps.sh", prefix=AS_NOBODY, **environment)
    assert result.returncode == 0, result.stderr
    assert daemons(scripts) == {}
    assert list(nobodys_state.iterdir()) == []


@needs_real_root
@pytest.mark.parametrize("caller", ["nobody", "root"])
def test_a_lock_in_the_callers_environment_holds_under_sudo_too(
    scripts: ModeScripts, nobodys_state: Path, caller: str
) -> None:
    result = scripts.run(
        "enable_mps.sh",
        "--exclusive",
        prefix=["sudo"],
        FAKE_SUDO_USER=caller,
        GPU_SHARING_STATE_DIR=str(nobodys_state),
        GPU_SETTINGS_LOCKED="1",
    )
    assert result.returncode == 5
    assert "GPU_SETTINGS_LOCKED=1" in result.stderr
    assert scripts.machine.changing_calls() == []


@needs_real_root
def test_root_does_not_follow_a_users_link_when_it_writes_the_state(
    scripts: ModeScripts, nobodys_state: Path
) -> None:
    target = scripts.folder / "roots-own"
    target.mkdir(mode=0o700)
    (nobodys_state / "state").symlink_to(target)
    result = scripts.run(
        "enable_mps.sh", prefix=["sudo"], GPU_SHARING_STATE_DIR=str(nobodys_state / "state")
    )
    assert result.returncode == 5
    assert list(target.iterdir()) == []
    assert daemons(scripts) == {}


@needs_real_root
def test_a_user_whose_home_cannot_be_written_is_told_which_variable_helps(
    scripts: ModeScripts,
) -> None:
    result = scripts.run("enable_mps.sh", prefix=["sudo"], GPU_SHARING_STATE_DIR="")
    assert result.returncode == 5
    assert "cannot write /nonexistent/.local/state/gpu-sharing-bench" in result.stderr
    assert "GPU_SHARING_STATE_DIR" in result.stderr
    assert daemons(scripts) == {}
