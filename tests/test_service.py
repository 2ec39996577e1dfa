"""An inference service in the comparison: judged by latency and goodput, never by throughput."""

from __future__ import annotations

from copy import deepcopy

import pytest
from compared_runs import change, compare, markdown, mps, sentences, time_slicing

from benchmarking.analysis import export

BOUND_MS = 100.0


def as_service(made: dict, mean_ms: float, missed: int) -> dict:
    """Make the batch inference of a made-up run a service: 10 s windows, 200 answers a run."""

    def edit(record: dict) -> None:
        is_alone = record["phase"] == "baseline"
        ms = 10.0 if is_alone else mean_ms
        record["label"], start = "Inference service", record["window_start_seconds"]
        record["window_end_seconds"] = start + 10
        record["latency_ms"] = [ms] * 190 + [5 * ms] * 10
        units = {"request": {"count": 200, "seconds": 0.24 * ms, "latency": True}}
        if missed and not is_alone:
            units["missed_request"] = {"count": missed, "seconds": 0.0, "latency": False}
        record["units"] = units
        record["figures"] = {
            "request_rate": 20.0, "slo_ms": BOUND_MS, "late_by_generator_percent": 0.2,
            "generator_limited_reason": None,
        }  # fmt: skip
        record["slowdown"] = ms / 10.0

    def without_it(record: dict) -> None:
        record["summary"]["throughput_clients"] = 3

    change(made, edit, record="client", workload="batch_inference")
    return change(made, without_it, record="co_run", phase="co_run")


@pytest.fixture
def compared():
    return compare(
        as_service(deepcopy(time_slicing([4.0, 4.04, 4.08])), mean_ms=15.0, missed=0),
        as_service(deepcopy(mps([2.0, 2.02, 2.04])), mean_ms=40.0, missed=50),
    )


def test_the_mode_of_the_lower_p99_is_advised_where_the_service_matters(compared) -> None:
    text = sentences(compared)
    assert "(3 throughput clients only): choose MPS for throughput" in text
    assert (
        "Inference service beside 3 others (`mixed`): choose time slicing where its p99 latency "
        "matters: 75.0 ms" in text
    )
    assert "against ∞ (n = 3; 20.0 % missed) under MPS" in text


def test_a_mode_that_drops_requests_does_not_win_by_the_speed_of_the_others() -> None:
    compared = compare(
        as_service(deepcopy(time_slicing([4.0, 4.04, 4.08])), mean_ms=40.0, missed=0),
        as_service(deepcopy(mps([2.0, 2.02, 2.04])), mean_ms=15.0, missed=50),
    )
    text = sentences(compared)
    assert (
        "Inference service beside 3 others (`mixed`): choose time slicing where its p99 latency "
        "matters: 200 ms" in text
    )
    rows = [line for line in markdown(compared).splitlines() if "1: Inference service" in line]
    assert any("| ∞ |" in row and row.startswith("| MPS") for row in rows)
    assert '"p99": null' in export.json_text(compared)


def test_few_requests_are_judged_by_the_median_in_which_missed_ones_count() -> None:
    def few(record: dict) -> None:
        record["latency_ms"] = record["latency_ms"][:30]

    runs = [
        as_service(deepcopy(made), mean_ms=ms, missed=missed)
        for made, ms, missed in (
            (time_slicing([4.0, 4.04, 4.08]), 40.0, 0), (mps([2.0, 2.02, 2.04]), 15.0, 50),
        )
    ]  # fmt: skip
    for run in runs:
        change(run, few, record="client", workload="batch_inference")
    assert "choose time slicing where its median latency matters" in sentences(compare(*runs))


def test_what_was_missed_counts_against_the_bound_and_not_for_goodput(compared) -> None:
    text = sentences(compared)
    # 190 of 250 within 100 ms, in 10 s.
    assert (
        "76.0 % of requests within 100 ms, a goodput of 19.0 of 20.0 requests a second offered"
        in text
    )
    assert "100.0 % of requests within 100 ms, a goodput of 20.0 of 20.0" in text


def test_the_report_has_the_service_alone_and_under_each_mode(compared) -> None:
    text = markdown(compared)
    (bullet,) = [line for line in text.splitlines() if line.startswith("- MPS, mixed, 4 clients:")]
    assert bullet.endswith("are of the throughput clients only: 3")
    assert "### Inference service" in text
    rows = [line for line in text.splitlines() if "1: Inference service" in line]
    together = [row for row in rows if "20.0 | " in row and "clients |" in row]
    assert len(together) == 2
    assert any("| 4.00 " in row and "| 150 |" in row for row in together)


def test_a_report_without_a_service_has_no_such_chapter() -> None:
    assert "### Inference service" not in markdown(compare(mps([2.0])))
