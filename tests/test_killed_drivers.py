"""What a driver enables and undoes: how long it took, and what one that was killed leaves."""

from __future__ import annotations

import json
import os
import signal

import pytest
from driver_runner import AS_BEFORE, UUID, DriverRunner
from mode_script_runner import needs_root

LEFT = "was left in force when the script was cut off"


def test_what_enabling_and_undoing_a_mode_said_and_took_is_recorded(runner: DriverRunner) -> None:
    assert runner.drive("run_experiments.sh", "--modes", "time-slicing,mps").returncode == 0
    assert "MPS is off" in (runner.output / "mode-scripts.log").read_text()
    lines = (runner.output / "mode_scripts.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["script"], run["arguments"]) for run in runs] == [
        (script, arguments)
        for script, arguments in (
            ("setup_time_slicing.sh", ["4"]), ("reset_time_slicing.sh", []),
            ("enable_mps.sh", []), ("disable_mps.sh", []),
        )
    ]  # fmt: skip
    assert all(0 < run["seconds"] < 60 and run["exit_code"] == 0 for run in runs)
    assert {run["gpu_uuid"] for run in runs} == {UUID}


def test_a_new_start_undoes_what_a_killed_driver_left_and_leaves_nothing_itself(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"kill_driver": True})
    killed = runner.drive("run_experiments.sh", "--modes", "mps")
    assert killed.returncode == -signal.SIGKILL
    assert len(runner.machine.state()["mps"]) == 1
    assert runner.saved("driver")["mode"] == "mps"

    runner.rule()
    runner.output = runner.folder / "second"
    result = runner.must_drive("run_experiments.sh", "--modes", "mps")
    assert f"mps {LEFT}; it is undone first" in result.stderr
    assert runner.suite_calls()["mps"]["gpu"]["daemons"] == 1
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


def test_a_run_that_was_cut_off_before_its_manifest_is_begun_anew(runner: DriverRunner) -> None:
    runner.rule(mps={"kill_driver": True})
    assert runner.drive("run_experiments.sh", "--modes", "mps").returncode == -signal.SIGKILL
    run = runner.output / "mps"
    (run / "manifest.json").rename(run / ".manifest.json.0123456789abcdef.tmp")
    for name in ("run.lock", "plan.toml"):
        (run / name).touch()
    runner.rule()
    runner.must_drive("run_experiments.sh", "--resume", str(runner.output))
    assert [path.name for path in run.iterdir()] == ["manifest.json"]


@needs_root
def test_instances_that_a_killed_driver_left_stand_in_nobodys_way(runner: DriverRunner) -> None:
    runner.rule(mig={"kill_driver": True})
    killed = runner.drive("run_experiments.sh", "--modes=mig", "--mig", as_root=True)
    assert killed.returncode == -signal.SIGKILL
    assert runner.gpu()["mig_current"] == "Enabled"

    runner.rule(analysis={"files": {"comparison.json": "{}"}})
    runner.output = runner.folder / "second"
    result = runner.must_drive("stress_test.sh", "time-slicing", "1", as_root=True)
    assert f"mig {LEFT}" in result.stderr
    assert runner.suite_calls()["time-slicing"]["gpu"] == AS_BEFORE
    assert runner.left_behind() == []


def test_a_gpu_that_another_driver_is_at_work_with_is_refused_and_left(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"wait": True})
    first = runner.start_driver("run_experiments.sh", "--modes", "mps", run_id="mps")
    second, where_first = runner.folder / "second", runner.output
    runner.output = second
    result = runner.drive("stress_test.sh", "mps")
    restored = runner.run("gpu_status.sh", "--restore")
    daemons = runner.machine.state()["mps"]
    first.terminate()
    first.communicate(timeout=60)
    assert result.returncode == 4
    assert "another run is at work with mps on GPU 0 (NVIDIA H100 80GB HBM3, " in result.stderr
    where = f"pid {first.pid}, into {where_first}; wait for its end, or stop it"
    assert where in result.stderr
    assert where in runner.refusal()["sentence"]
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
    result = runner.must_drive("run_experiments.sh", "--modes", "time-slicing")
    assert LEFT not in result.stderr
    assert runner.left_behind() == []
    assert not (runner.project / "broken").exists()
