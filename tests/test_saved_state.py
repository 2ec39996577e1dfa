"""Saved state: whose it is, who may read it, and what a driver that was killed leaves in it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from driver_runner import AS_BEFORE, UUID, DriverRunner
from mode_script_runner import (
    AS_NOBODY,
    NOBODY,
    PROJECT_ROOT,
    ModeScripts,
    needs_real_root,
    needs_root,
)
from waiting import wait_until

from benchmarking.modes.script_state import read_state

LEFT = "was left in force when the script was cut off"


def with_umask(scripts: ModeScripts, umask: str, script: str) -> None:
    """Run a mode script under a umask that lets others write."""
    subprocess.run(
        ["bash", "-c", 'umask "$1" && exec "./gpu-configs/$2"', "x", umask, script],
        cwd=PROJECT_ROOT, env=scripts.environment, capture_output=True, check=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("umask", ["000", "077"])
def test_state_is_for_its_owner_alone_whatever_the_umask(scripts: ModeScripts, umask: str) -> None:
    with_umask(scripts, umask, "enable_mps.sh")
    modes = {
        path.name if path.suffix else "folder": path.stat().st_mode & 0o777
        for path in [scripts.state_directory, *scripts.state_directory.glob("*.state")]
    }
    assert modes == {"folder": 0o700, f"mps-{UUID}.state": 0o600}
    (daemon,) = scripts.machine.state()["mps"].values()
    assert Path(daemon["log_directory"]).stat().st_mode & 0o777 == 0o700
    scripts.must("disable_mps.sh")
    assert scripts.left_behind() == []


def as_link(path: Path, folder: Path) -> None:
    """Somebody else's text, by a link."""
    (folder / "text").write_text(path.read_text())
    path.unlink()
    path.symlink_to(folder / "text")


def as_folder(path: Path, folder: Path) -> None:
    path.unlink()
    path.mkdir()


def as_file_of_another(path: Path, folder: Path) -> None:
    os.chown(path, NOBODY.pw_uid, -1)


def as_folder_of_another(path: Path, folder: Path) -> None:
    os.chown(path.parent, NOBODY.pw_uid, -1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (as_link, "is a symbolic link, which these scripts never make; look at it and remove it"),
        (as_folder, "is a directory, which these scripts never make"),
        (lambda path, folder: path.chmod(0o620), "others may write"),
        (lambda path, folder: path.parent.chmod(0o1777), "chmod go-w"),
        pytest.param(as_file_of_another, "belongs to user nobody", marks=needs_real_root),
        pytest.param(as_folder_of_another, "GPU_SHARING_STATE_DIR", marks=needs_real_root),
    ],
)
def test_state_that_somebody_else_may_have_written_is_refused_and_nothing_is_done(
    scripts: ModeScripts, spoil: Callable[[Path, Path], None], words: str
) -> None:
    scripts.must("enable_mps.sh")
    path = scripts.state_directory / f"mps-{UUID}.state"
    spoil(path, scripts.folder)
    scripts.machine.forget_calls()
    for script in ("disable_mps.sh", "enable_mps.sh"):
        result = scripts.run(script)
        assert result.returncode == 5
        (said,) = result.stderr.splitlines()
        assert words in said
    assert scripts.machine.changing_calls() == []
    assert len(scripts.machine.state()["mps"]) == 1
    environment = {"GPU_SHARING_STATE_DIR": str(scripts.state_directory)}
    assert read_state("mps", UUID, environment) == {}


@needs_real_root
def test_a_state_folder_that_others_may_write_gets_no_state(scripts: ModeScripts) -> None:
    scripts.state_directory.mkdir()
    scripts.state_directory.chmod(0o1777)
    result = scripts.run("enable_mps.sh", prefix=AS_NOBODY)
    assert result.returncode == 5
    assert f"others may write {scripts.state_directory}" in result.stderr
    assert scripts.machine.changing_calls() == scripts.left_behind() == []


# --- what a killed driver leaves ----------------------------------------------------------------


