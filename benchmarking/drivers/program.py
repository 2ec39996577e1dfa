"""What the programs next to the suite do alike: prepare clients, write what was found, and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunEnded, SuiteError
from benchmarking.measuring.client import Client
from benchmarking.measuring.event_log import tail_of
from benchmarking.measuring.jobs import resolve_all
from benchmarking.measuring.launcher import FinishRule
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import Plan
from benchmarking.records.run_folder import (
    ClientPaths,
    write_json_atomic,
)
from benchmarking.records.writing import write_text_atomic
from benchmarking.suite.setup import PROJECT_ROOT

POLL_SECONDS = 0.1
# A GPU process that is told to end first finishes the work in flight.
END_SECONDS = 60.0


def exit_code_of(work: Callable[[StopSignal], int], folder: Path, fix: str) -> int:
    """Return the exit code of `work`; what ends it early is one sentence on standard error.

    Args:
        work: Gets what tells whether somebody asked to stop; may raise what the suite raises.
        folder: Where the program writes.
        fix: What to do about a disk without room, after "make room there".
    """
    program = Path(sys.argv[0]).name
    try:
        with StopSignal().watching() as stop:
            return work(stop)
    except RunEnded as end:
        print(f"{program}: {end}", file=sys.stderr)
        return end.exit_code
    except SuiteError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        # A file that cannot be made is named by the error, one that cannot be filled is not.
        where = Path(error.filename).parent if isinstance(error.filename, str) else folder
        message = f"cannot write to {where} ({error.strerror or error}): make room there, {fix}"
        code = EXIT_FAILED
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


def make_folder(flag: str, folder: Path) -> None:
    """Make the folder that a flag names; raises `SuiteError` where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuiteError(
            f"{flag} {folder}: {error.strerror}; name another folder", EXIT_USAGE
        ) from error


def write_report(folder: Path, name: str, record: Mapping[str, Any], markdown: str) -> None:
    """Write what was found as `<name>.json`, and as people read it as `<name>.md`."""
    write_json_atomic(folder / f"{name}.json", record)
    write_text_atomic(folder / f"{name}.md", markdown)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table; a bar or the end of a line ends no cell."""
    cells = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [list(header), *cells]]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


@dataclass(frozen=True)
class UntilOver(FinishRule):
    """Ends the launcher's window when `over` is set, whatever the clients have done by then."""

    over: threading.Event = field(default_factory=threading.Event)

    def is_done(self, client: Client, window_seconds: float) -> bool:
        """Whether the window is over, the same for every client."""
        return self.over.is_set()


def resolve_jobs(plan: Plan, stop: StopSignal, say: Callable[[str], None]) -> Plan:
    """Return the plan with each job's data and weights found once; raises as `resolve_all` does."""
    jobs = plan.jobs()
    answers = resolve_all(jobs.values(), stop, say)
    found = dict(zip(jobs, (answer.get("arguments") or [] for answer in answers), strict=True))
    return plan.map_clients(lambda client: client.with_arguments(found[client.job_key]))


def client_paths(folder: Path, name: str) -> ClientPaths:
    """Return where a client's output goes; an earlier call's event log makes room."""
    folder.mkdir(exist_ok=True)
    kinds = ("events.jsonl", "stdout.log", "stderr.log")
    paths = ClientPaths(*(folder / f"{name}.{kind}" for kind in kinds))
    paths.events.unlink(missing_ok=True)
    return paths


class ScriptFailedError(Exception):
    """A script did not give what it was run for; the message says why."""


def run_script(
    command: Sequence[str], environment: Mapping[str, str], stop: StopSignal, timeout: float
) -> str:
    """Run a script of the project and return its standard output; leave no process behind.

    Args:
        command: The script's path in the project, and its arguments.
        environment: Variables that it gets besides this process's own.
        stop: Whether somebody asked to stop.
        timeout: Most seconds that it may take.

    Raises:
        ScriptFailedError: It failed, with the last line that it said, or took too long.
        RunEnded: Somebody asked to stop.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="script-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, str(PROJECT_ROOT / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        try:
            while process.poll() is None:
                if stop.requested:
                    raise RunEnded("interrupted", EXIT_INTERRUPTED)
                if time.monotonic() >= deadline:
                    raise ScriptFailedError(
                        f"timed out after {timeout:g} s (--timeout allows more)"
                    )
                time.sleep(POLL_SECONDS)
        finally:
            # Whatever is left of its session is asked to end, then killed.
            for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
        if process.returncode != 0:
            said = [line for line in tail_of(stderr) if line.strip()]
            raise ScriptFailedError(said[-1] if said else f"exit code {process.returncode}")
        return stdout.read_text(encoding="utf-8", errors="replace")
