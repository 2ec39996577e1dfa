"""What can be told before the first minute: memory, disk, pids that cannot be seen, how long.

Warnings are notes of the run; only what cannot work at all is refused.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarking.cli import EXIT_FAILED, EXIT_USAGE, SuiteError
from benchmarking.measuring.launcher import TAIL_PART, FinishRule
from benchmarking.modes.mig import MigMode
from benchmarking.modes.sharing_mode import is_own_pid_namespace
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.planning.workloads import COMMAND_WORKLOAD, SIZE_CPU, SIZE_GUIDE, WORKLOADS
from benchmarking.records.run_folder import PHASE_CO_RUN
from benchmarking.suite.setup import Setup

# The least counted seconds of whole jobs: under these a figure is noise. What is
# measured alone stands behind every figure of the run.
GUIDE_MIN_SECONDS = 7.0
SMALL_MIN_SECONDS = 2.0
# From the common start to the opening of the window: by then everyone is at work.
SETTLE_SECONDS = 3.0
QUICK_SETTLE_SECONDS = 2.0
CPU_SETTLE_SECONDS = 0.5

# A window that waits for units of a slow client ends after so many times its length.
LONGEST_WINDOW = 3.0

LITTLE_DISK_MB = 500
# Past this many times the memory that is there, no allocator's thrift makes jobs fit.
WIDE_MARGIN = 1.5
# What was measured is of an H100, and other engines and cards take some more.
FULL_FRACTION = 0.9

# Of a co-run that is not its window: imports, loading, ending, and each client's turn to warm up
# (an H100: 10 s for one client, 16 s for four).
START_SECONDS, WARM_UP_SECONDS = 8.0, 2.0
# Four of the mixed mix on an H100 made the longest job last 1.6 times as long (it waits between
# its cells). CPU jobs wait for each other's cores.
SLOWED_BY_A_NEIGHBOR = 0.25


def notes_before(setup: Setup) -> list[str]:
    """Return warnings about what is likely to go wrong; `setup` is a plan whose mode is in force.

    Raises `SuiteError` for what cannot work: no byte of disk, jobs far larger than the card.
    """
    notes = _disk_notes(setup.request.results_dir)
    if setup.gpu is None:
        return notes
    if is_own_pid_namespace():
        notes.append(
            "this is a container with a pid namespace of its own: where NVML's pids cannot be "
            "matched with the clients', all of them end `unverified` (start it with --pid=host)"
        )
    return [*notes, *_memory_notes(setup)]


def _disk_notes(results_dir: Path) -> list[str]:
    folder = next(
        place for place in (results_dir, *results_dir.resolve().parents) if os.path.exists(place)
    )
    free_mb = shutil.disk_usage(folder).free / 1e6
    if free_mb == 0:
        raise SuiteError(
            f"cannot write to {results_dir} (No space left on device): make room there, or name "
            "another --results-dir", EXIT_FAILED,
        )  # fmt: skip
    if free_mb >= LITTLE_DISK_MB:
        return []
    return [f"only {free_mb:.0f} MB are free in {results_dir}: a run whose disk gets full ends"]


# --- memory -----------------------------------------------------------------------------------


def _memory_mib(client: PlannedClient) -> float:
    """What a client takes of a card; 0 where that was never measured, as for a command."""
    kind = WORKLOADS.get(client.workload)
    return (kind.memory_mib if kind else None) or 0.0


def _memory_notes(setup: Setup) -> list[str]:
    """Whether the co-runs fit the card: of several counts, of which the larger may break, once."""
    too_large = [
        (run, need, room)
        for run in setup.plan.co_runs
        for need, room in [_need_and_room(run, setup)]
        if room and need > FULL_FRACTION * room
    ]
    if not too_large:
        return []
    run, need, room = too_large[0]
    sentence = (
        f"{run.co_run} needs about {need / 1024:.0f} GiB of GPU memory and {room / 1024:.0f} GiB "
        "are there"
    )
    fewest = min(len(run.clients) for run in setup.plan.co_runs)
    if len(run.clients) == fewest and need > WIDE_MARGIN * room:
        raise SuiteError(
            f"{sentence}: take fewer --workloads, another --mix, or smaller jobs by "
            "--job-arguments or --plan", EXIT_USAGE,
        )  # fmt: skip
    return [f"{sentence}: it may run out of memory"]


def _need_and_room(run: PlannedCoRun, setup: Setup) -> tuple[float, float]:
    """MiB that a co-run takes, and that are there; under MIG of the tightest client."""
    needs = [_memory_mib(client) for client in run.clients]
    if not isinstance(setup.mode, MigMode):
        return sum(needs), (setup.gpu or {}).get("memory_total_mib") or 0.0
    rooms = [instance.get("memory_mib") or 0.0 for instance in setup.mode.instances()]
    pairs = [(need, room) for need, room in zip(needs, rooms, strict=False) if room]
    return max(pairs, key=lambda pair: pair[0] / pair[1], default=(0.0, 0.0))


# --- how long it takes ------------------------------------------------------------------------


def finish_rule(setup: Setup, run: PlannedCoRun) -> FinishRule:
    """Return when the window of a co-run opens and closes.

    Alone it holds a whole job, and with it units of every kind. A user's own command is one unit,
    however long: next to one the window is as long as a run of the slowest.
    """
    request, is_alone = setup.request, run.phase != PHASE_CO_RUN
    settle_seconds = request.settle_seconds
    if settle_seconds is None:
        on_gpu = QUICK_SETTLE_SECONDS if request.quick else SETTLE_SECONDS
        settle_seconds = CPU_SETTLE_SECONDS if setup.is_cpu_demo else on_gpu
    window_seconds = None if is_alone else request.window_seconds
    is_long = not setup.is_cpu_demo if is_alone else setup.job_size == SIZE_GUIDE
    least = request.min_seconds or (GUIDE_MIN_SECONDS if is_long else SMALL_MIN_SECONDS)
    if any(client.workload == COMMAND_WORKLOAD for client in run.clients):
        return FinishRule(window_seconds or least, settle_seconds)
    return FinishRule(
        min_seconds=least,
        settle_seconds=settle_seconds,
        needs_whole_job=is_alone,
        window_seconds=window_seconds,
        longest_seconds=LONGEST_WINDOW * window_seconds if window_seconds else math.inf,
    )


def estimated_seconds(run: PlannedCoRun, setup: Setup) -> float | None:
    """Return about how long a co-run takes; `None` where a command's length is unknown."""
    kinds = [WORKLOADS[one.workload] for one in run.clients if one.workload in WORKLOADS]
    if len(kinds) < len(run.clients):
        return None
    rule = finish_rule(setup, run)
    around = START_SECONDS + WARM_UP_SECONDS * len(kinds) + (1 + TAIL_PART) * rule.settle_seconds
    if rule.window_seconds:
        return around + rule.window_seconds
    longest = max(kind.job_seconds[setup.job_size] for kind in kinds)
    if rule.needs_whole_job:
        longest *= 1.5  # the one in hand when the window opens is no whole one
    slowed = 1 + SLOWED_BY_A_NEIGHBOR * (len(kinds) - 1)
    if setup.job_size == SIZE_CPU:
        slowed = max(1.0, len(kinds) / setup.cores)
    return around + max(rule.min_seconds, longest * slowed)


