"""A row of the scorecard and its clients as data: one mode, mix and count over its rounds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate, excess_percent, range_estimate
from benchmarking.modes.names import MODE_MIG, MODE_MPS
from benchmarking.records.run_folder import pooled
from benchmarking.records.types import ClientRecord, GpuFigures
from benchmarking.report import guide
from benchmarking.report.groups import (
    Alone,
    CoRun,
    Group,
    percentile_estimate,
    plain,
)
from benchmarking.report.runs import MeasuredRun

TAIL_PERCENTILES = (50, 95, 99)
DISTURBED = "invalid: the baseline was disturbed"
# A client cannot be faster than alone by more than this, or than the method's own error.
LEAST_ERROR_PERCENT = 2.0

_GPU_FIGURES = (
    "utilization_gpu_percent", "sm_activity_percent", "sm_occupancy_percent",
    "tensor_activity_percent", "dram_activity_percent", "memory_used_mib_max",
    "power_draw_watts", "energy_joules", "sm_clock_mhz", "host_cpu_percent",
    "temperature_celsius_max", "coverage_percent",
)  # fmt: skip

Members = Sequence[tuple[CoRun, ClientRecord]]


def group_row(group: Group, own_error_percent: float | None) -> dict[str, Any]:
    """The group's figures.

    A count that failed once has none against the jobs alone, nor has one of a disturbed baseline
    or of a client that did nothing; what its clients felt stays in their rows.
    """
    good, broken, mode = group.good, group.broken, group.first.mode
    rows = client_rows(group, own_error_percent)
    invalid = next((found["invalid"] for found in rows if found["invalid"]), None)
    compared = [] if broken or invalid or group.idle else good

    def over_rounds(name: str) -> Estimate | None:
        return estimate(getattr(one.summary, name) for one in compared)

    def mean_of(name: str, co_runs: Sequence[CoRun]) -> float | None:
        return scores.mean(getattr(one.summary, name) for one in co_runs)

    stp, antt = over_rounds("stp"), over_rounds("antt")
    uuids = {run.manifest.environment.gpu_uuid for run in group.runs}
    is_mechanism = group.clients == 1 and mode in (MODE_MPS, MODE_MIG)
    row = {
        **group.kind,
        "outcome": broken.outcome if broken else "ok",
        "reason": broken.reason if broken else None,
        "run_ids": group.run_ids,
        "gpu_uuids": sorted(uuid for uuid in uuids if uuid),
        "co_runs": [one.name for one in group.co_runs],
        "baseline_ids": group.baseline_ids,
        "is_unverified": any(one.is_unverified for one in group.co_runs),
        "drift_guarded": group.is_guarded,
        "rounds": len(good),
        "invalid": invalid,
        "stp": plain(stp),
        "stp_alone": plain(_stp_alone(group.co_runs[0])),
        "antt": plain(antt),
        "overhead_percent": plain(stp and stp.map(lambda one: scores.overhead_percent(one) or 0.0)),
        "interference_overhead_percent": plain(_interference(compared, group.first, antt)),
        "mechanism_overhead_percent": plain(excess_percent(antt) if is_mechanism else None),
        "stp_per_multiprocessor": _stp_per_multiprocessor(group, stp),
        "fairness": plain(range_estimate(one.summary.fairness for one in compared)),
        "energy_ratio": plain(over_rounds("energy_ratio")),
        "joules_per_job": plain(estimate(one.joules_per_job() for one in good)),
        "joules_per_work": plain(estimate(one.joules_per_work() for one in compared)),
        "success_rate_percent": mean_of("success_rate_percent", group.co_runs),
        "average_duration_seconds": mean_of("average_duration_seconds", good),
        "total_gpu_time_seconds": mean_of("total_gpu_time_seconds", good),
        "throughput_clients": good[0].summary.throughput_clients if good else None,
        "gpu": gpu_figures([one.gpu for one in good or group.co_runs]),
        "client_rows": rows,
    }
    return row | {"checks": guide.mode_checks(row)}


def _stp_alone(co_run: CoRun) -> Estimate | None:
    """What each client's job delivers alone in each round, by the rule of STP; their mean."""
    counted = [one.job_key for one in co_run.clients if not scores.is_offered_rate(one.units)]
    alone = {job_key: one.pooled for job_key, one in co_run.alone.items()}
    rounds = zip(*(co_run.alone[key].repeats if key in alone else () for key in counted),
                 strict=False)  # fmt: skip
    delivered = (
        scores.all_known(scores.work_delivered([one], alone) for one in of_round)
        for of_round in rounds
    )
    return estimate(statistics.fmean(found) for found in delivered if found)