@pytest.mark.parametrize("script", ["run_experiments.sh", "stress_test.sh"])
def test_a_new_start_undoes_what_a_killed_driver_left_and_leaves_nothing_itself(
    runner: DriverRunner, script: str
) -> None:
    flags = ("--modes", "mps") if script == "run_experiments.sh" else ("mps", "2")
    runner.rule(mps={"kill_driver": True})
    assert runner.drive(script, *flags).returncode == -signal.SIGKILL
    assert len(runner.machine.state()["mps"]) == 1
    assert runner.saved("driver")["mode"] == "mps"

    runner.rule(analysis={"files": {"comparison.json": "{}"}})
    runner.output = runner.folder / "second"
    result = runner.drive(script, *flags)
    assert result.returncode == 0, result.stderr
    assert f"mps {LEFT}; it is undone first" in result.stderr
    assert runner.suite_calls()["mps"]["gpu"]["daemons"] == 1
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


@needs_root
def test_instances_that_a_killed_driver_left_stand_in_nobodys_way(runner: DriverRunner) -> None:
    runner.rule(mig={"kill_driver": True})
    killed = runner.drive("run_experiments.sh", "--modes=mig", "--mig", as_root=True)
    assert killed.returncode == -signal.SIGKILL
    assert runner.gpu()["mig_current"] == "Enabled"

    runner.rule(analysis={"files": {"comparison.json": "{}"}})
    runner.output = runner.folder / "second"
    result = runner.drive("stress_test.sh", "time-slicing", "1", as_root=True)
    assert result.returncode == 0, result.stderr
    assert f"mig {LEFT}" in result.stderr
    assert runner.suite_calls()["time-slicing"]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


def test_restore_undoes_what_a_killed_driver_left_with_its_note(runner: DriverRunner) -> None:
    runner.rule(mps={"kill_driver": True})
    runner.drive("run_experiments.sh", "--modes", "mps")
    runner.must("gpu_status.sh", "--restore")
    assert runner.machine.state()["mps"] == {}
    assert runner.left_behind() == []


def test_a_gpu_that_another_driver_is_at_work_with_is_refused_and_left(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"wait": True})
    first = subprocess.Popen(
        ["./run_experiments.sh", "--modes", "mps", "--output", str(runner.output)],
        cwd=PROJECT_ROOT, env=runner.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: any("waiting" in call for call in runner.python_calls()), "the suite")
    second = str(runner.folder / "second")
    result = subprocess.run(
        ["./stress_test.sh", "mps", "--output", second], cwd=PROJECT_ROOT, env=runner.environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    restored = runner.run("gpu_status.sh", "--restore")
    daemons = runner.machine.state()["mps"]
    first.terminate()
    first.wait(timeout=60)
    assert result.returncode == 1
    assert "another run is at work with mps on GPU 0 (NVIDIA H100 80GB HBM3, " in result.stderr
    where = f"pid {first.pid}, into {runner.output}; wait for its end, or stop it"
    assert where in result.stderr
    assert where in runner.refusal(Path(second))["sentence"]
    assert restored.returncode == 6
    assert f"error: a run is at work with mps on {UUID}: {where}" in restored.stderr
    assert len(daemons) == 1
    assert runner.left_behind() == []


@pytest.mark.parametrize("spoiled", ["pid=1", "started=1", "mode=$(touch broken)", "mode="])
def test_a_note_of_a_process_that_is_another_now_or_of_no_mode_is_forgotten(
    runner: DriverRunner, spoiled: str
) -> None:
    runner.state_directory.mkdir(mode=0o700)
    note = f"gpu_uuid={UUID}\nmode=mps\npid={os.getpid()}\nstarted=1\noutput=/x\n{spoiled}\n"
    (runner.state_directory / f"driver-{UUID}.state").write_text(note)
    result = runner.drive("run_experiments.sh", "--modes", "time-slicing")
    assert result.returncode == 0, result.stderr
    assert LEFT not in result.stderr
    assert runner.left_behind() == []
    assert not (PROJECT_ROOT / "broken").exists()
