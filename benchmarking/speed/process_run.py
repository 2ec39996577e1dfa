"""Runs one job of the speed table in one process and reads what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking.suite.launcher import StopSignal, tail_of

PROJECT_ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
# A GPU process that is told to end first finishes the work in flight.
END_SECONDS = 60.0


class Interrupted(Exception):
    """Somebody asked the program to end while a process of it ran."""


class RunFailedError(Exception):
    """A process did not give what it was run for; the message says why in words.

    `exit_code` is 2 where the process refused its flags, 1 for everything else.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Take the sentence for the user."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Processes:
    """Starts one process after another, each with a time limit, and leaves none behind."""

    stop_signal: StopSignal
    timeout_seconds: float

    def run_workload(
        self, script: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Run one of the project's workloads by hand and return its result file's content.

        Raises:
            RunFailedError: It failed, took too long, or wrote no result.
            Interrupted: Somebody asked to end; the process has ended.
        """
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            self._run([script, *arguments, "--results-dir", folder], environment)
            results = list(Path(folder).glob("*.json"))
            if len(results) != 1:
                raise RunFailedError(f"{script} wrote {len(results)} result files instead of one")
            return json.loads(results[0].read_text(encoding="utf-8"))

    def run_for_json(
        self, script: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Run a program of the project that prints one JSON object, and return that object.

        Raises:
            RunFailedError: It failed, took too long, or printed something else.
            Interrupted: Somebody asked to end; the process has ended.
        """
        answer = self._run([script, *arguments], environment or {})
        try:
            return json.loads(answer)
        except ValueError as error:
            raise RunFailedError(f"{script} printed no JSON: {answer[:200]!r}") from error

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> str:
        """Run a script of the project; return its standard output."""
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
            with stdout.open("wb") as out, stderr.open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, str(PROJECT_ROOT / command[0]), *command[1:]],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                    env={**os.environ, **environment},
                )  # fmt: skip
            try:
                self._wait(process)
            finally:
                _end(process)
            if process.returncode != 0:
                said = [line for line in tail_of(stderr) if line.strip()]
                raise RunFailedError(
                    said[-1] if said else f"exit code {process.returncode}",
                    exit_code=2 if process.returncode == 2 else 1,
                )
            return stdout.read_text(encoding="utf-8", errors="replace")

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while process.poll() is None:
            if self.stop_signal.requested:
                raise Interrupted
            if time.monotonic() >= deadline:
                raise RunFailedError(
                    f"not done within {self.timeout_seconds:g} s (--timeout allows more)"
                )
            time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and whatever it left in its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
