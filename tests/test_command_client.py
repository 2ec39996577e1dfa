"""Any command as a client: runs counted, failures told apart, and nothing left running."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from held_client import HeldClient
from waiting import is_running, wait_until
from workload_script import run_script

SCRIPT = "workloads/custom/command_client.py"


def by_hand(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(SCRIPT, *arguments, "--results-dir", tmp_path, cwd=PROJECT_ROOT)


def wait_for_line(path: Path) -> int:
    """The pid that a command writes about itself."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"a line in {path}")
    return int(path.read_text())


def test_by_hand_it_runs_once_and_leaves_a_result_whatever_it_says(tmp_path: Path) -> None:
    line = "sleep 0.2; echo out of memory >&2"
    done = by_hand(tmp_path, "--command", line, "--shell", "--working-directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("command_*.json"))
    assert 0.2 <= result["figures"]["command_seconds"] < 2
    assert result["settings"]["command"] == line


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("sh -c 'echo why >&2; exit 3'", 1, "ended with exit code 3: why"),
        ("sh -c 'kill -SEGV $$'", 1, "ended with signal SIGSEGV"),
        ("sh -c 'kill -40 $$'", 1, "ended with signal 40"),
        ("sh -c 'kill -KILL $$'", 1, "signal SIGKILL (the host may have run out of memory)"),
        ("sh -c 'exit 137'", 1, "exit code 137 (the host may have run out of memory)"),
        ("sh -c 'exit 12'", 12, "ended with exit code 12"),
        ("sh -c 'echo torch.OutOfMemoryError: CUDA out of memory. >&2; exit 1'", 12,
         "out of GPU memory"),
        ("sh -c 'printf %09999d 0 >&2; exit 1'", 1, "ended with exit code 1: 000"),
        ("no-such-program", 1, "cannot start no-such-program in .: No such file"),
        ("echo 'open", 2, "No closing quotation"),
        ("", 2, "--command is empty"),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence_and_out_of_memory_has_its_own_code(
    tmp_path: Path, line: str, code: int, words: str
) -> None:
    done = by_hand(tmp_path, "--command", line)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()[-1]) < 1000


def test_a_script_without_a_first_line_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("true")
    (tmp_path / "job.sh").chmod(0o755)
    done = by_hand(tmp_path, "--command", "./job.sh", "--working-directory", str(tmp_path))
    assert done.returncode == 1
    assert "Exec format error" in done.stderr
    assert "its first line (#!)" in done.stderr


def test_what_only_a_shell_can_read_is_left_to_the_shell(tmp_path: Path) -> None:
    for line in ("true # it's fine", "cat <<END\nit's a text\nEND"):
        done = by_hand(tmp_path, "--shell", "--command", line)
        assert done.returncode == 0, done.stderr
    assert by_hand(tmp_path, "--shell", "--command", " ").returncode == 2


