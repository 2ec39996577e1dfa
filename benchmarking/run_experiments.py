#!/usr/bin/env python3
"""Compare the GPU sharing modes, unattended: what ./run_experiments.sh becomes.

In rounds: each job alone, then the same mix of jobs together under time slicing and MPS; then MIG,
and the report.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cli import EXIT_NO_GPU
from benchmarking.drivers import driver_arguments as arguments
from benchmarking.drivers.driver import Driver, driving, say
from benchmarking.drivers.driver_arguments import SHARED_HELP
from benchmarking.drivers.phases import PHASES_FILE, Phase, Phases
from benchmarking.modes.mode_scripts import ModeScriptError
from benchmarking.modes.names import MODE_MPS_PARTITIONS
from benchmarking.planning.workloads import MIXES, PAIRED_MIXES

SCRIPT = "run_experiments.sh"
HELP = f"""\
Usage: ./run_experiments.sh [options]

Phase 1 baseline       each job of the mix alone, and one client under time slicing: the null
Phase 2 time-slicing   the mix together, as CUDA does by itself
Phase 3 mps            the mix together under NVIDIA MPS, without limits and with even shares
Phase 4 mig            each job on a MIG instance of its own (where MIG is on, or with --mig)
Phase 5 analysis       decision, table, charts: report.html, report.md

Phases 1 to 3 take turns in rounds, their order reversed from one to the next, so that what drifts
meanwhile makes no winner; the null says how wrong the method itself is. Without an NVIDIA GPU
phases 1 and 2 run as a small demonstration on the CPU. A phase that fails does not stop the others;
Ctrl-C stops, undoes what was enabled and reports what was done.

