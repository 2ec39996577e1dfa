"""Figures of a co-run: pure functions over plain numbers and records, no input or output.

Notation, for client i: `T_i` is the seconds that a unit of work takes alone on the whole GPU,
`C_i` the seconds that it takes next to the others, `n_i` the units done in the window of length
`L` in which everyone runs; those across its edges count by their share.
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

from benchmarking.records.types import ClientRecord, GpuFigures, Summary, Units

UnitsByKind = Mapping[str, Units]

# A client whose units are requests at a fixed offered rate does no more work on a faster GPU,
# so its progress says nothing about throughput: it is judged by its latency alone.
# A request that failed or timed out is no work and has no latency.
FAILED_REQUEST = "missed_request"
OFFERED_RATE_KINDS = frozenset({"request", FAILED_REQUEST})

# Of so many responses five lie beyond the p99; of fewer it is their maximum and little else.
FEWEST_FOR_A_TAIL = 500
# Of these the highest that has enough responses is compared.
COMPARED_PERCENTILES = (99.9, 99, 95, 90, 50)


# --- work -----------------------------------------------------------------------------------


def unit_seconds(units: UnitsByKind) -> dict[str, float]:
    """Mean seconds of a unit, by kind; those without a unit, or without time, are excluded."""
    return {
        kind: unit.seconds / unit.count
        for kind, unit in units.items()
        if unit.count and unit.seconds
    }


def work_seconds(units: UnitsByKind, alone: Mapping[str, float]) -> float | None:
    """Work done, in seconds-alone: `W = sum over kinds of count * T_kind`.

    `alone` holds `T_kind`, the mean seconds of a unit when the job runs alone. `None` when there
    are no units or a kind has no baseline.
    """
    done = _done(units)
    if not done or any(not alone.get(kind) for kind in done):
        return None
    return sum(unit.count * alone[kind] for kind, unit in done.items())


def spent_seconds(units: UnitsByKind) -> float:
    """Seconds that these units took: `D = sum of unit durations`."""
    return sum(unit.seconds for unit in _done(units).values())


def _done(units: UnitsByKind) -> UnitsByKind:
    return {kind: unit for kind, unit in units.items() if kind != FAILED_REQUEST and unit.count}


def normalized_progress(units: UnitsByKind, alone: Mapping[str, float]) -> float | None:
    """Normalized progress `T/C = W / D`: 1 = as fast as alone, 0.25 = a quarter of that.

    With one kind of unit this is exactly `T/C`; several kinds are weighted as they ran. `None` when
    there are no units or a kind has no baseline.
    """
    work, spent = work_seconds(units, alone), spent_seconds(units)
    return work / spent if work is not None and spent > 0 else None


def is_offered_rate(kinds: Iterable[str]) -> bool:
    """Whether units of these kinds are requests at a fixed offered rate (a server's)."""
    return not OFFERED_RATE_KINDS.isdisjoint(kinds)


# --- latency --------------------------------------------------------------------------------


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
    latencies: Sequence[float] | None, percent: float, failed: int = 0
) -> float | None:
    """Percentile over all requests; the `failed` ones have no latency and are infinitely late.

    Else a server that drops its slowest requests would have the best tail. `None` without a
    request, and of a tail under the `fewest_responses` that bear it.
    """
    asked = len(latencies or ()) + failed
    if asked < fewest_responses(percent):
        return None
    return percentile([*(latencies or ()), *[math.inf] * failed], percent)


def failed_requests(client: ClientRecord) -> int:
    """Requests in the window that failed or timed out."""
    unit = client.units.get(FAILED_REQUEST)
    return round(unit.count) if unit else 0


def fewest_responses(percent: float) -> int:
    """From how many responses on a percentile stands, five of them beyond it: p95 from 100.

    The median needs no more than one.
    """
    return 1 if percent <= 50 else math.ceil(round(5 * 100 / (100 - percent), 6))


def highest_percentile(requests: int) -> float | None:
    """The highest of the compared percentiles that so many requests bear; `None` without any."""
    borne = (one for one in COMPARED_PERCENTILES if requests >= fewest_responses(one))
    return next(borne, None)


