#!/usr/bin/env python3
"""Run real jobs side by side on one GPU under a sharing mode, and record what it cost them.

    python3 benchmarking/benchmark_suite.py --mode time-slicing --workloads 4
    python3 benchmarking/benchmark_suite.py --mode mps --mix training --workloads 1,2,4
    python3 benchmarking/benchmark_suite.py --mode mps --mix pairs    # each job beside each other
    python3 benchmarking/benchmark_suite.py --mode exclusive          # each job alone: the baseline
    python3 benchmarking/benchmark_suite.py --plan examples/plans/own-commands.toml  # your own jobs
    python3 benchmarking/benchmark_suite.py --mode mig --dry-run      # only show the plan
    python3 benchmarking/benchmark_suite.py --resume RUN_ID           # go on after it was cut off

Each distinct job runs alone first; then all clients warm up one at a time, start together and
repeat their jobs until everyone has finished once. The mode is proved client by client. Without
a GPU the same flow runs as a CPU demonstration, labelled so.

Exit codes: 0 complete, 1 a client failed or a file could not be written, 2 usage, 3 no usable GPU,
4 the GPU is in use or the mode asked for not in force (the message names the script to run),
5 invalid (a client without proof), 130 interrupted. What ends with 3 or 4 before there is a run is
kept in refusals.jsonl of the results folder. The last line on standard output is `results: FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.command_line.argument_types import positive_float, positive_int
from benchmarking.command_line.one_line_parser import OneLineParser
from benchmarking.records import run_folder
from benchmarking.suite import console, mig_layout, mps_knobs, pairs
from benchmarking.suite.launcher import Interruption
from benchmarking.suite.plan import MIXES, MODE_EXCLUSIVE, MODE_MIG, MODE_MPS, MODES
from benchmarking.suite.plan_file import PlanFileError, read_plan_file
from benchmarking.suite.ramp import MOST_CLIENTS
from benchmarking.suite.resume import EarlierPart, read_earlier, request_data
from benchmarking.suite.run import SuiteRun
from benchmarking.suite.setup import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Request,
    Setup,
    SuiteError,
    no_mps_folder,
    prepare,
)


def main() -> int:
    """Plan, show the plan, run it, show the figures; return the exit code."""
    options = parse_arguments()
    earlier = None
    try:
        earlier = read_earlier(options.resume, options.results_dir) if options.resume else None
        request = earlier.request if earlier else request_from(options)
        with Interruption().watching() as interruption, no_mps_folder() as folder:
            setup = prepare(request, folder, os.environ, require_mode=not options.dry_run)
            console.print_plan(setup, verbose=options.verbose or options.dry_run)
            return EXIT_COMPLETE if options.dry_run else run(setup, interruption, earlier)
    except SuiteError as error:
        complain(error, error.exit_code)
        if error.exit_code != EXIT_USAGE and not options.dry_run:
            note_refusal(error, earlier.run.folder.parent if earlier else options.results_dir)
        return error.exit_code
    except (run_folder.RunStoreError, PlanFileError) as error:
        return complain(error, EXIT_USAGE)
    except OSError as error:  # before the run began: a disk without room for its first file
        said = f"cannot write to {options.results_dir} ({error.strerror or error})"
        advice = "make room there, or name another --results-dir"
        return complain(OSError(f"{said}: {advice}"), EXIT_FAILED)


def run(setup: Setup, interruption: Interruption, earlier: EarlierPart | None) -> int:
    """Carry out the plan, or its rest, and print what came of it; return the exit code."""
    writer = earlier.reopen(setup.notes) if earlier else new_run(setup)
    if setup.is_contended:
        writer.update_manifest(is_contended=True)
    say = console.Teller().say
    suite = SuiteRun(setup, writer, interruption, say, earlier=earlier)
    code = suite.execute()
    try:
        console.print_summary(run_folder.read_run(writer.folder))
    except run_folder.RunStoreError as error:
        return complain(error, code or EXIT_FAILED)
    tell_what_next(writer.folder, interrupted=code == EXIT_INTERRUPTED)
    print(f"results: {writer.folder}", flush=True)
    return code


def tell_what_next(folder: Path, *, interrupted: bool) -> None:
    """Print the commands that follow a run."""
    report = ["python3", "benchmarking/analyze_results.py", "--results-dir", str(folder)]
    print(f"\nreport.html with its charts: {shlex.join(report)}")
    if interrupted:
        rest = ["python3", "benchmarking/benchmark_suite.py", "--resume", str(folder)]
        print(f"to go on: {shlex.join(rest)}")


def new_run(setup: Setup) -> run_folder.RunWriter:
    """Make the run's folder, with all in it that going on after a cut needs."""
    request = setup.request
    manifest = {**setup.manifest(sys.argv), "request": request_data(request)}
    writer = run_folder.create_run(request.results_dir, manifest, run_id=request.run_id)
    if request.plan_file is not None:
        writer.save_plan_file(request.plan_file.text)
    return writer


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments; ends the process with code 2 where they make no sense.

    `words` are the command line's, unless others are given.
    """
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="how the GPU is shared (default: %(default)s)",
    )
    add(
        "--workloads",
        type=counts,
        metavar="N[,N...]",
        help="how many clients at once; several counts make several co-runs, up to the first "
        "that fails (default: 4, with --plan its clients once)",
    )
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument(
        "--mix",
        choices=(*MIXES, pairs.MIX),
        default="mixed",
        help="mixed: ResNet50 training, batch inference, Jupyter session, BERT fine-tuning, over "
        "again for more than four; pairs: each of these beside each other one and itself, "
        f"{pairs.WINDOW_SECONDS:g} s a pair; serving: an inference server with its users and "
        "three ResNet50 trainings; else copies of one (default: %(default)s)",
    )
    jobs.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="clients of your own, any command among them, listed in a TOML file "
        "(see benchmarking/suite/plan_file.py); over again for more than it lists",
    )
    add_ramp_flags(parser)
    add_mps_flags(parser)
    add(
        "--mig-layout",
        type=listed(mig_layout.profile),
        default=(),
        metavar="PROFILE[,PROFILE...]",
        help="under mig, the instance of each client, such as 2g.20gb,1g.10gb,1g.10gb (made "
        "beforehand by gpu-configs/setup_mig.sh; default: client i has instance i)",
    )
    add("--quick", action="store_true", help="smaller jobs, for a demonstration")
    add(
        "--repeats",
        type=positive_int,
        default=1,
        metavar="N",
        help="how often each co-run is done (default: 1)",
    )
    add(
        "--budget-minutes",
        type=positive_float,
        metavar="M",
        help="leave out repeats that would take longer than this in all; the first is always done",
    )
    add(
        "--window",
        type=positive_float,
        metavar="S",
        help="measure for S seconds and 10 units a client, whole jobs or not (default: until "
        "every client has finished a job)",
    )
    add(
        "--min-seconds",
        type=positive_float,
        metavar="S",
        help="measure each baseline and co-run for at least so long (default: 5, co-runs of small "
        "jobs 2; NVML's process lists, which prove the mode, come once a second)",
    )
    add(
        "--timeout",
        type=positive_float,
        default=1800.0,
        metavar="S",
        help="time limit for getting ready, and again for measuring (default: %(default)g)",
    )
    add(
        "--baseline",
        metavar="RUN",
        help="reuse the baselines of this run (id or folder); refused unless GPU model, driver, "
        "versions and jobs are the same",
    )
    add("--results-dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    add("--run-id", metavar="ID", help="name of the run's folder (default: mode, mix, time)")
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add(
        "--engine",
        choices=("eager", "graph", "compile"),
        help="how clients launch a step (default: graph on a GPU, eager on the CPU)",
    )
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        help="(default: bf16 where the GPU has it, else fp32)",
    )
    add("--seed", type=non_negative_int, default=42, help="the same for all (default: 42)")
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cpu: CPU demonstration even where there is a GPU (default: auto)",
    )
    add("--dataset", help="of the ResNet50 training (see resnet_training.py --help)")
    add("--data-dir", metavar="DIR", help="folder of that dataset")
    add(
        "--job-arguments",
        type=words_of,
        default=(),
        metavar="WORDS",
        help="further flags for every job of the mix, as --job-arguments='--batch-size 8'",
    )
    add(
        "--allow-contention",
        "--beside-others",
        dest="beside_others",
        action="store_true",
        help="measure although other people's processes are on the GPU, and mark it contended",
    )
    add("--dry-run", action="store_true", help="show the plan and stop; nothing is run")
    add("--verbose", action="store_true", help="show every client's command and environment")
    add(
        "--resume",
        metavar="RUN",
        help="go on with a run that was cut off or failed (id or folder), with the flags that it "
        "was started with; what is done is not repeated, and a budget counts anew",
    )
    options = parser.parse_args(words)
    if options.resume is not None:
        check_resume(parser, sys.argv[1:] if words is None else words)
    if options.window is not None and options.window >= options.timeout:
        parser.error(f"--window {options.window:g} needs a --timeout above it")
    if options.mix == pairs.MIX:
        check_pairs(parser, options)
    if options.plan is not None and options.job_arguments:
        parser.error("--job-arguments: with --plan each client's arguments stand in that file")
    if options.until_break and options.mode == MODE_MIG:
        parser.error("--until-break: under MIG there are as many clients as instances; leave it")
    if options.mig_layout:
        check_mig_layout(parser, options)
    limits = (options.mps_percentage, options.mps_memory_limit, options.mps_priority)
    if any(limits) and options.mode != MODE_MPS:
        parser.error("limits of MPS clients need --mode mps")
    if options.mode == MODE_EXCLUSIVE and options.baseline is not None:
        parser.error("--mode exclusive takes baselines: leave --baseline away")
    if options.data_dir is not None and not Path(options.data_dir).is_dir():
        parser.error(f"--data-dir {options.data_dir} is no folder: name one that is there")
    return options


def check_resume(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse flags that would make the rest of a run another one."""
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    others = sorted(flags - {"--resume", "--results-dir", "--verbose"})
    if others:
        parser.error(f"--resume goes on with the run's own flags: leave {', '.join(others)} away")


