"""Asks a job once for its data and weights, before any client of it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from typing import Any

from benchmarking.suite.launcher import StopSignal, client_base_environment
from benchmarking.suite.plan import PlannedClient
from benchmarking.suite.setup import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
)


def resolve(client: PlannedClient, stop_signal: StopSignal) -> dict[str, Any]:
    """Run a job's command with `--resolve` and return its answer.

    Raises `SuiteError` with the last thing it said, and code 2 or 3 if those were its own; raises
    `RunEnded` when interrupted.
    """
    environment = {**client_base_environment(os.environ), **client.environment}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*client.command, "--resolve"], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env=environment, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if stop_signal.requested:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
            time.sleep(0.05)
        stdout.seek(0)
        stderr.seek(0)
        answer, complaint = stdout.read(), stderr.read().strip().splitlines()
    if process.returncode != 0:
        known = process.returncode in (EXIT_USAGE, EXIT_NO_GPU)
        said = complaint[-1] if complaint else f"exit code {process.returncode}"
        raise SuiteError(
            f"{client.label} cannot be prepared: {said}",
            process.returncode if known else EXIT_FAILED,
        )
    try:
        value = json.loads(answer)
    except ValueError as error:
        raise SuiteError(
            f"{client.label}: --resolve answered no JSON: {answer[:200]!r}", EXIT_FAILED
        ) from error
    return dict(value)