def _interference(
    compared: Sequence[CoRun], run: MeasuredRun, antt: Estimate | None
) -> Estimate | None:
    percents = (one.summary.interference_overhead_percent for one in compared)
    found = estimate(1 + percent / 100 for percent in percents if percent is not None)
    return excess_percent(antt if found is None and not run.has_own_shares else found)


def _stp_per_multiprocessor(group: Group, stp: Estimate | None) -> float | None:
    """STP as if the instances had all of the card's multiprocessors (MIG; else `None`)."""
    whole = group.first.manifest.environment.multiprocessor_count
    counts = [(one.identity or {}).get("multiprocessor_count") for one in group.members]
    known = [count for count in counts if isinstance(count, int) and count > 0]
    if group.first.mode != MODE_MIG or not stp or not whole or len(known) < len(counts):
        return None
    return stp.mean * whole / sum(known) if known else None


def gpu_figures(found: Sequence[GpuFigures]) -> dict[str, Any]:
    """GPU figures over rounds, with the names of their sources and of every throttle reason."""
    combined: dict[str, Any] = {}
    for name in _GPU_FIGURES:
        known = [value for one in found if (value := getattr(one, name)) is not None]
        combine: Callable[[Iterable[float]], float] = (
            max if name.endswith("_max") else statistics.fmean
        )
        combined[name] = combine(known) if known else None
    sources = sorted({one.utilization_source for one in found if one.utilization_source})
    reasons = [one.throttle_reasons for one in found if one.throttle_reasons is not None]
    return combined | {
        "utilization_source": ", ".join(sources) or None,
        "throttle_reasons": sorted({*itertools.chain(*reasons)}) if reasons else None,
    }


# --- its clients ---


def client_rows(group: Group, own_error_percent: float | None) -> list[dict[str, Any]]:
    """A row for each client that some co-run has a record of."""
    numbers = sorted({client.client for one in group.co_runs for client in one.clients})
    allowed = max(own_error_percent or 0.0, LEAST_ERROR_PERCENT)
    rows = []
    for number in numbers:
        row = client_row(group.of_client(number), "beside the others", group.slo_ms)
        felt = row["slowdown"]
        is_impossible = felt and not row["service"] and felt["mean"] < 1 - allowed / 100
        rows.append(row | {"invalid": DISTURBED if is_impossible else None})
    return rows