Options:
  --modes LIST          which of time-slicing,mps,mps:even,mps:N,mps:partitions,mig (default:
                        time-slicing,mps,mps:even,mig); mps:50 gives each client half of the
                        multiprocessors, mps:50/25 in turn, mps:even each the same;
                        mps:partitions each as many for itself (CUDA 13.1's MPS)
  --mix mixed|training|inference|interactive|serving|llm|pairs|noisy   which jobs (default: mixed:
                        ResNet50 training, batch inference, Jupyter session, BERT fine-tuning;
                        serving: an inference server with its users, three ResNet50 trainings; llm:
                        token generation in the place of BERT; pairs: each job of the mixed mix next
                        to each other one, 10 s a pair; noisy: each of these and token generation
                        next to one that presses the card's memory, its multiprocessors or the bus)
  --workloads N         jobs that run together (default: 4; with --plan or --job: each of them once)
  --full                the guide's own job sizes, each window as long as a job of the slowest
  --phase-minutes N     minutes for all rounds together: as many are done as fit, at least one; the
                        mig phase has as many for its repeats
  --noise-floor         nothing more than usual: every round measures the null
  --baseline RUN        folder of an earlier baseline run to use in place of phase 1
{SHARED_HELP}
Defaults: --repeats 4 (rounds; 3 with --quick, 1 for pairs, noisy and on the CPU; a claim needs 3),
3 s to settle and 14 s counted together, 3 + 7 s alone (--quick: 2 + 8 s), --output
results/experiments-<date-time>.
Exit codes: 0 every phase that ran succeeded, 1 one failed, 2 usage, 3 no usable GPU, 4 another run
is at work on it, 130 Ctrl-C
"""
TIME_SLICING, MPS, MIG = "time-slicing", "mps", "mig"
USUAL_MODES = (TIME_SLICING, MPS, "mps:even", MIG)
# Seconds to settle, counted alone at the least, and counted together.
USUAL_SECONDS = ("3", "7", "14")
QUICK_SECONDS = ("2", "8", "8")
ROUNDS, QUICK_ROUNDS = 4, 3


def main() -> int:
    """Run the five phases; return the exit code."""
    with driving(SCRIPT, parse_arguments) as driver:
        driver.enter_environment()
        workloads = choose_workloads(driver)
        driver.prepare("experiments")
        experiment = Experiment(driver, workloads)
        experiment.measure_rounds()
        experiment.measure_mig()
        experiment.analyze()
        return experiment.exit_code()


def parse_arguments() -> argparse.Namespace:
    """Return the checked options; raises `SuiteError`."""
    parser = arguments.DriverParser(SCRIPT, HELP, ["--noise-floor", "--full"])
    checks = {
        "--modes": _modes,
        "--mix": arguments.one_of(*MIXES, *PAIRED_MIXES),
        "--workloads": arguments.WHOLE_NUMBER,
        "--phase-minutes": arguments.matching(arguments.ABOVE_0, "a number of minutes over 0"),
        "--baseline": arguments.path(
            lambda folder: os.path.exists(f"{folder}/manifest.json"), "is no run folder"
        ),
    }
    options = parser.parse(sys.argv[1:], checks)
    options.modes = options.modes or list(USUAL_MODES)
    if options.positional:
        parser.error(f"unexpected argument: {options.positional[0]}")
    if options.mix in PAIRED_MIXES and options.workloads:
        parser.error(f"--mix {options.mix} has two jobs in each co-run: leave --workloads")
    if options.full and (options.quick or options.mix in PAIRED_MIXES):
        parser.error("--full is for the guide's own job sizes: leave --quick, pairs and noisy")
    if options.mps_percentage and MPS not in options.modes:
        parser.error("--modes has no mps without a share of its own: leave --mps-percentage")
    limits = arguments.mps_flags(options)
    if limits and not any(mode.startswith(MPS) for mode in options.modes):
        parser.error(f"{limits[0]} needs mps among the --modes")
    return options


def _modes(text: str | None) -> list[str]:
    share = r"([1-9]\d?(\.\d+)?|100)"
    check = arguments.matching(
        f"time-slicing|mig|{MODE_MPS_PARTITIONS}|mps(:(even|{share}(/{share})*))?",
        "some of: time-slicing mps mps:even mps:PERCENT mps:partitions mig",
    )
    return list(dict.fromkeys(check(mode) for mode in (text or "").split(",")))


def _enabled_mode(name: str) -> str:
    """Return what is put in force for a mode with its limits, which are the clients' own."""
    return name if name == MODE_MPS_PARTITIONS else name.partition(":")[0]


def choose_workloads(driver: Driver) -> int:
    """Return how many jobs run together; a layout has an instance for each. Raises `SuiteError`."""
    options = driver.options
    usual = 2 if options.mix in PAIRED_MIXES else driver.count_jobs(options.modes) or 4
    layout = options.mig_layout
    workloads = int(options.workloads or (layout.count(",") + 1 if layout else usual))
    if MIG in options.modes:
        driver.require_layout(workloads)
    return workloads


class Experiment:
    """The phases, and what a later one needs to know of those before it."""

    def __init__(self, driver: Driver, workloads: int) -> None:
        """Take the driver and how many jobs run together."""
        self.driver = driver
        self.options = driver.options
        self.workloads = workloads
        self.baseline: str | None = driver.options.baseline  # a run folder, once it is there
        self.gpu_is_unusable = False
        self.phases = Phases(driver)

    def measure_rounds(self) -> None:
        """Measure each job alone and then together under each mode, in turns; note the phases."""
        alone, together = self._alone(), self._together()
        phases = [alone, *together]
        for phase in phases:
            if not phase.is_open:
                self.phases.finish(phase)
        if any(phase.is_open for phase in phases):
            begun = time.monotonic()
            rounds = self._plan_rounds([phase for phase in phases if phase.is_open])
            for number in range(1, rounds + 1):
                said = f"\nRound {number} of {rounds}"
                say(f"{said}; those after it are alike" if self.options.dry_run else said)
                self._measure_round(number, rounds, alone, together)
                if self.options.dry_run or self._is_over(begun, number, rounds, phases):
                    break
        for phase in phases:
            self._note_interruption(phase)
            self.phases.finish(phase)

    def _alone(self) -> Phase:
        """Phase 1: each job alone on the whole GPU, and the null."""
        phase = self.phases.take(1, "baseline")
        reason = self.driver.modes.why_not("exclusive", 1) if self.driver.gpu else None
        if self.options.baseline is not None:
            phase.end("skipped", f"the baseline of {self.baseline} is used")
        elif reason:
            phase.end("skipped", f"{reason}; each job runs alone on its instance in phase 4")
        elif phase.was_done_before:
            self.baseline = os.path.join(self.driver.output, phase.name)
        return phase

    def _together(self) -> list[Phase]:
        """Phases 2 and 3; without a GPU one demonstration, whatever mode was asked for first."""
        is_demo = self.driver.gpu is None
        asked = [mode for mode in self.options.modes if mode.partition(":")[0] == MPS]
        first = self.driver.mode_name(self.options.modes[0]) if is_demo else TIME_SLICING
        others = [MPS] if is_demo else asked or [MPS]
        phases = [self.phases.take(2, first), *(self.phases.take(3, mode) for mode in others)]
        for phase in phases[is_demo:]:
            reason = self._why_skipped(phase.name)
            if reason:
                phase.end("skipped", reason)
        return phases

    def _why_skipped(self, mode: str) -> str | None:
        if mode not in self.options.modes:
            return f"not asked for (--modes {','.join(self.options.modes)})"
        gpu = self.driver.gpu
        if mode.startswith(f"{MPS}:") and gpu is not None and gpu.lacks_mps_limits:
            return f"MPS passes over limits of its clients on {gpu.name}: it has them since Volta"
        return self.driver.modes.why_not(_enabled_mode(mode), self.workloads)

    def _plan_rounds(self, phases: Sequence[Phase]) -> int:
        """Return how many rounds are done, and say it, with about how long they take."""
        options = self.options
        if options.noise_floor:
            say("--noise-floor is built in: every round measures the null, the method's own error.")
        wanted = self._wanted_rounds()
        if options.dry_run:
            return wanted
        if before := self._rounds_before():
            return before
        each = [self.driver.estimate(phase.name, self._flags(phase, wanted)) for phase in phases]
        known = [seconds for seconds in each if seconds is not None]
        if len(known) < len(each) or not sum(known):
            say(f"{wanted} rounds, each as long as your commands take")
            return wanted
        minutes = sum(known) / 60
        fitting = int(float(options.phase_minutes) / minutes) if options.phase_minutes else wanted
        rounds = max(1, min(wanted, fitting))
        why = f" ({wanted} do not fit in {options.phase_minutes} min)" if rounds < wanted else ""
        few = "; a claim needs 3" if rounds < 3 and self.driver.gpu else ""
        of = f"{rounds} round{'s' if rounds > 1 else ''} of {', '.join(p.name for p in phases)}"
        say(f"{of}: about {max(1, round(rounds * minutes))} min{why}{few}")
        return rounds

    def _wanted_rounds(self) -> int:
        """Return how many rounds were asked for, or are usual for these jobs."""
        usual = QUICK_ROUNDS if self.options.quick else ROUNDS
        if self.options.mix in PAIRED_MIXES or self.driver.gpu is None:
            usual = 1
        return int(self.options.repeats or usual)

    def _rounds_before(self) -> int | None:
        """Return how many rounds were planned where this goes on: what is there has that number."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(self.driver.manifest_of_rounds()["request"]["repeats"])
        return None

    def _measure_round(
        self, number: int, rounds: int, alone: Phase, together: Sequence[Phase]
    ) -> None:
        if alone.is_open:
            self._measure(alone, number, rounds)
            if number == 1 and alone.status == "ok":
                self.baseline = os.path.join(self.driver.output, alone.name)
        order = list(together if number % 2 else reversed(together))
        for mode, members in itertools.groupby(order, key=lambda phase: _enabled_mode(phase.name)):
            self._measure_mode(mode, list(members), number, rounds)

    @property
    def _is_stopped(self) -> bool:
        return self.driver.interrupted is not None or self.gpu_is_unusable

    def _measure_mode(self, mode: str, phases: Sequence[Phase], number: int, rounds: int) -> None:
        """Put a mode in force for the phases that need it, and undo it."""
        phases = [phase for phase in phases if phase.is_open]
        if not phases or self._is_stopped:
            return
        failure = None
        try:
            notes = self.driver.modes.enable(mode, self.workloads) if self.driver.gpu else []
            for phase in phases:
                phase.notes += notes
                self._measure(phase, number, rounds)
        except ModeScriptError as error:
            failure = str(error)
        failure = self.driver.undo_mode() or failure
        for phase in phases if failure else ():
            phase.end("failed", str(failure))
            self._note_end(phase, rounds)

    def _measure(self, phase: Phase, number: int, rounds: int) -> None:
        """Run the suite for one round of a phase; for all of them under MIG."""
        driver, begun = self.driver, time.monotonic()
        if self._is_stopped:
            return
        driver.notes = []
        phase.run_folder = phase.name.replace(":", "-").replace("/", "-")
        flags = self._flags(phase, rounds)
        if phase.mode == MIG:
            end = driver.run_suite(phase.run_folder, flags)
        else:
            end = driver.run_round(phase.run_folder, flags, number)
        phase.notes += driver.notes
        phase.rounds = number
        phase.seconds += time.monotonic() - begun
        if end.exit_code != 0:
            phase.end("failed", str(end.reason))
        self.gpu_is_unusable |= end.exit_code == EXIT_NO_GPU
        self._note_end(phase, rounds)

    def _note_end(self, phase: Phase, rounds: int) -> None:
        """Note a phase as soon as it has come to its end, the MIG phase once that is undone."""
        if phase.mode != MIG and (phase.status != "ok" or phase.rounds == rounds):
            self.phases.finish(phase)

    def _flags(self, phase: Phase, rounds: int) -> list[str]:
        """Return what the suite is told; the same in every round."""
        options = self.options
        is_alone, is_mig = phase.phase == 1, phase.mode == MIG
        mode = phase.mode
        if self.driver.gpu is None and not is_alone:
            mode = options.modes[0].partition(":")[0]
        flags = ["--mode", "exclusive" if is_alone else mode, "--repeats", str(rounds)]
        is_paired = options.mix in PAIRED_MIXES
        if not is_paired:
            flags += ["--workloads", str(self.workloads)]
        flags += arguments.jobs_of(options, "mixed")
        if self.driver.gpu is not None and not options.full:
            settle, alone, together = QUICK_SECONDS if options.quick else USUAL_SECONDS
            flags += ["--quick"] if options.quick or not is_paired else []
            flags += ["--settle", settle]
            if is_alone or not self.baseline:
                flags += ["--min-seconds", alone]
            if not is_alone and not is_paired:  # those have a window of their own
                flags += ["--window", together]
        if options.mix == "noisy" and not self._why_skipped(MIG):
            flags += ["--duty-steps"]  # from which on is a slice of its own better?
        if not is_mig:
            flags += ["--session", self.driver.session_name()]
        elif options.phase_minutes:
            flags += ["--budget-minutes", options.phase_minutes]
        flags += ["--null"] if is_alone else []
        if mode == MPS and not is_alone:
            share = phase.name.partition(":")[2].replace("/", ",") or options.mps_percentage
            if phase.name == MODE_MPS_PARTITIONS:
                flags += ["--mps-partitions"]
            elif share:
                flags += ["--mps-percentage", share]
            flags += arguments.flags_of(options, "mps_memory_limit", "mps_priority")
        if not is_alone and self.baseline:
            flags += ["--baseline", self.baseline]
        return flags

    def _is_over(self, begun: float, number: int, rounds: int, phases: Sequence[Phase]) -> bool:
        """Whether no further round is done; what is left out by the budget is noted."""
        minutes, spent = self.options.phase_minutes, time.monotonic() - begun
        if number == rounds or not minutes or spent * (number + 1) / number <= 60 * float(minutes):
            return number == rounds
        for phase in phases:
            if phase.is_open:
                is_last = number + 1 == rounds
                left = f"round {rounds}" if is_last else f"rounds {number + 1} to {rounds}"
                phase.notes.append(f"{left} left out: the budget of {minutes} minutes is spent")
        return True

    def measure_mig(self) -> None:
        """Phase 4: each job on a MIG instance of its own; a block, since its set-up is slow."""
        phase, begun = self.phases.take(4, MIG), time.monotonic()
        say(f"\nPhase {phase.phase}: {phase.name}")
        reason = self._why_skipped(MIG)
        if phase.is_open and self.driver.interrupted is None and reason:
            phase.end("skipped", reason)
        self._measure_mode(MIG, [phase], 1, self._wanted_rounds())
        phase.seconds = time.monotonic() - begun
        self._note_interruption(phase)
        self.phases.finish(phase)

    def analyze(self) -> None:
        """Phase 5: make the report of what there is."""
        phase, begun = Phase(5, "analysis"), time.monotonic()
        say(f"\nPhase {phase.phase}: {phase.name}")
        if not self.driver.has_runs():
            phase.end("skipped", "no phase left a run")
        elif reason := self.driver.analyze():
            phase.end("failed", reason)
        phase.seconds = time.monotonic() - begun
        self.phases.finish(phase)

    def _note_interruption(self, phase: Phase) -> None:
        if not phase.is_open:
            return
        if self.driver.interrupted is not None:
            skipped = ("skipped", "interrupted before it began")
            phase.end(*(("failed", "interrupted") if phase.rounds else skipped))
        elif self.gpu_is_unusable:
            phase.end("failed" if phase.rounds else "skipped", "the GPU cannot be used")

    def exit_code(self) -> int:
        """Say where the results are; return the exit code of the whole."""
        if self.options.dry_run:
            return 0
        say(f"\nResults: {self.driver.output} ({PHASES_FILE} says what each phase did)")
        self.driver.leave_interrupted()
        return EXIT_NO_GPU if self.gpu_is_unusable else int(self.phases.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
