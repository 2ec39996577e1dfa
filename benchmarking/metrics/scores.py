"""Figures of a co-run: pure functions over plain numbers and record dicts, no input or output.

Notation, for client i: `T_i` is the seconds that a unit of work takes alone on the whole GPU,
`C_i` the seconds that it takes beside the others, in the window in which everyone runs.
`T/C` is the normalized progress (1 = as fast as alone), `C/T` the slowdown.

Unknown is `None` everywhere: a figure that lacks one of its inputs is `None`, never 0.

Sources: S. Eyerman and L. Eeckhout, "System-Level Performance Metrics for Multiprogram
Workloads", IEEE Micro 28(3), 2008 (STP, ANTT); R. Jain, D. Chiu and W. Hawe, "A Quantitative
Measure of Fairness and Discrimination", DEC TR-301, 1984 (fairness).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Units = Mapping[str, Mapping[str, Any]]
Record = Mapping[str, Any]

# A client whose units are requests at a fixed offered rate does no more work on a faster GPU,
# so its progress says nothing about throughput: it is judged by its latency alone.
# A request that failed, or was past its bound without an answer, is no work and has no latency.
MISSED_KIND = "missed_request"
OFFERED_RATE_KINDS = frozenset({"request", MISSED_KIND})

# p99 of fewer responses is their maximum and little else; p95 of a few dozen hardly more.
FEWEST_FOR_A_TAIL = 100
TAIL_PERCENT = 99


# --- one client -----------------------------------------------------------------------------


def unit_seconds(units: Units) -> dict[str, float]:
    """Mean seconds of a unit, by kind: `{kind: seconds / count}`.

    `units` is `{kind: {"count": int, "seconds": float}}`, as in a client record. Kinds without a
    unit, or without time, are left out.
    """
    return {
        kind: unit["seconds"] / unit["count"]
        for kind, unit in units.items()
        if unit.get("count") and unit.get("seconds")
    }


def work_seconds(units: Units, alone: Mapping[str, float]) -> float | None:
    """Work done, in seconds-alone: `W = sum over kinds of count * T_kind`.

    `alone` holds `T_kind`, the mean seconds of a unit when the job runs alone. `None` when there
    are no units or a kind has no baseline.
    """
    done = {kind: unit["count"] for kind, unit in _answered(units).items() if unit.get("count")}
    if not done or any(not alone.get(kind) for kind in done):
        return None
    return sum(count * alone[kind] for kind, count in done.items())


def spent_seconds(units: Units) -> float:
    """Seconds that these units took: `D = sum of unit durations`."""
    return sum(unit["seconds"] for unit in _answered(units).values() if unit.get("count"))


def _answered(units: Units) -> Units:
    """The units in which work was done."""
    return {kind: unit for kind, unit in units.items() if kind != MISSED_KIND}


def normalized_progress(units: Units, alone: Mapping[str, float]) -> float | None:
    """Normalized progress `T/C = W / D`: 1 = as fast as alone, 0.25 = a quarter of that.

    `W` is the work done in seconds-alone (`work_seconds`), `D` the seconds it took
    (`spent_seconds`). With one kind of unit this is exactly `T/C`; several kinds are weighted as
    they ran. `None` when there are no units or a kind has no baseline.
    """
    work, spent = work_seconds(units, alone), spent_seconds(units)
    return work / spent if work is not None and spent > 0 else None


def slowdown(units: Units, alone: Mapping[str, float]) -> float | None:
    """Slowdown `C/T = D / W` that this user feels: the inverse of `normalized_progress`."""
    progress = normalized_progress(units, alone)
    return 1 / progress if progress else None


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile of raw values by linear interpolation between ranks (numpy's default).

    Raises `ValueError` without values, or when `percent` is outside 0..100.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0..100, not {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    if below == above:  # both may be infinite
        return below
    return below + (above - below) * (rank - math.floor(rank))


def latency_percentile(
    latencies: Sequence[float] | None, percent: float, missed: int = 0
) -> float | None:
    """Percentile over all requests: what was missed has no latency and counts as infinitely late.

    Else a server that drops its slowest requests would have the best tail. `None` without a
    request, and of a tail (over the median) under `FEWEST_FOR_A_TAIL` of them.
    """
    asked = len(latencies or ()) + missed
    if not asked or (percent > 50 and asked < FEWEST_FOR_A_TAIL):
        return None
    return percentile([*(latencies or ()), *[math.inf] * missed], percent)


def percentiles_ms(
    latencies: Sequence[float] | None, missed: int = 0
) -> dict[str, float | None] | None:
    """Mean, median, std, min, max, p50, p95 and p99 of raw latencies, in their own unit (ms).

    `std` is the population's. p50, p95 and p99 are `latency_percentile`s over what was `missed`,
    too; the others are of the answers. `None` without latencies. Percentiles of percentiles mean
    nothing: pass the raw values of all repeats, merged.
    """
    if not latencies:
        return None
    return {
        "mean": statistics.fmean(latencies),
        "median": percentile(latencies, 50),
        "std": statistics.pstdev(latencies),
        "min": min(latencies),
        "max": max(latencies),
        **{f"p{part}": latency_percentile(latencies, part, missed) for part in (50, 95, 99)},
    }


def tail_slowdown(
    shared: Sequence[float] | None,
    alone: Sequence[float] | None,
    percent: float,
    *,
    missed: int = 0,
    missed_alone: int = 0,
) -> float | None:
    """`latency_percentile` beside others, over the same one alone.

    `None` when either side has none (no latencies, or too few for a tail), or the one alone is 0
    or infinite.
    """
    reference = latency_percentile(alone, percent, missed_alone)
    found = latency_percentile(shared, percent, missed)
    if found is None or not reference or math.isinf(reference):
        return None
    return found / reference


def slo_attainment_percent(
    latencies: Sequence[float] | None, bound: float, missed: int = 0
) -> float | None:
    """Share of all requests that were answered within `bound`, in percent.

    `latencies` are the raw ones of the answers, in the unit of `bound`; `missed` counts requests
    that failed or were past their bound without an answer. `None` without a request.
    """
    asked = len(latencies or ()) + missed
    return 100 * sum(latency <= bound for latency in latencies or ()) / asked if asked else None


def missed_requests(client_record: Record) -> int:
    """Requests in the window that failed, or were past their bound without an answer."""
    return ((client_record.get("units") or {}).get(MISSED_KIND) or {}).get("count", 0)


def record_latency_ms(client_record: Record, percent: float) -> float | None:
    """`latency_percentile` of one client record."""
    missed = missed_requests(client_record)
    return latency_percentile(client_record.get("latency_ms"), percent, missed)


def goodput_per_second(client_records: Sequence[Record], bound_ms: float) -> float | None:
    """Requests a second that were answered within `bound_ms`, over the windows of all repeats.

    `None` when a window is unknown or there is none.
    """
    edges = [(r.get("window_start_seconds"), r.get("window_end_seconds")) for r in client_records]
    if not edges or any(start is None or end is None for start, end in edges):
        return None
    met = sum(ms <= bound_ms for record in client_records for ms in record.get("latency_ms") or [])
    seconds = math.fsum(end - start for start, end in edges)
    return met / seconds if seconds > 0 else None


def difference_percent(reference: float, value: float) -> float:
    """By how much `value` lies over `reference`, in percent: `100 * (value / reference - 1)`."""
    return 100 * (value / reference - 1) if value != reference else 0.0  # both may be infinite


# --- all clients of a co-run ----------------------------------------------------------------


def system_throughput(progress: Sequence[float]) -> float:
    """STP `= sum of T_i / C_i`: how many GPUs' worth of work the sharing delivers."""
    return math.fsum(progress)


