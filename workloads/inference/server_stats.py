"""Counts and latencies of the server, bounded in memory and readable at any moment."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from workloads.common.latency import summarize_latency_ms

RECENT_LATENCIES = 100_000  # per endpoint and part; the percentiles are over these
RECENT_SECONDS = 10.0
ENDPOINTS = ("predict", "batch_predict")
PARTS = ("decode", "queue", "compute")


@dataclass
class _Endpoint:
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LATENCIES))
    parts: dict[str, deque[float]] = field(
        default_factory=lambda: {part: deque(maxlen=RECENT_LATENCIES) for part in PARTS}
    )
    images: int = 0


class ServerStats:
    """What the inference requests came to; any thread may record and read."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._lock = threading.Lock()
        self._endpoints: dict[str, _Endpoint] = {}
        self._first_start_seconds: float | None = None
        self._last_end_seconds = 0.0
        self._recent_ends: deque[float] = deque()

    def record(
        self,
        endpoint: str,
        status: int,
        start_seconds: float,
        end_seconds: float,
        *,
        images: int = 0,
        parts: dict[str, float] | None = None,
    ) -> None:
        """Count one answered inference request.

        Args:
            endpoint: ``predict`` or ``batch_predict``.
            status: The HTTP status of the answer; 200 is a success.
            start_seconds: When the request was at hand (CLOCK_MONOTONIC).
            end_seconds: When its answer was ready.
            images: How many images were classified.
            parts: Seconds of ``decode``, ``queue`` and ``compute``.
        """
        with self._lock:
            counted = self._endpoints.setdefault(endpoint, _Endpoint())
            counted.statuses[status] += 1
            if self._first_start_seconds is None:
                self._first_start_seconds = start_seconds
            if status != 200:
                return
            self._last_end_seconds = max(self._last_end_seconds, end_seconds)
            self._recent_ends.append(end_seconds)
            self._forget_old(end_seconds)
            counted.images += images
            counted.latencies.append(end_seconds - start_seconds)
            for part, seconds in (parts or {}).items():
                counted.parts[part].append(seconds)

    def record_refusal(self, path: str) -> None:
        """Count one inference request that was refused before it reached the application."""
        endpoint = path.strip("/")
        if endpoint in ENDPOINTS:
            now = time.monotonic()
            self.record(endpoint, 503, now, now)

    def snapshot(self) -> dict:
        """Return all figures over both endpoints, and each endpoint's own below ``endpoints``.

        ``qps`` is successful requests a second from the first request to the last answer, so idle
        time afterwards does not dilute it; ``qps_last_10_seconds`` is over a sliding window.
        Latencies are those of successful requests, from the complete request to its answer, the
        last 100,000 of each endpoint. Unknown is None.
        """
        with self._lock:
            now = time.monotonic()
            self._forget_old(now)
            recent = len(self._recent_ends)
            span = self._last_end_seconds - (self._first_start_seconds or 0.0)
            endpoints = {
                name: _Endpoint(
                    Counter(counted.statuses),
                    counted.latencies.copy(),
                    {part: values.copy() for part, values in counted.parts.items()},
                    counted.images,
                )
                for name, counted in self._endpoints.items()
            }
        everything = _Endpoint(
            sum((counted.statuses for counted in endpoints.values()), Counter()),
            deque(s for counted in endpoints.values() for s in counted.latencies),
            {part: deque(s for e in endpoints.values() for s in e.parts[part]) for part in PARTS},
            sum(counted.images for counted in endpoints.values()),
        )
        figures = _figures(everything)
        succeeded = figures["successful_requests"]
        return {
            **figures,
            "qps": succeeded / span if succeeded and span > 0 else None,
            "qps_last_10_seconds": recent / RECENT_SECONDS,
            "endpoints": {name: _figures(counted) for name, counted in endpoints.items()},
        }

    def _forget_old(self, now: float) -> None:
        while self._recent_ends and self._recent_ends[0] < now - RECENT_SECONDS:
            self._recent_ends.popleft()


def _figures(counted: _Endpoint) -> dict:
    total = sum(counted.statuses.values())
    succeeded = counted.statuses[200]
    rejected = sum(n for status, n in counted.statuses.items() if 400 <= status < 500)
    latency = summarize_latency_ms(counted.latencies)
    return {
        "total_requests": total,
        "successful_requests": succeeded,
        "rejected_requests": rejected,
        "failed_requests": total - succeeded - rejected,
        "success_rate_percent": 100.0 * succeeded / total if total else None,
        "images": counted.images,
        "average_latency_ms": latency["mean_ms"],
        "p50_ms": latency["p50_ms"],
        "p95_ms": latency["p95_ms"],
        "p99_ms": latency["p99_ms"],
        "min_ms": latency["min_ms"],
        "max_ms": latency["max_ms"],
        "latency_parts_ms": {
            part: _short(summarize_latency_ms(values)) for part, values in counted.parts.items()
        },
        "statuses": {str(status): n for status, n in sorted(counted.statuses.items())},
    }


def _short(latency: dict) -> dict:
    return {name: latency[name] for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")}
