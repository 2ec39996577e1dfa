"""What a long load on the server has to keep to: the figures of a run, and the bounds on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUARTERS = 4
MEMORY_PERCENT = 2.0
# Bursts of a Poisson stream alone move the p99 of a quarter by a half now and then.
P99_RATIO = 2.0


@dataclass(frozen=True)
class HeldLoad:
    """The figures of one run; unknown is None."""

    requests: int  # sent under the steady load, after its lead-in
    failures: dict[str, int]  # not answered with 200, by kind, the lead-in's too
    hostile_requests: int  # answered or closed during the load
    slow_senders: int  # connected during the load
    chaos_faults: list[str]  # wrong answers to hostile requests
    resident_mib: list[float | None]  # of the whole server, median of each quarter of the time
    gpu_memory_mib: list[float | None] | None  # in use on the card; None without one
    p99_ms: list[float | None]  # of each quarter of the requests, from the intended send
    threads: tuple[int, int]  # at rest, before and after the steady load
    open_files: tuple[int, int]
    drain_answers: dict[int, int]  # requests around SIGTERM by status
    drain_lost: list[str]  # accepted requests that were not answered
    drain_seconds: float  # from SIGTERM to the server's end
    drain_limit_seconds: float
    exit_code: int
    unanswered: int | None  # what the server itself says it has cut off


def growth_percent(memory_mib: list[float | None]) -> float | None:
    """Return how much more memory the last quarter takes than the first; None where unknown."""
    first, last = memory_mib[0], memory_mib[-1]
    return None if first is None or last is None else 100.0 * (last - first) / first


def p99_ratio(p99_ms: list[float | None]) -> float | None:
    """Return the largest p99 of a quarter over the smallest; None where one is unknown."""
    return None if None in p99_ms else max(p99_ms) / min(p99_ms)


def quarter_medians(samples: Sequence[tuple[float, float]]) -> list[float | None]:
    """Return the median value in each quarter of the time that samples (seconds, value) span."""
    if not len(samples):
        return [None] * QUARTERS
    seconds, values = np.transpose(samples)
    edges = np.linspace(seconds[0], seconds[-1], QUARTERS + 1)[1:-1]
    quarter = np.searchsorted(edges, seconds, side="right")
    parts = [values[quarter == index] for index in range(QUARTERS)]
    return [float(np.median(part)) if len(part) else None for part in parts]


def quarter_p99_ms(latency_seconds: np.ndarray, ok: np.ndarray) -> list[float | None]:
    """Return the p99 of what was answered (`ok`) in each quarter of the requests by time."""
    parts = zip(np.array_split(latency_seconds, QUARTERS), np.array_split(ok, QUARTERS),
                strict=True)  # fmt: skip
    return [p99_ms(*part) for part in parts]


def p99_ms(latency_seconds: np.ndarray, ok: np.ndarray) -> float | None:
    """Return the p99 of what was answered, in milliseconds; None where nothing was."""
    return float(np.percentile(latency_seconds[ok], 99)) * 1e3 if ok.any() else None


def _is_steady(memory_mib: list[float | None]) -> bool:
    growth = growth_percent(memory_mib)
    return growth is not None and growth < MEMORY_PERCENT


def judged(run: HeldLoad) -> dict[str, bool]:
    """Return each bound by name and whether the run kept to it; what is unknown is not kept."""
    ratio = p99_ratio(run.p99_ms)
    memory = {"memory": run.resident_mib}
    if run.gpu_memory_mib is not None:
        memory["GPU memory"] = run.gpu_memory_mib
    return {
        "no good request failed": run.requests > 0 and not run.failures,
        "hostile requests were sent": run.hostile_requests > 0,
        "slow senders were there": run.slow_senders > 0,
        "every hostile request was answered rightly": not run.chaos_faults,
        **{f"{name} grew by less than {MEMORY_PERCENT:g} %": _is_steady(values)
           for name, values in memory.items()},
        f"p99 stable within a factor of {P99_RATIO:g}": ratio is not None and ratio <= P99_RATIO,
        "no more threads": run.threads[1] <= run.threads[0],
        "no more open files": run.open_files[1] <= run.open_files[0],
        "SIGTERM under load: every accepted request answered":
            set(run.drain_answers) == {200} and not run.drain_lost and run.unanswered == 0,
        "SIGTERM: ended in time with code 0":
            run.exit_code == 0 and run.drain_seconds <= run.drain_limit_seconds,
    }  # fmt: skip