def average_normalized_turnaround_time(slowdowns: Sequence[float]) -> float:
    """ANTT `= mean of C_i / T_i`: the average felt slowdown.

    Raises `ValueError` without a slowdown.
    """
    if not slowdowns:
        raise ValueError("ANTT needs at least one slowdown")
    return statistics.fmean(slowdowns)


def overhead_percent(stp: float | None) -> float | None:
    """Overhead `= 100 * (1 / STP - 1)`: together, against one after the other on the whole GPU.

    Negative when sharing wins. `None` when STP is unknown or 0.
    """
    return 100 * (1 / stp - 1) if stp else None


def interference_overhead_percent(same_share_slowdowns: Sequence[float]) -> float | None:
    """Interference overhead `= 100 * (mean of shared / alone on the same share - 1)`.

    The share is the whole GPU under time slicing and MPS, the client's own instance under MIG:
    there this is the guide's "0 % (isolated)". `None` without a slowdown.
    """
    return 100 * (statistics.fmean(same_share_slowdowns) - 1) if same_share_slowdowns else None


def jain_fairness(progress: Sequence[float]) -> float | None:
    """Jain's index `(sum x)^2 / (n * sum x^2)` over `x_i = T_i / C_i`: 1 = all equally slowed.

    The least is `1 / n`. `None` when there is no progress at all.
    """
    squares = math.fsum(x * x for x in progress)
    return math.fsum(progress) ** 2 / (len(progress) * squares) if squares else None


