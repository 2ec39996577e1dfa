"""The server's statistics in shared memory: what several writers leave, what a reader sees."""

from __future__ import annotations

import time

import pytest

from workloads.inference.server_metrics import ServerMetrics
from workloads.inference.server_stats import ServerStats, StatsWriter
from workloads.inference.shared_block import RECENT_REQUESTS, BlockShape, SharedBlock

SHAPE = BlockShape(front_ends=2, slots=1, max_batch=4)


@pytest.fixture
def block():
    return SharedBlock(SHAPE)


def record(writer: StatsWriter, end_seconds: float, seconds: float, **keywords: object) -> None:
    writer.record(
        "predict", 200, end_seconds - seconds, end_seconds, images=1, **keywords
    )  # fmt: skip


def test_a_server_without_requests_knows_no_latency(block):
    figures = ServerStats(block).snapshot()
    assert figures["total_requests"] == 0
    assert figures["qps_last_10_seconds"] == 0.0
    assert {figures[name] for name in ("p50_ms", "qps", "success_rate_percent")} == {None}


def test_figures_are_those_of_all_front_ends_together(block):
    first, second = (StatsWriter(region) for region in block.front_ends)
    now = time.monotonic()
    for seconds in (0.001, 0.002):
        record(first, now - 1.0, seconds, parts={"decode": seconds / 2, "gpu": seconds / 4})
    record(second, now, 0.009, parts={"queue": 0.008})
    second.record("predict", 400, now, now)
    second.record("batch_predict", 503, now, now)
    # Another process maps the same memory by its descriptor.
    figures = ServerStats(SharedBlock(SHAPE, block.descriptor)).snapshot()
    assert figures["total_requests"] == 5
    assert figures["successful_requests"] == figures["images"] == 3
    assert (figures["rejected_requests"], figures["failed_requests"]) == (1, 1)
    assert figures["statuses"] == {"200": 3, "400": 1, "503": 1}
    assert (figures["min_ms"], figures["p50_ms"], figures["max_ms"]) == pytest.approx((1, 2, 9))
    parts = figures["latency_parts_ms"]
    assert parts["decode"]["mean_ms"] == pytest.approx(0.75)
    assert parts["queue"]["p99_ms"] == pytest.approx(8.0)
    assert parts["gpu"]["p50_ms"] == pytest.approx(0.375)
    assert parts["total"]["p50_ms"] == pytest.approx(2.0)
    assert figures["qps"] == pytest.approx(3 / 1.001)
    assert figures["endpoints"]["batch_predict"]["total_requests"] == 1


def test_the_sliding_window_forgets_what_is_older_than_ten_seconds(block):
    writer = StatsWriter(block.front_ends[1])
    now = time.monotonic()
    for age_seconds in (60.0, 13.0, 10.5, 9.0, 5.0, 0.0):
        record(writer, now - age_seconds, 0.001)
    assert ServerStats(block).snapshot()["qps_last_10_seconds"] == pytest.approx(0.3)


def test_a_ring_that_went_round_keeps_the_latest_requests(block):
    writer = StatsWriter(block.front_ends[0])
    rows = RECENT_REQUESTS // SHAPE.front_ends
    now = time.monotonic()
    for _ in range(rows):
        record(writer, now, 1.0)
    for _ in range(rows - 100):
        record(writer, now, 0.001)
    figures = ServerStats(block).snapshot()
    assert figures["successful_requests"] == 2 * rows - 100
    assert figures["p95_ms"] == pytest.approx(1.0)
    assert figures["max_ms"] == pytest.approx(1000.0)


def test_each_request_is_reported_once(block):
    first, second = (StatsWriter(region) for region in block.front_ends)
    stats = ServerStats(block)
    record(first, 100.0, 0.5)
    record(second, 200.0, 0.25)
    assert sorted(stats.new_requests()) == [("predict", 99.5, 100.0), ("predict", 199.75, 200.0)]
    assert stats.new_requests() == []
    second.record("batch_predict", 200, 300.0, 301.0, images=32)
    assert stats.new_requests() == [("batch_predict", 300.0, 301.0)]


def test_prometheus_gets_cumulative_buckets_counters_and_gauges(block):
    first, second = (StatsWriter(region) for region in block.front_ends)
    record(first, 100.0, 0.003, parts={"gpu": 0.0005})
    record(second, 100.0, 0.75)
    second.record("predict", 503, 100.0, 100.0)
    block.engine.batches[[1, 4]] = (5, 2)
    block.engine.waiting[0] = 3
    lines = ServerMetrics(ServerStats(block)).text().decode().splitlines()
    assert set(lines) >= {
        "# TYPE inference_server_requests_total counter",
        'inference_server_requests_total{endpoint="predict",status="200"} 2.0',
        'inference_server_requests_total{endpoint="predict",status="503"} 1.0',
        'inference_server_images_total{endpoint="predict"} 2.0',
        "# TYPE inference_server_request_seconds histogram",
        'inference_server_request_seconds_bucket{endpoint="predict",le="0.0025"} 0.0',
        'inference_server_request_seconds_bucket{endpoint="predict",le="0.005"} 1.0',
        'inference_server_request_seconds_bucket{endpoint="predict",le="1.0"} 2.0',
        'inference_server_request_seconds_bucket{endpoint="predict",le="+Inf"} 2.0',
        'inference_server_request_seconds_count{endpoint="predict"} 2.0',
        'inference_server_request_gpu_seconds_sum{endpoint="predict"} 0.0005',
        'inference_server_batch_size_images_bucket{le="2"} 5.0',
        'inference_server_batch_size_images_bucket{le="+Inf"} 7.0',
        "inference_server_batch_size_images_sum 13.0",
        "inference_server_waiting_images 3.0",
    }
