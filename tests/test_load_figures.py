"""The load test's figures, worked out by hand, and what its generator sends when."""

from __future__ import annotations

import asyncio
import errno
import os
import time

import numpy as np
import pytest

from workloads.common.errors import UsageError
from workloads.inference import load_generator, load_report, load_requests

NAN, INF = float("nan"), float("inf")

# --- figures --------------------------------------------------------------------------------------

# Started at 100 s, ten a second: two on time; one that every connection was busy for; one that a
# free client sent 3 ms late; one that failed after 10 ms; one that was never sent.
SCENE = np.array(
    [
        (100.0, 99.9, 100.0002, 100.0102, ""),
        (100.1, 100.05, 100.1, 100.12, ""),
        (100.2, 100.3, 100.3004, 100.31, ""),
        (100.3, 100.25, 100.303, 100.32, ""),
        (100.4, 100.35, 100.4, 100.41, "HTTP 503"),
        (100.5, 101.6, NAN, 101.6, "not sent in time"),
    ],
    dtype=load_generator.RECORD_FIELDS,
)
EXPECTED = {
    "total_requests": 6,
    "successful_requests": 4,
    "failed_requests": 2,
    "success_rate_percent": pytest.approx(100 * 4 / 6),
    "errors": {"HTTP 503": 1, "not sent in time": 1},
    # Ascending: 10.2, 20, 20, 110 ms, and two that are infinite.
    "mean_latency_ms": pytest.approx((10.2 + 20 + 20 + 110) / 4),
    "median_latency_ms": pytest.approx(65),
    "p50_latency_ms": pytest.approx(65),
    "max_latency_ms": pytest.approx(110),
    "p90_latency_ms": None,
    "infinite_latency_percentiles": ["p90", "p95", "p99", "p99_9"],
    "latency_percentile_requests": 6,
    "slo_attainment_percent": pytest.approx(50),
    "offered_rate": pytest.approx(15),
    "achieved_rate": pytest.approx(5 / 0.4),
    "late_sends": 3,
    "late_for_connection": 2,
    "late_by_generator": 1,
    "late_by_generator_percent": pytest.approx(100 / 6),
    # From the actual send: 9.6, 10, 17, 20 ms and one that failed.
    "p50_service_ms": pytest.approx(17),
    "service_percentile_requests": 5,
    "infinite_service_percentiles": ["p90", "p95", "p99", "p99_9"],
    # Until the end of the last one, which the rate of the answered does not wait for.
    "elapsed_seconds": pytest.approx(1.6),
    "qps": pytest.approx(4 / 0.4),
    "connections_opened": 3,
    "generator_processes": 2,
    # Of the time until the last one was sent: waiting for answers is no work of the generator's.
    "generator_cpu_cores": pytest.approx(0.6 / 0.4),
    "generator_busiest_process_percent": pytest.approx(100),
    "generator_limited": True,
}


def figures_of(requests: np.ndarray) -> dict:
    parts = [
        load_generator.Measured(requests[::2], [0.4, 0.0], connections_opened=1),
        load_generator.Measured(requests[1::2], [0.0, 0.2], connections_opened=2),
    ]
    measured = load_generator.Measured.together(parts)
    return load_report.load_figures(measured, 100.0, 0.4, slo_ms=50.0, is_open_loop=True)


def test_the_figures_of_an_open_loop_count_from_the_intended_send_and_say_whose_fault_it_was(
    tmp_path,
):
    figures = figures_of(SCENE)
    assert {name: figures[name] for name in EXPECTED} == EXPECTED
    # Charts can be drawn of failures, and of a single request.
    for requests in (SCENE, SCENE[:1]):
        paths = tmp_path / "latency.png", tmp_path / "qps.png"
        load_report.draw_charts(*paths, requests, figures_of(requests), 100.0, 3.0)
        assert all(path.stat().st_size > 5000 for path in paths)


def test_without_any_request_figures_are_unknown_and_the_summary_says_none():
    figures = figures_of(SCENE[:0])
    unknown = ("success_rate_percent", "slo_attainment_percent", "p99_latency_ms", "p99_service_ms",
               "late_by_generator_percent")  # fmt: skip
    assert {figures[name] for name in unknown} == {None}
    assert (figures["qps"], figures["infinite_latency_percentiles"]) == (0, [])
    rows = dict(load_report.summary_rows(figures, slo_ms=50.0))
    assert (rows["Total requests"], "P90 latency" in rows) == ("0", False)