def check_pairs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what pairs have no use for, and fill in their own defaults."""
    ramp = (options.max_slowdown, options.slo_ms, options.bisect, options.until_break)
    if options.workloads or any(ramp):
        parser.error("--mix pairs has two clients in each co-run: leave --workloads and bounds")
    options.workloads = (pairs.CLIENTS,)
    options.window = options.window or pairs.WINDOW_SECONDS


def check_mig_layout(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a layout that has no instance for a client, or no meaning; it counts the clients."""
    if options.mode != MODE_MIG:
        parser.error("--mig-layout needs --mode mig")
    if options.mix == pairs.MIX:
        parser.error("--mix pairs needs instances of one size: leave --mig-layout")
    instances = len(options.mig_layout)
    options.workloads = options.workloads or (instances,)
    if max(options.workloads) > instances:
        parser.error(
            f"--mig-layout has {instances} instances for {max(options.workloads)} clients: name "
            "one for each, or give fewer --workloads"
        )


def add_ramp_flags(parser: argparse.ArgumentParser) -> None:
    """Add what looks for the largest count that holds."""
    ramp = parser.add_argument_group("the breaking point, with several counts")
    add = ramp.add_argument
    add(
        "--max-slowdown",
        type=positive_float,
        metavar="X",
        help="a count breaks, too, where a client is slower than alone by more than this factor",
    )
    add(
        "--slo-ms",
        type=positive_float,
        metavar="Y",
        help="a count breaks, too, where a client's p99 response time is above Y milliseconds",
    )
    add(
        "--bisect",
        action="store_true",
        help="after the first count that breaks try those between it and the last good one",
    )
    add(
        "--until-break",
        action="store_true",
        help=f"go on past the largest count by doubling, up to {MOST_CLIENTS} clients",
    )


