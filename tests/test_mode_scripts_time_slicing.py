"""setup_time_slicing.sh and reset_time_slicing.sh against the pretended machine."""

from __future__ import annotations

import signal

import pytest
from mode_script_runner import (
    AS_NOBODY,
    UUID,
    ModeScripts,
    mode_scripts,
    needs_real_root,
    needs_root,
)

SET_TIMESLICE = "nvidia-smi compute-policy -i * --set-timeslice *"


def test_setting_up_records_the_clients_and_changes_nothing_on_the_card(
    scripts: ModeScripts,
) -> None:
    result = scripts.must("setup_time_slicing.sh", "4")
    assert "Time slicing is in force" in result.stdout
    assert scripts.saved("time-slicing") == {
        "gpu_uuid": UUID,
        "clients": "4",
        "timeslice": "Default",
        "previous_timeslice": "Default",
    }
    assert scripts.machine.changing_calls() == []


def test_the_state_file_is_for_its_owner_alone(scripts: ModeScripts) -> None:
    scripts.must("setup_time_slicing.sh", "4")
    (path,) = scripts.state_directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert scripts.state_directory.stat().st_mode & 0o777 == 0o700


def test_without_the_variable_the_state_goes_to_the_users_state_folder(
    scripts: ModeScripts,
) -> None:
    home = scripts.folder / "home"
    result = scripts.run("setup_time_slicing.sh", "4", GPU_SHARING_STATE_DIR="", HOME=str(home))
    assert result.returncode == 0, result.stderr
    folder = home / ".local" / "state" / "gpu-sharing-bench"
    assert [path.name for path in folder.iterdir()] == [f"time-slicing-{UUID}.state"]


@needs_root
def test_the_slice_is_set_and_put_back_to_what_it_was(scripts: ModeScripts) -> None:
    scripts.machine.change_gpu(timeslice="Medium")
    scripts.must("setup_time_slicing.sh", "4", "--timeslice=short")
    assert scripts.gpu()["timeslice"] == "Short"
    assert scripts.saved("time-slicing")["previous_timeslice"] == "Medium"
    scripts.must("reset_time_slicing.sh")
    assert scripts.gpu()["timeslice"] == "Medium"
    assert scripts.left_behind() == []


@needs_root
def test_setting_up_twice_remembers_the_slice_from_before_the_first_time(
    scripts: ModeScripts,
) -> None:
    scripts.must("setup_time_slicing.sh", "4", "--timeslice", "short")
    scripts.must("setup_time_slicing.sh", "4", "--timeslice", "short")
    scripts.must("setup_time_slicing.sh", "8", "--timeslice", "long")
    assert len(scripts.machine.changing_calls()) == 2
    saved = scripts.saved("time-slicing")
    assert (saved["clients"], saved["timeslice"]) == ("8", "Long")
    assert saved["previous_timeslice"] == "Default"


@needs_root
def test_a_slice_that_somebody_else_has_set_since_is_left_alone(scripts: ModeScripts) -> None:
    scripts.must("setup_time_slicing.sh", "4", "--timeslice", "short")
    scripts.machine.change_gpu(timeslice="Long")
    result = scripts.must("reset_time_slicing.sh")
    assert "left as it is" in result.stderr
    assert scripts.gpu()["timeslice"] == "Long"
    assert scripts.left_behind() == []


def test_resetting_twice_or_without_a_set_up_does_nothing(scripts: ModeScripts) -> None:
    result = scripts.must("reset_time_slicing.sh")
    assert "nothing to undo" in result.stdout
    assert scripts.machine.changing_calls() == []


def test_the_kubernetes_configuration_offers_each_gpu_as_often_as_there_are_clients(
    scripts: ModeScripts,
) -> None:
    path = scripts.folder / "device plugin.yaml"
    for _ in range(2):  # the same text is no conflict
        scripts.must("setup_time_slicing.sh", "4", "--kubernetes-config", str(path))
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines == [
        "version: v1",
        "sharing:",
        "  timeSlicing:",
        "    resources:",
        "      - name: nvidia.com/gpu",
        "        replicas: 4",
    ]


