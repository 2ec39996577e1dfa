"""setup_mig.sh and disable_mig.sh against the pretended machine."""

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

CREATE = "nvidia-smi mig -i * -cgi *"
SWITCH = "nvidia-smi -i * -mig *"
pytestmark = needs_root


def profiles(scripts: ModeScripts) -> list[str]:
    """The profiles of the instances that are there, each with its compute instance."""
    return [i["profile"] for i in scripts.gpu()["instances"] if i["ci"] is not None]


def assert_as_before(scripts: ModeScripts) -> None:
    gpu = scripts.gpu()
    assert (gpu["mig_current"], gpu["mig_pending"]) == ("Disabled", "Disabled")
    assert gpu["instances"] == []
    assert scripts.left_behind() == []


def switch_on_by_hand(scripts: ModeScripts, *instances: dict) -> None:
    """MIG mode as an administrator has left it, with instances of profile 1g.10gb."""
    scripts.machine.change_gpu(
        mig_current="Enabled",
        mig_pending="Enabled",
        instances=[
            {
                "ci": 0,
                "profile": "1g.10gb",
                "profile_id": 19,
                "size": 1,
                "uuid": f"MIG-{i}",
                **place,
            }
            for i, place in enumerate(instances)
        ],
    )


def test_mig_is_switched_on_with_as_many_instances_as_asked_for(scripts: ModeScripts) -> None:
    result = scripts.must("setup_mig.sh", "1g.10gb", "4")
    assert profiles(scripts) == ["1g.10gb"] * 4
    for instance in scripts.gpu()["instances"]:
        assert instance["uuid"] in result.stdout
    saved = scripts.saved("mig")
    assert saved == {
        "gpu_uuid": UUID,
        "previous_mig_mode": "Disabled",
        "profile": "1g.10gb",
        "count": "4",
        "gpu_instances": "7,8,9,10",
        "instances_before": "",
    }


def test_disabling_destroys_the_instances_and_switches_mig_off(scripts: ModeScripts) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "4")
    result = scripts.must("disable_mig.sh")
    assert "MIG mode is Disabled" in result.stdout
    assert_as_before(scripts)


def test_setting_up_twice_changes_nothing_the_second_time(scripts: ModeScripts) -> None:
    first = scripts.must("setup_mig.sh", "1g.5gb", "4")
    scripts.machine.forget_calls()
    second = scripts.must("setup_mig.sh", "1g.5gb", "4")
    assert second.stdout == first.stdout
    assert scripts.machine.changing_calls() == []


def test_disabling_twice_or_without_mig_does_nothing(scripts: ModeScripts) -> None:
    result = scripts.must("disable_mig.sh")
    assert "nothing to undo" in result.stdout
    assert scripts.machine.changing_calls() == []


def test_a_list_of_profiles_makes_one_instance_of_each(scripts: ModeScripts) -> None:
    scripts.must("setup_mig.sh", "1g.10gb,2g.20gb,1g.10gb")
    assert sorted(profiles(scripts)) == ["1g.10gb", "1g.10gb", "2g.20gb"]
    saved = scripts.saved("mig")
    assert saved is not None
    assert (saved["profile"], saved["count"]) == ("2g.20gb,1g.10gb,1g.10gb", "3")
    scripts.must("setup_mig.sh", "2g.20gb,1g.10gb,1g.10gb")  # the same layout: in force already
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


@pytest.mark.parametrize(
    ("kind", "asked", "taken"),
    [
        ("h100", "1g.5gb", "1g.10gb"),
        ("h100", "3g.20gb", "3g.40gb"),
        ("h200", "1g.5gb", "1g.18gb"),
        ("a100-40", "1g.5gb", "1g.5gb"),
        ("a100-40", "7g.80gb", "7g.40gb"),
        ("h100", "1g.10gb+me", "1g.10gb+me"),
    ],
)
def test_a_profile_that_the_gpu_lacks_is_replaced_by_its_own_of_as_many_slices(
    kind: str, asked: str, taken: str
) -> None:
    with mode_scripts(kind) as scripts:
        result = scripts.must("setup_mig.sh", asked, "1")
        assert profiles(scripts) == [taken]
        assert (f"has no profile {asked}; taking {taken}" in result.stderr) == (asked != taken)


