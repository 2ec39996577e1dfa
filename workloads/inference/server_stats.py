"""Counts and latencies of the server, in shared memory: each front end writes, anyone reads.

A writer and its readers take no lock. What a reader sees may be a request behind, and the rows of
a full ring that may be overwritten while they are read are left out.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from workloads.common.latency import summarize_latency_ms
from workloads.inference.shared_block import (
    ENDPOINTS,
    LATENCY_BOUNDS_SECONDS,
    PARTS,
    STATUSES,
    TICKS,
    FrontEndRegion,
    SharedBlock,
)

RECENT_SECONDS = 10.0
TICKS_PER_SECOND = 10
# Rows of a full ring that its writer may be at while they are copied.
_UNSAFE_ROWS = 64


class StatsWriter:
    """Counts the answers of one front end; used by one thread."""

    def __init__(self, region: FrontEndRegion) -> None:
        """Write to ``region``."""
        self._region = region
        self._rows = region.recent.shape[1]

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
            parts: Seconds of ``decode``, ``queue`` and ``gpu``, as far as it had them.
        """
        region = self._region
        which = ENDPOINTS.index(endpoint)
        region.statuses[which, status] += 1
        if region.first_seconds[0] == 0.0:
            region.first_seconds[0] = start_seconds
        if status != 200:
            return
        region.last_seconds[0] = end_seconds
        region.classified[which] += images
        self._count_tick(end_seconds)
        seconds = {**(parts or {}), "total": end_seconds - start_seconds}
        row = region.recent[which, region.written[which] % self._rows]
        row[0] = start_seconds
        for position, part in enumerate(PARTS):
            value = seconds.get(part)
            if value is None:
                row[1 + position] = np.nan
                continue
            row[1 + position] = value
            region.sums[which, position] += value
            bucket = bisect_left(LATENCY_BOUNDS_SECONDS, value)
            region.histogram[which, position, bucket] += 1
        # Last: a reader takes no row that is not whole.
        region.written[which] += 1

    def _count_tick(self, end_seconds: float) -> None:
        number = int(end_seconds * TICKS_PER_SECOND)
        tick = self._region.ticks[number % TICKS]
        if tick[0] != number:
            tick[1] = 0
            tick[0] = number
        tick[1] += 1


@dataclass(frozen=True)
class Totals:
    """Everything that only grows, and how things stand, over all front ends.

    Attributes:
        statuses: int64 of shape (endpoints, 600): answers by HTTP status.
        images: int64 of shape (endpoints,): images classified.
        histogram: int64 of shape (endpoints, parts, bounds + 1): latencies by bucket.
        sums: float64 of shape (endpoints, parts): seconds in sum.
        batches: int64 of shape (max_batch + 1,): batches by size.
        waiting_images: Images that wait for the device.
        inside: Requests being decoded or waited for.
        decoding: Requests being decoded.
        front_ends: Front-end processes that live.
    """

    statuses: np.ndarray
    images: np.ndarray
    histogram: np.ndarray
    sums: np.ndarray
    batches: np.ndarray
    waiting_images: int
    inside: int
    decoding: int
    front_ends: int


@dataclass
class _Endpoint:
    """What one endpoint came to, over all front ends, or both endpoints together."""

    statuses: np.ndarray  # int64 of shape (600,)
    images: int
    recent: np.ndarray  # float64 of shape (n, 5), as in the ring


