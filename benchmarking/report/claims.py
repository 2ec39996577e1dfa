"""What may be called a difference between modes: the statistics of the claims, over plain numbers.

A figure has one positive value a round under each mode. Two modes are compared by the difference of
the means of logarithms, with the larger of their two variances and 2 (n - 1) degrees of freedom: a
pooled variance would claim too much where one mode is ten times as noisy as the other. All pairs of
a report are one family, at 5 % by Holm's rule.

Sources: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
Statistics 6(2), 1979; Student's t see `metrics/estimates.py`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.metrics.estimates import (
    MIN_REPEATS_FOR_CLAIM,
    student_t_probability,
    student_t_quantile,
)

FAMILY_ERROR = 0.05
POWER = 0.8
MATTERS_PERCENT = 2.0

WHOLE_CARD = "whole card"

SURE = "sure"
NO_DIFFERENCE = "no difference that matters"
CANNOT_TELL = "cannot tell"
TOO_FEW = "not enough rounds"
NOT_MEASURED = "not measured"

# Two figures that differ by rounding alone have no spread; this is what a clock can tell.
_LEAST_ERROR = 1e-9

# What a pair holds in the comparison, and is not known of all.
_UNKNOWN = dict.fromkeys(
    ("percent", "verdict", "low", "high", "p_value", "adjusted_p_value", "better",
     "smallest_shown_percent")
)  # fmt: skip

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A figure of the family: its values over rounds by mode, and which way is better."""

    values: Values
    is_higher_better: bool


@dataclass(frozen=True)
class _Test:
    """Two modes of one figure: the difference of their logarithms, and its standard error."""

    difference: float
    error: float
    degrees: int

    @property
    def p_value(self) -> float:
        return 1 - student_t_probability(abs(self.difference) / self.error, self.degrees)


def judge(
    figures: Sequence[Figure],
    matters_percent: float = MATTERS_PERCENT,
    error_percent: float = 0.0,
) -> list[list[dict[str, Any]]]:
    """Compare every two modes of every figure; all of them are one family.

    A difference within `error_percent`, the error of the method itself, is never sure.

    Returns, for each figure, its pairs as the comparison holds them (`report/comparison.py`).
    """
    tests: list[tuple[_Test, dict[str, Any], int]] = []
    found: list[list[dict[str, Any]]] = [[] for _ in figures]
    for number, figure in enumerate(figures):
        for one, other in itertools.combinations(figure.values, 2):
            pair: dict[str, Any] = {"one": one, "other": other, **_UNKNOWN}
            test = _test([figure.values[one], figure.values[other]])
            if isinstance(test, _Test):
                tests.append((test, pair, number))
            else:
                found[number].append(pair | test)
    tests.sort(key=lambda one: one[0].p_value)
    adjusted = 0.0
    for rank, (test, pair, number) in enumerate(tests):
        left = len(tests) - rank
        adjusted = max(adjusted, min(1.0, left * test.p_value))
        is_beyond = abs(test.difference) > math.log1p(error_percent / 100)
        is_sure = adjusted <= FAMILY_ERROR and is_beyond
        pair |= _interval(test, FAMILY_ERROR / left, matters_percent, is_sure=is_sure)
        if pair["verdict"] == SURE:
            is_one = (test.difference > 0) == figures[number].is_higher_better
            pair["better"] = pair["one"] if is_one else pair["other"]
        found[number].append(pair | {"adjusted_p_value": adjusted})
    return found


def _test(both: Sequence[Sequence[float]]) -> _Test | dict[str, Any]:
    """The test of two modes' values, or what is said of them where there is none."""
    fewest = min(map(len, both))
    if not fewest or not all(0 < value < math.inf for value in itertools.chain(*both)):
        return {"verdict": CANNOT_TELL}
    logs = [[math.log(value) for value in side] for side in both]
    difference = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if fewest < MIN_REPEATS_FOR_CLAIM:
        return {"verdict": TOO_FEW, "percent": _percent(difference)}
    variance = max(map(statistics.variance, logs))
    error = math.sqrt(variance * sum(1 / len(side) for side in logs))
    return _Test(difference, max(error, _LEAST_ERROR), 2 * (fewest - 1))


def _interval(
    test: _Test, level: float, matters_percent: float, *, is_sure: bool
) -> dict[str, Any]:
    """The difference with its interval; `level` is what Holm's rule holds its p-value against."""
    half = student_t_quantile(0.95, test.degrees) * test.error
    # To be found in so many of 100 reports, a difference must lie so far beyond the level.
    needed = student_t_quantile(1 - level, test.degrees)
    needed += student_t_quantile(2 * POWER - 1, test.degrees)
    is_alike = abs(test.difference) + half <= math.log1p(matters_percent / 100)
    return {
        "percent": _percent(test.difference),
        "verdict": NO_DIFFERENCE if is_alike else SURE if is_sure else CANNOT_TELL,
        "low": _percent(test.difference - half),
        "high": _percent(test.difference + half),
        "p_value": test.p_value,
        "smallest_shown_percent": _percent(needed * test.error),
    }


def _percent(difference: float) -> float:
    return 100 * math.expm1(min(difference, 100.0))


def verdict_of(
    best: str, others: Sequence[str], pairs: Sequence[Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """The verdict on the best of several modes, and which others are not surely worse."""
    with_best = {
        pair["other"] if pair["one"] == best else pair["one"]: pair
        for pair in pairs
        if best in (pair["one"], pair["other"])
    }
    against = {other: with_best[other] for other in others}
    tied = [name for name, pair in against.items() if pair["better"] != best]
    verdicts = {against[name]["verdict"] for name in tied}
    if not tied:
        return SURE, tied
    for verdict in (TOO_FEW, CANNOT_TELL):
        if verdict in verdicts:
            return verdict, tied
    return NO_DIFFERENCE, tied