def add_mps_flags(parser: argparse.ArgumentParser) -> None:
    """Add what limits the clients of an MPS server."""
    mps = parser.add_argument_group(
        "limits of MPS clients (one value for all, or one for each, over again after the last)"
    )
    add = mps.add_argument
    add(
        "--mps-percentage",
        type=listed(mps_knobs.percentage, mps_knobs.EVEN),
        default=(),
        metavar="even|N[,N...]",
        help="share of the multiprocessors that a client may use; even: 100 / clients",
    )
    add(
        "--mps-memory-limit",
        type=listed(mps_knobs.memory_limit),
        default=(),
        metavar="SIZE[,SIZE...]",
        help="GPU memory that a client may allocate, such as 512M or 8G",
    )
    add(
        "--mps-priority",
        type=listed(mps_knobs.priority),
        default=(),
        metavar="RANK[,RANK...]",
        help=f"{' or '.join(mps_knobs.PRIORITIES)}",
    )


def request_from(options: argparse.Namespace) -> Request:
    """Return the parsed arguments as the request that the rest of the program knows.

    Raises `PlanFileError` for a plan file that cannot be used.
    """
    plan_file = read_plan_file(options.plan) if options.plan else None
    usual_count = len(plan_file.members) if plan_file else 4
    return Request(
        mode=options.mode,
        mix=plan_file.name if plan_file else options.mix,
        counts=options.workloads or (usual_count,),
        plan_file=plan_file,
        bisect=options.bisect,
        until_break=options.until_break,
        max_slowdown=options.max_slowdown,
        slo_ms=options.slo_ms,
        mps_knobs=mps_knobs.MpsKnobs(
            options.mps_percentage, options.mps_memory_limit, options.mps_priority
        ),
        mig_layout=options.mig_layout,
        job_arguments=options.job_arguments,
        quick=options.quick,
        repeats=options.repeats,
        budget_minutes=options.budget_minutes,
        min_seconds=options.min_seconds,
        window_seconds=options.window,
        timeout_seconds=options.timeout,
        baseline=options.baseline,
        results_dir=options.results_dir,
        run_id=options.run_id,
        gpu=options.gpu,
        engine=options.engine,
        precision=options.precision,
        seed=options.seed,
        device=options.device,
        dataset=options.dataset,
        data_dir=options.data_dir,
        beside_others=options.beside_others,
    )


