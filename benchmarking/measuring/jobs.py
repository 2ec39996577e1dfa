"""Asks the jobs themselves before any client runs: for their data and weights, and their flags."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
)
from benchmarking.measuring.client import client_base_environment
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import PlannedClient

# About what is downloaded once where a job says that it is missing, in MB, by a name in its line.
DOWNLOAD_MB = {
    "resnet18": 45, "resnet50": 98, "vgg16": 528, "mobilenet": 14, "CIFAR-10": 170,
    "bert-base-uncased": 440,
}  # fmt: skip
FLAG_CHECK_SECONDS = 60.0
# What jobs answered to this process, by their command.
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
    clients: Iterable[PlannedClient], stop: StopSignal, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run each job's command with `--resolve` and return the answers in order.

    At the same time: each spends most of it importing torch, or waiting for a hub. `say` is told
    what is missing and downloaded. A process asks each job once: what it found is there. Raises
    `SuiteError` with the last thing that a job said, and code 2 or 3 if those were its own; raises
    `RunEnded` when interrupted.
    """
    jobs = list(clients)
    unknown = [client for client in jobs if client.command not in _answers]
    if unknown:
        say(f"resolving data and weights: {', '.join(client.label for client in unknown)}")
        with ThreadPoolExecutor(len(unknown)) as pool:
            found = pool.map(lambda client: _resolve(client, stop, say), unknown)
            _answers.update(zip((client.command for client in unknown), found, strict=True))
    return [_answers[client.command] for client in jobs]


def _resolve(client: PlannedClient, stop: StopSignal, say: Callable[[str], None]) -> dict[str, Any]:
    environment = {**client_base_environment(os.environ), **client.environment}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*client.command, "--resolve"], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env=environment, start_new_session=True,
        )  # fmt: skip
        told = 0
        while process.poll() is None:
            if stop.requested:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
            time.sleep(0.05)
            lines = _lines(stderr)
            for line in lines[told:]:
                if ": downloading " in line:
                    say(f"{client.label}: {line}{_about_mb(line)}")
            told = len(lines)
        complaint = _lines(stderr)
        stdout.seek(0)
        answer = stdout.read()
    if process.returncode != 0:
        known = process.returncode in (EXIT_USAGE, EXIT_NO_GPU)
        said = complaint[-1] if complaint else f"exit code {process.returncode}"
        raise SuiteError(
            f"{client.label} cannot be prepared: {said}",
            process.returncode if known else EXIT_FAILED,
        )
    try:
        return dict(json.loads(answer))
    except ValueError as error:
        raise SuiteError(
            f"{client.label}: --resolve answered no JSON: {answer[:200]!r}", EXIT_FAILED
        ) from error


def _lines(stream: IO[str]) -> list[str]:
    """The whole lines that are in a file so far; its writer has a position of its own."""
    text = os.pread(stream.fileno(), 1 << 20, 0).decode(errors="replace")
    return text.strip().splitlines()


def _about_mb(line: str) -> str:
    sizes = [mb for name, mb in DOWNLOAD_MB.items() if re.search(name, line, re.IGNORECASE)]
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
