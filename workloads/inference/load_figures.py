"""Figures of a load test from the raw records of its requests.

Latency counts from the intended send to the end of the answer, service time from the actual send.
They are the same in a closed loop. In an open loop only the first one shows what users feel when
the server stalls: requests that a stall kept from being sent at all have the wait in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common.latency import summarize_latency_ms

if TYPE_CHECKING:
    import numpy as np

# Timers and wake-ups take tenths of a millisecond; a send that is later than this was held up.
LATE_SEND_SECONDS = 0.001
# A run whose generator held up more sends than this share shows the generator in its p99.
LATE_SHARE_LIMIT_PERCENT = 1.0
BUSY_PROCESS_LIMIT_PERCENT = 90.0


@dataclass(frozen=True)
class Requests:
    """One job's requests, arrays of one length, times in seconds on CLOCK_MONOTONIC.

    Attributes:
        intended: When each should have been sent.
        free: When a client was free to send it.
        sent: When it was sent; NaN where it never was.
        end: When its answer had come, or it had failed.
        ok: Whether it was answered with status 200.
    """

    intended: np.ndarray
    free: np.ndarray
    sent: np.ndarray
    end: np.ndarray
    ok: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> Requests:
        """Return the columns of a float64 ``table`` of shape (requests, 5)."""
        intended, free, sent, end, ok = table.T
        return cls(intended, free, sent, end, ok > 0)

    @property
    def latency_seconds(self) -> np.ndarray:
        """From the intended send to the end."""
        return self.end - self.intended

    @property
    def service_seconds(self) -> np.ndarray:
        """From the actual send to the end; NaN where nothing was sent."""
        return self.end - self.sent


def outcome_figures(requests: Requests) -> dict[str, float | int | None]:
    """Return how many requests there were and how many succeeded."""
    total, succeeded = len(requests.ok), int(requests.ok.sum())
    return {
        "total_requests": total,
        "successful_requests": succeeded,
        "failed_requests": total - succeeded,
        "success_rate_percent": 100.0 * succeeded / total if total else None,
    }


def latency_figures(durations_seconds: np.ndarray, what: str) -> dict[str, float | None]:
    """Return ``mean_<what>_ms`` and the like, percentiles of raw values included.

    Args:
        durations_seconds: Raw durations, shape (n,); every figure is None where n is 0.
        what: ``latency`` or ``service``.
    """
    summary = summarize_latency_ms(durations_seconds)
    summary["p90_ms"] = summary["p99_9_ms"] = None
    if len(durations_seconds):
        import numpy as np

        p90, p99_9 = np.percentile(durations_seconds, (90, 99.9)) * 1e3
        summary["p90_ms"], summary["p99_9_ms"] = float(p90), float(p99_9)
    order = ("mean", "median", "std", "min", "p50", "p90", "p95", "p99", "p99_9", "max")
    return {f"{name}_{what}_ms": summary[f"{name}_ms"] for name in order}


def slo_attainment_percent(requests: Requests, slo_ms: float) -> float | None:
    """Return the share of all intended requests that succeeded within ``slo_ms`` of latency."""
    if not len(requests.ok):
        return None
    met = requests.ok & (requests.latency_seconds <= slo_ms / 1e3)
    return 100.0 * float(met.mean())


def open_loop_figures(
    requests: Requests, start_seconds: float, duration_seconds: float
) -> dict[str, float | int | None]:
    """Return how well the intended sends were kept.

    Returns:
        ``offered_rate`` and ``achieved_rate`` (requests a second, intended and really sent before
        ``start_seconds + duration_seconds``), ``late_sends`` (more than LATE_SEND_SECONDS after
        the intended time, or never), of those ``late_for_connection`` (every connection was busy)
        and ``late_by_generator`` (a free client was too slow), the latter also as a share.
    """
    import numpy as np

    end_seconds = start_seconds + duration_seconds
    total = len(requests.sent)
    on_time = requests.sent <= requests.intended + LATE_SEND_SECONDS
    ready = np.maximum(requests.intended, requests.free)
    waited = requests.free > requests.intended + LATE_SEND_SECONDS
    slow = requests.sent > ready + LATE_SEND_SECONDS
    return {
        "offered_rate": total / duration_seconds,
        "achieved_rate": int((requests.sent <= end_seconds).sum()) / duration_seconds,
        "late_sends": int(total - on_time.sum()),
        "late_for_connection": int(waited.sum()),
        "late_by_generator": int(slow.sum()),
        "late_by_generator_percent": 100.0 * float(slow.mean()) if total else None,
    }


def generator_limit(
    late_by_generator_percent: float | None, busiest_process_percent: float
) -> str | None:
    """Return the sentence that flags a run limited by its generator; None where it was not."""
    reasons = []
    if (late_by_generator_percent or 0.0) > LATE_SHARE_LIMIT_PERCENT:
        reasons.append(
            f"it sent {late_by_generator_percent:.1f} % of the requests more than "
            f"{LATE_SEND_SECONDS * 1e3:g} ms late"
        )
    if busiest_process_percent > BUSY_PROCESS_LIMIT_PERCENT:
        reasons.append(f"its busiest process used {busiest_process_percent:.0f} % of a core")
    if not reasons:
        return None
    return (
        f"the load generator limited this run ({' and '.join(reasons)}), so the figures show the "
        "generator and not the server alone; use more --processes or another machine"
    )


def save_raw(path: Path, requests: Requests, start_seconds: float) -> None:
    """Write every request as one row of a structured NumPy array, for ``numpy.load``.

    Args:
        path: The ``.npy`` file.
        requests: What was measured.
        start_seconds: The agreed start on CLOCK_MONOTONIC.

    The fields are ``intended_seconds`` (float64, after the start), ``latency_ms`` and
    ``service_ms`` (float32, the latter NaN where nothing was sent) and ``ok``.
    """
    import numpy as np

    fields = [("intended_seconds", "f8"), ("latency_ms", "f4"), ("service_ms", "f4"), ("ok", "?")]
    rows = np.empty(len(requests.ok), dtype=fields)
    rows["intended_seconds"] = requests.intended - start_seconds
    rows["latency_ms"] = 1e3 * requests.latency_seconds
    rows["service_ms"] = 1e3 * requests.service_seconds
    rows["ok"] = requests.ok
    np.save(path, rows)
