#!/usr/bin/env python3
"""Measure the values of one knob, one after another, and show what each gives.

    python3 benchmarking/sweep.py --knob workloads --values 1,2,4 -- --mode mps --mix inference
    python3 benchmarking/sweep.py --knob mps-percentage --values even,100,50 -- --mode mps
    python3 benchmarking/sweep.py --knob mig-layout --values 3g.40gb/3g.40gb,4g.40gb/2g.20gb \\
        --change-card -- --mode mig --mix inference
    python3 benchmarking/sweep.py --knob job-flag=--batch-size --values 1,8,32 -- \\
        --mode mps --mix inference
    python3 benchmarking/sweep.py --resume results/sweep-workloads-TIME   # go on where it was cut

What stands behind `--` goes to benchmark_suite.py (see its --help), which runs once for each value,
against one baseline that is taken first (or `-- --baseline RUN`); the values of a job's own flag
are other jobs, each with its own. Commas part the values; where a value has a part for each client,
`/` parts those. Writes one folder: `report.html`, `report.md`, `sweep.json`, the chart, and each
value's run. Ctrl-C leaves the report of what is done.

Exit codes: 0 complete, 1 a value failed or a file could not be written, 2 usage, 3 no usable GPU,
4 the mode is not in force, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_NO_GPU,
    EXIT_USAGE,
    OneLineParser,
    SuiteError,
    present_folder,
)
from benchmarking.drivers.program import claim_folder, exit_code_of
from benchmarking.measuring import locks
from benchmarking.measuring.card import find_gpu
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.modes.mode_scripts import ModeScriptError, in_force, is_set_up, lock_reason
from benchmarking.modes.names import MODE_EXCLUSIVE, MODE_MIG, MODE_TIME_SLICING
from benchmarking.planning import flags
from benchmarking.planning.redaction import NotRevealedError, hidden_in_command_line, reveal
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import PAIRED_MIXES
from benchmarking.records.files import NOT_DECODED, decode, read_file
from benchmarking.records.run_folder import (
    MANIFEST_FILE,
    RunStoreError,
    resolve_run,
    utc_now,
    write_json_atomic,
)
from benchmarking.records.writing import is_held, is_of_others, remove_unbegun
from benchmarking.suite.resume import read_earlier
from benchmarking.suite.session import run_suite
from benchmarking.suite.setup import prepared
from benchmarking.sweep_knobs import JOB_FLAG, KNOBS, PART, TIMESLICES, Knob, knob, values
from benchmarking.sweep_report import (
    INTERRUPTED,
    NOT_RUN,
    OK,
    Point,
    Sweep,
    read_point,
    terminal_text,
    write,
)

# isort: split
import msgspec  # here, where one that is missing is said in one sentence

SWEEP_FILE = "sweep.json"
BASELINE = "baseline"
USUAL_CLIENTS = 4

# What ends one value; anything else would end the others as well.
ONE_VALUE_ONLY = {EXIT_COMPLETE, EXIT_FAILED, EXIT_INVALID}

# Flags of the suite that the sweep itself gives.
RESERVED = ("results_dir", "run_id", "dry_run", "resume")
# What the suite's flags begin with that a job alone has no use for.
NOT_ALONE = ("--mps-", "--mig-layout", "--baseline", "--max-slowdown", "--bisect", "--until-break")

LONGEST_NAME = 255  # of a file, on the usual file systems
# What puts a setting of the card in force, and what takes it back, by the mode it belongs to.
CARD_SCRIPTS = {
    MODE_MIG: ("setup_mig.sh", "disable_mig.sh"),
    MODE_TIME_SLICING: ("setup_time_slicing.sh", "reset_time_slicing.sh"),
}


def main() -> int:
    """Check everything, measure the values, say where the report is; return the exit code."""
    options = parse_arguments()
    fix = f"then go on with {resume_command(options.output)}"
    return exit_code_of(lambda stop: SweepRun(options, stop).execute(), options.output, fix)


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments; ends the process with code 2 where they make no sense.

    `suite` are the suite's flags, `request` what they ask for without the knob; `sweep` is a new
    sweep, or one that goes on as far as it has come.
    """
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    listed = "; ".join(f"{knob.name} ({knob.about})" for knob in KNOBS.values())
    listed += f"; {JOB_FLAG}=--FLAG (of the jobs themselves)"
    add("--knob", type=knob, metavar="NAME", help=listed)
    add("--values", type=values, metavar="V[,V...]", help="in this order")
    add("--output", type=Path, metavar="DIR", help="new folder (default: results/sweep-KNOB-TIME)")
    add("--resume", type=Path, metavar="DIR", help="go on with a sweep that was cut off, with its "
        "own flags; values that are done are not repeated")  # fmt: skip
    add("--change-card", action="store_true",
        help="allow a knob that changes settings of the GPU; each value is put in force by a "
        "script of gpu-configs (root, or sudo without a password) and taken back after its run",
        )  # fmt: skip
    add("suite", nargs="*", metavar="-- FLAGS", help="flags of benchmark_suite.py")
    options = parser.parse_args()
    if options.resume is not None:
        return resumed(parser, options)
    check(parser, options)
    usual = Path("results") / f"sweep-{options.knob.name}-{utc_now()[:19].replace(':', '')}"
    options.output = options.output or usual
    # os.path: a name that is too long is no error before its folder is made
    if os.path.exists(options.output) and (
        not options.output.is_dir() or any(options.output.iterdir())
    ):
        parser.error(f"--output {options.output} is not empty: name a new folder")
    points = [Point(value, NOT_RUN) for value in options.values]
    command = hidden_in_command_line(sys.argv)
    options.sweep = Sweep(
        options.knob.name, command, utc_now(), None, points, directory=str(present_folder())
    )
    return options