@pytest.mark.parametrize("asked", ["5g.40gb", "1g.5gb+me"])
def test_a_profile_without_one_plain_counterpart_is_exit_code_4_and_those_there_are_listed(
    scripts: ModeScripts, asked: str
) -> None:
    result = scripts.run("setup_mig.sh", asked, "1")
    assert result.returncode == 4
    assert f"no profile {asked}" in result.stderr
    for name in ("1g.10gb ", "1g.10gb+me ", "1g.20gb ", "7g.80gb "):
        assert name in result.stderr
    assert scripts.machine.changing_calls() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a profile and a count"),
        (["1g.10gb", "2", "3"], "a profile and a count"),
        (["1g.10gb", "0"], "COUNT must be a number"),
        (["1g.10gb", "-3"], "unknown option: -3"),
        (["1g.10gb", "many"], "COUNT must be a number"),
        (["4", "1g.10gb"], "'4' is no MIG profile"),
        (["1g.10gb,2g.20gb", "2"], "takes no count"),
        (["1g.10gb;reboot", "2"], "is no MIG profile"),
    ],
)
def test_wrong_arguments_are_exit_code_2_with_a_sentence(
    scripts: ModeScripts, arguments: list[str], words: str
) -> None:
    result = scripts.run("setup_mig.sh", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert scripts.machine.calls() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["1g.10gb", "8"],
        ["2g.20gb", "4"],
        ["7g.80gb,1g.10gb"],
        # every count alone is allowed, but there are only eight memory slices
        ["3g.40gb,3g.40gb,1g.10gb"],
        ["4g.40gb,2g.20gb,1g.10gb,1g.10gb"],
    ],
)
def test_what_does_not_fit_is_exit_code_4_before_anything_is_changed(
    scripts: ModeScripts, arguments: list[str]
) -> None:
    files = scripts.all_files()
    result = scripts.run("setup_mig.sh", *arguments)
    assert result.returncode == 4
    assert "does not fit" in result.stderr
    assert scripts.machine.changing_calls() == []
    assert scripts.all_files() == files


@pytest.mark.parametrize(
    "arguments", [["3g.40gb", "2"], ["1g.10gb", "7"], ["4g.40gb,2g.20gb,1g.10gb"]]
)
def test_what_just_fits_is_created(scripts: ModeScripts, arguments: list[str]) -> None:
    scripts.must("setup_mig.sh", *arguments)
    assert scripts.run("disable_mig.sh").returncode == 0
    assert_as_before(scripts)


def test_a_gpu_without_mig_is_exit_code_4() -> None:
    with mode_scripts("t4") as scripts:
        result = scripts.run("setup_mig.sh", "1g.5gb", "4")
        assert result.returncode == 4
        assert "has no MIG" in result.stderr
        scripts.must("disable_mig.sh")


@needs_real_root
def test_without_root_it_is_refused_with_5_and_the_sudo_line(scripts: ModeScripts) -> None:
    result = scripts.run("setup_mig.sh", "1g.5gb", "4", prefix=AS_NOBODY)
    assert result.returncode == 5
    assert "sudo ./gpu-configs/setup_mig.sh 1g.5gb 4" in result.stderr
    assert scripts.machine.changing_calls() == []


def test_a_driver_that_refuses_the_caller_is_exit_code_5(scripts: ModeScripts) -> None:
    result = scripts.run("setup_mig.sh", "1g.10gb", "4", FAKE_GPU_UID="65534")
    assert result.returncode == 5
    assert "Insufficient Permissions" in result.stderr
    assert_as_before(scripts)