def words_of(text: str) -> tuple[str, ...]:
    """Argument type: words as a shell parts them."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).lower()}") from error


def non_negative_int(text: str) -> int:
    """Argument type: a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers of 1 or more, each once, rising, with commas between them."""
    values = tuple(positive_int(part.strip()) for part in text.split(","))
    if list(values) != sorted(set(values)):
        raise argparse.ArgumentTypeError(f"{text!r}: give each count once, the smallest first")
    return values


def listed(check: Callable[[str], str], *words: str) -> Callable[[str], tuple[str, ...]]:
    """Argument type: one of `words`, or values that `check` lets pass with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        if text in words:
            return (text,)
        try:
            return tuple(check(part.strip()) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def complain(error: Exception, code: int) -> int:
    """Print an error, one sentence for each thing that is wrong, and return its exit code."""
    for sentence in str(error).splitlines():
        print(f"benchmark_suite.py: error: {sentence}", file=sys.stderr)
    return code


def note_refusal(error: SuiteError, results_dir: Path) -> None:
    """Keep what was refused before there was a run; where that cannot be, it was at least said."""
    with contextlib.suppress(OSError):
        run_folder.append_refusal(results_dir, sys.argv, error.exit_code, str(error))


if __name__ == "__main__":
    sys.exit(main())
