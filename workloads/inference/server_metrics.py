"""The server's statistics for Prometheus, read from shared memory at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from workloads.inference.server_stats import ServerStats
from workloads.inference.shared_block import ENDPOINTS, LATENCY_BOUNDS_SECONDS, PARTS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "inference_server"


class ServerMetrics:
    """A collector of ``prometheus_client``; names as its conventions ask for."""

    def __init__(self, stats: ServerStats) -> None:
        """Register a collector of ``stats`` alone."""
        self._stats = stats
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing: there is no other collector to collide with."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its present values."""
        totals = self._stats.totals()
        yield self._requests(totals.statuses)
        images = CounterMetricFamily(
            f"{PREFIX}_images", "Images classified successfully.", labels=["endpoint"]
        )
        for endpoint, count in zip(ENDPOINTS, totals.images.tolist(), strict=True):
            images.add_metric([endpoint], count)
        yield images
        yield from self._latencies(totals.histogram, totals.sums)
        yield self._batches(totals.batches)
        for name, text, value in (
            ("waiting_images", "Images that wait for the device.", totals.waiting_images),
            ("requests_inside", "Requests being decoded or waited for.", totals.inside),
            ("decoding_requests", "Requests whose picture is being decoded.", totals.decoding),
            ("front_ends", "Front-end processes that live (0: all in one).", totals.front_ends),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)

    @staticmethod
    def _requests(statuses: np.ndarray) -> Metric:
        requests = CounterMetricFamily(
            f"{PREFIX}_requests", "Answered inference requests.", labels=["endpoint", "status"]
        )
        for which, endpoint in enumerate(ENDPOINTS):
            for status in statuses[which].nonzero()[0]:
                requests.add_metric([endpoint, str(status)], int(statuses[which, status]))
        return requests

    @staticmethod
    def _latencies(histogram: np.ndarray, sums: np.ndarray) -> Iterator[Metric]:
        bounds = [*map(str, LATENCY_BOUNDS_SECONDS), "+Inf"]
        for position, part in enumerate(PARTS):
            name = "request" if part == "total" else f"request_{part}"
            family = HistogramMetricFamily(
                f"{PREFIX}_{name}_seconds",
                f"Seconds of successful requests: {part}.",
                labels=["endpoint"],
            )
            for which, endpoint in enumerate(ENDPOINTS):
                counts = histogram[which, position].cumsum().tolist()
                family.add_metric(
                    [endpoint],
                    buckets=list(zip(bounds, counts, strict=True)),
                    sum_value=float(sums[which, position]),
                )
            yield family

    @staticmethod
    def _batches(batches: np.ndarray) -> Metric:
        sizes = np.arange(len(batches))
        bounds = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size < len(batches)]
        counts = batches.cumsum()
        buckets = [(str(bound), int(counts[bound])) for bound in bounds]
        return HistogramMetricFamily(
            f"{PREFIX}_batch_size_images",
            "Images in each batch that ran on the device.",
            buckets=[*buckets, ("+Inf", int(counts[-1]))],
            sum_value=int((sizes * batches).sum()),
        )
