"""The load test's arithmetic by hand, and an open loop against a server with a scripted stall."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT_ROOT

from workloads.inference import load_charts, load_generator
from workloads.inference.load_figures import (
    Requests,
    generator_limit,
    latency_figures,
    open_loop_figures,
    outcome_figures,
    slo_attainment_percent,
)
from workloads.inference.load_messages import WorkerPlan
from workloads.inference.load_schedule import arrival_offsets, split

SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "load_test.py"
NULL_SERVER = PROJECT_ROOT / "tests" / "fakes" / "null_server.py"
NAN = float("nan")


@contextmanager
def null_server(*arguments: str) -> Iterator[str]:
    process = subprocess.Popen(
        (sys.executable, str(NULL_SERVER), *arguments), stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def load_test(folder: Path, url: str, *arguments: str) -> tuple[dict, str]:
    """Run the real script and return its result and its summary."""
    done = subprocess.run(
        (sys.executable, str(SCRIPT), "--server", url, "--results-dir", str(folder), *arguments),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("load_test_*.json")
    return json.loads(path.read_text()), done.stdout


def requests_of(*rows: tuple[float, float, float, float, float]) -> Requests:
    return Requests.of(np.array(rows, dtype=np.float64))


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


def test_latency_counts_from_the_intended_send_and_service_time_from_the_actual_one():
    assert SCENE.latency_seconds[:4] == pytest.approx([0.0102, 0.02, 0.11, 0.02])
    assert SCENE.service_seconds[:4] == pytest.approx([0.01, 0.02, 0.0096, 0.017])
    assert np.isnan(SCENE.service_seconds[5])


def test_requests_that_failed_or_were_never_sent_count():
    assert outcome_figures(SCENE) == {
        "total_requests": 6,
        "successful_requests": 4,
        "failed_requests": 2,
        "success_rate_percent": pytest.approx(100 * 4 / 6),
    }


@pytest.mark.parametrize(
    ("slo_ms", "met"), [(5.0, 0), (15.0, 1), (50.0, 3), (200.0, 4), (5000.0, 4)]
)
def test_slo_attainment_is_a_share_of_all_intended_requests(slo_ms, met):
    assert slo_attainment_percent(SCENE, slo_ms) == pytest.approx(100 * met / 6)


def test_late_sends_are_told_apart_by_whose_fault_they_were():
    figures = open_loop_figures(SCENE, start_seconds=100.0, duration_seconds=0.4)
    assert figures == {
        "offered_rate": pytest.approx(15.0),
        "achieved_rate": pytest.approx(5 / 0.4),
        "late_sends": 3,
        "late_for_connection": 2,
        "late_by_generator": 1,
        "late_by_generator_percent": pytest.approx(100 / 6),
    }


def test_percentiles_are_of_raw_values_and_unknown_without_any():
    figures = latency_figures(np.arange(1001) / 1e3, "latency")
    ranks = ("p50", "p90", "p95", "p99", "p99_9", "max")
    assert [figures[f"{rank}_latency_ms"] for rank in ranks] == pytest.approx(
        [500, 900, 950, 990, 999, 1000]
    )
    assert set(latency_figures(np.array([]), "service").values()) == {None}


def test_percentiles_over_processes_are_of_the_merged_values():
    measured = load_generator.Measured()
    fast = [(i, i, i, i + 0.001, 1) for i in range(99)]
    measured.records = [np.array(fast), np.array([(0.5, 0.5, 0.5, 1.5, 1)])]
    merged = Requests.of(measured.table())
    assert list(merged.intended[:3]) == [0.0, 0.5, 1.0]
    # The average of both processes' medians would be 500 ms.
    assert latency_figures(merged.latency_seconds, "latency")["p50_latency_ms"] == pytest.approx(1)


def test_the_generator_is_flagged_for_lateness_and_for_want_of_processor_time():
    assert generator_limit(None, 50.0) is None
    assert generator_limit(0.9, 89.0) is None
    assert "2.0 % of the requests more than 1 ms late" in generator_limit(2.0, 50.0)
    assert "used 95 % of a core" in generator_limit(None, 95.0)
    assert "late and its busiest process" in generator_limit(2.0, 95.0)


def test_constant_arrivals_are_evenly_spaced_from_the_start():
    assert arrival_offsets(10, "constant", 0.3, seed=1) == pytest.approx([0.0, 0.1, 0.2])
    assert arrival_offsets(10, "constant", 0.35, seed=1) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert list(arrival_offsets(0.1, "constant", 1.0, seed=1)) == [0.0]


def test_poisson_arrivals_have_exponential_gaps_of_the_asked_mean_and_follow_the_seed():
    offsets = arrival_offsets(1000, "poisson", 20, seed=7)
    assert (offsets == arrival_offsets(1000, "poisson", 20, seed=7)).all()
    assert not np.array_equal(offsets, arrival_offsets(1000, "poisson", 20, seed=8))
    gaps = np.diff(offsets)
    assert offsets[0] > 0 and offsets[-1] < 20 and (gaps >= 0).all()
    # 20,000 draws of one fixed seed: mean and standard deviation of an exponential are equal.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)


def test_the_first_poisson_gaps_are_the_seeds_own_draws():
    draws = np.random.default_rng(3).exponential(0.1, 100)
    offsets = arrival_offsets(10, "poisson", 2.0, seed=3)
    assert offsets[:3] == pytest.approx([draws[0], draws[:2].sum(), draws[:3].sum()])


def test_a_plan_is_split_without_losing_a_client_a_thread_or_a_send():
    offsets = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [list(part) for part in split(offsets, 2)] == [[0.0, 0.2, 0.4], [0.1, 0.3]]
    plan = WorkerPlan("http://x/predict", [b""], 5, 9, 1.0, 1.0, 2, None)
    parts = load_generator.split_plan(plan, 2, offsets)
    assert [(part.clients, part.threads) for part in parts] == [(3, 5), (2, 4)]
    assert [list(np.frombuffer(part.offsets)) for part in parts] == [[0, 0.2, 0.4], [0.1, 0.3]]
    assert len(load_generator.split_plan(plan, 8, None)) == 5  # no process without a client


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


def test_a_stall_shows_in_latency_from_the_intended_send_and_not_in_service_time(tmp_path):
    # The server stands still for one of three seconds. Four connections can wait for it; the other
    # requests of that second wait for a connection, which service time does not see.
    with null_server("--stall-after", "1", "--stall-seconds", "1") as url:
        result, said = load_test(
            tmp_path, url, "--rate", "200", "--arrival", "constant", "--duration", "3",
            "--clients", "4", "--max-connections", "4", "--slo-ms", "300", "--no-charts",
        )  # fmt: skip
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
    assert "Late sends" in said and "Within 300 ms" in said


def test_a_closed_loop_hides_the_same_stall(tmp_path):
    with null_server("--stall-after", "0.5", "--stall-seconds", "0.5") as url:
        result, _ = load_test(
            tmp_path, url, "--clients", "2", "--duration", "1.5", "--no-charts"
        )  # fmt: skip
    figures = result["figures"]
    assert figures["max_latency_ms"] > 400
    assert figures["p99_latency_ms"] < 200
    assert "p99_service_ms" not in figures and result["settings"]["loop"] == "closed"


def test_requests_that_find_no_connection_in_time_fail_and_are_counted(tmp_path):
    with null_server("--stall-after", "0", "--stall-seconds", "1.5") as url:
        result, _ = load_test(
            tmp_path, url, "--rate", "50", "--arrival", "constant", "--duration", "1",
            "--clients", "1", "--max-connections", "1", "--timeout", "0.4", "--no-charts",
            "--warm-up-requests", "0", "--processes", "1",
        )  # fmt: skip
    figures = result["figures"]
    assert figures["total_requests"] == 50
    assert figures["errors"]["not sent in time"] > 0
    assert sum(figures["errors"].values()) == figures["failed_requests"]


def test_raw_values_and_charts_lie_beside_the_result_by_hand(tmp_path):
    with null_server() as url:
        result, _ = load_test(tmp_path, url, "--rate", "300", "--duration", "1")
    figures = result["figures"]
    raw = np.load(tmp_path / figures["raw_file"])
    assert len(raw) == figures["total_requests"] and raw["ok"].all()
    assert np.percentile(raw["latency_ms"], 99.9) == pytest.approx(
        figures["p99_9_latency_ms"], rel=1e-3
    )
    assert raw["intended_seconds"] == pytest.approx(
        arrival_offsets(300, "poisson", 1, 42), abs=1e-6
    )
    for chart in ("latency_chart", "qps_chart"):
        assert (tmp_path / figures[chart]).read_bytes().startswith(b"\x89PNG")


def test_charts_can_be_drawn_of_a_single_request_and_of_failures(tmp_path):
    load_charts.draw_latency_histogram(tmp_path / "one.png", np.array([5.0]))
    load_charts.draw_qps_timeline(
        tmp_path / "failed.png", np.array([0.2, 0.9, 1.4]), np.array([True, False, False]), 1.0, 3.0
    )
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--rate", "0"), "0"), (("--arrival", "poisson"), "give its --rate"),
     (("--slo-ms", "-1"), "-1"), (("--processes", "0"), "0")],
)  # fmt: skip
def test_wrong_flags_are_exit_code_2_and_one_sentence(arguments, said):
    done = subprocess.run(
        (sys.executable, str(SCRIPT), *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_rate_against_a_null_server_is_printed(tmp_path, record_property):
    # A figure to look at, not a floor: what else runs on the machine decides it.
    with null_server() as url:
        result, _ = load_test(tmp_path, url, "--duration", "2", "--no-charts", "--processes", "1")
    figures = result["figures"]
    record_property("requests_per_second", round(figures["qps"]))
    record_property("generator_cpu_cores", round(figures["generator_cpu_cores"], 2))
    assert figures["success_rate_percent"] == 100
    assert figures["generator_processes"] == 1
