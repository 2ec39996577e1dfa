"""The load test's arithmetic by hand, and an open loop against a server with a scripted stall."""

from __future__ import annotations

import argparse
import asyncio
import errno
import time

import numpy as np
import pytest
from load_runner import load_test, null_server, only_result

from workloads.common.errors import UsageError
from workloads.common.results import is_few
from workloads.inference import load_generator, load_report

NAN, INF = float("nan"), float("inf")


def requests_of(*rows: tuple[float, float, float, float, float]) -> np.ndarray:
    return np.array(list(rows), dtype=load_generator.RECORD_FIELDS)


# Started at 100 s, ten a second: two on time; one that every connection was busy for; one that a
# free client sent 3 ms late; one that failed after 10 ms; one that was never sent.
SCENE = requests_of(
    (100.0, 99.9, 100.0002, 100.0102, 1),
    (100.1, 100.05, 100.1, 100.12, 1),
    (100.2, 100.3, 100.3004, 100.31, 1),
    (100.3, 100.25, 100.303, 100.32, 1),
    (100.4, 100.35, 100.4, 100.41, 0),
    (100.5, 101.6, NAN, 101.6, 0),
)


def test_latency_counts_from_the_intended_send_and_failed_requests_are_infinitely_late():
    figures = load_report.request_figures(SCENE, slo_ms=None)
    assert (figures["total_requests"], figures["successful_requests"]) == (6, 4)
    assert figures["failed_requests"] == 2
    assert figures["success_rate_percent"] == pytest.approx(100 * 4 / 6)
    # Ascending: 10.2, 20, 20, 110 ms, and two that are infinite.
    assert figures["mean_latency_ms"] == pytest.approx((10.2 + 20 + 20 + 110) / 4)
    assert figures["p50_latency_ms"] == figures["median_latency_ms"] == pytest.approx(65)
    assert figures["max_latency_ms"] == pytest.approx(110)
    assert figures["p90_latency_ms"] is figures["p99_latency_ms"] is None
    assert figures["infinite_latency_percentiles"] == ["p90", "p95", "p99", "p99_9"]
    assert figures["latency_percentile_requests"] == 6


@pytest.mark.parametrize(
    ("slo_ms", "met"), [(5.0, 0), (15.0, 1), (50.0, 3), (200.0, 4), (5000.0, 4)]
)
def test_slo_attainment_is_a_share_of_all_intended_requests(slo_ms, met):
    figures = load_report.request_figures(SCENE, slo_ms)
    assert figures["slo_attainment_percent"] == pytest.approx(100 * met / 6)


def test_late_sends_are_told_apart_by_whose_fault_they_were():
    figures = load_report.open_loop_figures(SCENE, start_seconds=100.0, duration_seconds=0.4)
    assert {name: figures[name] for name in list(figures)[:6]} == {
        "offered_rate": pytest.approx(15.0),
        "achieved_rate": pytest.approx(5 / 0.4),
        "late_sends": 3,
        "late_for_connection": 2,
        "late_by_generator": 1,
        "late_by_generator_percent": pytest.approx(100 / 6),
    }
    # Service time counts from the actual send: 9.6, 10, 17, 20 ms and one that failed.
    assert figures["p50_service_ms"] == pytest.approx(17)
    assert figures["service_percentile_requests"] == 5
    assert figures["infinite_service_percentiles"] == ["p90", "p95", "p99", "p99_9"]


def test_percentiles_are_of_raw_values_and_unknown_without_any():
    figures = load_report.latency_figures(np.arange(1001) / 1e3, 0, "latency")
    ranks = ("p50", "p90", "p95", "p99", "p99_9", "max")
    assert [figures[f"{rank}_latency_ms"] for rank in ranks] == pytest.approx(
        [500, 900, 950, 990, 999, 1000]
    )
    none = load_report.latency_figures(np.array([]), 0, "service")
    assert none.pop("service_percentile_requests") == 0
    assert none.pop("infinite_service_percentiles") == []
    assert set(none.values()) == {None}


@pytest.mark.parametrize("rank", [0, 12.5, 50, 90, 95, 99, 99.9, 100])
def test_a_percentile_is_numpys_where_all_values_are_finite(rank):
    values = np.sort(np.random.default_rng(1).exponential(1.0, 137))
    assert load_report.percentile(values, rank) == pytest.approx(np.percentile(values, rank))


@pytest.mark.parametrize(
    ("rank", "value"), [(0, 1.0), (25, 2.0), (50, 3.0), (50.1, INF), (75, INF), (100, INF)]
)
def test_a_percentile_is_infinite_as_soon_as_an_infinite_value_has_a_part_in_it(rank, value):
    assert load_report.percentile([1.0, 2.0, 3.0, INF, INF], rank) == value