def test_processes_on_the_gpu_are_exit_code_6_and_listed_before_anything_is_changed(
    scripts: ModeScripts,
) -> None:
    scripts.machine.add_process(pid=4242, user="alice")
    result = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert result.returncode == 6
    assert "pid 4242 (user alice): python3" in result.stderr
    assert scripts.machine.changing_calls() == []


def test_our_own_mps_daemon_is_in_the_way(scripts: ModeScripts) -> None:
    scripts.must("enable_mps.sh")
    result = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert result.returncode == 6
    assert "./gpu-configs/disable_mps.sh" in result.stderr


def test_a_change_that_is_pending_because_of_a_client_is_exit_code_6_and_taken_back(
    scripts: ModeScripts,
) -> None:
    # nvidia-smi ends well here, and lists nobody: a monitoring agent is enough
    scripts.machine.change_gpu(mig_switch="in_use")
    result = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert result.returncode == 6
    assert "In use by another client" in result.stderr
    assert_as_before(scripts)


def test_a_change_that_needs_a_restart_is_said_and_left_pending_and_can_be_taken_back(
    scripts: ModeScripts,
) -> None:
    scripts.machine.change_gpu(mig_switch="reset_not_supported")
    result = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert result.returncode == 6
    assert "restart the machine" in result.stderr
    assert scripts.gpu()["mig_pending"] == "Enabled"
    assert CREATE.split(" *")[0] not in " ".join(scripts.machine.changing_calls())

    again = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert again.returncode == 6
    assert "pending Enabled" in again.stderr
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_after_the_restart_the_next_run_goes_on_and_still_knows_that_mig_was_off(
    scripts: ModeScripts,
) -> None:
    scripts.machine.change_gpu(mig_switch="reset_not_supported")
    assert scripts.run("setup_mig.sh", "1g.10gb", "4").returncode == 6
    scripts.machine.change_gpu(mig_current="Enabled", mig_switch="ok")  # the machine came up again
    scripts.must("setup_mig.sh", "1g.10gb", "4")
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_a_failure_half_way_through_creating_destroys_what_was_created(
    scripts: ModeScripts,
) -> None:
    scripts.machine.change_gpu(create_limit=2)
    result = scripts.run("setup_mig.sh", "1g.10gb", "4")
    assert result.returncode == 1
    assert "only 2 of 4 instances were created" in result.stderr
    assert "Insufficient Resources" in result.stderr
    assert_as_before(scripts)


def test_instances_of_somebody_else_stay_when_creating_fails(scripts: ModeScripts) -> None:
    switch_on_by_hand(scripts, {"gi": 11, "start": 4})
    scripts.machine.change_gpu(create_limit=1)
    assert scripts.run("setup_mig.sh", "1g.10gb", "4").returncode == 1
    assert [i["gi"] for i in scripts.gpu()["instances"]] == [11]
    assert scripts.gpu()["mig_current"] == "Enabled"
    assert scripts.left_behind() == []


def test_where_mig_was_on_before_instances_are_added_and_only_those_are_undone(
    scripts: ModeScripts,
) -> None:
    switch_on_by_hand(scripts, {"gi": 11, "start": 4})
    scripts.must("setup_mig.sh", "2g.20gb", "2")
    assert sorted(profiles(scripts)) == ["1g.10gb", "2g.20gb", "2g.20gb"]
    saved = scripts.saved("mig")
    assert saved is not None
    assert saved["previous_mig_mode"] == "Enabled"
    assert all("-mig" not in call.split() for call in scripts.machine.changing_calls())
    scripts.must("disable_mig.sh")
    assert [i["gi"] for i in scripts.gpu()["instances"]] == [11]
    assert scripts.gpu()["mig_current"] == "Enabled"


def test_what_does_not_fit_beside_somebody_elses_instances_is_exit_code_6(
    scripts: ModeScripts,
) -> None:
    switch_on_by_hand(scripts, {"gi": 11, "start": 4})
    result = scripts.run("setup_mig.sh", "3g.40gb", "2")
    assert result.returncode == 6
    assert "11 1g.10gb 4:1" in result.stderr
    assert scripts.machine.changing_calls() == []


