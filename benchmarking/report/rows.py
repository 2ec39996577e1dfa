"""A row of the scorecard and its clients as data: one mode, mix and count over its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import (
    Estimate,
    estimate,
    excess_percent,
    range_estimate,
)
from benchmarking.modes.names import MODE_MIG, MODE_MPS
from benchmarking.records.types import ClientRecord, GpuFigures, Summary
from benchmarking.report import guide
from benchmarking.report.groups import (
    CoRun,
    Group,
    failed_requests,
    percentile_estimate,
    plain,
    window_seconds,
)
from benchmarking.report.runs import Alone, MeasuredRun

TAIL_PERCENTILES = (50, 95, 99)
DISTURBED = "invalid: the baseline was disturbed"
# A client cannot be faster than alone by more than this, or than the method's own error.
LEAST_ERROR_PERCENT = 2.0

_GPU_FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    name: max if name.endswith("_max") else statistics.fmean
    for name in (
        "utilization_gpu_percent", "sm_activity_percent", "sm_occupancy_percent",
        "tensor_activity_percent", "dram_activity_percent", "memory_used_mib_max",
        "power_draw_watts", "energy_joules", "sm_clock_mhz", "host_cpu_percent",
        "temperature_celsius_max", "coverage_percent",
    )
}  # fmt: skip


def group_row(group: Group, own_error_percent: float | None) -> dict[str, Any]:
    """The group's figures; those against a baseline that was disturbed are marked."""
    good, mode = group.good, group.first.mode
    broken = next((one.record for one in group.co_runs if not one.is_ok), None)
    stp, antt = (_estimate_of(good, name) for name in ("stp", "antt"))
    rows = client_rows(group, own_error_percent)
    gpu = gpu_figures([one.record.gpu for one in good or group.co_runs])
    uuids = {run.manifest.environment.gpu_uuid for run in group.runs}
    row = {
        **group.kind,
        "outcome": broken.outcome if broken else "ok",
        "reason": broken.reason if broken else None,
        "run_ids": group.run_ids,
        "gpu_uuids": sorted(uuid for uuid in uuids if uuid),
        "co_runs": [f"{one.run.name}/{one.record.co_run}" for one in group.co_runs],
        "baseline_ids": group.baseline_ids,
        "is_unverified": any(one.is_unverified for one in group.co_runs),
        "drift_guarded": group.is_guarded,
        "rounds": len(good),
        "invalid": next((found["invalid"] for found in rows if found["invalid"]), None),
        "stp": plain(stp),
        "stp_alone": plain(_stp_alone(group.co_runs[0])),
        "antt": plain(antt),
        "overhead_percent": plain(stp and stp.map(scores.overhead_percent)),
        "interference_overhead_percent": plain(_interference(good, mode, antt)),
        "mechanism_overhead_percent": plain(
            excess_percent(antt) if group.clients == 1 and mode in (MODE_MPS, MODE_MIG) else None
        ),
        "stp_per_multiprocessor": _stp_per_multiprocessor(group, stp),
        "fairness": plain(range_estimate(one.summary.fairness for one in good)),
        "energy_ratio": plain(_estimate_of(good, "energy_ratio")),
        "joules_per_job": plain(estimate(one.joules_per_job() for one in good)),
        "joules_per_work": plain(estimate(one.joules_per_work() for one in good)),
        "success_rate_percent": scores.mean(
            one.summary.success_rate_percent for one in group.co_runs
        ),
        "average_duration_seconds": scores.mean(
            one.summary.average_duration_seconds for one in good
        ),
        "total_gpu_time_seconds": scores.mean(one.summary.total_gpu_time_seconds for one in good),
        "throughput_clients": good[0].summary.throughput_clients if good else None,
        "gpu": gpu,
        "client_rows": rows,
    }
    return row | {"checks": _mode_checks(row)}


def _estimate_of(co_runs: Sequence[CoRun], name: str) -> Estimate | None:
    return estimate(getattr(one.summary, name) for one in co_runs)