@pytest.mark.parametrize(("rank", "enough"), [(50, 10), (95, 100), (99, 500), (99.9, 5000)])
def test_a_percentile_is_few_under_five_requests_beyond_it(rank, enough):
    assert is_few(enough - 1, rank) and not is_few(enough, rank)


def test_the_summary_marks_few_and_says_how_many():
    figures = load_report.latency_figures(np.full(120, 0.005), 0, "latency")
    figures |= {
        "total_requests": 120, "successful_requests": 120, "failed_requests": 0, "errors": {},
        "success_rate_percent": 100.0, "qps": 12.0, "requests_per_minute": 720.0,
        "generator_processes": 1, "generator_cpu_cores": 0.1,
    }  # fmt: skip
    rows = dict(load_report.summary_rows(figures, argparse.Namespace(slo_ms=None, rate=None)))
    assert rows["Median (P50) latency"] == "5.0 ms, n = 120"
    assert rows["P95 / P99 latency"] == "5.0 ms / 5.0 ms (few), n = 120"
    assert rows["P99.9 latency"] == "5.0 ms (few), n = 120"


def test_figures_over_processes_are_of_the_merged_values():
    generator = object.__new__(load_generator.LoadGenerator)
    generator._processes = [None, None]
    fast = requests_of(*((i, i, i, i + 0.001, 1) for i in range(99)))
    slow = requests_of((0.5, 0.5, 0.5, 1.5, 1))
    generator.reports = [
        (0, load_generator.Report(fast.tobytes(), {"timeout": 1}, 1.0, 1)),
        (1, load_generator.Report(slow.tobytes(), {"timeout": 2}, 2.0, 0)),
    ]
    measured = generator.measured()
    assert list(measured.requests["intended"][:3]) == [0.0, 0.5, 1.0]
    # The average of both processes' medians would be 500 ms.
    figures = load_report.request_figures(measured.requests, None)
    assert figures["p50_latency_ms"] == pytest.approx(1)
    assert (measured.failures["timeout"], measured.connections_opened) == (3, 1)
    assert measured.cpu_seconds == [1.0, 2.0]
    assert generator.measured(since=1).cpu_seconds == [0.0, 2.0]


def test_the_generator_is_flagged_for_lateness_and_for_want_of_processor_time():
    limit = load_report.generator_limit
    assert limit(None, 50.0) is None
    assert limit(0.9, 89.0) is None
    assert "2.0 % of the requests more than 1 ms late" in limit(2.0, 50.0)
    assert "used 95 % of a core" in limit(None, 95.0)
    assert "late and its busiest process" in limit(2.0, 95.0)


@pytest.mark.parametrize(
    ("rate", "duration", "offsets"),
    [(10, 0.3, [0, 0.1, 0.2]), (10, 0.35, [0, 0.1, 0.2, 0.3]), (0.1, 1.0, [0])],
)
def test_constant_arrivals_are_evenly_spaced_from_the_start(rate, duration, offsets):
    drawn = load_generator.arrival_offsets(rate, "constant", duration, seed=1)
    assert list(drawn) == pytest.approx(offsets)


def test_poisson_arrivals_have_exponential_gaps_of_the_asked_mean_and_follow_the_seed():
    draw = load_generator.arrival_offsets
    offsets = draw(1000, "poisson", 20, seed=7)
    assert (offsets == draw(1000, "poisson", 20, seed=7)).all()
    assert not np.array_equal(offsets, draw(1000, "poisson", 20, seed=8))
    gaps = np.diff(offsets)
    assert offsets[0] > 0 and offsets[-1] < 20 and (gaps >= 0).all()
    # 20,000 draws of one fixed seed: mean and standard deviation of an exponential are equal.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    draws = np.random.default_rng(7).exponential(1e-3, 3)
    assert offsets[:3] == pytest.approx(np.cumsum(draws))


def test_a_plan_is_split_without_losing_a_client_a_connection_or_a_send():
    offsets = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    plan = load_generator.LoadPlan("http://x/predict", {}, [b""], 5, 9, 1.0, offsets=offsets)
    parts = plan.split(2)
    assert [(part.clients, part.connections) for part in parts] == [(3, 5), (2, 4)]
    assert [list(part.offsets) for part in parts] == [[0, 0.2, 0.4], [0.1, 0.3]]
    assert len(plan.split(8)) == 5  # no process without a client


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL])
def test_what_this_machine_lacks_is_no_failure_of_the_server(number):
    with pytest.raises(UsageError, match="the load generator failed, not the server"):
        load_generator._kind_of_failure(OSError(number, "x"))


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ECONNREFUSED, "ConnectionRefusedError"), (errno.ECONNRESET, "ConnectionResetError"),
     (errno.EPIPE, "BrokenPipeError"), (-2, "OSError"), (None, "OSError")],
)  # fmt: skip
def test_a_failure_is_named_by_what_the_system_said(number, kind):
    error = OSError("x") if number is None else OSError(number, "x")
    assert load_generator._kind_of_failure(error) == kind


