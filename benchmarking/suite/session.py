"""One suite run from its flags to its summary, as a driver calls it in its own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking import benchmark_suite as suite
from benchmarking.records import run_folder
from benchmarking.suite import console
from benchmarking.suite.launcher import Interruption as StopSignal
from benchmarking.suite.plan_file import PlanFileError
from benchmarking.suite.resume import read_earlier
from benchmarking.suite.run import SuiteRun
from benchmarking.suite.setup import EXIT_FAILED, EXIT_USAGE, SuiteError, no_mps_folder, prepare


@dataclass(frozen=True)
class SessionResult:
    """How a session ended: its exit code, the sentence that it ended with, the run's folder."""

    exit_code: int
    reason: str | None
    folder: Path | None


def run_suite(words: Sequence[str], stop: StopSignal, *, from_driver: bool = True) -> SessionResult:
    """Plan, show the plan, run it, show the figures, as the flags `words` say."""
    options = suite.parse_arguments(words)
    earlier = None
    try:
        earlier = read_earlier(options.resume, options.results_dir) if options.resume else None
        request = earlier.request if earlier else suite.request_from(options)
        with no_mps_folder() as folder:
            setup = prepare(request, folder, os.environ, require_mode=True)
            console.print_plan(setup, verbose=options.verbose)
            writer = earlier.reopen(setup.notes) if earlier else suite.new_run(setup)
            if setup.is_contended:
                writer.update_manifest(is_contended=True)
            run = SuiteRun(setup, writer, stop, console.Teller().say, earlier=earlier)
            code = run.execute()
    except SuiteError as error:
        suite.complain(error, error.exit_code)
        if error.exit_code != EXIT_USAGE:
            folder = earlier.run.folder.parent if earlier else options.results_dir
            with contextlib.suppress(OSError):
                command = ["benchmark_suite.py", *words]
                run_folder.append_refusal(folder, command, error.exit_code, str(error))
        return SessionResult(error.exit_code, str(error), None)
    except (run_folder.RunStoreError, PlanFileError) as error:
        return SessionResult(suite.complain(error, EXIT_USAGE), str(error), None)
    except OSError as error:  # before the run began: a disk without room for its first file
        said = f"cannot write to {options.results_dir} ({error.strerror or error})"
        sentence = f"{said}: make room there, or name another --results-dir"
        return SessionResult(suite.complain(OSError(sentence), EXIT_FAILED), sentence, None)
    try:
        console.print_summary(run_folder.read_run(writer.folder))
    except run_folder.RunStoreError as error:
        reason = run.ending or str(error)
        return SessionResult(suite.complain(error, code or EXIT_FAILED), reason, writer.folder)
    print(f"results: {writer.folder}", flush=True)
    return SessionResult(code, run.ending, writer.folder)
