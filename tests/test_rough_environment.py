"""Folders that cannot be written, clocks that are set, MPS pipes that are shut or a dead daemon's.

The scripts are real, GPU, suite and analysis pretended (fakes/). What root's rights would hide is
done as the account `nobody`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver_runner import AS_BEFORE, SYSTEM_PYTHON, DriverRunner
from mode_script_runner import AS_USER, NOBODY, PROJECT_ROOT, ModeScripts, require_reachable
from suite_bench import Bench, names, window_seconds

from benchmarking.modes.mps import MpsMode
from benchmarking.modes.sharing_mode import ModeNotInForceError
from benchmarking.suite import measurement

FORWARD, BACK = "3600", "-3600"


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def users(runner: DriverRunner) -> DriverRunner:
    """The driver scripts in folders that a user without root's rights owns."""
    if AS_USER:
        require_reachable()
        for folder in (runner.folder, runner.suite_state):
            os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
    runner.environment["PYTHON"] = SYSTEM_PYTHON
    runner.prefix = AS_USER
    return runner


@pytest.mark.parametrize(
    ("script", "output", "words"),
    [("run_experiments.sh", "shut", "cannot write into {}"),
     ("stress_test.sh", "shut/new", "cannot make the folder {}")],
)  # fmt: skip
def test_a_results_folder_that_may_only_be_read_is_one_sentence_before_anything_is_done(
    users: DriverRunner, script: str, output: str, words: str
) -> None:
    (users.folder / "shut").mkdir(mode=0o555)
    users.output = users.folder / output
    result = users.drive(script)
    assert result.returncode == 2
    assert words.format(users.output) + "; name another" in result.stderr.splitlines()[-1]
    assert users.machine.changing_calls() == users.python_calls() == []


def test_a_results_folder_that_is_shut_meanwhile_ends_the_run_in_a_sentence_and_undoes_the_mode(
    users: DriverRunner,
) -> None:
    users.output.mkdir()
    users.output.chmod(0o777)
    users.rule(mps={"wait": True})
    process = users.start_driver("run_experiments.sh", "--modes", "mps", run_id="mps")
    phases = users.output / "phases.jsonl"
    for path, mode in ((users.output, 0o555), (phases, 0o444)):
        path.chmod(mode)
        if AS_USER:
            os.chown(path, 0, 0)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"cannot write {phases}; make room or bring it back" in stderr
    assert f"--resume {users.output}" in stderr
    assert users.machine.state()["mps"] == {}
    assert users.left_behind() == []
    assert users.outcomes() == {"baseline": "ok", "time-slicing": "skipped"}
    # given back, it is gone on with
    for path in (users.output, phases):
        if AS_USER:
            os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
        path.chmod(0o755)
    users.rule()
    resumed = users.drive("run_experiments.sh", "--resume", str(users.output))
    assert resumed.returncode == 0, resumed.stderr
    assert users.outcomes()["mps"] == "ok"
    assert users.reason("mps") == "it was cut off before its end and went on"


def test_a_state_folder_that_may_only_be_read_fails_the_phase_with_the_variable_to_set(
    users: DriverRunner,
) -> None:
    users.state_directory.mkdir(mode=0o555)
    result = users.drive("run_experiments.sh", "--modes=mps")
    assert result.returncode == 1
    assert "set GPU_SHARING_STATE_DIR to a folder that you may write" in users.reason("mps")
    assert users.outcomes()["analysis"] == "ok"
    assert users.machine.changing_calls() == []


