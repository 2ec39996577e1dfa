"""The guide's ranges: what they say and how values are judged against them."""

from __future__ import annotations

import pytest

from benchmarking.analysis import expectations


def only(found: list[expectations.Expectation], quantity: str) -> expectations.Expectation:
    """The one expectation of that quantity."""
    (match,) = [expectation for expectation in found if expectation.quantity == quantity]
    return match


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(59.9, "below"), (60, "inside"), (100, "inside"), (120, "inside"), (120.1, "above")],
)
def test_a_value_is_inside_below_or_above_and_the_ends_are_inside(value, verdict):
    assert (
        only(expectations.for_workload("resnet_training"), "epoch_seconds").compare(value)
        == verdict
    )


def test_migs_zero_overhead_is_interference_and_is_read_as_a_whole_number():
    overhead = only(expectations.for_mode("mig"), "interference_overhead_percent")
    assert overhead.range_text == "0 %"
    assert overhead.compare(0.4) == overhead.compare(-0.4) == "inside"
    assert overhead.compare(3) == "above"
    assert "own instance" in overhead.note
    assert not [e for e in expectations.for_mode("mig") if e.quantity == "overhead_percent"]


@pytest.mark.parametrize(
    ("mode", "success", "overhead", "utilization"),
    [
        ("time-slicing", "90-100 %", "10-30 %", "80-95 %"),
        ("mps", "95-100 %", "5-15 %", "85-95 %"),
        ("mig", "100 %", "0 %", "60-70 %"),
    ],
)
def test_every_mode_has_the_guides_three_ranges(mode, success, overhead, utilization):
    texts = [expectation.range_text for expectation in expectations.for_mode(mode)]
    assert texts == [success, overhead, utilization]


def test_batch_inference_is_judged_by_its_own_batch_size():
    thirty_two = expectations.for_workload("batch_inference", batch_size=32)
    assert only(thirty_two, "mean_latency_ms").range_text == "30-50 ms"
    one = expectations.for_workload("batch_inference", batch_size=1)
    assert only(one, "mean_latency_ms").range_text == "5-10 ms"
    unusual = expectations.for_workload("batch_inference", batch_size=7)
    assert [e.quantity for e in unusual if e.batch_size is not None] == []
    assert only(unusual, "memory_used_gb").range_text == "2-4 GB"


def test_unknown_subjects_have_no_ranges():
    assert expectations.for_workload("my_own_job") == []
    assert expectations.for_mode("exclusive") == []


def test_every_range_is_ordered_and_says_where_it_comes_from():
    everything = (
        expectations.WORKLOAD_EXPECTATIONS
        + expectations.MODE_EXPECTATIONS
        + expectations.SUITE_EXPECTATIONS
    )
    assert len(everything) > 40
    for expectation in everything:
        assert expectation.low <= expectation.high, expectation
        assert expectation.where, expectation
        assert expectation.unit, expectation
    named = [(e.subject, e.quantity, e.batch_size) for e in everything]
    assert len(named) == len(set(named))