@pytest.mark.parametrize(
    ("rank", "value"), [(0, 1.0), (25, 2.0), (50, 3.0), (50.1, INF), (75, INF), (100, INF)]
)
def test_a_percentile_is_infinite_as_soon_as_an_infinite_value_has_a_part_in_it(rank, value):
    assert load_report.percentile([1.0, 2.0, 3.0, INF, INF], rank) == value
    values = np.sort(np.random.default_rng(1).exponential(1.0, 137))
    assert load_report.percentile(values, rank) == pytest.approx(np.percentile(values, rank))


@pytest.mark.parametrize(
    ("late_percent", "busiest_percent", "said"),
    [(None, 50.0, None), (0.9, 89.0, None), (None, 95.0, "used 95 % of a core"),
     (2.0, 50.0, "2.0 % of the requests more than 1 ms late"),
     (2.0, 95.0, "late and its busiest process")],
)  # fmt: skip
def test_the_generator_is_flagged_for_lateness_and_for_want_of_processor_time(
    late_percent, busiest_percent, said
):
    limit = load_report.generator_limit(late_percent, busiest_percent)
    assert limit is None if said is None else said in limit


# --- the generator --------------------------------------------------------------------------------


def test_poisson_arrivals_have_exponential_gaps_of_the_asked_mean_and_follow_the_seed():
    draw = load_requests.arrival_offsets
    offsets = draw(1000, "poisson", 20, seed=7)
    assert (offsets == draw(1000, "poisson", 20, seed=7)).all()
    assert not np.isin(offsets, draw(1000, "poisson", 20, seed=8)).any()
    gaps = np.diff(offsets)
    assert offsets[0] > 0 and offsets[-1] < 20 and (gaps >= 0).all()
    # 20,000 draws of one fixed seed: mean and standard deviation of an exponential are equal.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    # Each seed has a number of its own, whose variance is the mean too.
    counts = [len(draw(100, "poisson", 1, seed)) for seed in range(1000)]
    assert np.mean(counts) == pytest.approx(100, rel=0.15)
    assert np.var(counts) == pytest.approx(100, rel=0.15)


@pytest.mark.parametrize(
    ("clients", "rate", "cores", "processes"),
    [(10, None, 16, 1), (64, None, 16, 4), (64, None, 4, 2), (500, None, 16, 8),
     (10, 200.0, 16, 1), (10, 5000.0, 16, 5), (10, 5000.0, 1, 1)],
)  # fmt: skip
def test_processes_are_as_many_as_needed_and_leave_half_the_cores(
    clients, rate, cores, processes, monkeypatch
):
    monkeypatch.setattr(load_generator, "usable_cores", lambda: cores)
    assert load_generator.default_processes(clients, rate) == processes


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ECONNREFUSED, "ConnectionRefusedError"), (-2, "OSError"), (None, "OSError"),
     (errno.EMFILE, None), (errno.EADDRNOTAVAIL, None)],
)  # fmt: skip
def test_a_failure_is_named_by_what_the_system_said_unless_this_machine_lacks_something(
    number, kind
):
    error = OSError("x") if number is None else OSError(number, "x")
    if kind is None:
        with pytest.raises(UsageError, match="the load generator failed, not the server"):
            load_generator.kind_of_failure(error)
    else:
        assert load_generator.kind_of_failure(error) == kind


def test_a_generator_whose_load_test_goes_in_the_middle_of_its_plan_ends_in_silence():
    process, pipe = load_generator._start_process()
    os.write(pipe.fileno(), b"\0\0\1\0half")
    pipe.close()
    assert process.wait(60) == 0


def test_timers_of_the_generator_wake_before_the_next_millisecond():
    async def shortest_nap_seconds() -> float:
        naps = []
        for _ in range(50):
            begin = time.monotonic()
            await asyncio.sleep(0.0002)
            naps.append(time.monotonic() - begin)
        return min(naps)

    loop = asyncio.SelectorEventLoop(load_generator.PunctualSelector())
    # epoll alone would let each of them last a whole millisecond or more.
    assert 0.0002 <= loop.run_until_complete(shortest_nap_seconds()) < 0.001
    loop.close()