def test_an_environment_that_may_only_be_read_is_used_as_it_is(scripts: ModeScripts) -> None:
    project = scripts.folder / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / "benchmarking").mkdir()
    for name in ("setup_environment.sh", "benchmarking/environment.py"):
        shutil.copy(PROJECT_ROOT / name, project / name)
    (project / "requirements.txt").write_text("no-such-package>=1,<2\n")
    python = project / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # has everything
    python.chmod(0o755)
    for folder in (project / ".venv", project):
        folder.chmod(0o555)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment["PATH"] = f"{Path(SYSTEM_PYTHON).parent}:{environment['PATH']}"
    set_up = 'environment::set_up "$PWD/requirements.txt"; echo "$PYTHON"'
    result = subprocess.run(
        [*AS_USER, "bash", "-Eeuo", "pipefail", "-c",
         f"source ./setup_environment.sh; {set_up}"],
        cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")
    for folder in (project, project / ".venv"):
        folder.chmod(0o755)  # or nobody but root could remove them


# --- clocks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that sets the wall clock of a process by JUMP_SECONDS every half second."""
    folder = tmp_path_factory.mktemp("clock")
    folder.chmod(0o755)
    library = folder / "jumping_clock.so"
    source = PROJECT_ROOT / "tests" / "fakes" / "jumping_clock.c"
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for a wall clock that jumps")
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", "-shared", "-fPIC", *warnings, "-o", library, source], check=True)
    seen = subprocess.check_output(
        ["bash", "-c", "echo $EPOCHSECONDS; sleep 0.6; echo $EPOCHSECONDS"], text=True,
        env={**os.environ, "LD_PRELOAD": str(library), "JUMP_SECONDS": FORWARD},
    )  # fmt: skip
    first, last = map(int, seen.split())
    assert last - first >= 3600
    return str(library)


@pytest.mark.parametrize("jump", [FORWARD, BACK])
def test_waits_last_as_long_as_they_say_while_the_wall_clock_is_set(
    scripts: ModeScripts, jumping_clock: str, jump: str
) -> None:
    clock = {"LD_PRELOAD": jumping_clock, "JUMP_SECONDS": jump}
    scripts.machine.fail("nvidia-cuda-mps-control -d", exit=0, text="")
    started = time.monotonic()
    result = scripts.run("enable_mps.sh", **clock)
    assert 1 < time.monotonic() - started < 30
    assert result.returncode == 1
    assert "the MPS daemon did not answer within 2 s" in result.stderr
    scripts.machine.forget_rules()
    # one that takes a while is not given up
    scripts.machine.fail("nvidia-cuda-mps-control < get_*", exit=1, after=1, times=8)
    slow = scripts.run("enable_mps.sh", **clock, GPU_SHARING_WAIT_SECONDS="30")
    assert slow.returncode == 0, slow.stderr


@pytest.mark.parametrize("jump", [FORWARD, BACK])
def test_figures_and_rows_stay_right_while_the_wall_clock_is_set(
    bench: Bench, jumping_clock: str, jump: str
) -> None:
    bench.script({"match": "*:interactive-2-*", "unit_seconds": 0.04})
    bench.environment |= {"LD_PRELOAD": jumping_clock, "JUMP_SECONDS": jump}
    started = time.monotonic()
    run = bench.must("--mix", "interactive", "--workloads", "2", "--window", "1")
    took = time.monotonic() - started
    assert names(run) == ["baseline-jupyter_simulation", "interactive-2-r0"]
    assert all(0.1 < window_seconds(record) < took for record in run.co_run_records)
    together = run.co_run_records[1]
    (warning,) = [line for line in together["warnings"] if "clock was set" in line]
    by, rest = warning.removeprefix("the clock was set by ").split(" s ", 1)
    assert (int(by) + 1) % 3600 in (0, 1, 2)
    assert abs(int(by)) > 3000
    assert rest == "meanwhile; figures come from the monotonic clock"
    # twice the time for a unit is half the rate: STP 1, to what a busy machine adds
    assert 0.6 < together["summary"]["stp"] < 1.5


@pytest.mark.parametrize("seconds", [3600.0, -7.6, 1.5, -1.5])
def test_only_a_jump_that_no_time_service_makes_is_said(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    offset = measurement.wall_clock_offset()
    assert measurement.clock_warnings(offset) == []
    real = measurement.time.time
    monkeypatch.setattr(measurement.time, "time", lambda: real() + seconds)
    assert len(measurement.clock_warnings(offset)) == (abs(seconds) > 5)


# --- MPS pipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shut", [lambda pipe: pipe, lambda pipe: pipe.parent])
def test_a_pipe_directory_without_permission_is_named_and_its_daemon_is_not_lost(
    users: DriverRunner, shut: Callable[[Path], Path]
) -> None:
    enabled = users.run("enable_mps.sh", prefix=AS_USER)
    assert enabled.returncode == 0, enabled.stderr
    state = users.saved("mps")
    folder = shut(Path(state["pipe_directory"]))
    folder.chmod(0o000)
    users.machine.forget_calls()
    for script in ("enable_mps.sh", "disable_mps.sh"):
        result = users.run(script, prefix=AS_USER)
        assert result.returncode == 5
        assert f"no permission on the MPS pipe directory: chmod u+rwx {folder}" in result.stderr
    driven = users.drive("run_experiments.sh", "--modes=mps")
    assert driven.returncode == 1
    assert "no permission on the MPS pipe directory" in users.reason("mps")
    assert users.machine.changing_calls() == []
    assert users.saved("mps") == state
    folder.chmod(0o700)
    assert users.run("disable_mps.sh", prefix=AS_USER).returncode == 0
    assert users.machine.state()["mps"] == {}


@pytest.fixture
def without_roots_rights() -> Iterator[None]:
    """This very process as another user for a while, where it is root's."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY.pw_uid)
    yield
    os.seteuid(before)


def test_the_suite_says_that_a_pipe_directory_is_shut(without_roots_rights: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shut = Path(folder) / "shut"
        shut.mkdir(mode=0o000)
        card = {"uuid": "GPU-1", "compute_mode": "Default"}
        inherited = {"CUDA_MPS_PIPE_DIRECTORY": str(shut / "pipe")}
        mode = MpsMode("mps", lambda: card, shut, environment=inherited)
        with pytest.raises(ModeNotInForceError) as refused:
            mode.require()
        shut.chmod(0o700)
    assert "/shut/pipe: no permission, have its owner give it back)" in str(refused.value)
    assert str(refused.value).endswith("run ./gpu-configs/enable_mps.sh")


def test_pipes_of_a_dead_daemon_are_replaced_and_the_mode_is_undone(runner: DriverRunner) -> None:
    runner.must("enable_mps.sh")
    pipe = Path(runner.saved("mps")["pipe_directory"])
    runner.machine.change(mps={})  # it died
    assert (pipe / "control").is_socket()
    result = runner.must_drive("run_experiments.sh", "--modes", "mps")
    assert "no longer answers; starting a new one" in result.stderr
    said = f"no longer answers; starting a new one in place of its pipes at {pipe}"
    assert said in runner.reason("mps")
    assert runner.outcomes()["mps"] == "ok"
    assert runner.suite_calls()["mps"]["gpu"]["daemons"] == 1
    assert runner.python_calls()[-1]["gpu"] == AS_BEFORE
    assert not pipe.exists()
    assert runner.left_behind() == []


def test_a_pipe_folder_that_somebody_filled_with_a_link_is_nobodys_daemon(
    runner: DriverRunner,
) -> None:
    pipe, elsewhere = runner.folder / "nvidia-mps", runner.folder / "elsewhere"
    for folder in (pipe, elsewhere):
        folder.mkdir()
    (elsewhere / "control").touch()
    (pipe / "control").symlink_to(elsewhere / "control")
    runner.machine.add_mps_daemon(str(pipe), uid=os.geteuid(), user="me")
    result = runner.drive("run_experiments.sh", "--modes", "mps", CUDA_MPS_PIPE_DIRECTORY=str(pipe))
    assert "mps is set up already" not in result.stderr
    assert all(
        call["environment"].get("CUDA_MPS_PIPE_DIRECTORY") != str(pipe)
        for call in runner.machine.calls()
        if call["command"].startswith("nvidia-cuda-mps-control <")
    )
