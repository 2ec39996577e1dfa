"""Runs run_experiments.sh and stress_test.sh with a pretended GPU, suite and analysis."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mode_script_runner import PROJECT_ROOT, ROOT_PREFIX, UUID, ModeScripts, open_folder
from program_copy import copy_programs
from recorded_rows import plain
from waiting import wait_until

from benchmarking.measuring import locks
from benchmarking.records import run_folder

PRETENDED_SUITE = PROJECT_ROOT / "tests" / "fakes" / "pretended_suite.py"
REPLACED = ("benchmarking/suite/session.py", "benchmarking/analyze_results.py")
SCRIPTS = ("run_experiments.sh", "stress_test.sh", "setup_environment.sh")
# One that every user may run.
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable
AS_BEFORE = {"daemons": 0, "mig": "Disabled", "instances": 0, "compute_mode": "Default",
             "timeslice": "Default"}  # fmt: skip


def _own_the_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class DriverRunner(ModeScripts):
    """A driver script run from a copy of the project whose suite is pretended."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder, kind)
        self.output = folder / "output"
        self.rounds = ("--repeats", "1")  # what holds of one round holds of four
        self.prefix: list[str] = []  # what a driver is started by
        self.suite_state = folder / "suite"
        self.suite_state.mkdir()
        copy_drivers(self.project)
        self.locks = folder / "locks"  # its own: other tests pretend the same card
        self.locks.mkdir()
        self.locks.chmod(0o1777)  # as /run/lock: some tests drive as another user
        self.environment |= {
            "PYTHON": sys.executable, "FAKE_SUITE_STATE": str(self.suite_state),
            locks.FOLDER_VARIABLE: str(self.locks),
        }  # fmt: skip

    def drive(
        self, script: str, *arguments: str, as_root: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a driver to its end."""
        return subprocess.run(
            self._command(script, arguments, as_root),
            cwd=self.project, env={**self.environment, **environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def must_drive(self, script: str, *arguments: str, **how: Any) -> subprocess.CompletedProcess:
        """Run a driver that has to succeed."""
        result = self.drive(script, *arguments, **how)
        assert result.returncode == 0, result.stderr
        return result

    def start_driver(
        self, script: str, *arguments: str, run_id: str, **how: Any
    ) -> subprocess.Popen[str]:
        """Start a driver in a session of its own; return once the suite is at work."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
                   "stderr": subprocess.PIPE}  # fmt: skip
        process = subprocess.Popen(
            self._command(script, arguments, False), cwd=self.project, env=self.environment,
            text=True, start_new_session=True, **(streams | how),
        )  # fmt: skip
        self._wait_for(lambda call: call.get("waiting") == run_id, f"the suite at work as {run_id}")
        return process

    def drive_until_signal(
        self, script: str, *arguments: str, run_id: str, signals: list[signal.Signals]
    ) -> tuple[int, str]:
        """Send signals to the driver alone, each once the suite had the one before."""
        process = self.start_driver(script, *arguments, run_id=run_id)
        for count, number in enumerate(signals, start=1):
            process.send_signal(number)
            self._wait_for(lambda call: "signal" in call, f"signal {count} at the suite", count)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr

    def drive_until_hangup(self, script: str, *arguments: str, run_id: str) -> int:
        """Close the driver's terminal once the suite is at work; return the exit status."""
        terminal, inside = os.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
        process = self.start_driver(
            script, *arguments, run_id=run_id, preexec_fn=_own_the_terminal, **streams
        )
        os.close(inside)
        os.close(terminal)  # what the kernel makes of it is SIGHUP and a terminal that is dead
        return process.wait(timeout=60)

    def _command(self, script: str, arguments: tuple[str, ...], as_root: bool) -> list[str]:
        prefix = (ROOT_PREFIX or []) if as_root else self.prefix
        flags = {word.partition("=")[0] for word in arguments}
        output = () if "--resume" in flags else ("--output", str(self.output))
        of_ramps_and_kept = {"--resume", "--repeats", "--quick", "--full", "--phase-minutes"}
        is_ramp = script != "run_experiments.sh"
        rounds = () if is_ramp or flags & of_ramps_and_kept else self.rounds
        return [*prefix, f"./{script}", *arguments, *rounds, *output]

    def _wait_for(self, wanted: Callable[[dict], bool], what: str, count: int = 1) -> None:
        wait_until(lambda: sum(map(wanted, self.python_calls())) >= count, what)

    def rule(self, **rules: dict[str, Any]) -> None:
        """Say what the pretended suite does, by run id (`time_slicing` for time-slicing)."""
        named = {name.replace("_", "-"): rule for name, rule in rules.items()}
        (self.suite_state / "rules.json").write_text(json.dumps(named))

    def python_calls(self) -> list[dict[str, Any]]:
        """Every call of suite and analysis, and every signal they got, oldest first."""
        path = self.suite_state / "calls.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True)]

    def all_suite_calls(self) -> list[dict[str, Any]]:
        """Every call of the suite, in order, with its flags as a dict."""
        return [
            {**call, "flags": suite_flags(call["arguments"])}
            for call in self.python_calls()
            if call["program"] == "benchmark_suite.py" and "arguments" in call
        ]

    def suite_calls(self) -> dict[str, dict[str, Any]]:
        """The last call of the suite for each run id."""
        return {call["flags"]["--run-id"]: call for call in self.all_suite_calls()}

    def planned(self, script: str, *arguments: str, **environment: str) -> dict[str, dict]:
        """The flags of each run that a dry run promises, which is the first of its rounds."""
        result = self.drive(script, "--dry-run", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        lines = [shlex.split(line) for line in result.stdout.splitlines()]
        runs = [words for words in lines if words[:2] == ["would", "run:"]]
        calls = [suite_flags(w[4:]) for w in runs if w[3].endswith("/benchmark_suite.py")]
        return {flags["--run-id"]: flags for flags in calls}

    def turns(self) -> list[str]:
        """The runs in the order of their rounds, as `2 mps-even`."""
        flags = [call["flags"] for call in self.all_suite_calls()]
        return [f"{one.get('--round', '-')} {one['--run-id']}" for one in flags]

    def phases(self) -> list[dict[str, Any]]:
        """The lines of phases.jsonl."""
        return [*map(json.loads, (self.output / "phases.jsonl").read_text().splitlines())]

    def outcomes(self) -> dict[str, str]:
        """Each phase's status by its name."""
        return {phase["name"]: phase["status"] for phase in self.phases()}

    def reason(self, name: str) -> str:
        """Why a phase failed or was skipped."""
        return next(phase["reason"] for phase in self.phases() if phase["name"] == name)

    def refusal(self, folder: Path | None = None) -> dict[str, Any]:
        """What was refused, once, and nothing else was left; as the published schema has it."""
        folder = folder or self.output
        (refusal,), warnings = run_folder.read_refusals(folder)
        assert warnings == []
        assert [path.name for path in folder.iterdir()] == [run_folder.REFUSALS_FILE]
        return plain(refusal)


def suite_flags(arguments: list[str]) -> dict[str, str]:
    """What a call of the suite was told, by flag."""
    words = iter(arguments)
    switches = (
        "--quick",
        "--bisect",
        "--until-break",
        "--allow-contention",
        "--null",
        "--mps-partitions",
    )
    flags = {word: "" if word in switches else next(words) for word in words}
    flags.setdefault("--run-id", Path(flags.get("--resume", "")).name)
    return flags


def copy_drivers(project: Path) -> None:
    """Copy all that a driver consists of; its suite is pretended, and it needs no package."""
    copy_programs(project, PRETENDED_SUITE, REPLACED)
    for name in SCRIPTS:
        shutil.copy(PROJECT_ROOT / name, project)
    (project / "requirements.txt").touch()
    for name in ("examples", "workloads"):
        (project / name).symlink_to(PROJECT_ROOT / name)


def without_gpu_programs() -> str:
    """A PATH on which neither the fakes nor a real nvidia-smi are found."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not (Path(f) / "nvidia-smi").exists())


@contextlib.contextmanager
def driver_runner(kind: str = "h100") -> Iterator[DriverRunner]:
    """A fresh DriverRunner, cleaned away at the end."""
    with open_folder() as folder:
        yield DriverRunner(folder, kind)


__all__ = [
    "AS_BEFORE", "SYSTEM_PYTHON", "UUID", "DriverRunner", "driver_runner", "without_gpu_programs",
]  # fmt: skip
