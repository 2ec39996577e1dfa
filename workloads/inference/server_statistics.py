"""What the inference server has answered: counts and latencies, for /stats and for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from workloads.common.results import few_percentiles, summarize_latency_ms

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# What one answered request of an endpoint is called in the event log.
UNIT_KINDS = {"predict": "request", "batch_predict": "batch_request"}
ENDPOINTS = tuple(UNIT_KINDS)
PARTS = ("total", "decode", "queue", "gpu")
LATENCY_BOUNDS_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RECENT_REQUESTS, RECENT_SECONDS = 100_000, 10.0


class Statistics:
    """What has been answered; written by the engine's thread, read by any."""

    def __init__(self, gauges: Callable[[], dict[str, int]]) -> None:
        self._gauges = gauges  # shown as metrics, too
        # Of the latest successful requests: end (CLOCK_MONOTONIC), seconds by part.
        self._recent = {name: np.zeros((RECENT_REQUESTS, 1 + len(PARTS))) for name in ENDPOINTS}
        # Of all of them, by part: how many fell between which bounds, and their sum.
        buckets = len(PARTS), len(LATENCY_BOUNDS_SECONDS) + 1
        self._buckets = {name: np.zeros(buckets, np.int64) for name in ENDPOINTS}
        self._sums = {name: np.zeros(len(PARTS)) for name in ENDPOINTS}
        self._statuses: dict[str, Counter] = {name: Counter() for name in ENDPOINTS}
        self._images: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._first_seconds: dict[str, float] = {}
        self._units: deque[tuple[str, float, float]] = deque(maxlen=RECENT_REQUESTS)

    def count_batch(self, images: int) -> None:
        """Count a batch that ran on the device."""
        self._batches[images] += 1

    def record(
        self, endpoint: str, status: int, images: int, start_seconds: float, *seconds: float
    ) -> None:
        """Count an answered request; ``seconds`` by part, NaN where it had none."""
        statuses, end_seconds = self._statuses[endpoint], start_seconds + seconds[0]
        self._first_seconds.setdefault(endpoint, start_seconds)
        if status == 200:
            # Before it is counted: whoever reads meanwhile finds as many rows as requests.
            row = statuses[200] % RECENT_REQUESTS
            self._recent[endpoint][row] = (end_seconds, *seconds)
            self._images[endpoint] += images
            self._units.append((UNIT_KINDS[endpoint], start_seconds, end_seconds))
            for part, value in enumerate(seconds):
                if value == value:
                    bucket = bisect_left(LATENCY_BOUNDS_SECONDS, value)
                    self._buckets[endpoint][part, bucket] += 1
                    self._sums[endpoint][part] += value
        statuses[status] += 1

    def take_units(self) -> Iterator[tuple[str, float, float]]:
        """Yield (kind, start, end) of each request that succeeded and was not yielded before."""
        while self._units:
            yield self._units.popleft()

    def metrics(self) -> bytes:
        """Return everything in Prometheus's text format."""
        from prometheus_client import generate_latest

        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Yield everything as Prometheus's library knows it, which calls this."""
        from prometheus_client import core

        name, by_endpoint = "inference_server_{}".format, ["endpoint"]
        requests = core.CounterMetricFamily(
            name("requests"), "Answered requests.", labels=["endpoint", "status"]
        )
        images = core.CounterMetricFamily(name("images"), "Images classified.", labels=by_endpoint)
        times = [
            core.HistogramMetricFamily(
                name(f"request{'' if part == 'total' else f'_{part}'}_seconds"),
                f"Seconds of successful requests: {part}.", labels=by_endpoint,
            )
            for part in PARTS
        ]  # fmt: skip
        for endpoint in ENDPOINTS:
            images.add_metric([endpoint], self._images[endpoint])
            for status, count in sorted(self._statuses[endpoint].items()):
                requests.add_metric([endpoint, str(status)], count)
            for part, family in enumerate(times):
                below = _below(LATENCY_BOUNDS_SECONDS, self._buckets[endpoint][part])
                family.add_metric([endpoint], below, self._sums[endpoint][part])
        sizes = sorted(self._batches.items())
        counts = [0] * (len(BATCH_BOUNDS) + 1)
        for size, count in sizes:
            counts[bisect_left(BATCH_BOUNDS, size)] += count
        yield core.HistogramMetricFamily(
            name("batch_size_images"), "Images in each batch that ran on the device.",
            buckets=_below(BATCH_BOUNDS, counts), sum_value=sum(n * count for n, count in sizes),
        )  # fmt: skip
        yield from (requests, images, *times)
        for what, value in self._gauges().items():
            yield core.GaugeMetricFamily(name(what), f"At this moment: {what}.", value)

    def snapshot(self) -> dict:
        """Return the figures of ``/predict``, and below ``batch_predict`` those of the other.

        Latencies are of the last 100,000 successful requests, from the complete request to its
        answer: ``decode`` reads and scales the picture, ``queue`` waits for the device, ``gpu`` is
        the batch from its copy to the device to its answer. Requests refused for what the caller
        sent (4xx) are rejected, not failed. ``qps`` is successful requests a second from the first
        request to the last answer: idle time afterwards does not dilute it. Unknown is None.
        """
        return {
            **self._figures("predict"),
            "batch_predict": self._figures("batch_predict"),
            "batch_size_histogram": {str(size): n for size, n in sorted(self._batches.items())},
        }

    def _figures(self, endpoint: str) -> dict:
        statuses = self._statuses[endpoint].copy()
        recent = self._recent[endpoint][: statuses[200]].copy()
        total, succeeded, responses = sum(statuses.values()), statuses[200], len(recent)
        rejected = sum(n for status, n in statuses.items() if 400 <= status < 500)
        judged = total - rejected
        parts_ms = {part: _latency_ms(recent[:, n]) for n, part in enumerate(PARTS, start=1)}
        span_seconds = recent[:, 0].max() - self._first_seconds[endpoint] if succeeded else 0.0
        latest = int((recent[:, 0] > time.monotonic() - RECENT_SECONDS).sum())
        return {
            "total_requests": total,
            "successful_requests": succeeded,
            "rejected_requests": rejected,
            "failed_requests": judged - succeeded,
            "success_rate_percent": round(100 * succeeded / judged, 2) if judged else None,
            "images": self._images[endpoint],
            "average_latency_ms": parts_ms["total"]["mean_ms"],
            **{name: ms for name, ms in parts_ms["total"].items() if name != "mean_ms"},
            "latency_responses": responses,
            "few_responses_for": [f"{name}_ms" for name in few_percentiles(responses)],
            "latency_parts_ms": parts_ms,
            "statuses": {str(status): n for status, n in sorted(statuses.items()) if n},
            "qps": round(succeeded / span_seconds, 1) if span_seconds > 0 else None,
            "qps_last_10_seconds": round(latest / RECENT_SECONDS, 1),
        }


def _below(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """Return Prometheus's buckets: how many were at most each bound."""
    return [
        *zip([*map(str, map(float, bounds)), "+Inf"], accumulate(map(int, counts)), strict=True)
    ]


def _latency_ms(seconds: np.ndarray) -> dict[str, float | None]:
    figures = summarize_latency_ms(seconds[seconds == seconds])
    names = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "min_ms", "max_ms")
    chosen = ((name, figures[name]) for name in names)
    return {name: None if ms is None else round(ms, 3) for name, ms in chosen}
