#!/usr/bin/env python3
"""Find out how many jobs can share the GPU: what ./stress_test.sh becomes.

1, 2, 4, 6, 8 ... copies at once under one mode, until one fails, then the counts between for the
exact answer.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cli import EXIT_FAILED, EXIT_NO_GPU, SuiteEnd, SuiteError
from benchmarking.drivers import driver_arguments as arguments
from benchmarking.drivers.driver import Driver, driving, say
from benchmarking.drivers.driver_arguments import SHARED_HELP, UsageError
from benchmarking.modes.names import MODE_MPS_PARTITIONS

SCRIPT = "stress_test.sh"
HELP = f"""\
Usage: ./stress_test.sh [MODE] [MAX] [options]

Runs 1, 2, 4, 6, 8 ... up to MAX jobs at once and prints, for each count, success rate, average
duration, utilization and STP, then the breaking point and what broke: a job out of memory, a crash,
a neighbor's fault, a time limit, or a bound of yours. Past the first count that breaks, those
between it and the last good one are tried. The mode is enabled before and undone after. Without an
NVIDIA GPU it is a demonstration on the CPU.

  MODE                  time-slicing (default), mps, mps:partitions (static partitions of the
                        multiprocessors, MAX equal ones: CUDA 13.1's MPS) or mig
  MAX                   largest count (default: 8); always tried itself

Options:
  --mix training|inference|interactive|mixed|serving|llm   which jobs (default: training); mixed,
                        serving (an inference server with its users, three trainings) and llm (token
                        generation in the place of BERT) go in fours, or the counts would be of
                        different jobs
  --max-slowdown X      a count breaks, too, where a job is slower than alone by more than this
                        factor
  --slo-ms Y            a count breaks, too, where the p99 of a job's response times is above Y ms
                        (--mix inference, interactive, mixed, serving, llm)
  --until-break         go on past MAX by doubling, up to 64 jobs (not under mig, mps:partitions)
  --no-bisect           stop at the first count that breaks
{SHARED_HELP}
With --plan FILE or --job counts go in multiples of its clients, and MAX has to be one.
Defaults: --repeats 1, --output results/stress-<mode>-<date-time>.
Exit codes: 0 done (a breaking point is a result), 1 nothing could be measured, 2 usage, 3 no usable
GPU, 4 another run is at work on it, 130 Ctrl-C
"""
MODES = ("time-slicing", "mps", MODE_MPS_PARTITIONS, "mig")
# How many jobs make a mix once.
GROUPS = {"training": 1, "inference": 1, "interactive": 1, "mixed": 4, "serving": 4, "llm": 4}


def main() -> int:
    """Ramp up under the mode; return the exit code."""
    with driving(SCRIPT, parse_arguments) as driver:
        if not driver.options.plan:
            require_mode(driver, counts_of(driver)[-1])
        driver.enter_environment()
        counts = counts_of(driver)
        require_mode(driver, counts[-1])
        if driver.options.mode == "mig":
            driver.require_layout(counts[-1])
        driver.prepare(f"stress-{driver.mode_name(driver.options.mode)}")
        end, went_well = ramp_up(driver, counts)
        return finish(driver, end, went_well=went_well)


def parse_arguments() -> argparse.Namespace:
    """Return the checked options; raises `SuiteError`."""
    parser = arguments.DriverParser(SCRIPT, HELP, ["--until-break", "--no-bisect"])
    above_0 = arguments.matching(arguments.ABOVE_0, "a number above 0")
    checks = {
        "--mix": arguments.one_of(*GROUPS), "--max-slowdown": above_0, "--slo-ms": above_0,
    }  # fmt: skip
    options = parser.parse(sys.argv[1:], checks)
    if len(options.positional) > 2:
        parser.error(f"unexpected argument: {options.positional[2]}")
    mode, maximum = (*options.positional, None, None)[:2]
    options.mode = parser.checked(
        "MODE", arguments.one_of(*MODES), MODES[0] if mode is None else mode
    )
    options.maximum = (
        parser.checked("MAX", arguments.WHOLE_NUMBER, maximum) if maximum is not None else None
    )
    if options.mode == "mig" and options.until_break:
        parser.error("--until-break: under mig there are as many jobs as instances")
    if options.mode == MODE_MPS_PARTITIONS and (options.until_break or options.mps_percentage):
        flag = "--until-break" if options.until_break else "--mps-percentage"
        parser.error(f"{flag}: under mps:partitions there are MAX jobs, each on its own partition")
    limits = arguments.mps_flags(options)
    if limits and not options.mode.startswith("mps"):
        parser.error(f"{limits[0]} needs MODE mps")
    if options.slo_ms and jobs_of(options) == ["--mix", "training"]:
        parser.error(
            "--slo-ms needs jobs with response times: --mix inference, interactive, mixed, "
            "serving or llm"
        )
    return options


def jobs_of(options: argparse.Namespace) -> list[str]:
    """Return the suite's flags for the jobs."""
    return arguments.jobs_of(options, "training")


def counts_of(driver: Driver) -> list[int]:
    """Return how many jobs are tried at once, the largest last; raises `SuiteError`."""
    options = driver.options
    size = driver.count_jobs([options.mode]) or GROUPS[options.mix or "training"]
    maximum = int(options.maximum or max(size, 8 // size * size))
    if maximum % size != 0:
        raise UsageError(f"MAX needs to be a multiple of {size}: so many jobs make the mix once")
    steps = range(size, maximum, size) if size > 1 else [1, *range(2, maximum, 2)]
    return [*(count for count in steps if count < maximum), maximum]


def require_mode(driver: Driver, maximum: int) -> None:
    """Raise `SuiteError` where the mode cannot be used here.

    What another run has left behind may stand in the way until `prepare` has undone it.
    """
    mode = driver.options.mode
    if driver.gpu is None or driver.modes.has_note():
        return
    reason = driver.modes.why_not(mode, maximum)
    if reason:
        raise SuiteError(f"{mode} cannot be used: {reason}", EXIT_FAILED)


def ramp_up(driver: Driver, counts: list[int]) -> tuple[SuiteEnd, bool]:
    """Run the counts under the mode, undo it, make the report of what there is.

    Returns how the suite ended, and whether undo and report went well.
    """
    options = driver.options
    require_mode(driver, counts[-1])
    if driver.gpu is not None:
        driver.modes.enable(options.mode, counts[-1])
    flags = ["--mode", options.mode.partition(":")[0], *jobs_of(options)]
    flags += ["--mps-partitions"] if options.mode == MODE_MPS_PARTITIONS else []
    flags += ["--workloads", ",".join(map(str, counts)), "--repeats", str(options.repeats or 1)]
    flags += arguments.flags_of(options, "max_slowdown", "slo_ms")
    flags += ["--quick"] if options.quick else []
    flags += ["--until-break"] if options.until_break else []
    flags += [] if options.no_bisect else ["--bisect"]
    flags += arguments.mps_flags(options)
    end = driver.run_suite(driver.mode_name(options.mode), flags)
    failures = [driver.undo_mode(), driver.analyze() if driver.has_runs() else None]
    return end, not any(failures)


def finish(driver: Driver, end: SuiteEnd, *, went_well: bool) -> int:
    """Say where the report is; return the exit code of the whole. Raises `SuiteError`."""
    if driver.options.dry_run:
        return 0
    if not driver.has_runs():
        driver.leave_interrupted()
        raise SuiteError(str(end.reason), end.exit_code if went_well else EXIT_FAILED)
    # A run that was interrupted or broke at once may have none.
    charts = sorted(Path(driver.output).glob("*scaling-*.png"))
    chart = f" (the ramp is {charts[0].name})" if charts else ""
    say(f"Report, table and charts: {driver.output}{chart}")
    driver.leave_interrupted()
    if not went_well:
        return EXIT_FAILED
    if end.exit_code in (0, EXIT_NO_GPU):
        return end.exit_code
    # A disk that is full says nothing of how many jobs the GPU supports.
    could_not_write = str(end.reason).startswith("cannot write to ")
    if end.exit_code == EXIT_FAILED and not could_not_write and broke_under_load(driver.output):
        return 0
    raise SuiteError(f"{end.reason} before anything could be compared", EXIT_FAILED)


def broke_under_load(output: str) -> bool:
    """Whether some count went well: one that failed is the answer that was looked for then."""
    try:
        compared = Path(output, "comparison.json").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r'"last_good_clients": \d', compared) is not None


if __name__ == "__main__":
    sys.exit(main())
