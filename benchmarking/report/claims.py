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

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A figure of the family: its values over rounds by mode, and which way is better."""

    values: Values
    is_higher_better: bool


@dataclass(frozen=True)
class _Pair:
    """Two modes of one figure: the difference of their logarithms, and its standard error."""

    figure: int
    one: str
    other: str
    difference: float
    error: float
    degrees: int

    @property
    def p_value(self) -> float:
        return 1 - student_t_probability(abs(self.difference) / self.error, self.degrees)


def judge(
    figures: Sequence[Figure], matters_percent: float = MATTERS_PERCENT
) -> list[list[dict[str, Any]]]:
    """Compare every two modes of every figure; all of them are one family.

    Returns, for each figure, its pairs as the comparison holds them (`report/comparison.py`).
    """
    pairs: list[_Pair] = []
    found: list[list[dict[str, Any]]] = [[] for _ in figures]
    for number, figure in enumerate(figures):
        for one, other in itertools.combinations(figure.values, 2):
            pair = _pair(number, one, other, figure.values)
            if isinstance(pair, _Pair):
                pairs.append(pair)
            else:
                found[number].append(pair)
    for pair, adjusted, level in _holm(pairs):
        figure = figures[pair.figure]
        found[pair.figure].append(_judged(pair, adjusted, level, figure, matters_percent))
    return found


def _pair(number: int, one: str, other: str, values: Values) -> _Pair | dict[str, Any]:
    """The pair, or what is said of it where it cannot be compared."""
    both = [values[one], values[other]]
    fewest = min(map(len, both))
    unknown = dict.fromkeys(
        ("low", "high", "p_value", "adjusted_p_value", "better", "smallest_shown_percent")
    )
    if not fewest or not all(0 < value < math.inf for value in itertools.chain(*both)):
        verdict, percent = CANNOT_TELL, None
        return {"one": one, "other": other, "percent": percent, "verdict": verdict, **unknown}
    logs = [[math.log(value) for value in side] for side in both]
    difference = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if fewest < MIN_REPEATS_FOR_CLAIM:
        percent = _percent(difference)
        return {"one": one, "other": other, "percent": percent, "verdict": TOO_FEW, **unknown}
    variance = max(map(statistics.variance, logs))
    error = math.sqrt(variance * sum(1 / len(side) for side in logs))
    return _Pair(number, one, other, difference, max(error, _LEAST_ERROR), 2 * (fewest - 1))


def _holm(pairs: Sequence[_Pair]) -> list[tuple[_Pair, float, float]]:
    """The pairs with their adjusted p-values and the level that each was held against."""
    ordered = sorted(pairs, key=lambda pair: pair.p_value)
    adjusted, judged = 0.0, []
    for rank, pair in enumerate(ordered):
        left = len(ordered) - rank
        adjusted = max(adjusted, min(1.0, left * pair.p_value))
        judged.append((pair, adjusted, FAMILY_ERROR / left))
    return judged


def _judged(
    pair: _Pair, adjusted: float, level: float, figure: Figure, matters_percent: float
) -> dict[str, Any]:
    half = student_t_quantile(0.95, pair.degrees) * pair.error
    low, high = _percent(pair.difference - half), _percent(pair.difference + half)
    # To be found in so many of 100 reports, a difference must lie so far beyond the level.
    needed = student_t_quantile(1 - level, pair.degrees)
    needed += student_t_quantile(2 * POWER - 1, pair.degrees)
    if abs(pair.difference) + half <= math.log1p(matters_percent / 100):
        verdict = NO_DIFFERENCE
    else:
        verdict = SURE if adjusted <= FAMILY_ERROR else CANNOT_TELL
    is_one = (pair.difference > 0) == figure.is_higher_better
    return {
        "one": pair.one,
        "other": pair.other,
        "percent": _percent(pair.difference),
        "verdict": verdict,
        "low": low,
        "high": high,
        "p_value": pair.p_value,
        "adjusted_p_value": adjusted,
        "better": (pair.one if is_one else pair.other) if verdict == SURE else None,
        "smallest_shown_percent": _percent(needed * pair.error),
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