def _stp_alone(co_run: CoRun) -> Estimate | None:
    """What each client's job delivers alone in each round, by the rule of STP; their mean."""
    counted = [client for client in co_run.clients if not scores.is_offered_rate(client.units)]
    alone = co_run.alone
    rounds = zip(*(alone.repeats.get(client.job_key, ()) for client in counted), strict=False)
    delivered = (
        scores.all_known(scores.work_delivered([one], alone.pooled) for one in of_round)
        for of_round in rounds
    )
    return estimate(statistics.fmean(found) for found in delivered if found)


def _interference(good: Sequence[CoRun], mode: str, antt: Estimate | None) -> Estimate | None:
    percents = (one.summary.interference_overhead_percent for one in good)
    found = estimate(1 + percent / 100 for percent in percents if percent is not None)
    return excess_percent(antt if found is None and mode != MODE_MIG else found)


def _stp_per_multiprocessor(group: Group, stp: Estimate | None) -> float | None:
    """STP as if the instances had all of the card's multiprocessors (MIG; else `None`)."""
    whole = group.first.manifest.environment.multiprocessor_count
    if group.first.mode != MODE_MIG or stp is None or not whole:
        return None
    identities = [client.identity or {} for client in group.co_runs[0].clients]
    counts = [identity.get("multiprocessor_count") for identity in identities]
    is_known = all(isinstance(count, int) and count > 0 for count in counts)
    return stp.mean * whole / sum(counts) if counts and is_known else None


def gpu_figures(found: Iterable[GpuFigures | None]) -> dict[str, Any]:
    """GPU figures over rounds, with the names of their sources and of every throttle reason."""
    sections = [one or GpuFigures() for one in found]
    combined: dict[str, Any] = {}
    for name, combine in _GPU_FIGURES.items():
        known = [value for one in sections if (value := getattr(one, name)) is not None]
        combined[name] = combine(known) if known else None
    sources = sorted({one.utilization_source for one in sections if one.utilization_source})
    combined["utilization_source"] = ", ".join(sources) or None
    reasons = {reason for one in sections for reason in one.throttle_reasons or ()}
    return combined | {"throttle_reasons": sorted(reasons)}


def _mode_checks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The guide's ranges of the mode; one client alone shares nothing, so none apply to it."""
    if row["clients"] < 2:
        return []
    ranges = [one for one in guide.MODE_EXPECTATIONS if one.subject == row["mode"]]
    measured = {
        "success_rate_percent": row["success_rate_percent"],
        "utilization_gpu_percent": row["gpu"]["utilization_gpu_percent"],
    }
    for name in ("overhead_percent", "interference_overhead_percent"):
        measured[name] = row[name] and row[name]["mean"]
    return guide.checks(ranges, measured, f"{row['mix']}, {row['clients']} clients")


# --- its clients ---


def client_rows(group: Group, own_error_percent: float | None) -> list[dict[str, Any]]:
    """A row for each client that some co-run has a record of."""
    numbers = sorted({client.client for one in group.co_runs for client in one.clients})
    allowed = max(own_error_percent or 0.0, LEAST_ERROR_PERCENT)
    rows = []
    for number in numbers:
        members = group.members(number)
        row = client_row(members, "beside the others", group.slo_ms)
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
        by_name = {record.co_run: record for record in run.co_runs("baseline")}
        for client in run.good_alone():
            co_run = CoRun(run, by_name[client.co_run], [client], Alone(), Summary())
            found.setdefault(client.job_key, []).append((co_run, client))
        for job_key, members in found.items():
            if job_key not in rows:
                row = client_row(members, "alone", slo_ms)
                # A job next to itself alone: 1 by definition, with its own spread over rounds.
                gpus = [one.record.gpu for one, _ in members if one.record.gpu is not None]
                row["slowdown"] = plain(estimate(_relative_to_all(members)))
                row["joules_per_job"] = scores.mean(one.joules_per_job() for one, _ in members)
                if gpus:
                    row["checks"] += guide.card_checks(row["workload"], gpus[-1])
                rows[job_key] = row | {"invalid": None}
    return list(rows.values())


