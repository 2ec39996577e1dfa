"""What a suite run was asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarking.modes.names import MODE_TIME_SLICING
from benchmarking.planning import limits
from benchmarking.planning.plan_file import PlanFile
from benchmarking.planning.redaction import Secrets, secrets_of_words
from benchmarking.planning.workloads import (
    COMMAND_WORKLOAD,
    MIXES,
    NOISY_JOBS,
    PAIR_CLIENTS,
    PAIRED_MIXES,
    PAIRS_MIX,
    WORKLOADS,
)
from benchmarking.records.types import MpsLimits


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for on the command line; kept in the manifest, to go on after a cut."""

    mode: str = MODE_TIME_SLICING
    mix: str = "mixed"
    counts: tuple[int, ...] = (4,)
    quick: bool = False
    repeats: int = 1
    budget_minutes: float | None = None
    duty_steps: bool = False
    null: bool = False
    session: str | None = None
    settle_seconds: float | None = None
    min_seconds: float | None = None
    window_seconds: float | None = None
    timeout_seconds: float = 1800.0
    baseline: str | None = None
    gpu: str | None = None
    engine: str | None = None
    precision: str | None = None
    seed: int = 42
    device: str = "auto"
    dataset: str | None = None
    data_dir: str | None = None
    bisect: bool = False
    until_break: bool = False
    max_slowdown: float | None = None
    slo_ms: float | None = None
    mps_limits: MpsLimits = MpsLimits()
    mig_layout: tuple[str, ...] = ()
    job_arguments: tuple[str, ...] = ()
    allow_contention: bool = False
    # not in the manifest's request: the run's own folder and its plan.toml say so
    results_dir: Path = Path("results")
    run_id: str | None = None
    plan_file: PlanFile | None = None

    @property
    def co_run_prefix(self) -> str:
        """What the names of its co-runs begin with: under other limits they are other co-runs."""
        return f"{self.mix}{limits.co_run_suffix(self.mps_limits)}"

    @property
    def is_pairs(self) -> bool:
        """Whether every job runs with each other one, two at a time."""
        return self.mix == PAIRS_MIX and self.plan_file is None

    @property
    def is_paired(self) -> bool:
        """Whether co-runs are of two: jobs with each other, or with a noisy neighbor."""
        return self.mix in PAIRED_MIXES and self.plan_file is None

    @property
    def workloads(self) -> tuple[str, ...]:
        """What makes the whole mix once; `command` for a command of a plan."""
        if self.plan_file:
            return tuple(entry.workload or COMMAND_WORKLOAD for entry in self.plan_file.members)
        if self.is_paired:
            return MIXES["mixed"] if self.is_pairs else NOISY_JOBS
        return MIXES[self.mix]

    @property
    def mix_size(self) -> int:
        """How many clients make the whole mix once."""
        return PAIR_CLIENTS if self.is_paired else len(self.workloads)

    @property
    def has_latency(self) -> bool:
        """Whether some client of the mix has response times."""
        if self.plan_file:
            return self.plan_file.has_latency
        return any(WORKLOADS[workload].has_latency for workload in self.workloads)

    @property
    def secrets(self) -> Secrets:
        """What of it is not to be recorded or printed."""
        mine = Secrets(secrets_of_words(self.job_arguments))
        return mine | self.plan_file.secrets if self.plan_file else mine
