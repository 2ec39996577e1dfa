#!/usr/bin/env python3
"""Measure the values of one knob, one after another, and show what each gives.

    python3 benchmarking/sweep.py --knob workloads --values 1,2,4 -- --mode mps --mix inference
    python3 benchmarking/sweep.py --knob mps-percentage --values even,100,50 -- --mode mps
    python3 benchmarking/sweep.py --knob mig-layout --values 3g.40gb/3g.40gb,4g.40gb/2g.20gb \\
        --change-card -- --mode mig --mix inference
    python3 benchmarking/sweep.py --knob job-flag=--batch-size --values 1,8,32 -- \\
        --mode mps --mix inference

What stands behind `--` goes to benchmark_suite.py (see its --help), which runs once for each value,
against one baseline that is taken first (or `-- --baseline RUN`); the values of a job's own flag
are other jobs, each with its own. Commas part the values; where a value has a part for each client,
`/` parts those. Writes one folder: `report.html`, `report.md`,
`sweep.json`, the chart, and each value's run. Ctrl-C leaves the report of what is done.

Exit codes: 0 complete, 1 a value failed, 2 usage, 3 no usable GPU, 4 the mode is not in force,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.records.run_folder import RunStoreError, utc_now
from benchmarking.suite import flags
from benchmarking.suite.cli import EXIT_USAGE, OneLineParser, SuiteError
from benchmarking.suite.plan import MODE_EXCLUSIVE, MODE_TIME_SLICING, PAIRS_MIX
from benchmarking.suite.plan_file import PlanFileError
from benchmarking.suite.setup import no_mps_folder, prepare
from benchmarking.suite.stop_signal import StopSignal
from benchmarking.sweeping.knobs import JOB_FLAG, KNOBS, TIMESLICES, Knob, alone_words, knob_called
from benchmarking.sweeping.sweep_run import SweepRun, card_of

RESERVED = {"results_dir": "--results-dir", "run_id": "--run-id", "dry_run": "--dry-run"}


def main() -> int:
    """Check everything, measure the values, say where the report is; return the exit code."""
    options = parse_arguments()
    try:
        require_mode(options)
        with StopSignal().watching() as stop_signal:
            code = SweepRun(options, stop_signal).execute()
    except (SuiteError, RunStoreError, PlanFileError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_USAGE)
    print(f"report: {options.output / 'report.html'}", flush=True)
    return code


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments; ends the process with code 2 where they make no sense.

    `suite` are the suite's flags, `request` what they ask for without the knob.
    """
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    listed = "; ".join(f"{knob.name} ({knob.about})" for knob in KNOBS.values())
    listed += f"; {JOB_FLAG}=--FLAG (of the jobs themselves)"
    add("--knob", type=knob, required=True, metavar="NAME", help=listed)
    add("--values", type=values, required=True, metavar="V[,V...]", help="in this order")
    add("--output", type=Path, metavar="DIR", help="new folder (default: results/sweep-KNOB-TIME)")
    add(
        "--change-card",
        action="store_true",
        help="allow a knob that changes settings of the GPU; each value is put in force by a "
        "script of gpu-configs (root, or sudo without a password) and taken back after its run",
    )
    add("suite", nargs="*", metavar="-- FLAGS", help="flags of benchmark_suite.py")
    options = parser.parse_args()
    if options.knob.changes_card and not options.change_card:
        parser.error(f"--knob {options.knob.name} changes the card: allow it by --change-card")
    options.request = flags.parse_arguments(options.suite)
    check_suite_flags(parser, options)
    if options.knob.changes_card:
        options.gpu = card_of(parser, options.request, options.knob)
    usual = Path("results") / f"sweep-{options.knob.name}-{utc_now()[:19].replace(':', '')}"
    options.output = options.output or usual
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output {options.output} is not empty: name a new folder")
    return options


def check_suite_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that are the sweep's own, and values that the suite would refuse."""
    knob: Knob = options.knob
    usual = flags.parse_arguments([])
    for name, flag in RESERVED.items():
        if getattr(options.request, name) != getattr(usual, name):
            parser.error(f"{flag} behind -- is the sweep's own: leave it")
    if knob.flag and getattr(options.request, knob.flag[2:].replace("-", "_")):
        parser.error(f"{knob.flag} behind -- is the knob itself: leave it")
    if knob.job_flag and (options.request.job_arguments or options.request.baseline):
        parser.error("each value is another job: leave --job-arguments and --baseline behind --")
    if options.request.mode == MODE_EXCLUSIVE or options.request.mix == PAIRS_MIX:
        parser.error("a sweep needs clients that run together: leave exclusive and pairs")
    if len(options.request.workloads or ()) > 1:
        parser.error("--workloads behind -- needs one count: sweep it by --knob workloads")
    if knob.state == MODE_TIME_SLICING:
        if options.request.mode != MODE_TIME_SLICING:
            parser.error(f"--knob {knob.name} needs -- --mode {MODE_TIME_SLICING}")
        unknown = [value for value in options.values if value not in TIMESLICES]
        if unknown:
            parser.error(f"{unknown[0]!r} is no time slice: {', '.join(TIMESLICES)}")
    for value in options.values:
        flags.parse_arguments([*options.suite, *knob.suite_words(value)])
    flags.parse_arguments([*alone_words(options.suite), "--mode", MODE_EXCLUSIVE])


def require_mode(options: argparse.Namespace) -> None:
    """Look whether the first value can be measured at all, before the baseline takes its time.

    A knob of the card is put in force later. Raises what the suite raises.
    """
    if options.knob.changes_card:
        return
    words = [*options.suite, *options.knob.suite_words(options.values[0])]
    request = flags.request_from(flags.parse_arguments(words))
    with no_mps_folder() as folder:
        prepare(request, folder, os.environ, require_mode=True)


def knob(text: str) -> Knob:
    """Argument type: the name of a knob."""
    try:
        return knob_called(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def values(text: str) -> list[str]:
    """Argument type: values with commas between them, each once."""
    found = [value.strip() for value in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: give each value once, with commas between")
    return found


if __name__ == "__main__":
    sys.exit(main())
