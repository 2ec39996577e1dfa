"""One suite run from its flags to its summary: what `benchmark_suite.py` is, and drivers call.

A driver calls `run_suite` in its own process with a stop signal that it shares: what it caught
stops the suite politely, the second time harder.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    PROJECT_ROOT,
    SuiteEnd,
    SuiteError,
)
from benchmarking.measuring import locks
from benchmarking.measuring.jobs import require_known_flags
from benchmarking.measuring.progress import Progress
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning import flags
from benchmarking.planning.redaction import hidden_in_command_line
from benchmarking.records import run_folder
from benchmarking.records.writing import append_refusal
from benchmarking.suite import console, preflight
from benchmarking.suite.measurement import Measurement
from benchmarking.suite.resume import read_earlier, read_rounds_before, request_data
from benchmarking.suite.run import SuiteRun
from benchmarking.suite.setup import Setup, prepared

SUITE_SCRIPT = PROJECT_ROOT / "benchmarking" / "benchmark_suite.py"
ANALYSIS_SCRIPT = PROJECT_ROOT / "benchmarking" / "analyze_results.py"


def run_suite(
    words: Sequence[str], stop: StopSignal | None = None, *, from_driver: bool = False
) -> SuiteEnd:
    """Plan, show the plan, run it, show the figures, as the flags `words` say.

    Without `stop` the signals that end a run are caught here. `from_driver` leaves out the commands
    that follow a run, and returns usage errors (exit code 2) as a result; else they leave the
    process.
    """
    try:
        options = flags.parse_arguments(words)
    except SystemExit as end:
        if not from_driver:
            raise
        return SuiteEnd(int(end.code or 0), getattr(end, "sentence", None))
    program = flags.PROGRAM if from_driver else sys.argv[0]
    command = [program, *hidden_in_command_line(words)]
    watched = contextlib.nullcontext(stop) if stop else StopSignal().watching()
    try:
        with watched as stop:
            return _plan_and_run(options, command, stop, from_driver=from_driver)
    except SuiteError as error:
        if error.exit_code != EXIT_USAGE and not options.dry_run:
            _note_refusal(options, command, error)
        return _refused(str(error), error.exit_code)
    except OSError as error:  # before the run began: a disk without room for its first file
        said = f"cannot write to {options.results_dir} ({error.strerror or error})"
        return _refused(f"{said}: make room there, or name another --results-dir", EXIT_FAILED)


def _plan_and_run(
    options: argparse.Namespace, command: Sequence[str], stop: StopSignal, *, from_driver: bool
) -> SuiteEnd:
    earlier = read_earlier(options.resume, options.results_dir) if options.resume else None
    request = earlier.request if earlier else flags.request_from(options)
    if options.round is not None:
        earlier = read_rounds_before(request)
    if options.allow_contention:  # the one flag that a run may go on with
        request = msgspec.structs.replace(request, allow_contention=True)
    with prepared(request, require_mode=not options.dry_run) as setup, ExitStack() as stack:
        setup.notes.extend(preflight.notes_before(setup))
        if options.dry_run:
            if earlier is None:
                run_folder.require_new(request.results_dir, request.run_id)
            require_known_flags(setup.plan.jobs().values())
        if earlier is None or options.resume:
            with console.printing():
                console.print_plan(setup, verbose=options.verbose or options.dry_run)
        if options.dry_run:
            return SuiteEnd(EXIT_COMPLETE, None)
        uuid, is_refused = setup.gpu_uuid, not request.allow_contention
        note = stack.enter_context(locks.hold_or_note(uuid, is_refused=is_refused))
        if note is not None:
            setup.notes.append(note)
            with console.printing():
                print(f"  note: {note}")
        writer = earlier.reopen(setup.notes) if earlier else _new_run(setup, command)
        if note is not None or setup.is_contended:
            writer.update_manifest(is_contended=True)
        suite = SuiteRun(Measurement(setup, writer, stop, Progress(), earlier, options.round))
        end = SuiteEnd(suite.execute(), suite.ending)
    if options.round is not None and from_driver:  # it has the report at the end
        return end
    return _told(end, writer.folder, from_driver=from_driver)


def estimate_repeat_seconds(words: Sequence[str]) -> float | None:
    """Return about how long one repeat of a run with these flags takes, baselines included.

    `None` where nobody can tell: what the flags lack, the run itself will say.
    """
    try:
        request = flags.request_from(flags.parse_arguments(words))
        with prepared(request, require_mode=False) as setup:
            return preflight.estimated_round_seconds(setup)
    except (SystemExit, SuiteError):
        return None


def _new_run(setup: Setup, command: Sequence[str]) -> run_folder.RunWriter:
    """Make the run's folder, with all in it that going on after a cut needs."""
    request = setup.request
    manifest = {**setup.manifest(list(command)), "request": request_data(request)}
    plan_text = request.plan_file.text if request.plan_file else None
    return run_folder.create_run(
        request.results_dir, manifest, run_id=request.run_id, plan_text=plan_text
    )


def _told(end: SuiteEnd, folder: Path, *, from_driver: bool) -> SuiteEnd:
    """Print the figures of a run that has ended, and the commands that follow it."""
    try:
        run = run_folder.read_run(folder)
    except run_folder.RunStoreError as error:
        refused = _refused(str(error), end.exit_code or EXIT_FAILED)
        return SuiteEnd(refused.exit_code, end.reason or refused.reason)
    with console.printing():
        console.print_summary(run)
        if not from_driver:
            report = shell_words(ANALYSIS_SCRIPT, "--results-dir", str(folder))
            print(f"\nreport.html with its charts: {report}")
            if end.exit_code == EXIT_INTERRUPTED:
                print(f"to go on: {shell_words(SUITE_SCRIPT, '--resume', str(folder))}")
        print(f"results: {folder}")
    return end


def shell_words(script: Path, *words: str) -> str:
    """Return a command that works from the present folder: the script by its shortest path."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        script = script.relative_to(Path.cwd())
    return shlex.join(["python3", str(script), *words])


def _refused(said: str, code: int) -> SuiteEnd:
    """Print an error, one sentence for each thing that is wrong."""
    for sentence in said.splitlines():
        print(f"{flags.PROGRAM}: error: {sentence}", file=sys.stderr)
    return SuiteEnd(code, said)


def _note_refusal(options: argparse.Namespace, command: Sequence[str], error: SuiteError) -> None:
    """Keep what was refused before there was a run; where that cannot be, it was at least said."""
    folder = options.results_dir
    if options.resume:
        folder = run_folder.resolve_run(options.resume, options.results_dir).parent
    with contextlib.suppress(OSError):
        append_refusal(folder, command, error.exit_code, str(error))