def test_mig_that_was_switched_on_by_hand_is_not_switched_off(scripts: ModeScripts) -> None:
    switch_on_by_hand(scripts, {"gi": 11, "start": 4})
    result = scripts.must("disable_mig.sh")
    assert "it is left alone" in result.stdout
    assert scripts.machine.changing_calls() == []


def test_another_layout_of_ours_has_to_be_removed_first(scripts: ModeScripts) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "4")
    result = scripts.run("setup_mig.sh", "2g.20gb", "2")
    assert result.returncode == 6
    assert "sudo ./gpu-configs/disable_mig.sh" in result.stderr
    assert profiles(scripts) == ["1g.10gb"] * 4


def test_instances_in_use_are_exit_code_6_with_the_processes_and_none_is_destroyed(
    scripts: ModeScripts,
) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    scripts.machine.add_process(pid=4242, user="alice", gi=8)
    scripts.machine.forget_calls()
    result = scripts.run("disable_mig.sh")
    assert result.returncode == 6
    assert "pid 4242 (user alice): python3 on GPU instance 8" in result.stderr
    assert scripts.machine.changing_calls() == []
    scripts.machine.remove_process(4242)
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_an_instance_that_the_driver_does_not_let_go_is_exit_code_6_and_stays_known(
    scripts: ModeScripts,
) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    scripts.machine.fail(
        "nvidia-smi mig -i * -dgi *",
        exit=19,
        text="Unable to destroy GPU instance ID  7 from GPU  0: In use by another client",
    )
    result = scripts.run("disable_mig.sh")
    assert result.returncode == 6
    assert scripts.saved("mig") is not None
    scripts.machine.forget_rules()
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_a_run_that_was_killed_between_creating_and_saving_can_be_undone(
    scripts: ModeScripts,
) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    (path,) = scripts.state_directory.iterdir()
    path.write_text(path.read_text().replace("gpu_instances=7,8", "gpu_instances="))
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_instances_that_did_not_outlive_a_reset_are_created_anew(scripts: ModeScripts) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    scripts.machine.change_gpu(instances=[])
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    assert profiles(scripts) == ["1g.10gb"] * 2
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


@pytest.mark.parametrize("status", [0, 6])
def test_no_mig_devices_means_none_whatever_the_exit_status(
    scripts: ModeScripts, status: int
) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    scripts.machine.change_gpu(instances=[])
    scripts.machine.fail("nvidia-smi mig -lgi", exit=status, text="No MIG-enabled devices found.")
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


@pytest.mark.parametrize("during", [SWITCH, CREATE])
@pytest.mark.parametrize(
    ("number", "group", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_in_the_middle_of_setting_up_puts_everything_back(
    scripts: ModeScripts, during: str, number: signal.Signals, group: bool, status: int
) -> None:
    code, stderr = scripts.interrupt(
        "setup_mig.sh", "1g.10gb", "4", during=during, number=number, group=group
    )
    assert code == status, stderr
    assert_as_before(scripts)


def test_disabling_that_was_interrupted_is_finished_by_the_next_one(scripts: ModeScripts) -> None:
    scripts.must("setup_mig.sh", "1g.10gb", "2")
    code, _ = scripts.interrupt(
        "disable_mig.sh",
        during="nvidia-smi mig -i * -dgi *",
        number=signal.SIGINT,
        group=True,
    )
    assert code == 130
    scripts.must("disable_mig.sh")
    assert_as_before(scripts)


def test_a_list_with_unknown_profiles_names_them_once_in_one_message(scripts: ModeScripts) -> None:
    result = scripts.run("setup_mig.sh", "5g.40gb,1g.5gb,5g.40gb,6g.60gb,1g.5gb")
    assert result.returncode == 4
    assert "no profile 5g.40gb,6g.60gb, nor one plain profile like it" in result.stderr
    assert result.stderr.count("has no profile 1g.5gb; taking 1g.10gb") == 1
    assert scripts.machine.changing_calls() == []
