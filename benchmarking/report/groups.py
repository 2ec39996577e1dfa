"""Co-runs with their figures against the jobs alone, and the groups that they form over rounds.

Every figure against the jobs alone is taken anew here, with the baselines of all rounds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.modes.names import MODE_EXCLUSIVE, MODE_MIG
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures, Summary
from benchmarking.report.runs import NOISY, Alone, MeasuredRun, pressed_resource

# What the table of clients takes from their records as it is.
_TABLE_FIELDS = (
    "phase", "co_run", "clients", "repeat", "client", "workload", "label", "job_key", "status",
    "reason", "latency_ms",
)  # fmt: skip


def window_seconds(record: CoRunRecord) -> float | None:
    """Length of the counting window."""
    start, end = record.window_start_seconds, record.window_end_seconds
    return None if start is None or end is None else end - start


@dataclass
class CoRun:
    """One co-run with its clients, and its figures against the jobs alone."""

    run: MeasuredRun
    record: CoRunRecord
    clients: list[ClientRecord]
    alone: Alone
    summary: Summary

    @property
    def is_ok(self) -> bool:
        """Whether every client did its work to the end."""
        return self.record.outcome == "ok"

    @property
    def is_unverified(self) -> bool:
        """Whether some client's membership in the mode could not be checked."""
        return any(client.proof.verdict == "unverified" for client in self.clients)

    def slowdown(self, client: ClientRecord) -> float | None:
        """Times as long as alone that a unit of the client's work took."""
        reference = self.alone.pooled.get(client.job_key)
        if client.status != "ok" or reference is None or self.record.outcome == "invalid":
            return None
        seconds = scores.unit_seconds(reference.units)
        progress = scores.normalized_progress(client.units, seconds)
        return 1 / progress if progress else None

    def joules_per_job(self) -> float | None:
        """The card's joules a job, where all clients run the same one."""
        if len({client.job_key for client in self.clients}) != 1 or self.record.gpu is None:
            return None
        jobs = (
            scores.jobs_in_window(
                [(job.start_seconds, job.end_seconds) for job in client.jobs if job.in_window],
                window_seconds(self.record),
            )
            for client in self.clients
        )
        return scores.joules_per_job(self.record.gpu.energy_joules, jobs)

    def joules_per_work(self) -> float | None:
        """The card's joules a second of alone-work; unknown beside clients that are no part of it.

        The card does not tell whose joules they are.
        """
        joules = self.record.gpu and self.record.gpu.energy_joules
        seconds, stp = window_seconds(self.record), self.summary.stp
        is_whole = self.summary.throughput_clients == self.record.clients
        return (
            joules / (stp * seconds)
            if joules is not None and stp and seconds and is_whole
            else None
        )


def measure(
    run: MeasuredRun, record: CoRunRecord, alone: Alone, own_share: Alone | None = None
) -> CoRun:
    """Take a co-run's figures; `own_share` are the jobs alone on their instances (MIG)."""
    clients = run.clients_of(record)
    is_comparable = record.outcome not in ("interrupted", "invalid")
    summary = scores.summarize_co_run(
        clients,
        alone.pooled if is_comparable else {},
        record.gpu,
        energy_alone_joules=alone.energy_joules,
        share_baselines=own_share and own_share.pooled,
    )
    return CoRun(run, record, clients, alone, summary)