def _relative_to_all(members: Sequence[tuple[CoRun, ClientRecord]]) -> list[float]:
    records = [client for _, client in members]
    return Alone.of(records).slowdowns(records[0].job_key)


def client_row(
    members: Sequence[tuple[CoRun, ClientRecord]], situation: str, slo_ms: float | None
) -> dict[str, Any]:
    """One client over the co-runs; latencies are the raw ones of all of them together."""
    records = [client for _, client in members]
    first = records[0]
    good = [(one, client) for one, client in members if client.status == "ok"]
    good_records = [client for _, client in good]
    latencies = [ms for client in good_records for ms in client.latency_ms or ()]
    failed = sum(failed_requests(client) for client in good_records)
    reference = members[0][0].alone.pooled.get(first.job_key)
    bound_ms = slo_ms or first_figure(good_records, "slo_ms")
    share = bound_ms and scores.slo_attainment_percent(latencies, bound_ms, failed)
    job_seconds = scores.mean(guide.mean_job_seconds(client) for client in good_records)
    alone_seconds = reference and guide.mean_job_seconds(reference)
    highest = scores.highest_percentile(len(latencies) + failed)
    service = _service(good, bound_ms)
    return {
        "client": first.client,
        "workload": first.workload,
        "label": first.label,
        "job_key": first.job_key,
        "statuses": [client.status for client in records],
        "proof": sorted({client.proof.verdict for client in records}),
        "reasons": [client.reason or f"exit code {client.exit_code}"
                    for client in records if client.status != "ok"],
        "slowdown": plain(estimate(one.slowdown(client) for one, client in good)),
        "job_seconds": job_seconds,
        "job_time_ratio": job_seconds / alone_seconds if job_seconds and alone_seconds else None,
        "latency": scores.percentiles_ms(latencies, failed),
        "tail_slowdown": {
            str(percent): scores.tail_slowdown(
                latencies,
                reference and reference.latency_ms,
                percent,
                failed=failed,
                failed_alone=failed_requests(reference) if reference else 0,
            )
            for percent in TAIL_PERCENTILES
        },
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
        "peak_memory_mib": max(
            (c.peak_memory_mib for c in records if c.peak_memory_mib is not None), default=None
        ),
        "checks": guide.workload_checks(good_records, latencies, situation),
    }  # fmt: skip


def figure_of(client: ClientRecord, name: str) -> float | None:
    """A number among what a client told of itself."""
    value = client.figures.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def first_figure(clients: Sequence[ClientRecord], name: str) -> float | None:
    """The first client's that tells it."""
    known = (figure_of(client, name) for client in clients)
    return next((value for value in known if value is not None), None)


def _service(
    good: Sequence[tuple[CoRun, ClientRecord]], bound_ms: float | None
) -> dict[str, Any] | None:
    """An inference service: what was offered to it and what it answered; `None` of other jobs.

    Its requests come at a fixed rate, so a busy neighbor shows as latency and not as less work.
    """
    records = [client for _, client in good]
    if not records or not all(scores.is_offered_rate(client.units) for client in records):
        return None

    late = [figure_of(client, "late_by_generator_percent") or 0.0 for client in records]
    limits = (client.figures.get("generator_limited_reason") for client in records)
    return {
        "offered_per_second": first_figure(records, "request_rate"),
        "answered": sum(len(client.latency_ms or ()) for client in records),
        "missed": sum(map(failed_requests, records)),
        "goodput_per_second": bound_ms
        and scores.goodput_per_second(
            [ms for client in records for ms in client.latency_ms or ()],
            bound_ms,
            [window_seconds(one.record) for one, _ in good],
        ),
        "bound_ms": bound_ms,
        "late_percent": max(late) or None,
        "limit": next((str(limit) for limit in limits if limit), None),
    }
