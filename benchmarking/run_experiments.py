#!/usr/bin/env python3
"""Compare the GPU sharing modes, unattended: what ./run_experiments.sh becomes.

Each job alone, then the same mix of jobs together under time slicing, MPS and MIG, then the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.modes.mode_scripts import ModeScriptError
from benchmarking.records.writing import append_text
from benchmarking.suite import driver_arguments as arguments
from benchmarking.suite.driver import Driver, driving, say
from benchmarking.suite.driver_arguments import EXIT_FAILED, EXIT_NO_GPU, SHARED_HELP, Refused

SCRIPT, PHASES_FILE = "run_experiments.sh", "phases.jsonl"
HELP = f"""\
Usage: ./run_experiments.sh [options]

Phase 1 baseline       each job of the mix alone
Phase 2 time-slicing   the mix together, as CUDA does by itself
Phase 3 mps            the mix together under NVIDIA MPS
Phase 4 mig            each job on a MIG instance of its own (where MIG is on, or with --mig)
Phase 5 analysis       decision, table, charts: report.html, report.md

Without an NVIDIA GPU phases 1 and 2 run as a small demonstration on the CPU. A phase that fails
does not stop the others; Ctrl-C stops, undoes what was enabled and reports what was done.

Options:
  --modes LIST          which of time-slicing,mps,mig (default: all)
  --mix mixed|training|inference|interactive|serving|llm|pairs   which jobs (default: mixed:
                        ResNet50 training, batch inference, Jupyter session, BERT fine-tuning;
                        serving: an inference server with its users, three ResNet50 trainings; llm:
                        token generation in the place of BERT; pairs: each job of the mixed mix next
                        to each other one, 10 s a pair)
  --workloads N         jobs that run together (default: 4; with --plan or --job: each of them once)
  --phase-minutes N     budget of each phase (default: 5 for phase 1, 10 for the others); it limits
                        repeats, never below one
  --noise-floor         measure the first mode that runs twice: differences between modes that are
                        no larger than those between its two runs are called noise
  --baseline RUN        folder of an earlier baseline run to use in place of phase 1
{SHARED_HELP}
Defaults: --repeats 3 (CPU: 1), --output results/experiments-<date-time>.
Exit codes: 0 every phase that ran succeeded, 1 one failed, 2 usage, 3 no usable GPU, 4 another run
is at work on it, 130 Ctrl-C
"""
MODES = ("time-slicing", "mps", "mig")
MIXES = ("mixed", "training", "inference", "interactive", "serving", "llm", "pairs")


def main() -> int:
    """Run the five phases; return the exit code."""
    with driving(SCRIPT, parse_arguments) as driver:
        driver.enter_environment()
        workloads = choose_workloads(driver)
        driver.prepare("experiments")
        experiment = Experiment(driver, workloads)
        experiment.run_phase(1, "baseline", experiment.measure_baseline)
        experiment.run_phase(2, driver.mode_name(MODES[0]), experiment.measure_time_slicing)
        experiment.run_phase(3, "mps", experiment.measure_mps)
        experiment.run_phase(4, "mig", experiment.measure_mig)
        experiment.run_phase(5, "analysis", experiment.analyze)
        return experiment.exit_code()


def parse_arguments() -> argparse.Namespace:
    """Return the checked options; raises `Refused`."""
    parser = arguments.DriverParser(SCRIPT, HELP, ["--noise-floor"])
    checks = {
        "--modes": _modes,
        "--mix": arguments.one_of(*MIXES),
        "--workloads": arguments.WHOLE_NUMBER,
        "--phase-minutes": arguments.matching(arguments.ABOVE_0, "a number of minutes over 0"),
        "--baseline": arguments.path(
            lambda folder: (folder / "manifest.json").exists(), "is no run folder"
        ),
    }
    options = parser.parse(sys.argv[1:], checks)
    options.modes = options.modes or list(MODES)
    if options.positional:
        parser.error(f"unexpected argument: {options.positional[0]}")
    if options.mix == "pairs" and options.workloads:
        parser.error("--mix pairs has two jobs in each co-run: leave --workloads")
    return options


def _modes(text: str | None) -> list[str]:
    return [arguments.one_of(*MODES)(mode) for mode in (text or "").split(",")]


def choose_workloads(driver: Driver) -> int:
    """Return how many jobs run together; a layout has an instance for each. Raises `Refused`."""
    options = driver.options
    usual = 2 if options.mix == "pairs" else driver.count_jobs() or 4
    layout = options.mig_layout
    workloads = int(options.workloads or (layout.count(",") + 1 if layout else usual))
    if "mig" in options.modes:
        driver.require_layout(workloads)
    return workloads


@dataclass
class Phase:
    """What became of a phase, as a line of phases.jsonl has it."""

    phase: int
    name: str
    status: str = "ok"
    reason: str = ""  # also what is to be known of one that went well
    run_folder: str = ""
    seconds: int = 0

    def end(self, status: str, reason: str) -> None:
        """Note that it failed or was skipped, and why."""
        self.status, self.reason = status, reason


class Experiment:
    """The phases, and what a later one needs to know of those before it."""

    def __init__(self, driver: Driver, workloads: int) -> None:
        """Take the driver and how many jobs run together."""
        self.driver = driver
        self.options = driver.options
        self.workloads = workloads
        self.baseline: str | None = driver.options.baseline  # a run folder, once it is complete
        self.gpu_is_unusable = False
        self.failed_phases = 0

    def run_phase(self, number: int, name: str, measure: Callable[[Phase], None]) -> None:
        """Run a phase and append its outcome to phases.jsonl; raises `Refused` if that fails."""
        driver, phase, begun = self.driver, Phase(number, name), time.monotonic()
        driver.notes = []
        say(f"\nPhase {number}: {name}")
        is_measured = name != "analysis"
        if is_measured and self._was_ok(number):
            say(f"Phase {number}: {name}: done before")
            if name == "baseline":
                self.baseline = os.path.join(driver.output, name)
            return
        if is_measured and driver.interrupted is not None:
            phase.end("skipped", "interrupted before it began")
        elif is_measured and self.gpu_is_unusable:
            phase.end("skipped", "the GPU cannot be used")
        else:
            measure(phase)
            if is_measured and driver.interrupted is not None and phase.status == "ok":
                phase.end("failed", "interrupted")
            phase.reason = "; ".join(filter(None, [phase.reason, *driver.notes]))
        self.failed_phases += phase.status == "failed"
        if not self.options.dry_run or phase.status != "ok":
            why = f" ({phase.reason})" if phase.reason else ""
            say(f"Phase {number}: {name}: {phase.status}{why}")
        phase.seconds = int(time.monotonic() - begun)
        self._record(phase)

    def measure_baseline(self, phase: Phase) -> None:
        """Measure each job alone on the whole GPU."""
        modes = self.driver.modes
        reason = modes.why_not("exclusive", 1) if self.driver.gpu else None
        if self.baseline is not None:
            phase.end("skipped", f"the baseline of {self.baseline} is used")
        elif reason:
            phase.end("skipped", f"{reason}; each job runs alone on its instance in phase 4")
        else:
            self._run_suite(phase, "baseline", "exclusive", "5")
            if phase.status == "ok":
                self.baseline = os.path.join(self.driver.output, "baseline")

    def measure_time_slicing(self, phase: Phase) -> None:
        """Measure the jobs together as CUDA runs them by itself.

        Without a GPU it is a demonstration of the flow, whichever mode was asked for first.
        """
        if self.driver.gpu is None:
            self._run_twice(phase, self.options.modes[0])
        else:
            self._measure_mode(phase, "time-slicing")

    def measure_mps(self, phase: Phase) -> None:
        """Measure the jobs together under MPS."""
        self._measure_mode(phase, "mps")

    def measure_mig(self, phase: Phase) -> None:
        """Measure each job on a MIG instance of its own, all at once."""
        self._measure_mode(phase, "mig")

    def analyze(self, phase: Phase) -> None:
        """Make the report of what there is."""
        if not self.options.dry_run and not any(Path(self.driver.output).glob("*/manifest.json")):
            phase.end("skipped", "no phase left a run")
            return
        reason = self.driver.analyze()
        if reason:
            phase.end("failed", reason)

    def _measure_mode(self, phase: Phase, mode: str) -> None:
        modes = self.driver.modes
        if mode not in self.options.modes:
            phase.end("skipped", f"not asked for (--modes {','.join(self.options.modes)})")
            return
        reason = modes.why_not(mode, self.workloads)
        if reason:
            phase.end("skipped", reason)
            return
        try:
            self.driver.notes += modes.enable(mode, self.workloads)
            self._run_twice(phase, mode)
        except ModeScriptError as error:
            phase.end("failed", str(error))
        failure = self.driver.undo_mode()
        if failure:
            phase.end("failed", failure)

    def _run_twice(self, phase: Phase, mode: str) -> None:
        """Run the jobs together; again for the noise floor, if it is wanted and none has it yet."""
        name = self.driver.mode_name(mode)
        self._run_suite(phase, name, mode, "10")
        if not self.options.noise_floor or phase.status != "ok" or self.driver.interrupted:
            return
        floors = Path(self.driver.output).glob("*-again/manifest.json")
        if all(floor.parent.name == f"{name}-again" for floor in floors):
            self._run_suite(phase, f"{name}-again", mode, "10")
            phase.run_folder = name

    def _run_suite(self, phase: Phase, run_id: str, mode: str, minutes: str) -> None:
        """Run the suite once; later runs reuse the baseline of the first."""
        options = self.options
        flags = ["--mode", mode, "--budget-minutes", options.phase_minutes or minutes]
        if options.mix != "pairs":
            flags += ["--workloads", str(self.workloads)]
        flags += arguments.jobs_of(options, "mixed")
        if mode == "mps":
            flags += arguments.mps_flags(options)
        if mode != "exclusive":
            flags += ["--repeats", str(options.repeats or (3 if self.driver.gpu else 1))]
            flags += ["--baseline", self.baseline] if self.baseline else []
        phase.run_folder = run_id
        end = self.driver.run_suite(run_id, flags)
        if end.exit_code != 0:
            phase.end("failed", end.reason)
        self.gpu_is_unusable |= end.exit_code == EXIT_NO_GPU

    def _was_ok(self, number: int) -> bool:
        """Whether a run that goes on has had this phase; its last whole line counts."""
        lines: list[str] = []
        if self.options.resumed:
            with contextlib.suppress(OSError):
                path = Path(self.driver.output, PHASES_FILE)
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        status = None
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if row["phase"] == number:
                    status = row["status"]
        return status == "ok"

    def _record(self, phase: Phase) -> None:
        if self.options.dry_run:
            return
        output = self.driver.output
        if not os.path.exists(os.path.join(output, phase.run_folder)):
            phase.run_folder = ""
        try:
            row = json.dumps(vars(phase), separators=(",", ":"))
            append_text(Path(output, PHASES_FILE), row)
        except OSError:
            raise Refused(
                EXIT_FAILED,
                f"cannot write {output}/{PHASES_FILE}; make room or bring it back, then "
                f"{self.driver.resume_command()}",
            ) from None

    def exit_code(self) -> int:
        """Say where the results are; return the exit code of the whole."""
        if self.options.dry_run:
            return 0
        say(f"\nResults: {self.driver.output} ({PHASES_FILE} says what each phase did)")
        self.driver.leave_interrupted()
        return EXIT_NO_GPU if self.gpu_is_unusable else int(self.failed_phases > 0)


if __name__ == "__main__":
    sys.exit(main())