class ServerStats:
    """Reads the statistics of all front ends; any thread of any process may."""

    def __init__(self, block: SharedBlock) -> None:
        """Read from ``block``."""
        self._block = block
        self._reported = np.zeros((len(block.front_ends), len(ENDPOINTS)), dtype=np.int64)

    def snapshot(self) -> dict:
        """Return all figures over both endpoints, and each endpoint's own below ``endpoints``.

        ``qps`` is successful requests a second from the first request to the last answer, so idle
        time afterwards does not dilute it; ``qps_last_10_seconds`` is over a sliding window.
        Latencies are those of successful requests, from the complete request to its answer, the
        last 100,000 of each endpoint: ``decode`` is reading and scaling the picture, ``queue`` is
        waiting for a thread and for the device, ``gpu`` is the batch from its copy to the device
        to its answer, ``total`` is all of it. Unknown is None.
        """
        endpoints = {
            name: self._endpoint(which)
            for which, name in enumerate(ENDPOINTS)
            if self._statuses(which).any()
        }
        everything = _Endpoint(
            sum((e.statuses for e in endpoints.values()), np.zeros(STATUSES, dtype=np.int64)),
            sum(e.images for e in endpoints.values()),
            np.concatenate(
                [np.empty((0, 1 + len(PARTS))), *[e.recent for e in endpoints.values()]]
            ),
        )
        figures = _figures(everything)
        return {
            **figures,
            "qps": self._qps(figures["successful_requests"]),
            "qps_last_10_seconds": self.recent_successes() / RECENT_SECONDS,
            "endpoints": {name: _figures(counted) for name, counted in endpoints.items()},
            "batch_size_histogram": {
                str(size): int(count)
                for size, count in enumerate(self._block.engine.batches)
                if count
            },
            "waiting_images": int(self._block.engine.waiting[0]),
            "front_ends": int(self._block.engine.alive.sum()),
        }

    def totals(self) -> Totals:
        """Return the counters and gauges; cheap, no percentile is computed."""
        block, regions = self._block, self._block.front_ends
        return Totals(
            statuses=np.sum([region.statuses for region in regions], axis=0),
            images=np.sum([region.classified for region in regions], axis=0),
            histogram=np.sum([region.histogram for region in regions], axis=0),
            sums=np.sum([region.sums for region in regions], axis=0),
            batches=block.engine.batches.copy(),
            waiting_images=int(block.engine.waiting[0]),
            inside=block.gauge(FrontEndRegion.INSIDE),
            decoding=block.gauge(FrontEndRegion.DECODING),
            front_ends=int(block.engine.alive.sum()),
        )

    def recent_successes(self) -> int:
        """Return how many requests succeeded in the last ten seconds."""
        now = int(time.monotonic() * TICKS_PER_SECOND)
        oldest = now - int(RECENT_SECONDS * TICKS_PER_SECOND)
        return sum(
            int(region.ticks[region.ticks[:, 0] > oldest, 1].sum())
            for region in self._block.front_ends
        )

    def new_requests(self) -> list[tuple[str, float, float]]:
        """Return (endpoint, start, end) of each request that succeeded since the last call."""
        found: list[tuple[str, float, float]] = []
        for region, reported in zip(self._block.front_ends, self._reported, strict=True):
            for which, endpoint in enumerate(ENDPOINTS):
                end = int(region.written[which])
                rows = _recent_rows(region, which, end, since=int(reported[which]))
                reported[which] = end
                found += [(endpoint, row[0], row[0] + row[-1]) for row in rows.tolist()]
        return found

    def _endpoint(self, which: int) -> _Endpoint:
        regions = self._block.front_ends
        return _Endpoint(
            self._statuses(which),
            sum(int(region.classified[which]) for region in regions),
            np.concatenate(
                [_recent_rows(region, which, int(region.written[which])) for region in regions]
            ),
        )

    def _statuses(self, which: int) -> np.ndarray:
        return np.sum([region.statuses[which] for region in self._block.front_ends], axis=0)

    def _qps(self, succeeded: int) -> float | None:
        firsts = [float(region.first_seconds[0]) for region in self._block.front_ends]
        begun = [first for first in firsts if first > 0.0]
        last = max(float(region.last_seconds[0]) for region in self._block.front_ends)
        span = last - min(begun, default=last)
        return succeeded / span if succeeded and span > 0 else None


def _recent_rows(region: FrontEndRegion, which: int, end: int, since: int = 0) -> np.ndarray:
    """Return a copy of rows number ``since`` to ``end``, as far as the ring still has them."""
    ring = region.recent[which]
    capacity = len(ring)
    first = max(since, end - capacity + _UNSAFE_ROWS)
    if first >= end:
        return ring[:0].copy()
    low, high = first % capacity, end % capacity
    if low < high:
        return ring[low:high].copy()
    return np.concatenate([ring[low:], ring[:high]])


def _figures(counted: _Endpoint) -> dict:
    total = int(counted.statuses.sum())
    succeeded = int(counted.statuses[200])
    rejected = int(counted.statuses[400:500].sum())
    totals = summarize_latency_ms(counted.recent[:, -1])
    return {
        "total_requests": total,
        "successful_requests": succeeded,
        "rejected_requests": rejected,
        "failed_requests": total - succeeded - rejected,
        "success_rate_percent": 100.0 * succeeded / total if total else None,
        "images": counted.images,
        "average_latency_ms": totals["mean_ms"],
        "p50_ms": totals["p50_ms"],
        "p95_ms": totals["p95_ms"],
        "p99_ms": totals["p99_ms"],
        "min_ms": totals["min_ms"],
        "max_ms": totals["max_ms"],
        "latency_parts_ms": {
            part: _short(counted.recent[:, 1 + position]) for position, part in enumerate(PARTS)
        },
        "statuses": {
            str(status): int(counted.statuses[status]) for status in counted.statuses.nonzero()[0]
        },
    }


def _short(seconds: np.ndarray) -> dict:
    latency = summarize_latency_ms(seconds[~np.isnan(seconds)])
    return {name: latency[name] for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")}