def test_a_stall_shows_in_latency_from_the_intended_send_and_not_in_service_time(tmp_path):
    # The server stands still for one of three seconds. Four connections can wait for it; the other
    # requests of that second wait for a connection, which service time does not see.
    with null_server("--stall-after", "1", "--stall-seconds", "1") as server:
        done = load_test(
            tmp_path, server.url, "--rate", "200", "--arrival", "constant", "--duration", "3",
            "--clients", "4", "--max-connections", "4", "--slo-ms", "300", "--no-charts",
        )  # fmt: skip
    result = only_result(tmp_path)
    figures = result["figures"]
    assert figures["total_requests"] == figures["successful_requests"] == 600
    # 200 requests were due in the stall, the last ones near its end: 10 % waited 0.7 s or more.
    assert figures["p95_latency_ms"] > 500
    assert 900 < figures["max_latency_ms"] < 2000
    # Only the four in flight felt it as service time, 0.7 % of all.
    assert figures["p95_service_ms"] < 200 < 900 < figures["max_service_ms"]
    assert figures["late_for_connection"] > 150
    # Within 300 ms: what was due outside the stall or in its last 0.3 s, about 460 of 600.
    assert 60 < figures["slo_attainment_percent"] < 85
    assert result["settings"]["loop"] == "open"
    assert "Late sends" in done.stdout and "Within 300 ms" in done.stdout


def test_a_closed_loop_hides_the_same_stall(tmp_path):
    with null_server("--stall-after", "0.5", "--stall-seconds", "0.5") as server:
        load_test(tmp_path, server.url, "--clients", "2", "--duration", "1.5", "--no-charts")
    result = only_result(tmp_path)
    figures = result["figures"]
    assert figures["max_latency_ms"] > 400
    assert figures["p99_latency_ms"] < 200
    assert "p99_service_ms" not in figures and result["settings"]["loop"] == "closed"


def test_requests_that_find_no_connection_in_time_fail_and_are_counted(tmp_path):
    with null_server("--stall-after", "0", "--stall-seconds", "1.5") as server:
        load_test(
            tmp_path, server.url, "--rate", "50", "--arrival", "constant", "--duration", "1",
            "--clients", "1", "--max-connections", "1", "--timeout", "0.4", "--no-charts",
            "--warm-up-requests", "0", "--processes", "1",
        )  # fmt: skip
    figures = only_result(tmp_path)["figures"]
    assert figures["total_requests"] == 50
    assert figures["errors"]["not sent in time"] > 0
    assert sum(figures["errors"].values()) == figures["failed_requests"]


def test_charts_can_be_drawn_of_a_single_request_and_of_failures(tmp_path):
    for number, requests in enumerate((SCENE[:1], SCENE)):
        load_report.draw_charts(
            tmp_path / f"latency{number}.png", tmp_path / f"qps{number}.png", requests,
            load_report.request_figures(requests, None), 100.0, 1.0, 3.0,
        )  # fmt: skip
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_timers_of_the_generator_wake_before_the_next_millisecond():
    async def shortest_nap_seconds() -> float:
        naps = []
        for _ in range(50):
            begin = time.monotonic()
            await asyncio.sleep(0.0002)
            naps.append(time.monotonic() - begin)
        return min(naps)

    loop = asyncio.SelectorEventLoop(load_generator._PunctualSelector())
    # epoll alone would let each of them last a whole millisecond or more.
    assert 0.0002 <= loop.run_until_complete(shortest_nap_seconds()) < 0.001
    loop.close()


def test_the_rate_against_a_null_server_is_printed(tmp_path, record_property):
    # A figure to look at, not a floor: what else runs on the machine decides it.
    with null_server() as server:
        flags = ("--duration", "2", "--no-charts", "--processes", "1")
        load_test(tmp_path, server.url, *flags)
    figures = only_result(tmp_path)["figures"]
    record_property("requests_per_second", round(figures["qps"]))
    record_property("generator_cpu_cores", round(figures["generator_cpu_cores"], 2))
    assert (figures["success_rate_percent"], figures["generator_processes"]) == (100, 1)