def percentiles_ms(
    latencies: Sequence[float] | None, failed: int = 0
) -> dict[str, float | None] | None:
    """Mean, median, std, min, max, p50, p95 and p99 of raw latencies, in their own unit (ms).

    `std` is the population's. p50, p95 and p99 are `latency_percentile`s over the failed requests,
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
        **{f"p{part}": latency_percentile(latencies, part, failed) for part in (50, 95, 99)},
    }


def tail_slowdown(
    shared: Sequence[float] | None,
    alone: Sequence[float] | None,
    percent: float,
    *,
    failed: int = 0,
    failed_alone: int = 0,
) -> float | None:
    """`latency_percentile` next to others, over the same one alone.

    `None` when either side has none (no latencies, or too few for a tail), or the one alone is 0
    or infinite.
    """
    reference = latency_percentile(alone, percent, failed_alone)
    found = latency_percentile(shared, percent, failed)
    if found is None or not reference or math.isinf(reference):
        return None
    return found / reference


def slo_attainment_percent(
    latencies: Sequence[float] | None, bound: float, failed: int = 0
) -> float | None:
    """Share of all requests that were answered within `bound`, in percent.

    `latencies` are the raw ones of the answers, in the unit of `bound`. `None` without a request.
    """
    asked = len(latencies or ()) + failed
    return 100 * sum(latency <= bound for latency in latencies or ()) / asked if asked else None


def goodput_per_second(
    latencies_ms: Iterable[float], bound_ms: float, window_seconds: Sequence[float | None]
) -> float | None:
    """Requests a second that were answered within the bound, over the windows of all repeats.

    `None` when a window is unknown or there is none.
    """
    known = all_known(window_seconds)
    seconds = math.fsum(known) if known else 0
    return sum(ms <= bound_ms for ms in latencies_ms) / seconds if seconds > 0 else None


# --- whole jobs -----------------------------------------------------------------------------


def jobs_in_window(
    whole_jobs: Sequence[tuple[float, float]], window_seconds: float | None
) -> float | None:
    """How many jobs a client did in its window: its length over the mean time from job to job.

    `whole_jobs` are start and end of those that lie in it, in order: a client repeats its job until
    the window ends, so the last one counts in part. `None` when there was no whole one.
    """
    if not whole_jobs or window_seconds is None:
        return None
    cycle = (whole_jobs[-1][1] - whole_jobs[0][0]) / len(whole_jobs)
    return window_seconds / cycle if cycle > 0 else None


def joules_per_job(
    window_joules: float | None, client_jobs: Iterable[float | None]
) -> float | None:
    """The card's joules in the window over the jobs (`jobs_in_window`) of all its clients.

    Only for clients that run the same job: the card does not tell whose joules they are. `None`
    when an input is missing.
    """
    jobs = all_known(client_jobs)
    return window_joules / math.fsum(jobs) if jobs and window_joules is not None else None


# --- all clients of a co-run ----------------------------------------------------------------


def overhead_percent(stp: float | None) -> float | None:
    """Overhead `= 100 * (1 / STP - 1)`: together, against one after the other on the whole GPU.

    Negative when sharing wins. `None` when STP is unknown or 0.
    """
    return 100 * (1 / stp - 1) if stp else None


def difference_percent(reference: float, value: float) -> float:
    """By how much `value` lies over `reference`, in percent: `100 * (value / reference - 1)`."""
    return 100 * (value / reference - 1) if value != reference else 0.0  # both may be infinite


def jain_fairness(progress: Sequence[float]) -> float | None:
    """Jain's index `(sum x)^2 / (n * sum x^2)` over `x_i = T_i / C_i`: 1 = all equally slowed.

    The least is `1 / n`. `None` when there is no progress at all.
    """
    squares = math.fsum(x * x for x in progress)
    return math.fsum(progress) ** 2 / (len(progress) * squares) if squares else None


def solo_energy_joules(
    units: UnitsByKind, alone: UnitsByKind, energy_alone: float | None
) -> float | None:
    """Joules that this work takes when its job runs alone: units done x solo joules a unit.

    `alone` holds the units of the job's baseline, `energy_alone` the card's joules over its window.
    Alone, the kinds of one job share that energy by time, so the work is scaled by its
    seconds-alone: with one kind this is exactly `count * (energy_alone / count_alone)`. `None` when
    an input is missing.
    """
    work, alone_spent = work_seconds(units, unit_seconds(alone)), spent_seconds(alone)
    if work is None or energy_alone is None or alone_spent <= 0:
        return None
    return energy_alone * work / alone_spent


def energy_ratio(window_joules: float | None, solo_joules: Iterable[float | None]) -> float | None:
    """Card's joules in the window, over what the same work takes one job after another.

    `solo_joules` holds `solo_energy_joules` of each client. Under 1 = sharing saves energy.
    `None` when any input is missing: no hardware tells the power of one client.
    """
    known = all_known(solo_joules)
    if window_joules is None or known is None or sum(known) <= 0:
        return None
    return window_joules / math.fsum(known)


def success_rate_percent(statuses: Sequence[str]) -> float | None:
    """Share of clients whose status is `ok`, in percent.

    `None` without clients, or when one was interrupted: nobody knows how it would have ended.
    """
    if not statuses or "interrupted" in statuses:
        return None
    return 100 * statuses.count("ok") / len(statuses)


def summarize_co_run(
    client_records: Sequence[ClientRecord],
    baselines: Mapping[str, ClientRecord],
    gpu: GpuFigures | None,
    *,
    energy_alone_joules: Mapping[str, float | None] | None = None,
    share_baselines: Mapping[str, ClientRecord] | None = None,
) -> Summary:
    """Figures of one co-run from its client records.

    `baselines` maps `job_key` to the baseline's client record (the whole GPU, alone);
    `energy_alone_joules` maps it to the card's energy over that baseline's window;
    `share_baselines` are the jobs alone on the client's own share (MIG: its instance), needed for
    the interference overhead where the share is not the whole GPU.

    STP, the work delivered, is the sum of `n_i T_i / L`: seconds of alone-work a second, in which
    pauses and gaps between jobs are no work (for clients that never pause it is the sum of
    `T_i / C_i`, as Eyerman and Eeckhout have it). ANTT is the mean of `C_i / T_i`; the interference
    overhead is the mean slowdown against the job alone on the same share, in percent over 1 (under
    MIG the guide's "0 % (isolated)"). Figures over all clients are `None` as soon as one client
    that counts failed or has no baseline: a co-run of n is never summed up as one of n - 1. Clients
    at a fixed offered rate stay out of STP, ANTT, overhead, fairness, energy and durations;
    `throughput_clients` says how many counted. `average_duration_seconds` and
    `total_gpu_time_seconds` are the mean and the sum over clients of the mean seconds of one whole
    job.
    """
    counted = [record for record in client_records if not is_offered_rate(record.units)]
    progress = all_known(_progress(record, baselines) for record in counted)
    slowdowns = [1 / x for x in progress] if progress and all(progress) else None
    stp = work_delivered(counted, baselines) if progress else None

    is_mig = any(record.mode == "mig" for record in client_records)
    share = baselines if share_baselines is None and not is_mig else share_baselines or {}
    on_share = all_known(_progress(record, share) for record in counted)
    interference = None
    if on_share and all(on_share):
        interference = 100 * (statistics.fmean(1 / x for x in on_share) - 1)

    energies = energy_alone_joules or {}
    charged = counted if progress and len(counted) == len(client_records) else []
    solo_joules = [
        solo_energy_joules(one.units, baselines[one.job_key].units, energies.get(one.job_key))
        for one in charged
    ]
    durations = [
        mean(job.duration_seconds for job in record.jobs if job.in_window)
        for record in counted
        if record.status == "ok"
    ]
    finished = [seconds for seconds in durations if seconds is not None]
    return Summary(
        clients=len(client_records),
        throughput_clients=len(counted),
        stp=stp,
        antt=statistics.fmean(slowdowns) if slowdowns else None,
        overhead_percent=overhead_percent(stp),
        interference_overhead_percent=interference,
        fairness=jain_fairness(progress) if progress else None,
        energy_ratio=energy_ratio(gpu.energy_joules if gpu else None, solo_joules),
        success_rate_percent=success_rate_percent([record.status for record in client_records]),
        average_duration_seconds=mean(finished),
        total_gpu_time_seconds=(
            math.fsum(finished) if finished and len(finished) == len(counted) else None
        ),
    )


def work_delivered(
    records: Iterable[ClientRecord], baselines: Mapping[str, ClientRecord]
) -> float | None:
    """STP of clients that shared a window: `sum of n_i T_i / L`, in GPUs' worth of work.

    `None` when one of them has no baseline, or the window is unknown.
    """
    delivered = []
    for record in records:
        start, end, baseline = (
            record.window_start_seconds, record.window_end_seconds, baselines.get(record.job_key),
        )  # fmt: skip
        if baseline is None or start is None or end is None or end <= start:
            return None
        work = work_seconds(record.units, unit_seconds(baseline.units))
        delivered.append(None if work is None else work / (end - start))
    known = all_known(delivered)
    return math.fsum(known) if known else None


def _progress(record: ClientRecord, baselines: Mapping[str, ClientRecord]) -> float | None:
    """Normalized progress against the baseline of the client's own job."""
    baseline = baselines.get(record.job_key)
    if record.status != "ok" or baseline is None:
        return None
    return normalized_progress(record.units, unit_seconds(baseline.units))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the known values; `None` without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def all_known(values: Iterable[float | None]) -> list[float] | None:
    """The values as a list, or `None` when there are none or one of them is unknown."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if known and len(known) == len(found) else None