@dataclass
class Group:
    """The co-runs of one mode, mix and count, from one or several runs; newest run first."""

    runs: list[MeasuredRun]
    co_runs: list[CoRun]
    baseline_ids: list[str]
    slo_ms: float | None

    @property
    def first(self) -> MeasuredRun:
        """The newest run, which stands for what all have in common."""
        return self.runs[0]

    @property
    def good(self) -> list[CoRun]:
        """The co-runs that ended well."""
        return [co_run for co_run in self.co_runs if co_run.is_ok]

    @property
    def clients(self) -> int:
        """How many clients ran together."""
        return self.co_runs[0].record.clients

    @property
    def run_ids(self) -> list[str]:
        """The runs that the figures come from, newest first."""
        return [run.name for run in self.runs]

    @property
    def pair(self) -> list[str] | None:
        """The labels of a pair's own mix, else `None`."""
        is_pair = self.first.manifest.is_pairs or self.first.manifest.mix.startswith(f"{NOISY}: ")
        return [client.label for client in self.co_runs[0].clients] if is_pair else None

    @property
    def kind(self) -> dict[str, Any]:
        """What tells the group from others."""
        return kind_of(self.first) | {"mix": self.first.manifest.mix, "clients": self.clients}

    @property
    def is_guarded(self) -> bool:
        """Whether its rounds were spread over a session, one next to those of the other modes."""
        sessions = {run.manifest.session for run in self.runs}
        return len(sessions) == 1 and None not in sessions and self.first.mode != MODE_MIG

    def proportions(self) -> tuple[tuple[str, int], ...]:
        """The jobs' shares in lowest terms: alike where one count is so many copies of another."""
        keys = [client.job_key for client in self.co_runs[0].clients]
        unit = math.gcd(*map(keys.count, keys)) or 1
        return tuple(sorted((key, keys.count(key) // unit) for key in set(keys)))

    def labels(self) -> list[str]:
        """What its clients run, each once: copies of a job have one label."""
        return list(dict.fromkeys(client.label for client in self.co_runs[0].clients))

    def members(self, client: int) -> list[tuple[CoRun, ClientRecord]]:
        """One client's records over the co-runs, each with its co-run."""
        return [(one, r) for one in self.co_runs for r in one.clients if r.client == client]


def kind_of(run: MeasuredRun) -> dict[str, str]:
    """The mode of a run in three ways."""
    return {"mode": run.mode, "settings": run.settings, "variant": run.variant}


def plain(found: Estimate | None) -> dict[str, Any] | None:
    """An estimate as it stands in the comparison."""
    return found and dataclasses.asdict(found) | {"values": list(found.values)}


def failed_requests(client: ClientRecord) -> int:
    """Requests in the window that failed or timed out."""
    unit = client.units.get(scores.FAILED_REQUEST)
    return round(unit.count) if unit else 0


def mean_slowdown(co_run: CoRun, members: Sequence[ClientRecord]) -> float | None:
    """Mean over copies of a job; `None` where one of them is unknown."""
    felt = scores.all_known(co_run.slowdown(one) for one in members)
    return statistics.fmean(felt) if felt else None


def percentile_estimate(records: Sequence[ClientRecord], percent: float | None) -> Estimate | None:
    """A percentile of all rounds' raw latencies together, with the spread that the rounds give it.

    `None` where all of them are too few, or too many requests failed.
    """
    latencies = [ms for client in records for ms in client.latency_ms or ()]
    failed = sum(map(failed_requests, records))
    together = percent and scores.latency_percentile(latencies, percent, failed)
    if not together or math.isinf(together):
        return None
    of_rounds = estimate(
        scores.percentile([*(c.latency_ms or ()), *[math.inf] * failed_requests(c)], percent)
        for c in records
        if c.latency_ms
    )
    if of_rounds is None or math.isinf(of_rounds.mean):
        return None
    scale = together / of_rounds.mean if of_rounds.is_interval else 1.0
    return dataclasses.replace(
        of_rounds, mean=together, low=of_rounds.low * scale, high=of_rounds.high * scale
    )


def table_rows(co_run: CoRun) -> list[dict[str, Any]]:
    """The rows of a co-run's clients in the table of all clients."""
    record, gpu = co_run.record, msgspec.to_builtins(co_run.record.gpu or GpuFigures())
    shared = {
        "run_id": co_run.run.name,
        "folder": str(co_run.run.folder),
        "session": co_run.run.manifest.session,
        **kind_of(co_run.run),
        "mix": co_run.run.manifest.mix,
        "outcome": record.outcome,
        "window_start_seconds": record.window_start_seconds,
        "window_end_seconds": record.window_end_seconds,
        "stp": co_run.summary.stp,
        "antt": co_run.summary.antt,
        **{f"gpu_{name}": value for name, value in gpu.items()},
    }
    return [
        {
            **shared,
            **{name: getattr(client, name) for name in _TABLE_FIELDS},
            "verdict": client.proof.verdict,
            "jobs": msgspec.to_builtins(client.jobs),
            "failed_requests": failed_requests(client),
            "slowdown": co_run.slowdown(client),
            "is_service": scores.is_offered_rate(client.units),
        }
        for client in co_run.clients
    ]


def most_compared(groups: Sequence[Group]) -> list[list[Group]]:
    """For each mix the groups of one count: the one with the most modes, the largest such."""
    by_mix: dict[str, dict[int, list[Group]]] = {}
    for group in groups:
        if _is_compared(group):
            by_count = by_mix.setdefault(group.first.manifest.mix, {})
            by_count.setdefault(group.clients, []).append(group)

    def rank(item: tuple[int, list[Group]]) -> tuple[int, int]:
        clients, found = item
        known = (any(one.summary.stp for one in group.good) for group in found)
        return sum(known), clients

    return [max(by_count.items(), key=rank)[1] for by_count in by_mix.values()]


def _is_compared(group: Group) -> bool:
    """Whether modes are compared by it; a noisy neighbor asks where a slice begins to pay."""
    is_noisy = any(pressed_resource(client.job_key) for client in group.co_runs[0].clients)
    return group.first.mode != MODE_EXCLUSIVE and group.clients > 1 and not is_noisy
