"""The flags of `benchmark_suite.py`, and the request that they make."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarking.cli import (
    OneLineParser,
    count,
    counts,
    non_negative_float,
    non_negative_int,
    positive_float,
    present_folder,
)
from benchmarking.modes.names import MODE_EXCLUSIVE, MODE_MIG, MODE_MPS, MODES
from benchmarking.planning import limits
from benchmarking.planning.job_lines import plan_of_jobs
from benchmarking.planning.plan_file import (
    PERCENTAGE_IS_IGNORED,
    read_plan_file,
)
from benchmarking.planning.ramp import MOST_CLIENTS
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import (
    MIXES,
    NOISY_MIX,
    PAIR_CLIENTS,
    PAIR_WINDOW_SECONDS,
    PAIRED_MIXES,
)
from benchmarking.records.types import MpsLimits

PROGRAM = "benchmark_suite.py"
USUAL_CLIENTS = 4
# Other flags would make the rest of a run another one.
GOES_WITH_RESUME = {
    "--resume", "--results-dir", "--verbose", "--allow-contention", "--beside-others",
}  # fmt: skip

DESCRIPTION = """\
Run real jobs side by side on one GPU under a sharing mode, and record what it cost them.

    python3 benchmarking/benchmark_suite.py --mode time-slicing --workloads 4
    python3 benchmarking/benchmark_suite.py --mode mps --mix training --workloads 1,2,4
    python3 benchmarking/benchmark_suite.py --mode mps --mix pairs    # each job with each other
    python3 benchmarking/benchmark_suite.py --mode exclusive          # each job alone: the baseline
    python3 benchmarking/benchmark_suite.py --plan examples/plans/own-commands.toml  # your own jobs
    python3 benchmarking/benchmark_suite.py --job 'python train.py' --job ./infer.sh  # without one
    python3 benchmarking/benchmark_suite.py --mode mig --dry-run      # check all, show the plan
    python3 benchmarking/benchmark_suite.py --resume RUN_ID           # go on after it was cut off

Each distinct job runs alone first; then all clients warm up one at a time, start together and
repeat their jobs. Some seconds later counting opens for all at once, and lasts as long as a job of
the slowest (or --window). The mode is proved client by client. Without
a GPU the same flow runs as a CPU demonstration, labelled so.