def alone_rows(
    runs_newest_first: Sequence[MeasuredRun], slo_ms: float | None
) -> list[dict[str, Any]]:
    """Each distinct job alone, from the newest run that holds it, with the card's figures."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs_newest_first:
        found: dict[str, list[tuple[CoRun, ClientRecord]]] = {}
        for record, client in run.good_alone():
            co_run = CoRun(run, record, [client])
            found.setdefault(client.job_key, []).append((co_run, client))
        for job_key, members in found.items():
            if job_key in rows:
                continue
            row = client_row(members, "alone", slo_ms)
            # A job next to itself alone: 1 by definition, with its own spread over rounds.
            itself = Alone([client for _, client in members])
            row["slowdown"] = plain(estimate(itself.own_slowdowns()))
            row["joules_per_job"] = scores.mean(one.joules_per_job() for one, _ in members)
            gpus = [one.record.gpu for one, _ in members if one.record.gpu]
            row["checks"] += guide.card_checks(row["workload"], gpus[-1]) if gpus else []
            rows[job_key] = row | {"invalid": None}
    return list(rows.values())


def client_row(members: Members, situation: str, slo_ms: float | None) -> dict[str, Any]:
    """One client over the co-runs; latencies are the raw ones of all of them together."""
    records = [client for _, client in members]
    first = records[0]
    good = [(one, client) for one, client in members if client.status == "ok"]
    good_records = [client for _, client in good]
    together = pooled(good_records) if good_records else None
    latencies = (together.latency_ms if together else None) or []
    apart = (together.apart_latency_ms if together else None) or {}
    failed = sum(map(scores.failed_requests, good_records))
    baseline = members[0][0].alone.get(first.job_key)
    reference = baseline.pooled if baseline else None
    bound_ms = slo_ms or first_figure(good_records, "slo_ms")
    share = bound_ms and scores.slo_attainment_percent(latencies, bound_ms, failed)
    job_seconds = scores.mean(map(guide.mean_job_seconds, good_records))
    alone_seconds = reference and guide.mean_job_seconds(reference)
    highest = scores.highest_percentile(len(latencies) + failed)
    service = _service(good, latencies, failed, bound_ms)
    memory = (one.peak_memory_mib for one in records if one.peak_memory_mib is not None)
    tails = {
        str(percent): scores.tail_slowdown(
            latencies,
            reference.latency_ms if reference else None,
            percent,
            failed=failed,
            failed_alone=scores.failed_requests(reference) if reference else 0,
        )
        for percent in TAIL_PERCENTILES
    }
    return {
        "client": first.client,
        "workload": first.workload,
        "label": first.label,
        "job_key": first.job_key,
        "statuses": [client.status for client in records],
        "proof": sorted({client.proof.verdict for client in records}),
        "reasons": [client.reason or f"exit code {client.exit_code}"
                    for client in records if client.status != "ok"],
        "slowdown": plain(estimate(client.slowdown for client in good_records)),
        "job_seconds": job_seconds,
        "job_time_ratio": job_seconds / alone_seconds if job_seconds and alone_seconds else None,
        "latency": scores.percentiles_ms(latencies, failed),
        "apart_latency": {kind: scores.percentiles_ms(ms) for kind, ms in apart.items() if ms},
        "tail_slowdown": tails,
        "tail_percent": highest,
        "tail_ms": plain(percentile_estimate(good_records, highest)),
        "p99_ms": plain(percentile_estimate(good_records, 99)),
        "median_ms": plain(percentile_estimate(good_records, 50)),
        "responses": len(latencies),
        "missed": failed,
        "is_closed_loop": bool(latencies) and service is None,
        "slo": None if share is None else {"percent": share, "bound_ms": bound_ms},
        "service": service,
        "joules_per_job": None,
        "peak_memory_mib": max(memory, default=None),
        "checks": guide.workload_checks(good_records, latencies, situation),
    }  # fmt: skip


def first_figure(clients: Sequence[ClientRecord], name: str) -> float | None:
    """A number that a client tells of itself: the first client's that does."""
    known = (guide.figure_of(client, name) for client in clients)
    return next((value for value in known if value is not None), None)


def _service(
    good: Members, latencies: Sequence[float], failed: int, bound_ms: float | None
) -> dict[str, Any] | None:
    """An inference service: what was offered to it and what it answered; `None` of other jobs.

    Its requests come at a fixed rate, so a busy neighbor shows as latency and not as less work.
    """
    records = [client for _, client in good]
    if not records or not all(scores.is_offered_rate(client.units) for client in records):
        return None
    late = (guide.figure_of(client, "late_by_generator_percent") or 0.0 for client in records)
    limits = (client.figures.get("generator_limited_reason") for client in records)
    windows = [one.window_seconds for one, _ in good]
    return {
        "offered_per_second": first_figure(records, "request_rate"),
        "answered": len(latencies),
        "missed": failed,
        "goodput_per_second": bound_ms and scores.goodput_per_second(latencies, bound_ms, windows),
        "bound_ms": bound_ms,
        "late_percent": max(late) or None,
        "limit": next((str(limit) for limit in limits if limit), None),
    }