def estimated_round_seconds(setup: Setup) -> float | None:
    """Return about how long one repeat of the co-runs takes, of the baselines where it is they."""
    first = [run for run in setup.plan.co_runs or setup.plan.baseline if run.repeat == 0]
    return _whole_seconds(first, setup)


def _whole_seconds(runs: Sequence[PlannedCoRun], setup: Setup) -> float | None:
    seconds = [estimated_seconds(run, setup) for run in runs]
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None


def estimate(setup: Setup) -> str:
    """Return one line: about how long the plan takes, and what it consists of."""
    plan = setup.plan
    repeats = max((run.repeat + 1 for run in plan.co_runs), default=0)
    alone = f"{_counted(len(plan.jobs()), 'job')} alone"
    rounds = max((run.repeat + 1 for run in plan.baseline), default=0)
    parts = [f"{rounds} rounds of {alone}" if rounds > 1 else alone] if plan.baseline else []
    if plan.co_runs:
        what = _counted(len(plan.co_runs) // repeats, "co-run")
        parts.append(f"{repeats} repeats of {what}" if repeats > 1 else what)
    whole = _whole_seconds((*plan.baseline, *plan.co_runs), setup)
    if whole is None:
        return f"as long as your commands take: {', '.join(parts)}"
    budget = setup.request.budget_minutes
    if budget and repeats > 1:
        whole = min(whole, 60 * budget)
    return f"{_duration(whole)}: {', '.join(parts)}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
