"""Co-runs with their figures against the jobs alone, and the groups that they form over rounds.

Every figure against the jobs alone is taken anew here, with the baselines of all rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.modes.names import MODE_EXCLUSIVE, MODE_MIG
from benchmarking.records.run_folder import pooled
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures, Summary
from benchmarking.report.runs import NOISY, MeasuredRun, pressed_resource


@dataclass
class Alone:
    """A job alone: its repeats, and the card's joules over them."""

    repeats: Sequence[ClientRecord]
    joules: float | None = None

    @functools.cached_property
    def pooled(self) -> ClientRecord:
        """All repeats as one record."""
        return pooled(self.repeats)

    @functools.cached_property
    def unit_seconds(self) -> dict[str, float]:
        """Mean seconds of a unit, by kind."""
        return scores.unit_seconds(self.pooled.units)

    def slowdown(self, client: ClientRecord) -> float | None:
        """Times as long as alone that a unit of a client's work took."""
        progress = scores.normalized_progress(client.units, self.unit_seconds)
        return 1 / progress if progress else None

    def own_slowdowns(self) -> list[float]:
        """Those of each repeat against all of them: the baseline's own error."""
        return [felt for felt in map(self.slowdown, self.repeats) if felt]


Baselines = Mapping[str, Alone]  # by `job_key`


@dataclass
class CoRun:
    """One co-run with its clients; `measure` has taken their figures against the jobs alone."""

    run: MeasuredRun
    record: CoRunRecord
    clients: Sequence[ClientRecord]
    alone: Baselines = field(default_factory=dict)

    @property
    def summary(self) -> Summary:
        """The figures over all its clients."""
        return self.record.summary

    @property
    def name(self) -> str:
        """Two runs may name a co-run alike."""
        return f"{self.run.name}/{self.record.co_run}"

    @property
    def gpu(self) -> GpuFigures:
        """What the card's samples say of it."""
        return self.record.gpu or GpuFigures()

    @property
    def is_ok(self) -> bool:
        """Whether every client did its work to the end."""
        return self.record.outcome == "ok"

    @property
    def is_unverified(self) -> bool:
        """Whether some client's membership in the mode could not be checked."""
        return any(client.proof.verdict == "unverified" for client in self.clients)

    @property
    def window_seconds(self) -> float | None:
        """Length of the counting window."""
        start, end = self.record.window_start_seconds, self.record.window_end_seconds
        return None if start is None or end is None else end - start

    def joules_per_job(self) -> float | None:
        """The card's joules a job, where all clients run the same one."""
        if len({client.job_key for client in self.clients}) != 1:
            return None
        jobs = (
            scores.jobs_in_window(
                [(job.start_seconds, job.end_seconds) for job in client.jobs if job.in_window],
                self.window_seconds,
            )
            for client in self.clients
        )
        return scores.joules_per_job(self.gpu.energy_joules, jobs)

    def joules_per_work(self) -> float | None:
        """The card's joules a second of alone-work; unknown beside clients that are no part of it.

        The card does not tell whose joules they are.
        """
        joules, seconds, stp = self.gpu.energy_joules, self.window_seconds, self.summary.stp
        is_whole = self.summary.throughput_clients == self.record.clients
        return (
            joules / (stp * seconds)
            if joules is not None and stp and seconds and is_whole
            else None
        )


def measure(
    run: MeasuredRun, record: CoRunRecord, alone: Baselines, own_share: Baselines | None
) -> CoRun:
    """Take a co-run's figures anew; `own_share` are the jobs alone on their instances (MIG)."""
    clients = []
    for client in run.clients_of(record):
        reference = alone.get(client.job_key)
        is_known = client.status == "ok" and record.outcome != "invalid"
        slowdown = reference.slowdown(client) if reference and is_known else None
        clients.append(msgspec.structs.replace(client, slowdown=slowdown))
    compared = {} if record.outcome in ("interrupted", "invalid") else alone
    summary = scores.summarize_co_run(
        clients,
        {job_key: one.pooled for job_key, one in compared.items()},
        record.gpu,
        energy_alone_joules={job_key: one.joules for job_key, one in alone.items()},
        share_baselines=None if own_share is None else {
            job_key: one.pooled for job_key, one in own_share.items()
        },
    )  # fmt: skip
    return CoRun(run, msgspec.structs.replace(record, summary=summary), clients, alone)


