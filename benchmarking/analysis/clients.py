"""One client over the repeats of a co-run, or one job alone: what its user felt."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis.guide_checks import Check, card_checks, workload_checks
from benchmarking.analysis.runs import (
    CoRun,
    RunView,
    failed_requests,
    joules_per_job,
    latency_ms,
    mean_job_seconds,
)
from benchmarking.analysis.service import ServiceFigures, bound_of, service_figures
from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate

Record = Mapping[str, Any]

TAIL_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class SloAttainment:
    """Share of responses, in percent, that came within a bound in ms."""

    percent: float
    bound_ms: float


@dataclass
class ClientRow:
    """One client of a co-run group over the group's repeats, or one job alone.

    `p99_ms` and `median_ms` hold those of each repeat; `latency` and `tail_slowdown` come from the
    raw latencies of all repeats together. `responses` is how many these are, `missed` how many
    more requests had none: they count as infinitely late.
    """

    client: int
    workload: str
    label: str
    statuses: list[str]
    proof: list[str]
    reasons: list[str]
    slowdown: Estimate | None
    job_seconds: float | None
    latency: dict[str, float | None] | None
    tail_slowdown: dict[int, float | None]
    p99_ms: Estimate | None
    median_ms: Estimate | None
    responses: int
    missed: int
    slo: SloAttainment | None
    service: ServiceFigures | None
    joules_per_job: float | None
    peak_memory_mib: float | None
    checks: list[Check]

    @property
    def missed_percent(self) -> float:
        """Share of the requests that were missed, in percent."""
        return 100 * self.missed / max(1, self.responses + self.missed)


def copies_by_label(rows: Iterable[ClientRow]) -> dict[str, list[ClientRow]]:
    """The rows by what they run: copies of one job stand together."""
    found: dict[str, list[ClientRow]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return found


def worst_copy(
    copies: Iterable[ClientRow], figure: Callable[[ClientRow], float | None]
) -> ClientRow | None:
    """The copy that felt most, which stands for all; `None` where none has the figure."""
    known = [row for row in copies if figure(row) is not None]
    return max(known, key=figure, default=None)


def client_rows(
    co_runs: Sequence[CoRun], alone: Mapping[str, Record], slo_ms: float | None
) -> list[ClientRow]:
    """A row for each client that some repeat has a record of; `alone` is by job key."""
    by_client: dict[int, list[Record]] = {}
    for co_run in co_runs:
        for record in co_run.clients:
            by_client.setdefault(record["client"], []).append(record)
    return [
        _row(records, alone.get(records[0].get("job_key", "")), "beside the others", slo_ms)
        for _, records in sorted(by_client.items())
    ]


def alone_rows(runs_newest_first: Sequence[RunView], slo_ms: float | None) -> list[ClientRow]:
    """Each distinct job alone, from the newest baseline that holds it, with the card's figures."""
    rows: dict[str, ClientRow] = {}
    for run in runs_newest_first:
        gpu_by_co_run = {
            record["co_run"]: record.get("gpu") or {} for record in run.co_runs("baseline")
        }
        for record in run.successful_baselines():
            if record["job_key"] in rows:
                continue
            gpu = gpu_by_co_run.get(record["co_run"], {})
            row = _row([record], None, "alone", slo_ms)
            row.checks += card_checks(record["workload"], gpu)
            row.joules_per_job = joules_per_job(gpu, [record])
            rows[record["job_key"]] = row
    return list(rows.values())


def _row(
    records: Sequence[Record], baseline: Record | None, situation: str, slo_ms: float | None
) -> ClientRow:
    first = records[0]
    good = [record for record in records if record["status"] == "ok"]
    latencies = [value for record in good for value in record.get("latency_ms") or []]
    missed = sum(map(failed_requests, good))
    alone = baseline or {}
    peaks = [r["peak_memory_mib"] for r in records if r.get("peak_memory_mib") is not None]
    proofs = [record.get("proof") or {} for record in records]
    reasons = [
        record.get("reason") or f"exit code {record.get('exit_code')}"
        for record in records
        if record["status"] != "ok"
    ]
    return ClientRow(
        client=first["client"],
        workload=first["workload"],
        label=first.get("label") or first["workload"],
        statuses=[record["status"] for record in records],
        proof=sorted({proof.get("verdict") or "unverified" for proof in proofs}),
        reasons=reasons,
        slowdown=estimate(record.get("slowdown") for record in good),
        job_seconds=_mean(mean_job_seconds(record) for record in good),
        latency=scores.percentiles_ms(latencies, missed),
        tail_slowdown={
            percent: scores.tail_slowdown(
                latencies,
                alone.get("latency_ms"),
                percent,
                failed=missed,
                failed_alone=failed_requests(alone),
            )
            for percent in TAIL_PERCENTILES
        },
        p99_ms=_of_every(latency_ms(r, scores.TAIL_PERCENT) for r in good),
        median_ms=estimate(latency_ms(r, 50) for r in good),
        responses=len(latencies),
        missed=missed,
        slo=_slo(good, latencies, slo_ms),
        service=service_figures(good, slo_ms),
        joules_per_job=None,
        peak_memory_mib=max(peaks, default=None),
        checks=workload_checks(good, latencies, situation),
    )


def _slo(
    good: Sequence[Record], latencies: Sequence[float], slo_ms: float | None
) -> SloAttainment | None:
    """By the bound that was given, else by the one that a service was run with."""
    bound_ms = slo_ms or bound_of(good)
    if bound_ms is None:
        return None
    missed = sum(map(failed_requests, good))
    share = scores.slo_attainment_percent(latencies, bound_ms, missed)
    return None if share is None else SloAttainment(share, bound_ms)


def _of_every(values: Iterable[float | None]) -> Estimate | None:
    """The estimate where every repeat has a value: those without would be the slow ones."""
    found = list(values)
    return None if None in found else estimate(found)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
