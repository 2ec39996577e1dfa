"""Runs a sweep: the baseline, then the suite once for each value, one process after another."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarking.modes.mode_scripts import ModeScriptError, in_force, is_set_up, lock_reason
from benchmarking.records.run_folder import resolve_run, utc_now, write_json_atomic
from benchmarking.suite.card import find_gpu
from benchmarking.suite.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_NO_GPU,
    EXIT_USAGE,
    SuiteError,
)
from benchmarking.suite.plan import MODE_EXCLUSIVE, MODE_MIG
from benchmarking.suite.request import Request
from benchmarking.suite.stop_signal import StopSignal
from benchmarking.sweeping import report
from benchmarking.sweeping.knobs import KNOBS, Knob, alone_words
from benchmarking.sweeping.points import INTERRUPTED, NOT_RUN, OK, Point, read_point

SUITE = Path(__file__).resolve().parents[1] / "benchmark_suite.py"
SWEEP_FILE = "sweep.json"
BASELINE = "baseline"
POLL_SECONDS = 0.1
USUAL_CLIENTS = 4

# What ends one value; anything else would end the others as well.
_ONE_VALUE_ONLY = {EXIT_COMPLETE, EXIT_FAILED, EXIT_INVALID}


class SweepRun:
    """Measures value by value; `sweep.json` is written after each, the report at the end."""

    def __init__(self, options: argparse.Namespace, stop_signal: StopSignal) -> None:
        """Take the checked arguments and whom to ask whether to stop.

        Raises:
            RunStoreError: The baseline that was asked for is not there.
        """
        self._options = options
        self._knob: Knob = options.knob
        self._stop_signal = stop_signal
        self._folder: Path = options.output
        self._baseline: Path | None = None
        if options.request.baseline is not None:
            self._baseline = resolve_run(options.request.baseline, options.request.results_dir)
        self._sweep = report.Sweep(
            knob=self._knob.name,
            command=sys.argv,
            created_at=utc_now(),
            baseline=str(self._baseline) if self._baseline else None,
            points=[Point(value, NOT_RUN) for value in options.values],
        )

    def execute(self) -> int:
        """Measure everything, write the report; return the exit code.

        Raises:
            SuiteError: The folder cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SuiteError(
                f"--output {self._folder}: {error.strerror}; name another folder", EXIT_USAGE
            ) from error
        self._save()
        code = self._take_baseline()
        if code == EXIT_COMPLETE:
            code = self._measure_values()
        outcomes = {EXIT_COMPLETE: "complete", EXIT_INTERRUPTED: INTERRUPTED}
        self._sweep.outcome = outcomes.get(code, "failed")
        self._save()
        report.write(self._sweep, self._folder)
        return code

    def _take_baseline(self) -> int:
        """Take each job alone, once for all values.

        Under MIG of others there is no whole GPU, and values that are other jobs have nothing in
        common: there each value's run takes its own.
        """
        is_mig_already = self._options.request.mode == MODE_MIG and not self._knob.changes_card
        if self._baseline is not None or is_mig_already or self._knob.job_flag:
            return EXIT_COMPLETE
        words = alone_words(self._options.suite)
        if self._knob is KNOBS["workloads"]:
            words += ["--workloads", str(max(int(value) for value in self._options.values))]
        print("sweep: each job alone, the baseline of all values", flush=True)
        code = self._run_suite([*words, "--mode", MODE_EXCLUSIVE], BASELINE)
        if code == EXIT_COMPLETE:
            self._baseline = self._folder / BASELINE
            self._sweep.baseline = BASELINE
        return code

    def _measure_values(self) -> int:
        worst = EXIT_COMPLETE
        for number, value in enumerate(self._options.values):
            if self._stop_signal.requested:
                return EXIT_INTERRUPTED
            total = len(self._options.values)
            print(f"\nsweep: {number + 1}/{total}: {self._knob.name} {value}", flush=True)
            code, reason = self._measure(value)
            run_id = self._knob.slug(value)
            point = read_point(value, self._folder / run_id, self._baseline, reason)
            self._sweep.points[number] = point
            self._save()
            if code not in _ONE_VALUE_ONLY:
                return code
            if code != EXIT_COMPLETE or point.outcome != OK:
                worst = EXIT_FAILED
        return worst

    def _measure(self, value: str) -> tuple[int, str | None]:
        """Run the suite at one value; return its exit code, and why there is no run."""
        words = [*self._options.suite, *self._knob.suite_words(value)]
        if self._baseline is not None:
            words += ["--baseline", str(self._baseline.resolve())]
        try:
            with self._in_force(value):
                code = self._run_suite(words, self._knob.slug(value))
        except ModeScriptError as error:
            print(f"sweep.py: error: {error}", file=sys.stderr)
            return EXIT_FAILED, str(error)
        reasons = {EXIT_COMPLETE: None, EXIT_INTERRUPTED: INTERRUPTED}
        return code, reasons.get(code, f"the suite ended with exit code {code}")

    def _in_force(self, value: str) -> contextlib.AbstractContextManager[None]:
        """The card's setting of a value; nothing where the knob leaves the card alone."""
        if not self._knob.changes_card:
            return contextlib.nullcontext()
        clients = (self._options.request.workloads or (USUAL_CLIENTS,))[0]
        setup = self._knob.setup_words(value, clients)
        return in_force(setup, str(self._knob.undo), self._options.gpu, self._folder)

    def _run_suite(self, words: Sequence[str], run_id: str) -> int:
        """Run the suite to its end; asked to stop, it is asked, too, and keeps its records."""
        if self._stop_signal.requested:
            return EXIT_INTERRUPTED
        where = ["--results-dir", str(self._folder), "--run-id", run_id]
        process = subprocess.Popen(
            [sys.executable, str(SUITE), *words, *where], stdin=subprocess.DEVNULL
        )
        told = 0
        while process.poll() is None:
            if self._stop_signal.count > told:
                told = self._stop_signal.count
                process.send_signal(signal.SIGINT if told == 1 else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        return EXIT_INTERRUPTED if told else process.returncode

    def _save(self) -> None:
        write_json_atomic(self._folder / SWEEP_FILE, self._sweep.to_dict())


def card_of(parser: argparse.ArgumentParser, options: argparse.Namespace, knob: Knob) -> str:
    """Return the UUID of the card whose settings may be changed, or end with one sentence."""
    lock = lock_reason(os.environ)
    if lock is not None:
        parser.error(f"{lock} forbids --knob {knob.name}, which changes the card")
    try:
        gpu, _ = find_gpu(Request(gpu=options.gpu, device=options.device), os.environ)
    except SuiteError as error:
        parser.exit(error.exit_code, f"{parser.prog}: error: {error}\n")
    if gpu is None:
        parser.exit(EXIT_NO_GPU, f"{parser.prog}: error: --knob {knob.name} needs a GPU\n")
    if is_set_up(str(knob.state), gpu["uuid"], os.environ):
        parser.error(
            f"{knob.state} is set up already and would be lost: undo it first by "
            f"./gpu-configs/{knob.undo}"
        )
    return gpu["uuid"]
