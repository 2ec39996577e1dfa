"""What all mode scripts have in common: help, usage, no driver, dry run, status."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mode_script_runner import (
    PROJECT_ROOT,
    UUID,
    ModeScripts,
    mode_scripts,
    needs_root,
    without_random_names,
)

# Each script with arguments under which it does its work.
SCRIPTS = {
    "setup_time_slicing.sh": ["4"],
    "reset_time_slicing.sh": [],
    "enable_mps.sh": [],
    "disable_mps.sh": [],
    "setup_mig.sh": ["1g.10gb", "4"],
    "disable_mig.sh": [],
    "gpu_status.sh": [],
}


def test_every_script_of_the_folder_is_tested_here() -> None:
    assert {path.name for path in (PROJECT_ROOT / "gpu-configs").glob("*.sh")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_common_flags_and_the_exit_codes_without_a_driver(
    scripts: ModeScripts, script: str
) -> None:
    scripts.machine.change(driver="not-loaded")
    result = scripts.run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")
    for word in ("--dry-run", "--gpu INDEX_OR_UUID", "--help", "Exit codes"):
        assert word in result.stdout
    assert scripts.machine.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_a_usage_error(scripts: ModeScripts, script: str) -> None:
    result = scripts.run(script, *SCRIPTS[script], "--nonsense")
    assert result.returncode == 2
    assert "unknown option: --nonsense" in result.stderr
    assert "--help" in result.stderr
    assert scripts.machine.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_without_a_value_is_a_usage_error(scripts: ModeScripts, script: str) -> None:
    result = scripts.run(script, *SCRIPTS[script], "--gpu")
    assert result.returncode == 2
    assert "--gpu needs a value" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_driver_the_exit_code_is_3_and_nvidia_smis_words_are_passed_on(
    scripts: ModeScripts, script: str
) -> None:
    scripts.machine.change(driver="not-loaded")
    result = scripts.run(script, *SCRIPTS[script])
    assert result.returncode == 3
    assert "couldn't communicate with the NVIDIA driver" in result.stderr
    assert scripts.machine.changing_calls() == []


def test_a_driver_that_does_not_fit_its_library_is_exit_code_3(scripts: ModeScripts) -> None:
    scripts.machine.change(driver="Driver/library version mismatch")
    result = scripts.run("gpu_status.sh")
    assert result.returncode == 3
    assert "Driver/library version mismatch" in result.stderr


def test_a_machine_without_a_gpu_is_exit_code_3() -> None:
    with mode_scripts("no-gpu") as scripts:
        result = scripts.run("gpu_status.sh")
        assert result.returncode == 3
        assert "No devices were found" in result.stderr


def test_without_nvidia_smi_the_exit_code_is_3(scripts: ModeScripts, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    for program in ("bash", "env", "dirname", "id", "getent", "cat"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    result = subprocess.run(
        [bash, "./gpu-configs/gpu_status.sh"],
        cwd=PROJECT_ROOT,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert "nvidia-smi was not found" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there_is_exit_code_3_and_those_that_are_get_listed(
    scripts: ModeScripts, script: str
) -> None:
    result = scripts.run(script, *SCRIPTS[script], "--gpu", "7")
    assert result.returncode == 3
    assert "there is no GPU '7'" in result.stderr
    assert UUID in result.stderr


@needs_root
@pytest.mark.parametrize(
    ("before", "script", "arguments"),
    [
        ([], "setup_time_slicing.sh", ["4", "--timeslice", "long"]),
        ([["setup_time_slicing.sh", "4", "--timeslice", "long"]], "reset_time_slicing.sh", []),
        ([], "enable_mps.sh", ["--exclusive", "--percentage", "25"]),
        ([["enable_mps.sh"]], "enable_mps.sh", ["--exclusive", "--percentage", "25"]),
        ([["enable_mps.sh", "--exclusive"]], "disable_mps.sh", []),
        ([], "setup_mig.sh", ["1g.5gb", "4"]),
        ([["setup_mig.sh", "1g.10gb", "2"]], "disable_mig.sh", []),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    scripts: ModeScripts, before: list[list[str]], script: str, arguments: list[str]
) -> None:
    for command in before:
        scripts.must(*command)
    scripts.machine.forget_calls()
    files = scripts.all_files()
    result = scripts.run(script, *arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert scripts.all_files() == files
    assert scripts.machine.changing_calls() == []
    assert "would run: " in result.stdout
    # The plan is the deed: what the real run logs is what the dry run has promised.
    promised = [
        line.removeprefix("would run: ")
        for line in without_random_names(result.stdout).splitlines()
        if line.startswith("would run: ")
    ]
    real = without_random_names(scripts.must(script, *arguments).stderr)
    done = [line.removeprefix("run: ") for line in real.splitlines() if line.startswith("run: ")]
    # Ids of instances are only known when they are there; they are saved at the end.
    assert done[: len(promised)] == promised
    assert all(extra.startswith("save ") for extra in done[len(promised) :])


@needs_root
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("setup_time_slicing.sh", ["4", "--timeslice", "long"]),
        ("enable_mps.sh", ["--exclusive"]),
        ("setup_mig.sh", ["1g.10gb", "4"]),
    ],
)
def test_locked_settings_are_refused_with_5_before_anything_is_changed(
    scripts: ModeScripts, script: str, arguments: list[str]
) -> None:
    files = scripts.all_files()
    result = scripts.run(script, *arguments, GPU_SETTINGS_LOCKED="1")
    assert result.returncode == 5
    assert "GPU_SETTINGS_LOCKED=1" in result.stderr
    assert scripts.machine.changing_calls() == []
    assert scripts.all_files() == files


@needs_root
@pytest.mark.parametrize(
    ("before", "script"),
    [
        (["setup_time_slicing.sh", "4", "--timeslice", "long"], "reset_time_slicing.sh"),
        (["enable_mps.sh", "--exclusive"], "disable_mps.sh"),
        (["setup_mig.sh", "1g.10gb", "4"], "disable_mig.sh"),
    ],
)
def test_locked_settings_keep_the_undo_scripts_from_changing_the_card_too(
    scripts: ModeScripts, before: list[str], script: str
) -> None:
    scripts.must(*before)
    scripts.machine.forget_calls()
    files = scripts.all_files()
    result = scripts.run(script, GPU_SETTINGS_LOCKED="1")
    assert result.returncode == 5
    assert scripts.machine.changing_calls() == []
    assert scripts.all_files() == files


def test_locked_settings_leave_time_slicing_and_mps_usable(scripts: ModeScripts) -> None:
    for script in (
        "setup_time_slicing.sh",
        "reset_time_slicing.sh",
        "enable_mps.sh",
        "disable_mps.sh",
    ):
        result = scripts.run(script, *SCRIPTS[script], GPU_SETTINGS_LOCKED="1")
        assert result.returncode == 0, result.stderr


def test_a_damaged_state_file_is_named_and_nothing_is_done(scripts: ModeScripts) -> None:
    scripts.state_directory.mkdir()
    path = scripts.state_directory / f"mps-{UUID}.state"
    path.write_text("pipe_dir")
    result = scripts.run("disable_mps.sh")
    assert result.returncode == 1
    assert f"{path} is damaged" in result.stderr
    assert scripts.machine.changing_calls() == []


def test_a_state_folder_that_cannot_be_made_is_exit_code_5_and_names_the_variable(
    scripts: ModeScripts,
) -> None:
    (scripts.folder / "file").write_text("")
    result = scripts.run(
        "setup_time_slicing.sh", "4", GPU_SHARING_STATE_DIR=str(scripts.folder / "file" / "x")
    )
    assert result.returncode == 5
    assert "GPU_SHARING_STATE_DIR" in result.stderr


def test_status_of_an_untouched_gpu_says_that_nothing_is_to_be_undone(scripts: ModeScripts) -> None:
    result = scripts.must("gpu_status.sh")
    for line in (
        "mode in force: time-slicing (what CUDA does by itself)",
        "compute mode:  Default",
        "time slice:    Default",
        "MIG mode:      Disabled",
        "MPS daemon:    none",
        "in use by:     nobody",
        "saved:         nothing",
    ):
        assert line in result.stdout
    assert scripts.machine.changing_calls() == []


def test_status_shows_each_gpu_or_the_one_asked_for() -> None:
    with mode_scripts("h100x2") as scripts:
        assert scripts.must("gpu_status.sh").stdout.count("mode in force") == 2
        one = scripts.must("gpu_status.sh", "--gpu", "1").stdout
    assert one.count("mode in force") == 1
    assert "GPU-55555555-6666-7777-8888-999999999999" in one


def test_status_names_the_processes_on_the_gpu_and_their_owners(scripts: ModeScripts) -> None:
    scripts.machine.add_process(pid=4242, name="python3", user="alice")
    assert "pid 4242 (user alice): python3, 512 MiB" in scripts.must("gpu_status.sh").stdout


@needs_root
@pytest.mark.parametrize(
    ("before", "mode", "undo"),
    [
        (
            ["setup_time_slicing.sh", "4"],
            "time-slicing",
            "undo: ./gpu-configs/reset_time_slicing.sh",
        ),
        (
            ["setup_time_slicing.sh", "4", "--timeslice", "long"],
            "time-slicing",
            "undo: sudo ./gpu-configs/reset_time_slicing.sh",
        ),
        (["enable_mps.sh"], "mps", "undo: ./gpu-configs/disable_mps.sh"),
        (["enable_mps.sh", "--exclusive"], "mps", "undo: sudo ./gpu-configs/disable_mps.sh"),
        (["setup_mig.sh", "1g.10gb", "4"], "mig", "undo: sudo ./gpu-configs/disable_mig.sh"),
    ],
)
def test_status_names_the_mode_the_state_file_and_the_command_that_undoes_it(
    scripts: ModeScripts, before: list[str], mode: str, undo: str
) -> None:
    scripts.must(*before)
    scripts.machine.forget_calls()
    status = scripts.must("gpu_status.sh").stdout
    assert f"mode in force: {mode}" in status
    assert f"{mode}-{UUID}.state" in status
    assert undo in status
    assert scripts.machine.changing_calls() == []


def test_status_knows_another_users_daemon(scripts: ModeScripts) -> None:
    scripts.machine.add_mps_daemon("/nonexistent/pipe", user="alice", pid=777)
    status = scripts.must("gpu_status.sh").stdout
    assert "MPS daemon:    another, pid 777 of user alice" in status
    assert "mode in force: mps, by a daemon that enable_mps.sh did not start" in status


def test_status_of_a_compute_mode_that_forbids_sharing_says_so(scripts: ModeScripts) -> None:
    scripts.machine.change_gpu(compute_mode="Exclusive_Process")
    status = scripts.must("gpu_status.sh").stdout
    assert "mode in force: exclusive (compute mode Exclusive_Process: no sharing)" in status


def test_restore_undoes_what_a_killed_script_left_and_a_dry_run_only_says_so(
    scripts: ModeScripts,
) -> None:
    scripts.must("enable_mps.sh")
    said = scripts.must("gpu_status.sh", "--restore", "--dry-run")
    assert f"disable_mps.sh --gpu {UUID}" in said.stdout
    assert scripts.machine.state()["mps"]
    scripts.must("gpu_status.sh", "--restore")
    assert not scripts.machine.state()["mps"]
    assert scripts.left_behind() == []
    assert "saved:         nothing" in scripts.must("gpu_status.sh", "--restore").stdout
