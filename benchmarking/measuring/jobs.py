"""Asks the jobs themselves before any client runs: for their data and weights, and their flags."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
)
from benchmarking.measuring.client import client_base_environment
from benchmarking.measuring.event_log import LineFollower, tail_of
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import PlannedClient

# About what is downloaded once where a job says that it is missing, in MB, by a name in its line.
DOWNLOAD_MB = {
    "resnet18": 45, "resnet50": 98, "vgg16": 528, "mobilenet": 14, "cifar-10": 170,
    "bert-base-uncased": 440,
}  # fmt: skip
FLAG_CHECK_SECONDS = 60.0
POLL_SECONDS = 0.05
# A GPU process that is told to end first finishes the work in flight.
END_SECONDS = 60.0
# What jobs answered to this process: their key tells environments apart, their command devices.
_answers: dict[tuple[str, ...], dict[str, Any]] = {}
# Runs a script up to the end of its own `parse_arguments`, which complains as it always does.
_PARSE_ONLY = """
import sys
sys.path[:] = filter(None, sys.path)
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0]).get("parse_arguments", int)()
"""


def resolve_all(
    jobs: Mapping[str, PlannedClient], stop: StopSignal, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Run each job's command with `--resolve` and return the answers, both by `job_key`.

    At the same time: each spends most of it importing torch, or waiting for a hub. `say` is told
    what is missing and downloaded. A process asks each job once: what it found is there. Raises
    `SuiteError` with the last thing that a job said, and code 2 or 3 if those were its own; raises
    `RunEnded` when interrupted.
    """
    questions = {job_key: (job_key, *client.command) for job_key, client in jobs.items()}
    unknown = [client for key, client in jobs.items() if questions[key] not in _answers]
    if unknown:
        say(f"resolving data and weights: {', '.join(client.label for client in unknown)}")
        with ThreadPoolExecutor(len(unknown)) as pool:
            found = pool.map(lambda client: _resolve(client, stop, say), unknown)
            for client, answer in zip(unknown, found, strict=True):
                _answers[questions[client.job_key]] = answer
    return {job_key: _answers[question] for job_key, question in questions.items()}


def _resolve(client: PlannedClient, stop: StopSignal, say: Callable[[str], None]) -> dict[str, Any]:
    def hear(line: str) -> None:
        if ": downloading " in line:
            say(f"{client.label}: {line}{_about_mb(line)}")

    environment = {**client_base_environment(os.environ), **client.environment}
    try:
        answer = run_script([*client.command, "--resolve"], environment, stop, hear=hear)
    except ScriptFailedError as error:
        known = error.exit_code in (EXIT_USAGE, EXIT_NO_GPU)
        raise SuiteError(
            f"{client.label} cannot be prepared: {error}", error.exit_code if known else EXIT_FAILED
        ) from error
    try:
        return dict(json.loads(answer))
    except ValueError as error:
        raise SuiteError(
            f"{client.label}: --resolve answered no JSON: {answer[:200]!r}", EXIT_FAILED
        ) from error


def _about_mb(line: str) -> str:
    sizes = [mb for name, mb in DOWNLOAD_MB.items() if name in line.lower()]
    return f" (about {sizes[0]} MB)" if sizes else ""


def require_known_flags(clients: Iterable[PlannedClient]) -> None:
    """Let the parser of each job's own script look at its flags; takes about a second.

    Raises `SuiteError` (code 2) with a sentence for each job whose flags it refuses.
    """
    jobs = list(clients)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [found for found in pool.map(_complaint_on_flags, jobs) if found]
    if complaints:
        raise SuiteError("\n".join(complaints), EXIT_USAGE)


def _complaint_on_flags(client: PlannedClient) -> str | None:
    python, *words = client.command
    done = subprocess.run(
        [python, "-c", _PARSE_ONLY, *words], stdin=subprocess.DEVNULL, capture_output=True,
        encoding="utf-8", errors="replace", timeout=FLAG_CHECK_SECONDS, check=False,
        env={**client_base_environment(os.environ), **client.environment},
    )  # fmt: skip
    if done.returncode != EXIT_USAGE:
        return None  # what else may go wrong is not the flags' fault, and the run will say it
    said = done.stderr.strip().splitlines() or ["its flags make no sense"]
    return f"{client.label}: {said[-1]}"


class ScriptFailedError(SuiteError):
    """A script did not give what it was run for; the message says why."""


def run_script(
    command: Sequence[str],
    environment: Mapping[str, str],
    stop: StopSignal,
    timeout: float = math.inf,
    hear: Callable[[str], None] = lambda line: None,
) -> str:
    """Run a script and return its standard output; leave no process behind.

    Args:
        command: The script with what runs it, and its arguments.
        environment: All variables that it gets.
        stop: Whether somebody asked to stop.
        timeout: Most seconds that it may take.
        hear: Gets each line that it says on standard error.

    Raises:
        ScriptFailedError: It failed, with the last line that it said, or took too long.
        RunEnded: Somebody asked to stop.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="script-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                start_new_session=True,
            )  # fmt: skip
        spoken = LineFollower(stderr)
        try:
            while process.poll() is None:
                if stop.requested:
                    raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
                if time.monotonic() >= deadline:
                    said = f"timed out after {timeout:g} s (--timeout allows more)"
                    raise ScriptFailedError(said, EXIT_FAILED)
                time.sleep(POLL_SECONDS)
                for line in spoken.poll():
                    hear(line.decode(errors="replace"))
        finally:
            # Whatever is left of its session is asked to end, then killed.
            for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
        if process.returncode != 0:
            tail = [line for line in tail_of(stderr) if line.strip()]
            why = tail[-1].strip() if tail else f"exit code {process.returncode}"
            raise ScriptFailedError(why, process.returncode)
        return stdout.read_text(encoding="utf-8", errors="replace")
