"""How many clients: where a ramp breaks, and from where on more gain nothing. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.metrics.number_text import duration
from benchmarking.metrics.scores import missed_requests, percentile, slo_attainment_percent

Record = Mapping[str, Any]

SATURATION_FRACTION = 0.95

# Which status names the cause when several clients of one co-run failed: a neighbour that was
# killed or timed out is more often the consequence than the cause.
_FAILURES_BY_CAUSE = ("oom", "failed", "timeout", "killed")


def saturation_count(
    stp_by_clients: Mapping[int, float | None], fraction: float = SATURATION_FRACTION
) -> int | None:
    """First count of clients whose STP is under `fraction` of the best STP at a smaller count.

    Counts with an unknown STP are passed over. `None` when no count saturates.
    """
    best: float | None = None
    for clients, stp in sorted(stp_by_clients.items()):
        if stp is None:
            continue
        if best is not None and stp < fraction * best:
            return clients
        best = stp if best is None else max(best, stp)
    return None


def sufficient_count(
    stp_by_clients: Mapping[int, float | None], fraction: float = SATURATION_FRACTION
) -> int | None:
    """Fewest clients that deliver `fraction` of the best STP of all counts: more gain nothing.

    `None` when no count has an STP.
    """
    known = {clients: stp for clients, stp in stp_by_clients.items() if stp is not None}
    best = max(known.values(), default=0.0)
    return min((n for n, stp in known.items() if stp >= fraction * best), default=None)


def breaking_point(
    co_runs: Sequence[Record],
    client_records: Sequence[Record] = (),
    *,
    max_slowdown: float | None = None,
    max_p99_ms: float | None = None,
) -> dict[str, Any]:
    """First count of clients at which a client failed, or a bound that was asked for was passed.

    `co_runs` are the co-run records of one ramp (`clients`, `outcome`, `reason`, `co_run`);
    `client_records` their clients, matched by `co_run`. Of several repeats at one count, one that
    breaks is enough. Invalid and interrupted co-runs, and those that lost the GPU, prove nothing
    either way: their counts are listed in `not_judged`, unless another repeat of that count was
    judged, and are not tried.

    Returns `{"clients": int | None, "criterion": "oom"|"failed"|"timeout"|"killed"|"slowdown"|
    "p99"|None, "detail": str | None, "broken_repeats": int, "judged_repeats": int,
    "last_good_clients": int | None, "highest_clients_tried": int | None,
    "not_judged": [int, ...]}`; `clients` is `None` when it was not reached, `criterion` and
    `detail` are the first broken repeat's.
    """
    by_count: dict[int, list[Record]] = {}
    for co_run in co_runs:
        by_count.setdefault(co_run["clients"], []).append(co_run)
    judged_by_count = {
        clients: [run for run in repeats if says_something_of_the_load(run)]
        for clients, repeats in sorted(by_count.items())
    }
    tried = [clients for clients, judged in judged_by_count.items() if judged]
    found: dict[str, Any] = {
        "clients": None,
        "criterion": None,
        "detail": None,
        "broken_repeats": 0,
        "judged_repeats": 0,
        "last_good_clients": None,
        "highest_clients_tried": max(tried, default=None),
        "not_judged": [],
    }
    for clients, judged in judged_by_count.items():
        if not judged:
            found["not_judged"].append(clients)
            continue
        broken = [
            (criterion, detail)
            for run in judged
            for criterion, detail in [
                _broken_by(run, _members(run, client_records), max_slowdown, max_p99_ms)
            ]
            if criterion is not None
        ]
        if broken:
            criterion, detail = broken[0]
            return found | {
                "clients": clients,
                "criterion": criterion,
                "detail": detail,
                "broken_repeats": len(broken),
                "judged_repeats": len(judged),
            }
        found["last_good_clients"] = clients
    return found


def _members(co_run: Record, client_records: Sequence[Record]) -> list[Record]:
    return [record for record in client_records if record.get("co_run") == co_run.get("co_run")]


def says_something_of_the_load(co_run: Record) -> bool:
    """Whether a co-run proves that its clients work together, or that they do not.

    One that was invalid or interrupted, or lost the GPU, proves neither.
    """
    kind = (co_run.get("stop_reason") or {}).get("kind")
    return co_run["outcome"] in ("ok", "failed", "timeout") and kind != "gpu_lost"


def _broken_by(
    co_run: Record,
    members: Sequence[Record],
    max_slowdown: float | None,
    max_p99_ms: float | None,
) -> tuple[str | None, str | None]:
    """Which criterion this co-run breaks, and in words; `(None, None)` when it holds."""
    if co_run["outcome"] in ("failed", "timeout"):
        statuses = [record["status"] for record in members]
        cause = next((status for status in _FAILURES_BY_CAUSE if status in statuses), None)
        return cause or co_run["outcome"], co_run.get("reason")
    slowdowns = [record["slowdown"] for record in members if record.get("slowdown") is not None]
    if max_slowdown is not None and slowdowns and max(slowdowns) > max_slowdown:
        return "slowdown", f"slowdown {max(slowdowns):.2f} passes the bound of {max_slowdown:g}"
    if max_p99_ms is not None and (share := _kept_by_fewest(members, max_p99_ms)) < 99:
        return (
            "p99",
            f"only {share:.1f} % of all requests were answered within the bound of "
            f"{duration(max_p99_ms)}",
        )
    tails = [percentile(record["latency_ms"], 99) for record in members if record.get("latency_ms")]
    if max_p99_ms is not None and tails and max(tails) > max_p99_ms:
        return (
            "p99",
            f"p99 latency {duration(max(tails))} passes the bound of {duration(max_p99_ms)}",
        )
    return None, None


def _kept_by_fewest(members: Sequence[Record], bound_ms: float) -> float:
    """Lowest share of requests within the bound, in percent, where some were missed; else 100.

    What was missed has no latency, so the percentile of the answers would not show it.
    """
    shares = (
        slo_attainment_percent(record.get("latency_ms"), bound_ms, missed)
        for record in members
        if (missed := missed_requests(record))
    )
    return min((share for share in shares if share is not None), default=100.0)
