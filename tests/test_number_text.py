"""Numbers in texts: digits, units, no powers of ten."""

from __future__ import annotations

import pytest

from benchmarking.metrics import number_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.2804, "0.280"), (4.4, "4.40"), (9.996, "10.0"), (12.71, "12.7"),
        (-11.599, "-11.6"), (99.98, "100"), (999.6, "1,000"), (12833.4, "12,833"),
        (0.000123, "0.000123"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_three_significant_digits_and_never_an_exponent(value, text):
    assert number_text.significant(value) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (2.77, "2.77 ms"),
        (999.4, "999 ms"),
        (999.6, "1.00 s"),
        (13039.6, "13.0 s"),
        (float("inf"), "∞"),
    ],
)
def test_a_duration_is_in_seconds_from_a_thousand_milliseconds_on(milliseconds, text):
    assert number_text.duration(milliseconds) == text


def test_durations_share_a_unit_only_where_it_is_the_same():
    assert number_text.durations([12833.0, 13036.3, 13039.6]) == "12.8 / 13.0 / 13.0 s"
    assert number_text.durations([6.52, 9.18, 12.7]) == "6.52 / 9.18 / 12.7 ms"
    assert number_text.durations([500, 1500]) == "500 ms / 1.50 s"


def test_names_are_listed_as_in_a_sentence():
    assert number_text.joined(["MPS"]) == "MPS"
    assert number_text.joined(["MPS", "MIG"]) == "MPS and MIG"
    assert number_text.joined(["MPS", "MIG", "time slicing"]) == "MPS, MIG and time slicing"
