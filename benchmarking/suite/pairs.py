"""Every job beside each other one and beside itself: the co-runs of `--mix pairs`.

A pair is run once and gives both directions. Pure, as `plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarking.records.run_folder import PHASE_CO_RUN
from benchmarking.suite import plan as planning
from benchmarking.suite.plan import (
    MIXES,
    MODE_EXCLUSIVE,
    SIZE_CPU,
    JobOptions,
    Plan,
    PlannedCoRun,
)

MIX = "pairs"
CLIENTS = 2

# Long enough for ten units of every quick job beside another, the notebook's cells (0.4 s alone)
# among them.
WINDOW_SECONDS = 10.0

# Without a GPU two jobs are enough to show the flow: one that is all throughput, one with latency.
CPU_WORKLOADS = ("resnet_training", "batch_inference")


def pair_workloads(job_size: str) -> tuple[str, ...]:
    """Return the workloads that are paired: those of the mixed mix, fewer on the CPU."""
    return CPU_WORKLOADS if job_size == SIZE_CPU else MIXES["mixed"]


def pairs_plan(
    mode: str,
    workloads: Sequence[str],
    options: JobOptions,
    *,
    name: str,
    repeats: int,
    python: str,
    root: str,
    whole_gpu_baseline: bool,
    share_baseline: bool,
    baseline_mode: str,
) -> Plan:
    """Lay out each job alone, then every pair; all pairs once before the first repeat.

    Co-runs are called `<name>-<workload>-<workload>-r<repeat>`. `mode` "exclusive" has baselines
    only.
    """

    def client(number: int, workload: str) -> planning.PlannedClient:
        return planning.planned_client(number, workload, options, python=python, root=root)

    alone = planning.build_plan(
        mode,
        # Number 0 each, as every job alone runs on the first client's share.
        lambda _: [client(0, workload) for workload in workloads],
        name=name,
        counts=(len(workloads),),
        repeats=0,
        whole_gpu_baseline=whole_gpu_baseline,
        share_baseline=share_baseline,
        baseline_mode=baseline_mode,
    )
    pairs = list(itertools.combinations_with_replacement(workloads, 2))
    co_runs = () if mode == MODE_EXCLUSIVE else tuple(
        PlannedCoRun(
            f"{name}-{one}-{other}-r{repeat}", PHASE_CO_RUN, mode, repeat,
            (client(0, one), client(1, other)),
        )
        for repeat in range(repeats)
        for one, other in pairs
    )  # fmt: skip
    return Plan(alone.baseline, co_runs)
