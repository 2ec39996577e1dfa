"""What the programs next to the suite do alike: prepare clients, write what was found, and end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
    drop_output,
    leave_dead_terminal,
)
from benchmarking.measuring.client import Client, client_base_environment
from benchmarking.measuring.jobs import resolve_all
from benchmarking.measuring.launcher import CoRunResult, FinishRule, Launcher, Timeouts
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import Plan, PlannedCoRun
from benchmarking.records.run_folder import (
    ClientPaths,
    write_json_atomic,
)
from benchmarking.records.writing import LOCK_FILE, open_own, take_lock, write_text_atomic


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
            code = work(stop)
            print(end="", flush=True)
            return code
    except RunEnded as end:
        said, code = str(end), end.exit_code
    except SuiteError as error:
        said, code = f"error: {error}", error.exit_code
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        drop_output()
        return EXIT_FAILED
    except OSError as error:
        drop_output()
        # A file that cannot be made is named by the error, one that cannot be filled is not.
        where = Path(error.filename).parent if isinstance(error.filename, str) else folder
        said = f"error: cannot write to {where} ({error.strerror or error}): make room there, {fix}"
        code = EXIT_FAILED
    leave_dead_terminal(os.devnull)
    print(f"{program}: {said}", file=sys.stderr)
    return code


def make_folder(flag: str, folder: Path) -> None:
    """Make the folder that a flag names; raises `SuiteError` where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuiteError(
            f"{flag} {folder}: {error.strerror}; name another folder", EXIT_USAGE
        ) from error


def claim_folder(flag: str, folder: Path) -> None:
    """Make the folder that a flag names, and hold it until this process ends.

    Raises `SuiteError` where it cannot be made, or another process writes to it.
    """
    make_folder(flag, folder)
    if not take_lock(open_own(folder / LOCK_FILE)):
        raise SuiteError(
            f"{flag} {folder}: another {Path(sys.argv[0]).stem} is at work there: wait, or stop it"
        )


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
    answers = resolve_all(plan.jobs(), stop, say)
    return plan.map_clients(
        lambda client: client.with_arguments(answers[client.job_key].get("arguments") or [])
    )


def launch(
    planned: PlannedCoRun,
    folder: Path,
    stop: StopSignal,
    say: Callable[[str], None],
    rule: FinishRule,
    *,
    timeout: float,
    before_go: Callable[[list[Client]], None] = lambda clients: None,
    name: str = "{}",
) -> CoRunResult:
    """Run clients by the suite's launcher, until `rule` is met by all; no process is left.

    What they write lies in `folder`, each client's files under `name` with its number in it; an
    earlier call's event log makes room.
    """

    def paths_of(co_run: str, client: int) -> ClientPaths:
        folder.mkdir(exist_ok=True)
        kinds = ("events.jsonl", "stdout.log", "stderr.log")
        paths = ClientPaths(*(folder / f"{name.format(client)}.{kind}" for kind in kinds))
        paths.events.unlink(missing_ok=True)
        return paths

    launcher = Launcher(client_base_environment(os.environ), Timeouts(timeout), stop, say)
    return launcher.run(planned, paths_of, rule, before_go)