def test_a_file_that_is_there_is_not_overwritten(scripts: ModeScripts) -> None:
    path = scripts.folder / "mine.yaml"
    path.write_text("mine\n")
    result = scripts.run("setup_time_slicing.sh", "4", "--kubernetes-config", str(path))
    assert result.returncode == 2
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "CLIENTS must be a number"),
        (["0"], "CLIENTS must be a number"),
        (["4x"], "CLIENTS must be a number"),
        (["four"], "unexpected argument: four"),
        (["4", "8"], "only one number"),
        (["4", "--timeslice", "tiny"], "default, short, medium or long"),
        (["4", "--timeslice"], "needs a value"),
        (["1", "--kubernetes-config", "/tmp/x.yaml"], "at least 2 clients"),
        (["4", "--kubernetes-config", "/nonexistent/x.yaml"], "there is no folder /nonexistent"),
    ],
)
def test_wrong_arguments_are_exit_code_2_with_a_sentence(
    scripts: ModeScripts, arguments: list[str], words: str
) -> None:
    result = scripts.run("setup_time_slicing.sh", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert scripts.left_behind() == []


def test_a_gpu_without_the_setting_refuses_a_slice_with_4_and_works_without(
    scripts: ModeScripts,
) -> None:
    scripts.machine.change_gpu(timeslice=None)
    result = scripts.run("setup_time_slicing.sh", "4", "--timeslice", "short")
    assert result.returncode == 4
    assert "has no time slice setting" in result.stderr
    scripts.must("setup_time_slicing.sh", "4")
    scripts.must("reset_time_slicing.sh")


@needs_real_root
def test_without_root_a_slice_is_refused_with_5_and_the_sudo_line(scripts: ModeScripts) -> None:
    result = scripts.run("setup_time_slicing.sh", "4", "--timeslice", "short", prefix=AS_NOBODY)
    assert result.returncode == 5
    assert "sudo ./gpu-configs/setup_time_slicing.sh 4 --timeslice short" in result.stderr
    assert scripts.machine.changing_calls() == []


@needs_root
def test_a_driver_that_refuses_the_caller_is_exit_code_5_and_nothing_stays(
    scripts: ModeScripts,
) -> None:
    # root in a container without the right to administer the GPU
    result = scripts.run("setup_time_slicing.sh", "4", "--timeslice", "short", FAKE_GPU_UID="65534")
    assert result.returncode == 5
    assert "Insufficient Permissions" in result.stderr
    assert scripts.left_behind() == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mig_current": "Enabled", "mig_pending": "Enabled"}, "disable_mig.sh"),
        ({"compute_mode": "Exclusive_Process"}, "compute mode is Exclusive_Process"),
        ({"compute_mode": "Prohibited"}, "compute mode is Prohibited"),
    ],
)
def test_another_mode_in_force_is_exit_code_6_and_the_way_out_is_named(
    scripts: ModeScripts, fields: dict[str, str], words: str
) -> None:
    scripts.machine.change_gpu(**fields)
    result = scripts.run("setup_time_slicing.sh", "4")
    assert result.returncode == 6
    assert words in result.stderr
    assert scripts.left_behind() == []