def solo_energy_joules(units: Units, baseline: Record, energy_alone: float | None) -> float | None:
    """Joules that this work takes when its job runs alone: units done x solo joules a unit.

    `energy_alone` is the card's energy over the baseline's window. Alone, the kinds of one job
    share that energy by time, so the work is scaled by its seconds-alone: with one kind this is
    exactly `count * (energy_alone / count_alone)`. `None` when an input is missing.
    """
    alone_units = baseline.get("units") or {}
    work, alone_spent = work_seconds(units, unit_seconds(alone_units)), spent_seconds(alone_units)
    if work is None or energy_alone is None or alone_spent <= 0:
        return None
    return energy_alone * work / alone_spent


def energy_ratio(window_joules: float | None, solo_joules: Sequence[float | None]) -> float | None:
    """Card's joules in the window, over what the same work takes one job after another.

    `solo_joules` holds `solo_energy_joules` of each client. Under 1 = sharing saves energy.
    `None` when any input is missing: no hardware tells the power of one client.
    """
    known = [joules for joules in solo_joules if joules is not None]
    if window_joules is None or not known or len(known) < len(solo_joules) or sum(known) <= 0:
        return None
    return window_joules / math.fsum(known)


def jobs_in_window(client_record: Record) -> float | None:
    """How many jobs the client did in its window: its length over the mean time from job to job.

    A client repeats its job until the window ends, so the last one counts in part. `None` when no
    whole job was finished in the window.
    """
    whole = [job for job in client_record.get("jobs") or [] if job.get("in_window")]
    start, end = (client_record.get(f"window_{edge}_seconds") for edge in ("start", "end"))
    if not whole or start is None or end is None:
        return None
    cycle = (whole[-1]["end_seconds"] - whole[0]["start_seconds"]) / len(whole)
    return (end - start) / cycle if cycle > 0 else None


def joules_per_job(window_joules: float | None, client_records: Sequence[Record]) -> float | None:
    """The card's joules in the window over the jobs that all clients did in it (`jobs_in_window`).

    Only where all clients run the same job: the card does not tell whose joules they are. `None`
    otherwise, or when an input is missing.
    """
    if len({record.get("job_key") for record in client_records}) != 1 or window_joules is None:
        return None
    jobs = _all_known(jobs_in_window(record) for record in client_records)
    return window_joules / math.fsum(jobs) if jobs else None


def success_rate_percent(client_records: Sequence[Record]) -> float | None:
    """Share of clients whose status is `ok`, in percent.

    `None` without clients, or when one was interrupted: nobody knows how it would have ended.
    """
    if not client_records or any(record["status"] == "interrupted" for record in client_records):
        return None
    succeeded = sum(record["status"] == "ok" for record in client_records)
    return 100 * succeeded / len(client_records)


def mean_job_seconds(client_record: Record) -> float | None:
    """Mean wall time of the client's whole jobs in the window; `None` when none was finished."""
    durations = [
        job["duration_seconds"] for job in client_record.get("jobs") or [] if job.get("in_window")
    ]
    return statistics.fmean(durations) if durations else None


