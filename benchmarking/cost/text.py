"""What a measurement of the suite's own cost says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarking.metrics.number_text import significant

# The suite is to cost less than this.
MOST_SAMPLER_COST_PERCENT = 0.5
MOST_START_SKEW_MS = 50.0
UNKNOWN = "unknown"


def summary(found: Mapping[str, Any]) -> str:
    """Return the content of `suite_cost.json` in words."""
    clients, gpu = found["clients"], found["gpu"]
    where = gpu["name"] if gpu else "the CPU (a demonstration: no GPU is in use)"
    title = f"Suite cost: {len(clients)} clients, mode {found['mode']}, on {where}"
    lines = [
        title, "-" * len(title),
        "client  share of the work  cores  busiest thread  host threads",
        *(_client_line(client, found) for client in clients),
        "",
        f"Sampler   {_sampler(found['sampler_cost_percent'])}",
        f"Start     {_start(found)}",
        f"Host      {_cores(found['clients_cores'])} of {found['host_cores']} cores used by the "
        f"clients, {_cores(found['suite_cores'])} by the suite, "
        f"{_cores(found['sampler_cores'])} by the sampler",
        *(f"WARNING: {warning}" for warning in found["host_limits"]),
    ]  # fmt: skip
    return "\n".join(lines)


def sampler_verdict(cost: Mapping[str, Any]) -> str:
    """Say whether the sampler's cost is small enough, or that this cannot be told yet."""
    if not cost["is_interval"]:
        return "not judged under three pairs"
    if cost["high"] < MOST_SAMPLER_COST_PERCENT:
        return f"under {MOST_SAMPLER_COST_PERCENT} %"
    if cost["low"] > MOST_SAMPLER_COST_PERCENT:
        return f"over {MOST_SAMPLER_COST_PERCENT} %"
    return f"not told apart from {MOST_SAMPLER_COST_PERCENT} %: take longer windows or more pairs"


def _client_line(client: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    total = sum(other["work_rate"] for other in found["clients"])
    share = f"{100 * client['work_rate'] / total:.1f} %" if total else UNKNOWN
    return (
        f"{client['client']:>6}  {share:>17}  {_cores(client['window_host_cpu_fraction']):>5}  "
        f"{_cores(client['busiest_thread_cpu_fraction']):>14}  {client['host_threads']:>12}"
    )


def _sampler(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "cost unknown: no pair of windows has work in it"
    return f"costs {cost['text']} of throughput: {sampler_verdict(cost)}"


def _start(found: Mapping[str, Any]) -> str:
    told = f"go sent to all within {significant(found['go_skew_ms'])} ms"
    skew = found["start_skew_ms"]
    if skew is None:
        return f"{told}; one client has no neighbor to be late for"
    verdict = "under" if skew < MOST_START_SKEW_MS else "over"
    return (
        f"{told}; first units within {significant(skew)} ms of each other: "
        f"{verdict} {MOST_START_SKEW_MS:.0f} ms"
    )


def _cores(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"