def test_our_own_mps_daemon_is_in_the_way_and_disable_mps_is_named(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    result = scripts.run("setup_time_slicing.sh", "4")
    assert result.returncode == 6
    assert "./gpu-configs/disable_mps.sh" in result.stderr
    assert scripts.saved("time-slicing") is None


def test_an_mps_server_on_the_gpu_is_in_the_way_whoever_owns_it(scripts: ModeScripts) -> None:
    scripts.machine.add_mps_daemon("/nonexistent/pipe", user="alice")
    assert "another user's MPS" in scripts.must("setup_time_slicing.sh", "4").stderr
    scripts.machine.add_mps_client(938)
    result = scripts.run("setup_time_slicing.sh", "4")
    assert result.returncode == 6
    assert "user alice): nvidia-cuda-mps-server" in result.stderr


@needs_root
def test_a_change_that_did_not_take_is_put_back_though_nvidia_smi_ended_well(
    scripts: ModeScripts,
) -> None:
    scripts.machine.fail(SET_TIMESLICE, exit=0, text="Successfully set timeslice policy.")
    result = scripts.run("setup_time_slicing.sh", "4", "--timeslice", "short")
    assert result.returncode == 1
    assert "the time slice is Default, not Short" in result.stderr
    assert scripts.left_behind() == []


@needs_root
def test_a_failure_after_the_slice_was_set_puts_it_back(scripts: ModeScripts) -> None:
    folder = scripts.folder / "sealed"
    folder.mkdir()
    target = folder / "x.yaml"
    target.symlink_to(folder / "missing" / "y.yaml")  # -e says no, writing fails
    result = scripts.run(
        "setup_time_slicing.sh", "4", "--timeslice", "short", "--kubernetes-config", str(target)
    )
    assert result.returncode == 5
    assert len(scripts.machine.changing_calls()) == 2
    assert scripts.gpu()["timeslice"] == "Default"
    assert scripts.left_behind() == []


@needs_root
def test_what_cannot_be_put_back_keeps_its_state_file_so_that_it_can_be_undone_later(
    scripts: ModeScripts,
) -> None:
    scripts.machine.fail(SET_TIMESLICE, exit=0, text="", after=1)
    target = scripts.folder / "x.yaml"
    target.symlink_to(scripts.folder / "missing" / "y.yaml")
    result = scripts.run(
        "setup_time_slicing.sh", "4", "--timeslice", "short", "--kubernetes-config", str(target)
    )
    assert result.returncode == 5
    assert "Not everything could be put back" in result.stderr
    scripts.machine.forget_rules()
    scripts.must("reset_time_slicing.sh")
    assert scripts.gpu()["timeslice"] == "Default"


@needs_root
@pytest.mark.parametrize(
    ("number", "group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
def test_a_signal_in_the_middle_puts_the_slice_back(
    scripts: ModeScripts, number: signal.Signals, group: bool, status: int
) -> None:
    code, stderr = scripts.interrupt(
        "setup_time_slicing.sh",
        "4",
        "--timeslice",
        "long",
        during=SET_TIMESLICE,
        number=number,
        group=group,
    )
    assert code == status, stderr
    assert "Putting back" in stderr
    assert scripts.gpu()["timeslice"] == "Default"
    assert scripts.left_behind() == []


@needs_root
def test_a_reset_that_was_interrupted_is_finished_by_the_next_one(scripts: ModeScripts) -> None:
    scripts.must("setup_time_slicing.sh", "4", "--timeslice", "long")
    code, _ = scripts.interrupt(
        "reset_time_slicing.sh", during=SET_TIMESLICE, number=signal.SIGTERM, group=False
    )
    assert code == 143
    assert scripts.saved("time-slicing") is not None
    scripts.must("reset_time_slicing.sh")
    assert scripts.gpu()["timeslice"] == "Default"
    assert scripts.left_behind() == []


@needs_root
def test_the_gpu_that_was_asked_for_is_the_one_that_changes() -> None:
    with mode_scripts("h100x2") as scripts:
        second = "GPU-55555555-6666-7777-8888-999999999999"
        scripts.must("setup_time_slicing.sh", "4", "--timeslice", "long", "--gpu", second)
        assert [gpu["timeslice"] for gpu in scripts.machine.state()["gpus"]] == ["Default", "Long"]
        scripts.must("reset_time_slicing.sh")
        assert scripts.machine.state()["gpus"][1]["timeslice"] == "Long"
        scripts.must("reset_time_slicing.sh", "--gpu", "1")
        assert scripts.machine.state()["gpus"][1]["timeslice"] == "Default"