Exit codes: 0 complete, 1 a client failed or a file could not be written, 2 usage, 3 no usable GPU,
4 the GPU is in use or the mode asked for not in force (the message names the script to run),
5 invalid (a client without proof), 130 interrupted. What ends with 3 or 4 before there is a run is
kept in refusals.jsonl of the results folder. The last line on standard output is `results: FOLDER`.
"""


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return the checked flags; raises `UsageExit` (exit code 2) where they make no sense."""
    parser = OneLineParser(
        prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_experiment(parser)
    add_ramp(parser.add_argument_group("the breaking point, with several counts"))
    add_mps_limits(parser.add_argument_group(
        "limits of MPS clients (one value for all, or one for each, over again after the last)"
    ))  # fmt: skip
    add_run(parser)
    options = parser.parse_args(words)
    wrong = contradiction(options, words)
    if wrong is not None:
        parser.error(wrong)
    if options.mix in PAIRED_MIXES:
        options.workloads = (PAIR_CLIENTS,)
        options.window_seconds = options.window_seconds or PAIR_WINDOW_SECONDS
    elif options.mig_layout:
        options.workloads = options.workloads or (len(options.mig_layout),)
    return options


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add what is measured: mode, jobs, counts, windows."""
    add = parser.add_argument
    add("--mode", choices=MODES, default=MODES[0],
        help="how the GPU is shared (default: %(default)s)")  # fmt: skip
    add("--workloads", type=counts, metavar="N[,N...]",
        help="how many clients at once; several counts make several co-runs, up to the first that "
        f"fails (default: {USUAL_CLIENTS}, with --plan its clients once)")  # fmt: skip
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--mix", choices=(*MIXES, *PAIRED_MIXES), default="mixed",
        help="mixed: ResNet50 training, batch inference, Jupyter session, BERT fine-tuning, over "
        "again for more than four; pairs: each of these with each other one and itself, "
        f"{PAIR_WINDOW_SECONDS:g} s a pair; noisy: each of these, and token generation, next to "
        "an antagonist that presses the card's memory, its multiprocessors or the bus; serving: "
        "an inference server with its users and three ResNet50 trainings; llm: token generation, "
        "ResNet50 training, batch inference, Jupyter session; else copies of one (default: "
        "%(default)s)")  # fmt: skip
    jobs.add_argument("--plan", type=Path, metavar="FILE",
        help="clients of your own, any command among them, listed in a TOML file "
        "(see benchmarking/planning/plan_file.py); over again for more than it lists")  # fmt: skip
    jobs.add_argument("--job", action="append", metavar="COMMAND",
        help="a client of your own without a file, as --job 'python train.py --epochs 1'; give it "
        "once for each (default of --workloads: as many as there are)")  # fmt: skip
    add("--mig-layout", type=listed(limits.profile), default=(),
        metavar="PROFILE[,PROFILE...]",
        help="under mig, the instance of each client, such as 2g.20gb,1g.10gb,1g.10gb (made "
        "beforehand by gpu-configs/setup_mig.sh; default: client i has instance i)")  # fmt: skip
    add("--quick", action="store_true",
        help="smaller jobs, for a demonstration; of --mix noisy two jobs and two antagonists",
    )  # fmt: skip
    add("--duty-steps", action="store_true",
        help="with --mix noisy: also token generation next to memory that is pressed for 25, 50 "
        "and 75 %% of the time")  # fmt: skip
    add("--repeats", type=count, default=1, metavar="N",
        help="how often each co-run is done (default: 1)")  # fmt: skip
    add("--round", type=count, metavar="K",
        help="measure repeat K of --repeats alone, of baselines too, into the run of --run-id: "
        "several modes' runs can take turns")  # fmt: skip
    add("--session", metavar="NAME",
        help="what runs have in common whose rounds took turns: a report then calls their "
        "comparison guarded against drift")  # fmt: skip
    add("--budget-minutes", type=positive_float, metavar="M",
        help="leave out repeats that would take longer than this in all; the first is always done",
    )  # fmt: skip
    add("--null", action="store_true",
        help="with the baselines, also measure one client under time slicing: its distance from "
        "its baseline is the method's own error")  # fmt: skip
    add("--settle", dest="settle_seconds", type=non_negative_float, metavar="S",
        help="seconds between the common start and the opening of the window (default: 3, with "
        "--quick 2, on the CPU 0.5)")  # fmt: skip
    add("--window", dest="window_seconds", type=positive_float, metavar="S",
        help="count for S seconds and 10 units a client, whole jobs or not, but never over 3 S "
        "(default: as long as a job of the slowest client takes)")  # fmt: skip
    add("--min-seconds", type=positive_float, metavar="S",
        help="count each baseline and co-run for at least so long (default: 7, co-runs of small "
        "jobs and the CPU 2; NVML's process lists, which prove the mode, come once a second)",
    )  # fmt: skip
    add("--timeout", dest="timeout_seconds", type=positive_float, default=1800.0, metavar="S",
        help="time limit for getting ready, and again for measuring (default: %(default)g)",
    )  # fmt: skip
    add("--baseline", metavar="RUN",
        help="reuse the baselines of this run (id or folder); refused unless GPU model, driver, "
        "versions and jobs are the same")  # fmt: skip


def add_ramp(group: argparse._ArgumentGroup) -> None:
    """Add what looks for the largest count that meets the bounds."""
    add = group.add_argument
    add("--max-slowdown", type=positive_float, metavar="X",
        help="a count breaks, too, where a client is slower than alone by more than this factor",
    )  # fmt: skip
    add("--slo-ms", type=positive_float, metavar="Y",
        help="a count breaks, too, where a client's p99 response time is above Y milliseconds",
    )  # fmt: skip
    add("--bisect", action="store_true",
        help="after the first count that breaks try those between it and the last good one",
    )  # fmt: skip
    add("--until-break", action="store_true",
        help=f"go on past the largest count by doubling, up to {MOST_CLIENTS} clients",
    )  # fmt: skip


def add_mps_limits(group: argparse._ArgumentGroup) -> None:
    """Add what limits the clients of an MPS server."""
    add = group.add_argument
    add("--mps-percentage", type=listed(limits.percentage, limits.EVEN), default=(),
        metavar="even|N[,N...]",
        help="share of the multiprocessors that a client may use; even: 100 / clients",
    )  # fmt: skip
    add("--mps-partitions", action="store_true",
        help="a static partition of the multiprocessors each, made by enable_mps.sh "
        "--static-partitions N, in place of a percentage")  # fmt: skip
    add("--mps-memory-limit", type=listed(limits.memory_limit), default=(),
        metavar="SIZE[,SIZE...]",
        help="GPU memory that a client may allocate, such as 512M or 8G")  # fmt: skip
    add("--mps-priority", type=listed(limits.priority), default=(), metavar="RANK[,RANK...]",
        help=" or ".join(limits.PRIORITIES))  # fmt: skip


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add where it runs, how jobs compute, and what is done with the run."""
    add = parser.add_argument
    add("--results-dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    add("--run-id", metavar="ID", help="name of the run's folder (default: mode, mix, time)")
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--engine", choices=("eager", "graph", "compile"),
        help="how clients launch a step (default: graph on a GPU, eager on the CPU)")  # fmt: skip
    add("--precision", choices=("fp32", "tf32", "bf16"),
        help="(default: bf16 where the GPU has it, else fp32)")  # fmt: skip
    add("--seed", type=non_negative_int, default=42, help="the same for all (default: 42)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="cpu: CPU demonstration even where there is a GPU (default: auto)")  # fmt: skip
    add("--dataset", help="of the ResNet50 training (see resnet_training.py --help)")
    add("--data-dir", metavar="DIR", help="folder of that dataset")
    add("--job-arguments", type=words_of, default=(), metavar="WORDS",
        help="further flags for every job of the mix, as --job-arguments='--batch-size 8'",
    )  # fmt: skip
    add("--allow-contention", "--beside-others", action="store_true",
        help="measure although foreign processes are on the GPU, and mark the run contended",
    )  # fmt: skip
    add(
        "--dry-run",
        action="store_true",
        help="check everything, show the plan and stop; no job is run",
    )
    add("--verbose", action="store_true", help="show every client's command and environment")
    add("--resume", metavar="RUN",
        help="go on with a run that was cut off or failed (id or folder), with the flags that it "
        "was started with; what is done is not repeated, and a budget counts anew")  # fmt: skip


def contradiction(options: argparse.Namespace, words: Sequence[str]) -> str | None:
    """Return the first thing that makes no sense in flags that are good each by itself."""
    is_pairs, is_own = options.mix in PAIRED_MIXES, options.plan or options.job
    ramp = (options.max_slowdown, options.slo_ms, options.bisect, options.until_break)
    mps_limits = (
        options.mps_percentage, options.mps_partitions, options.mps_memory_limit,
        options.mps_priority,
    )  # fmt: skip
    instances, most = len(options.mig_layout), max(options.workloads or (0,))
    seconds = {"--settle": options.settle_seconds or 0, "--window": options.window_seconds or 0,
               "--min-seconds": options.min_seconds or 0}  # fmt: skip
    longest = max(seconds, key=seconds.__getitem__)
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    others = sorted(flags - GOES_WITH_RESUME)
    found = (
        (options.resume is not None and others,
         f"--resume goes on with the run's own flags: leave {', '.join(others)} out"),
        (options.round is not None and not (options.run_id and options.round <= options.repeats),
         "--round K needs --run-id, and --repeats of K at least"),
        (options.round is not None and any(ramp), "--round: leave the bounds of a ramp out"),
        (seconds[longest] >= options.timeout_seconds,
         f"{longest} {seconds[longest]:g} needs a --timeout above it"),
        (is_pairs and (options.workloads or any(ramp)),
         f"--mix {options.mix} has two clients in each co-run: leave --workloads and bounds out"),
        (options.duty_steps and options.mix != NOISY_MIX, "--duty-steps needs --mix noisy"),
        (is_own and options.job_arguments,
         "--job-arguments: with --plan or --job each client has its own arguments there"),
        (options.until_break and options.mode == MODE_MIG,
         "--until-break: under MIG there are as many clients as instances; leave it"),
        (options.until_break and options.mps_partitions,
         "--until-break: there are as many clients as static partitions; leave it"),
        (options.mps_partitions and options.mps_percentage,
         f"--mps-partitions: {PERCENTAGE_IS_IGNORED}: leave --mps-percentage out"),
        (options.null and options.mode == MODE_MIG,
         "--null needs the whole GPU, which MIG has divided: leave it"),
        (instances and options.mode != MODE_MIG, "--mig-layout needs --mode mig"),
        (instances and is_pairs,
         f"--mix {options.mix} needs instances of one size: leave --mig-layout"),
        (instances and most > instances,
         f"--mig-layout has {instances} instances for {most} clients: name one for each, or give "
         "fewer --workloads"),
        (any(mps_limits) and options.mode != MODE_MPS, "limits of MPS clients need --mode mps"),
        (options.mode == MODE_EXCLUSIVE and options.baseline is not None,
         "--mode exclusive takes baselines: leave --baseline out"),
        (options.data_dir is not None and not os.path.isdir(options.data_dir),
         f"--data-dir {options.data_dir} is no folder: name one that is there"),
    )  # fmt: skip
    return next((sentence for is_wrong, sentence in found if is_wrong), None)


def request_from(options: argparse.Namespace) -> Request:
    """Return checked flags as the request that the rest of the program knows.

    Raises `PlanFileError` for a plan that cannot be used.
    """
    plan_file = read_plan_file(options.plan) if options.plan else None
    if options.job:
        plan_file = plan_of_jobs(options.job, present_folder())
    if plan_file and options.mps_partitions:
        plan_file.require_no_percentage()
    usual_count = len(plan_file.members) if plan_file else USUAL_CLIENTS
    fields = {name: vars(options)[name] for name in Request.__struct_fields__ if name in options}
    return Request(
        **{**fields, "mix": plan_file.name if plan_file else options.mix},
        counts=options.workloads or (usual_count,),
        plan_file=plan_file,
        mps_limits=MpsLimits(
            partitions=options.mps_partitions,
            percentages=options.mps_percentage,
            memory_limits=options.mps_memory_limit,
            priorities=options.mps_priority,
        ),
    )


def words_of(text: str) -> tuple[str, ...]:
    """Argument type: words as a shell parts them."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).lower()}") from error


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