def is_offered_rate(client_record: Record) -> bool:
    """Whether the client answers requests at a fixed offered rate (a server with its tester)."""
    return any(kind in OFFERED_RATE_KINDS for kind in client_record.get("units") or {})


def client_progress(client_record: Record, baselines: Mapping[str, Record]) -> float | None:
    """Normalized progress of a client record against the baseline of its own job.

    `baselines` maps `job_key` to the baseline's client record. `None` when the client's status is
    not `ok`, or its job has no baseline.
    """
    baseline = baselines.get(client_record.get("job_key", ""))
    if client_record["status"] != "ok" or baseline is None:
        return None
    alone = unit_seconds(baseline.get("units") or {})
    return normalized_progress(client_record.get("units") or {}, alone)


def summarize_co_run(
    client_records: Sequence[Record],
    baselines: Mapping[str, Record],
    gpu: Record | None,
    *,
    energy_alone_joules: Mapping[str, float | None] | None = None,
    share_baselines: Mapping[str, Record] | None = None,
) -> dict[str, Any]:
    """Figures of one co-run from its client records; the `summary` of a co-run record.

    `baselines` maps `job_key` to the baseline's client record (the whole GPU, alone); `gpu` is the
    co-run's GPU section (`energy_joules` is read); `energy_alone_joules` maps `job_key` to the
    card's energy over that job's baseline window; `share_baselines` are the jobs alone on the
    client's own share (MIG: its instance), needed for the interference overhead where the share
    is not the whole GPU.

    Figures over all clients are `None` as soon as one client that counts failed or has no
    baseline: a co-run of n is never summed up as one of n - 1. Clients at a fixed offered rate
    stay out of STP, ANTT, overhead, fairness, energy and durations; `throughput_clients` says how
    many counted. `average_duration_seconds` and `total_gpu_time_seconds` are the mean and the sum
    over clients of the mean seconds of one whole job.
    """
    counted = [record for record in client_records if not is_offered_rate(record)]
    progress = _all_known(client_progress(record, baselines) for record in counted)
    slowdowns = [1 / x for x in progress] if progress and all(progress) else None
    stp = system_throughput(progress) if progress else None

    share = baselines if share_baselines is None else share_baselines
    share_progress = _all_known(client_progress(record, share) for record in counted)
    is_mig = any(record.get("mode") == "mig" for record in client_records)
    knows_share = share_baselines is not None or not is_mig
    interference = (
        interference_overhead_percent([1 / x for x in share_progress])
        if share_progress and all(share_progress) and knows_share
        else None
    )

    energies = energy_alone_joules or {}
    solo = (
        [
            solo_energy_joules(
                record.get("units") or {},
                baselines.get(record["job_key"], {}),
                energies.get(record["job_key"]),
            )
            for record in client_records
        ]
        if len(counted) == len(client_records) and progress
        else [None]
    )

    durations = [mean_job_seconds(record) for record in counted if record["status"] == "ok"]
    finished = [seconds for seconds in durations if seconds is not None]
    everyone_finished = bool(finished) and len(finished) == len(counted)
    return {
        "clients": len(client_records),
        "throughput_clients": len(counted),
        "stp": stp,
        "antt": average_normalized_turnaround_time(slowdowns) if slowdowns else None,
        "overhead_percent": overhead_percent(stp),
        "interference_overhead_percent": interference,
        "fairness": jain_fairness(progress) if progress else None,
        "energy_ratio": energy_ratio((gpu or {}).get("energy_joules"), solo),
        "success_rate_percent": success_rate_percent(client_records),
        "average_duration_seconds": statistics.fmean(finished) if finished else None,
        "total_gpu_time_seconds": math.fsum(finished) if everyone_finished else None,
    }


def _all_known(values: Iterable[float | None]) -> list[float] | None:
    """The values as a list, or `None` when there are none or one of them is unknown."""
    known = list(values)
    return None if not known or any(x is None for x in known) else known  # type: ignore[return-value]