@pytest.mark.parametrize("flags", ["", "--hold --events events"])
def test_closed_streams_and_ones_of_few_letters_fail_nothing(tmp_path: Path, flags: str) -> None:
    words = f"{sys.executable} {PROJECT_ROOT / SCRIPT} {flags} --command 'true é'"
    for streams in ("<&- >&- 2>&-", "</dev/null"):
        done = subprocess.run(
            ("sh", "-c", f"PYTHONIOENCODING=ascii exec {words} {streams}"), cwd=tmp_path,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_closes_takes_the_command_with_it(tmp_path: Path) -> None:
    line = f"trap '' HUP; echo $$ > {tmp_path}/deaf; sleep 600"
    client = subprocess.Popen(
        (sys.executable, PROJECT_ROOT / SCRIPT, "--shell", "--command", line), cwd=tmp_path
    )
    deaf = wait_for_line(tmp_path / "deaf")
    client.send_signal(signal.SIGHUP)
    assert client.wait(60) == 130
    assert not is_running(deaf)


def test_held_it_repeats_the_command_and_names_its_processes(tmp_path: Path) -> None:
    line = "sleep 0.6 & sleep 0.6 & wait"
    with HeldClient(tmp_path, SCRIPT, "--command", line, "--shell", "--latency") as client:
        identity = client.start_working()
        client.wait_for("job", count=2)
        client.say("stop")
        assert client.exit_code() == 0
    units = client.events("units")
    assert {(event["kind"], event["latency"]) for event in units} == {("command", True)}
    assert all(0.6 <= seconds < 10 for event in units for seconds in event["duration_seconds"])
    assert identity["device"] is None
    noted = {pid for event in client.events("processes") for pid in event["pids"]}
    assert len(noted) >= 6  # the shell and both sleeps, twice
    assert identity["pid"] not in noted
    assert client.events("done")[0]["host_cpu_seconds"] > 0


def test_a_held_command_that_fails_is_a_failed_client(tmp_path: Path) -> None:
    with HeldClient(tmp_path, SCRIPT, "--command", "sh -c 'echo broken >&2; exit 1'") as client:
        client.start_working()
        assert client.exit_code() == 1
    (error,) = client.events("error")
    assert error["status"] == "failed"
    assert error["message"].endswith("ended with exit code 1: broken")


def test_a_short_command_may_end_by_itself_when_told_to_stop(tmp_path: Path) -> None:
    line = f"sleep 1; echo whole > {tmp_path}/end"
    with HeldClient(tmp_path, SCRIPT, "--command", line, "--shell") as client:
        client.start_working()
        client.wait_for("processes")
        client.say("stop")
        assert client.exit_code() == 0
    assert (tmp_path / "end").exists()
    assert client.events("job") == []


def test_a_long_command_is_ended_with_all_that_it_started_in_whatever_session(
    tmp_path: Path,
) -> None:
    line = f"setsid sh -c 'echo $$ > {tmp_path}/far; exec sleep 600' & sleep 600"
    with HeldClient(tmp_path, SCRIPT, "--command", line, "--shell") as client:
        client.start_working()
        far = wait_for_line(tmp_path / "far")
        client.process.stdin.close()  # as when the suite has died
        assert client.exit_code() == 0
    assert not is_running(far)


def test_a_command_gets_sigterm_first_and_time_to_put_its_work_away(tmp_path: Path) -> None:
    line = f"trap 'sleep 1; echo saved > {tmp_path}/end; exit 0' TERM; echo $$ > {tmp_path}/pid; "
    line += "while :; do sleep 0.1; done"
    with HeldClient(tmp_path, SCRIPT, "--command", line, "--shell") as client:
        client.start_working()
        wait_for_line(tmp_path / "pid")
        # Interrupted while it starts the command, the client could not read what that complains.
        client.wait_for("processes")
        client.process.send_signal(signal.SIGTERM)
        assert client.exit_code() == 130
    assert (tmp_path / "end").read_text() == "saved\n"


def test_what_a_run_leaves_in_the_background_takes_no_time_of_its_job(tmp_path: Path) -> None:
    with HeldClient(tmp_path, SCRIPT, "--command", "sleep 600 &", "--shell") as client:
        client.start_working()
        client.wait_for("job", count=2)
        client.say("stop")
        assert client.exit_code() == 0
    spans = [job["end_seconds"] - job["start_seconds"] for job in client.events("job")]
    assert min(spans) < 0.9


def test_what_a_run_leaves_in_the_background_does_not_run_beside_the_next(tmp_path: Path) -> None:
    line = f"[ -e {tmp_path}/pid ] || {{ setsid sleep 600 & echo $! > {tmp_path}/pid; }}; sleep 0.1"
    with HeldClient(tmp_path, SCRIPT, "--command", line, "--shell") as client:
        client.start_working()
        client.wait_for("job", count=2)
        assert not is_running(int((tmp_path / "pid").read_text()))
        client.say("stop")
        assert client.exit_code() == 0
