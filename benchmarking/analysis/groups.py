"""A row of the scorecard: co-runs of one mode and setting, mix and count, over their repeats."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis.clients import ClientRow, client_rows
from benchmarking.analysis.guide_checks import Check, mode_checks
from benchmarking.analysis.runs import (
    CPU_DEMO,
    CoRun,
    RunView,
    clients_text,
    joules_per_job,
    mode_name,
)
from benchmarking.metrics.estimates import (
    Estimate,
    estimate,
    excess_percent,
    overhead_estimate,
    range_estimate,
)

Record = Mapping[str, Any]

# What a co-run's GPU section holds and how repeats are put together.
_GPU_FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "utilization_gpu_percent": statistics.fmean,
    "sm_activity_percent": statistics.fmean,
    "sm_occupancy_percent": statistics.fmean,
    "tensor_activity_percent": statistics.fmean,
    "dram_activity_percent": statistics.fmean,
    "memory_used_mib_max": max,
    "power_draw_watts": statistics.fmean,
    "energy_joules": statistics.fmean,
    "sm_clock_mhz": statistics.fmean,
    "host_cpu_percent": statistics.fmean,
}


@dataclass
class Group:
    """The co-runs (repeats) of one mode, mix and count of clients, from one or several runs.

    `settings` says what the mode was set to, where it was: limits of MPS clients, for instance.
    `baseline_ids` are the runs in which the jobs were measured alone; `fairness` has the median and
    the range of its repeats, since an interval could pass its limit of 1.
    """

    mode: str
    settings: str
    mix: str
    clients: int
    runs: list[RunView]
    co_runs: list[CoRun]
    outcome: str
    reason: str | None
    stp: Estimate | None
    antt: Estimate | None
    overhead_percent: Estimate | None
    interference_overhead_percent: Estimate | None
    mechanism_overhead_percent: Estimate | None
    stp_per_multiprocessor: float | None
    fairness: Estimate | None
    energy_ratio: Estimate | None
    joules_per_job: Estimate | None
    success_rate_percent: float | None
    average_duration_seconds: float | None
    total_gpu_time_seconds: float | None
    throughput_clients: int | None
    baseline_ids: tuple[str, ...]
    gpu: dict[str, Any]
    client_rows: list[ClientRow]
    checks: list[Check]

    @property
    def mode_name(self) -> str:
        """The mode and its settings as they are written in sentences."""
        return mode_name(self.mode, self.settings)

    @property
    def mode_in_claims(self) -> str:
        """The mode as a claim names it, with a word where nobody could check it."""
        return f"{self.mode_name}{' (mode unverified)' if self.is_unverified else ''}"

    @property
    def who(self) -> str:
        """`4 clients`; a single one is not the mix, but the first of its jobs: `one X`."""
        if self.clients == 1 and self.client_rows:
            return f"one {self.client_rows[0].label}"
        return clients_text(self.clients)

    @property
    def subject(self) -> str:
        """What ran: `mixed, 4 clients`."""
        return f"{self.mix}, {self.who}"

    @property
    def proportions(self) -> tuple[tuple[str, int], ...]:
        """The jobs' shares in lowest terms: alike where one count is so many copies of another."""
        first = self.co_runs[0]
        records = first.clients
        if len(records) < self.clients:
            planned = {co_run["co_run"]: co_run for co_run in first.run.planned(self.clients)}
            records = planned.get(first.name, {}).get("clients", records)
        jobs = Counter(record.get("job_key", "") for record in records)
        unit = math.gcd(*jobs.values()) or 1
        return tuple(sorted((job, count // unit) for job, count in jobs.items()))

    @property
    def share_text(self) -> str:
        """`16 of 132 multiprocessors` where the first client had fewer than the card; else ``."""
        whole = self.runs[0].environment.get("multiprocessor_count")
        identity = next((record.get("identity") for record in self.co_runs[0].clients), None)
        own = (identity or {}).get("multiprocessor_count")
        return f"{own} of {whole} multiprocessors" if own and whole and own < whole else ""

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The runs that the figures come from, newest first."""
        return tuple(run.run_id for run in self.runs)

    @property
    def gpu_uuids(self) -> list[str]:
        """The cards that it ran on."""
        return sorted({uuid for run in self.runs if (uuid := run.environment.get("gpu_uuid"))})

    @property
    def is_unverified(self) -> bool:
        """Whether some client's membership in the mode could not be checked."""
        return any("unverified" in row.proof for row in self.client_rows)

    @property
    def counts_in_part(self) -> bool:
        """Whether figures of throughput leave out clients at a fixed offered rate."""
        counted = self.throughput_clients
        return counted is not None and counted < self.clients

    @property
    def ran_out_of_time(self) -> bool:
        """Whether a run was completed without the repeats that its plan held for this count."""
        for run in self.runs:
            planned = {co_run["co_run"] for co_run in run.planned(self.clients)}
            done = {record["co_run"] for record in run.co_runs()}
            if run.manifest.get("outcome") == "complete" and not planned <= done:
                return True
        return False


def build_group(
    runs: Sequence[RunView],
    clients: int,
    alone: Mapping[str, Record],
    slo_ms: float | None = None,
    baseline_ids: Sequence[str] = (),
) -> Group:
    """Put together the judged co-runs of that many clients; the runs are alike, newest first.

    `alone` holds baseline records by job key, `baseline_ids` are the runs that all the figures'
    baselines come from; `slo_ms` is a bound on the latency jobs' responses.
    """
    mode, mix = runs[0].mode, runs[0].mix
    co_runs = [co_run for run in runs for co_run in run.judged(clients)]
    good = [co_run for co_run in co_runs if co_run.is_ok]
    broken = next((co_run.record for co_run in co_runs if not co_run.is_ok), None)
    stp, antt = (estimate(c.summary(name) for c in good) for name in ("stp", "antt"))
    group = Group(
        mode=mode,
        settings=runs[0].settings,
        mix=mix,
        clients=clients,
        runs=[run for run in runs if run.judged(clients)],
        co_runs=co_runs,
        outcome=broken["outcome"] if broken else "ok",
        reason=broken.get("reason") if broken else None,
        stp=stp,
        antt=antt,
        overhead_percent=overhead_estimate(stp),
        interference_overhead_percent=_interference(good, mode, antt),
        mechanism_overhead_percent=(
            excess_percent(antt) if clients == 1 and mode != CPU_DEMO else None
        ),
        stp_per_multiprocessor=_stp_per_multiprocessor(runs[0], mode, stp, co_runs),
        fairness=range_estimate(c.summary("fairness") for c in good),
        energy_ratio=estimate(c.summary("energy_ratio") for c in good),
        joules_per_job=estimate(joules_per_job(c.record.get("gpu"), c.clients) for c in good),
        success_rate_percent=_mean_of(co_runs, "success_rate_percent"),
        average_duration_seconds=_mean_of(good, "average_duration_seconds"),
        total_gpu_time_seconds=_mean_of(good, "total_gpu_time_seconds"),
        throughput_clients=next((c.summary("throughput_clients") for c in good), None),
        baseline_ids=tuple(dict.fromkeys(baseline_ids)),
        gpu=_gpu_figures([c.record.get("gpu") or {} for c in good or co_runs]),
        client_rows=client_rows(co_runs, alone, slo_ms),
        checks=[],
    )
    group.checks = _mode_checks(group)
    return group


def run_ids_of(groups: Iterable[Group]) -> tuple[str, ...]:
    """The runs that the groups' figures come from, each once."""
    return tuple(dict.fromkeys(run_id for group in groups for run_id in group.run_ids))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean_of(co_runs: Sequence[CoRun], name: str) -> float | None:
    return _mean(co_run.summary(name) for co_run in co_runs)


def _interference(good: Sequence[CoRun], mode: str, antt: Estimate | None) -> Estimate | None:
    percents = [c.summary("interference_overhead_percent") for c in good]
    found = estimate(1 + percent / 100 for percent in percents if percent is not None)
    return excess_percent(antt if found is None and mode != "mig" else found)


def _stp_per_multiprocessor(
    run: RunView, mode: str, stp: Estimate | None, co_runs: Sequence[CoRun]
) -> float | None:
    """STP as if the instances had all of the card's multiprocessors (MIG; else `None`)."""
    whole = run.environment.get("multiprocessor_count")
    if mode != "mig" or stp is None or not whole or not co_runs:
        return None
    identities = [record.get("identity") or {} for record in co_runs[0].clients]
    counts = [identity.get("multiprocessor_count") for identity in identities]
    return stp.mean * whole / sum(counts) if counts and all(counts) else None


def _gpu_figures(sections: Sequence[Record]) -> dict[str, Any]:
    """GPU figures over repeats, with the names of their sources and of every throttle reason."""
    combined: dict[str, Any] = {}
    for name, combine in _GPU_FIGURES.items():
        known = [section[name] for section in sections if section.get(name) is not None]
        combined[name] = combine(known) if known else None
    sources = sorted({s["utilization_source"] for s in sections if s.get("utilization_source")})
    combined["utilization_source"] = ", ".join(sources) or None
    reasons = {reason for section in sections for reason in section.get("throttle_reasons") or []}
    combined["throttle_reasons"] = sorted(reasons)
    return combined


def _mode_checks(group: Group) -> list[Check]:
    """The guide's ranges of the mode; one client alone shares nothing, so none apply to it."""
    if group.clients < 2:
        return []
    measured = {
        "success_rate_percent": group.success_rate_percent,
        "overhead_percent": group.overhead_percent.mean if group.overhead_percent else None,
        "interference_overhead_percent": (
            group.interference_overhead_percent.mean
            if group.interference_overhead_percent
            else None
        ),
        "utilization_gpu_percent": group.gpu["utilization_gpu_percent"],
    }
    return mode_checks(group.mode, measured, group.subject)
