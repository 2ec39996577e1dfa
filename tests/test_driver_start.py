"""How the drivers start: from where, with which Python, with whose saved arguments; --job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driver_runner import SYSTEM_PYTHON, DriverRunner

SCRIPT = "run_experiments.sh"
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
BARE_PYTHON = f'#!/bin/sh\nexec {SYSTEM_PYTHON} -S "$@"\n'


def start(
    runner: DriverRunner, command: list[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**runner.environment, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def with_pythons(runner: DriverRunner, text: str) -> dict[str, str]:
    """An environment in which every Python is this script, and none was named."""
    programs = runner.folder / "programs"
    programs.mkdir()
    names = [f"python3.{minor}" for minor in range(10, 15)]
    for name in ("python3", "python", *names):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    runner.environment.pop("PYTHON")
    return {"PATH": f"{programs}:{runner.environment['PATH']}"}


@pytest.mark.parametrize("script", [SCRIPT, "stress_test.sh"])
def test_a_link_to_a_driver_works_from_any_folder_and_messages_name_a_command_that_does(
    runner: DriverRunner, script: str
) -> None:
    link = runner.folder / "link"
    link.symlink_to(Path("project") / script)
    refused = start(runner, [str(link), "--nonsense"], Path("/"))
    assert refused.returncode == 2
    command = f"{runner.project / script}".removeprefix("/")
    assert refused.stderr == f"error: unknown option: --nonsense\nTry '{command} --help'.\n"
    elsewhere = runner.folder / "elsewhere"
    elsewhere.mkdir()
    done = start(runner, ["../link", "--output", "here"], elsewhere)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "here" / "arguments.nul").exists()


@pytest.mark.parametrize("script", [SCRIPT, "stress_test.sh"])
def test_a_driver_that_is_started_in_a_folder_that_is_gone_says_so(
    runner: DriverRunner, script: str
) -> None:
    folder = runner.folder / "gone"
    folder.mkdir()
    command = f"rmdir '{folder}'; exec '{runner.project / script}'"
    refused = start(runner, ["bash", "-c", command], folder)
    assert refused.returncode == 2
    assert "error: the folder that this was started in is gone" in refused.stderr


def test_without_a_python_that_is_new_enough_the_answer_is_one_sentence(
    runner: DriverRunner,
) -> None:
    result = start(
        runner, [f"./{SCRIPT}", "--help"], runner.project, **with_pythons(runner, OLD_PYTHON)
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: no Python >= 3.10 was found; install one")
    assert len(result.stderr.splitlines()) == 1


def test_a_dry_run_needs_no_package_and_says_what_it_would_install(runner: DriverRunner) -> None:
    environment = with_pythons(runner, BARE_PYTHON)
    (runner.project / "requirements.txt").write_text("no-such-package>=1,<2\n")
    (runner.project / "benchmarking" / "planning" / "plan_file.py").write_text(
        "import no_such_package\n"
    )
    plan = ["--plan", "examples/plans/own-commands.toml"]
    for words in (["--modes", "mps"], ["--modes", "time-slicing", "--timeslice", "long", *plan]):
        result = start(runner, [f"./{SCRIPT}", "--dry-run", *words], runner.project, **environment)
        assert result.returncode == 0, result.stderr
        venv = runner.project / ".venv"
        assert f"would install: requirements.txt into {venv}" in result.stdout
        assert f"would run: {venv}/bin/python {runner.project}/benchmarking/" in result.stdout
    assert "own-commands.toml is checked once there is an environment" in result.stderr
    # a GPU that does not answer is told before anything is installed
    runner.machine.change(driver="not-loaded")
    result = start(runner, [f"./{SCRIPT}"], runner.project, **environment)
    assert result.returncode == 3
    assert "mend the driver" in result.stderr
    assert not venv.exists()
    assert "mend the driver" in runner.refusal(runner.project / "results")["sentence"]
    # and is not written through somebody's link
    precious = runner.folder / "precious"
    runner.output.mkdir()
    (runner.output / "refusals.jsonl").symlink_to(precious)
    assert runner.drive(SCRIPT, PYTHON=sys.executable).returncode == 3
    assert not precious.exists()


def test_arguments_that_others_may_write_are_not_gone_on_with(runner: DriverRunner) -> None:
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 0
    saved = runner.output / "arguments.nul"
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.chmod(0o666)
    result = runner.drive(SCRIPT, "--resume", str(runner.output))
    assert result.returncode == 2
    assert "is not yours alone" in result.stderr
    other = runner.drive("stress_test.sh", "--resume", str(runner.folder))
    assert "holds no arguments.nul" in other.stderr


def test_a_secret_of_a_job_is_not_kept_with_the_arguments_and_is_needed_again_to_go_on(
    runner: DriverRunner,
) -> None:
    secret = "hunter2-hunter2"
    job = f"sleep 1 --token {secret}"
    assert runner.drive(SCRIPT, "--modes", "time-slicing", "--job", job).returncode == 0
    assert secret.encode() not in (runner.output / "arguments.nul").read_bytes()
    refused = runner.drive(SCRIPT, "--resume", str(runner.output))
    assert refused.returncode == 2
    assert "set the variable TOKEN to what it was" in refused.stderr
    again = runner.drive(SCRIPT, "--resume", str(runner.output), TOKEN=secret)
    assert again.returncode == 0, again.stderr


def test_a_run_that_goes_on_elsewhere_names_a_command_that_works_there(
    runner: DriverRunner,
) -> None:
    assert runner.drive(SCRIPT, "--modes", "time-slicing").returncode == 0
    phases = runner.output / "phases.jsonl"
    phases.rename(runner.folder / "kept")
    phases.symlink_to(runner.folder / "kept")
    command = [str(runner.project / SCRIPT), "--resume", str(runner.output)]
    result = start(runner, command, runner.folder)
    assert result.returncode == 1
    assert f"make room or bring it back, then {' '.join(command)}" in result.stderr


def test_own_jobs_take_the_place_of_the_mix_and_count_as_clients(runner: DriverRunner) -> None:
    jobs = ["--job", "python train.py --epochs 1", "--job=./serve.sh"]
    assert runner.drive(SCRIPT, "--modes", "mps", *jobs).returncode == 0
    for call in runner.suite_calls().values():
        words = call["arguments"]
        assert [words[i + 1] for i, word in enumerate(words) if word == "--job"] == [
            "python train.py --epochs 1", "./serve.sh",
        ]  # fmt: skip
        assert call["flags"]["--workloads"] == "2"
        assert "--mix" not in words
    runner.output = runner.folder / "second"
    ramp = runner.drive("stress_test.sh", "mps", "6", "--dry-run", *jobs)
    assert "--workloads 2,4,6 --repeats" in ramp.stdout
    refused = runner.drive("stress_test.sh", "mps", "7", *jobs)
    assert "MAX needs to be a multiple of 2" in refused.stderr
    refused = runner.drive(SCRIPT, "--mix", "mixed", *jobs)
    assert refused.returncode == 2
    assert "--mix and --job: give one of the two" in refused.stderr


def test_foreign_processes_are_allowed_by_the_old_name_too(asked: DriverRunner) -> None:
    result = asked.drive(SCRIPT, "--dry-run", "--modes", "mps", "--beside-others")
    assert result.stdout.count("--allow-contention") == 2


def test_a_tee_that_ends_takes_neither_the_mode_nor_the_report_along(
    runner: DriverRunner,
) -> None:
    runner.rule(mps={"wait": True})
    reader = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)
    pipe = {"stdout": reader.stdin, "stderr": reader.stdin}
    process = runner.start_driver(SCRIPT, "--modes", "mps", run_id="mps", **pipe)
    reader.stdin.close()
    reader.kill()
    reader.wait()
    process.terminate()
    assert process.wait(60) == 143
    assert runner.outcomes()["analysis"] == "ok"
    assert not runner.machine.state()["mps"]
    assert "MPS is off" in (runner.output / "after-hangup.log").read_text()


def test_a_refusal_that_nobody_reads_leaves_no_file_behind(runner: DriverRunner) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    folder = runner.folder / "elsewhere"
    folder.mkdir()
    words = ["--modes", "mig", "--mig-layout", "1g.10gb", "--workloads", "2"]
    refused = subprocess.run(
        [str(runner.project / SCRIPT), *words], cwd=folder, env=runner.environment,
        stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, timeout=60, check=False,
    )  # fmt: skip
    os.close(writing)
    assert refused.returncode == 2
    assert list(folder.iterdir()) == []


def test_a_run_under_nohup_outlives_its_terminal(runner: DriverRunner) -> None:
    runner.rule(mps={"wait": True})
    runner.prefix = ["nohup"]
    process = runner.start_driver(SCRIPT, "--modes", "mps", run_id="mps")
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.3)
    assert not any("signal" in call for call in runner.python_calls())
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_mode_script_that_may_not_be_run_fails_its_phase_alone(runner: DriverRunner) -> None:
    script = runner.project / "gpu-configs" / "enable_mps.sh"
    script.chmod(0o644)
    result = runner.drive(SCRIPT, "--modes", "mps")
    assert result.returncode == 1
    assert runner.reason("mps") == f"cannot run {script} (Permission denied)"
    assert runner.outcomes()["analysis"] == "ok"
    assert runner.left_behind() == []