def resumed(parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of the sweep to go on with, as they were given then and there."""
    if given.knob or given.values or given.output or given.change_card or given.suite:
        parser.error("--resume goes on with the sweep's own flags: leave the others out")
    folder, refused = given.resume.resolve(), f"--resume {given.resume}"
    try:
        status = (folder / SWEEP_FILE).lstat()
        kept = decode(msgspec.json.Decoder(Sweep), read_file(folder / SWEEP_FILE))
        os.chdir(kept.directory)  # relative paths among its flags count from there
    except (OSError, *NOT_DECODED) as error:
        parser.error(f"{refused} is no sweep that can go on: start a new one ({error})")
    if is_of_others(status):
        parser.error(f"{refused}: {SWEEP_FILE} is not yours alone, and what it says would be run: "
                     "copy the folder, look at it, chmod go-w it, or start anew")  # fmt: skip
    points = [Point(one.value, one.outcome, one.run_id, one.reason) for one in kept.points]
    sweep = dataclasses.replace(kept, baseline=None, points=points, outcome="running")
    try:
        options = parser.parse_args(reveal(sweep.command[1:], os.environ))
    except NotRevealedError as error:
        parser.error(f"{refused}: {error}")
    check(parser, options)
    if (options.knob.name, options.values) != (sweep.knob, [p.value for p in sweep.points]):
        parser.error(f"{refused}: {SWEEP_FILE} is not as it was written: start a new sweep")
    if kept.outcome == "complete":
        parser.error(f"{refused}: that sweep is complete: look at its report.html")
    if is_held(folder):
        parser.error(f"{refused}: that sweep is still going on: wait, or stop it")
    options.output, options.sweep = folder, sweep
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that are the sweep's own, and values that the suite would refuse."""
    missing = [flag for flag in ("--knob", "--values") if not vars(options)[flag[2:]]]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    knob: Knob = options.knob
    if knob.card_mode and not options.change_card:
        parser.error(f"--knob {knob.name} changes the card: allow it by --change-card")
    usual = flags.parse_arguments([])
    options.request = request = flags.parse_arguments(options.suite)
    unknown = [value for value in options.values if value not in TIMESLICES]
    slugs = [knob.slug(value) for value in options.values]
    shared = [slug for slug in slugs if slugs.count(slug) > 1]
    is_timeslice = knob.card_mode == MODE_TIME_SLICING
    for is_wrong, complaint in (
        *((getattr(request, name) != getattr(usual, name),
           f"--{name.replace('_', '-')} behind -- is the sweep's own: leave it")
          for name in RESERVED),
        (knob.flag and getattr(request, knob.flag[2:].replace("-", "_")),
         f"{knob.flag} behind -- is the knob itself: leave it"),
        (knob is KNOBS["workloads"] and any(PART in value for value in options.values),
         "--knob workloads takes one count a value, with commas between"),
        (knob.job_flag and (request.job_arguments or request.baseline),
         "each value is another job: leave --job-arguments and --baseline behind --"),
        (request.mode == MODE_EXCLUSIVE or request.mix in PAIRED_MIXES,
         "a sweep needs clients that run together: leave exclusive and pairs"),
        (len(request.workloads or ()) > 1,
         "--workloads behind -- needs one count: sweep it by --knob workloads"),
        (shared, f"--values: two would be measured in one folder, {' '.join(shared[:1])}: sweep "
         "them apart"),
        (max(map(len, slugs)) > LONGEST_NAME,
         "--values: one is too long for the name of its folder, give it a shorter path or name"),
        (is_timeslice and request.mode != MODE_TIME_SLICING,
         f"--knob {knob.name} needs -- --mode {MODE_TIME_SLICING}"),
        (is_timeslice and unknown,
         f"{', '.join(unknown)}: no time slice, choose of {', '.join(TIMESLICES)}"),
    ):  # fmt: skip
        if is_wrong:
            parser.error(complaint)
    for value in options.values:
        flags.parse_arguments([*options.suite, *knob.suite_words(value)])
    flags.parse_arguments([*alone_words(options.suite), "--mode", MODE_EXCLUSIVE])


def alone_words(words: Sequence[str]) -> list[str]:
    """Return the suite's flags, with their values, without those that jobs alone cannot use."""
    kept: list[str] = []
    is_kept = True
    for word in words:
        if word.startswith("--"):
            is_kept = not word.startswith(NOT_ALONE)
        kept += [word] if is_kept else []
    return kept


def resume_command(folder: Path) -> str:
    """Return the command that goes on with the sweep in a folder, as a user types it here."""
    return shlex.join(["python3", sys.argv[0], "--resume", str(folder)])


class SweepRun:
    """Measures value by value; `sweep.json` is written after each, the report at the end."""

    def __init__(self, options: argparse.Namespace, stop: StopSignal) -> None:
        """Look whether the first value can be measured at all, before anything takes its time.

        Raises:
            SuiteError: It cannot, or the card cannot be changed.
            RunStoreError: The baseline that was asked for is not there.
        """
        self._options = options
        self._knob: Knob = options.knob
        self._stop = stop
        self._folder: Path = options.output
        self._sweep: Sweep = options.sweep
        self._gpu_uuid: str | None = None
        if self._knob.card_mode:
            self._gpu_uuid = card_to_change(self._knob.card_mode, options)
        else:
            words = [*options.suite, *self._knob.suite_words(options.values[0])]
            request = flags.request_from(flags.parse_arguments(words))
            with prepared(request) as setup:
                self._gpu_uuid = setup.gpu_uuid
        self._baseline: Path | None = None
        if options.request.baseline is not None:
            self._baseline = resolve_run(options.request.baseline, options.request.results_dir)
            self._sweep.baseline = str(self._baseline)

    def execute(self) -> int:
        """Measure everything that is missing, write the report; return the exit code."""
        # Also between two values: another run would have the card, or it be changed under that.
        is_refused = not self._options.request.allow_contention
        with locks.hold_or_note(self._gpu_uuid, is_refused=is_refused):
            return self._execute()

    def _execute(self) -> int:
        claim_folder("--output", self._folder)
        self._save()
        code = self._take_baseline()
        if code == EXIT_COMPLETE:
            code = self._measure_values()
        outcomes = {EXIT_COMPLETE: "complete", EXIT_INTERRUPTED: INTERRUPTED}
        self._sweep.outcome = outcomes.get(code, "failed")
        self._save()
        write(self._sweep, self._folder)
        print(f"\n{terminal_text(self._sweep, shutil.get_terminal_size((100, 24)).columns)}")
        if any(point.outcome in (NOT_RUN, INTERRUPTED) for point in self._sweep.points):
            print(f"to go on: {resume_command(self._folder)}")
        print(f"report: {self._folder / 'report.html'}", flush=True)
        return code

    def _take_baseline(self) -> int:
        """Take each job alone, once for all values; return the exit code.

        Under MIG of others there is no whole GPU, and values that are other jobs have nothing in
        common: there each value's run takes its own.
        """
        is_mig_already = self._options.request.mode == MODE_MIG and not self._knob.card_mode
        if self._baseline is not None or is_mig_already or self._knob.job_flag:
            return EXIT_COMPLETE
        folder, code = self._folder / BASELINE, EXIT_COMPLETE
        if not is_settled(folder):
            words = alone_words(self._options.suite)
            if self._knob is KNOBS["workloads"]:
                words += ["--workloads", str(max(map(int, self._options.values)))]
            print("sweep: each job alone, the baseline of all values", flush=True)
            code = self._run([*words, "--mode", MODE_EXCLUSIVE], BASELINE)
        if code == EXIT_COMPLETE:
            self._baseline, self._sweep.baseline = folder, BASELINE
        return EXIT_FAILED if code == EXIT_INVALID else code

    def _measure_values(self) -> int:
        """Measure the values that have no run with an answer; return the exit code of all."""
        points = self._sweep.points
        missing = []
        for number, point in enumerate(points):
            if is_settled(self._folder / self._knob.slug(point.value)):
                points[number] = self._read(point.value, point.reason)
            else:
                missing.append(number)
        for number in missing:
            if self._stop.requested:
                return EXIT_INTERRUPTED
            value = points[number].value
            print(f"\nsweep: {number + 1}/{len(points)}: {self._knob.name} {value}", flush=True)
            code, reason = self._measure(value)
            points[number] = self._read(value, reason)
            self._save()
            if code not in ONE_VALUE_ONLY:
                return code
        return EXIT_COMPLETE if all(p.outcome == OK for p in points) else EXIT_FAILED

    def _read(self, value: str, reason: str | None) -> Point:
        return read_point(value, self._folder / self._knob.slug(value), self._baseline, reason)

    def _measure(self, value: str) -> tuple[int, str | None]:
        """Run the suite at one value; return its exit code, and why there is no run."""
        words = [*self._options.suite, *self._knob.suite_words(value)]
        if self._baseline is not None:
            words += ["--baseline", str(self._baseline.resolve())]
        try:
            with self._in_force(value):
                code = self._run(words, self._knob.slug(value))
        except ModeScriptError as error:
            print(f"sweep.py: error: {error}", file=sys.stderr)
            return EXIT_FAILED, str(error)
        reasons = {EXIT_COMPLETE: None, EXIT_INTERRUPTED: INTERRUPTED}
        return code, reasons.get(code, f"the suite ended with exit code {code}")

    def _in_force(self, value: str) -> contextlib.AbstractContextManager[None]:
        """The card's setting of a value; nothing where the knob leaves the card alone."""
        if not self._knob.card_mode:
            return contextlib.nullcontext()
        script, undo = CARD_SCRIPTS[self._knob.card_mode]
        setup = [script, value.replace(PART, ",")]
        if self._knob.card_mode == MODE_TIME_SLICING:
            clients = (self._options.request.workloads or (USUAL_CLIENTS,))[0]
            setup = [script, str(clients), "--timeslice", value]
        return in_force(setup, undo, str(self._gpu_uuid), self._folder)

    def _run(self, words: Sequence[str], run_id: str) -> int:
        """Run the suite, or the rest of a run that was cut off; return its exit code."""
        if self._stop.requested:
            return EXIT_INTERRUPTED
        folder = self._folder / run_id
        if (folder / MANIFEST_FILE).is_file():
            words = ["--resume", str(folder)]
        else:
            remove_unbegun(folder)
            words = [*words, "--results-dir", str(self._folder), "--run-id", run_id]
        code = run_suite(words, self._stop, from_driver=True).exit_code
        return EXIT_INTERRUPTED if self._stop.requested else code

    def _save(self) -> None:
        write_json_atomic(self._folder / SWEEP_FILE, self._sweep.to_dict())


def card_to_change(mode: str, options: argparse.Namespace) -> str:
    """Return the UUID of the card whose settings may be changed; raises `SuiteError`."""
    flag = f"--knob {options.knob.name}"
    if lock := lock_reason(os.environ):
        raise SuiteError(f"{lock} forbids {flag}, which changes the card", EXIT_USAGE)
    request = Request(gpu=options.request.gpu, device=options.request.device)
    gpu, _ = find_gpu(request, os.environ)
    if gpu is None:
        raise SuiteError(f"{flag} needs a GPU", EXIT_NO_GPU)
    if is_set_up(mode, gpu["uuid"], os.environ):
        raise SuiteError(
            f"{mode} is set up already and would be lost: undo it first by "
            f"./gpu-configs/{CARD_SCRIPTS[mode][1]}", EXIT_USAGE,
        )  # fmt: skip
    return gpu["uuid"]


def is_settled(folder: Path) -> bool:
    """Whether a run has its answer, figures or a failure under its load: it is not run again."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    try:
        read_earlier(str(folder), folder.parent)
    except RunStoreError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