@dataclass
class Group:
    """The co-runs of one mode, mix and count, from one or several runs; newest run first.

    `row` is what comparison.json holds of it (`report/rows.py`).
    """

    runs: list[MeasuredRun]
    co_runs: list[CoRun]
    baseline_ids: list[str]
    slo_ms: float | None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> MeasuredRun:
        """The newest run, which stands for what all have in common."""
        return self.runs[0]

    @property
    def mix(self) -> str:
        """What runs."""
        return self.first.manifest.mix

    @property
    def good(self) -> list[CoRun]:
        """The co-runs that ended well."""
        return [co_run for co_run in self.co_runs if co_run.is_ok]

    @property
    def broken(self) -> CoRunRecord | None:
        """The first co-run that did not: a count that failed once has no figure."""
        return next((one.record for one in self.co_runs if not one.is_ok), None)

    @property
    def idle(self) -> list[str]:
        """The labels of clients that went well and did nothing in some round's window."""
        clients = (client for one in self.good for client in one.clients)
        return list(dict.fromkeys(client.label for client in clients if not client.units))

    @property
    def members(self) -> Sequence[ClientRecord]:
        """The clients of its first co-run, which stand for what runs together."""
        return self.co_runs[0].clients

    @property
    def jobs(self) -> dict[int, str]:
        """What each client runs, as far as records tell: modes of unlike jobs are not compared."""
        return {client.client: client.job_key for one in self.co_runs for client in one.clients}

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
        is_pair = self.first.manifest.is_pairs or self.mix.startswith(f"{NOISY}: ")
        return [one.label for one in self.members] if is_pair and self.clients == 2 else None

    @property
    def kind(self) -> dict[str, Any]:
        """What tells the group from others."""
        return {**self.first.kind, "mix": self.mix, "clients": self.clients}

    @property
    def is_guarded(self) -> bool:
        """Whether its rounds were spread over a session, one next to those of the other modes."""
        sessions = {run.manifest.session for run in self.runs}
        return len(sessions) == 1 and None not in sessions and self.first.mode != MODE_MIG

    def of_client(self, client: int) -> list[tuple[CoRun, ClientRecord]]:
        """One client's records over the co-runs, each with its co-run."""
        return [(one, r) for one in self.co_runs for r in one.clients if r.client == client]


def plain(found: Estimate | None) -> dict[str, Any] | None:
    """An estimate as it stands in the comparison."""
    return dataclasses.asdict(found) | {"values": list(found.values)} if found else None


def mean_slowdown(members: Iterable[ClientRecord]) -> float | None:
    """Mean over copies of a job; `None` where one of them is unknown."""
    felt = scores.all_known(one.slowdown for one in members)
    return statistics.fmean(felt) if felt else None


def percentile_estimate(records: Sequence[ClientRecord], percent: float | None) -> Estimate | None:
    """A percentile of all rounds' raw latencies together, with the spread that the rounds give it.

    `None` where all of them are too few, or too many requests failed.
    """
    if not percent:
        return None
    latencies = [ms for client in records for ms in client.latency_ms or ()]
    failed = sum(map(scores.failed_requests, records))
    together = scores.latency_percentile(latencies, percent, failed)
    of_rounds = estimate(
        scores.percentile(requests, percent)
        for client in records
        if (requests := [*(client.latency_ms or ()), *[math.inf] * scores.failed_requests(client)])
    )
    if not together or of_rounds is None or math.inf in (together, of_rounds.mean):
        return None
    scale = together / of_rounds.mean if of_rounds.is_interval else 1.0
    return dataclasses.replace(
        of_rounds, mean=together, low=of_rounds.low * scale, high=of_rounds.high * scale
    )


def most_compared(groups: Sequence[Group]) -> list[list[Group]]:
    """For each mix the groups of one count: the one with the most modes, the largest such."""
    by_mix: dict[str, dict[int, list[Group]]] = {}
    for group in groups:
        # A noisy neighbor asks where a slice begins to pay, and compares no modes.
        is_noisy = any(pressed_resource(client.job_key) for client in group.members)
        if group.first.mode != MODE_EXCLUSIVE and group.clients > 1 and not is_noisy:
            by_mix.setdefault(group.mix, {}).setdefault(group.clients, []).append(group)

    def rank(found: Sequence[Group]) -> tuple[int, int]:
        known = (any(one.summary.stp for one in group.good) for group in found)
        return sum(known), found[0].clients

    return [max(by_count.values(), key=rank) for by_count in by_mix.values()]
