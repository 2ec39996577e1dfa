"""Figures over rounds: a center, a spread, the raw values; and Student's t.

Source of Student's t: M. Abramowitz and I. Stegun, "Handbook of Mathematical Functions", 26.7.3 and
26.7.4.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarking.metrics.scores import difference_percent

# Where a claim compares modes; under three there is a range, but no interval.
MIN_REPEATS_FOR_CLAIM = 3


@dataclass(frozen=True)
class Estimate:
    """A figure over rounds: its center, its interval or range, and its value in each."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    is_interval: bool = False

    @property
    def repeats(self) -> int:
        """How many rounds it rests on."""
        return len(self.values)

    def map(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of a figure that rises, or falls, with this one."""
        low, high = sorted((change(self.low), change(self.high)))
        raw = tuple(map(change, self.values))
        return Estimate(change(self.mean), low, high, raw, self.is_interval)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Geometric mean of the known, positive values with its interval; `None` without any.

    From three values on the interval is Student's t on the logarithms (df = n - 1), at 95 %; ratios
    are skewed, their logarithms less so. Under three it is only the range of the values. Of
    infinite values among finite ones the logarithms have no bounded spread: the interval is all
    that is positive.
    """
    known = tuple(value for value in values if value is not None and value > 0)
    if not known:
        return None
    is_interval = len(known) >= MIN_REPEATS_FOR_CLAIM
    low, high = min(known), max(known)
    if high == math.inf:
        low = 0.0 if is_interval and low < math.inf else low
        return Estimate(high, low, high, known, is_interval)
    logs = [math.log(value) for value in known]
    center = statistics.fmean(logs)
    if not is_interval:
        mean = min(max(math.exp(center), low), high)  # exp(log(x)) is not always x
        return Estimate(mean, low, high, known)
    half = student_t_quantile(0.95, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Estimate(
        math.exp(center), math.exp(center - half), math.exp(center + half), known, is_interval
    )


def excess_percent(ratio: Estimate | None) -> Estimate | None:
    """By how much a ratio lies over 1, in percent: 3.0 for 1.03."""
    return ratio and ratio.map(lambda value: difference_percent(1.0, value))


def range_estimate(values: Iterable[float | None]) -> Estimate | None:
    """Median and plain range of the known values: for figures of which a mean means nothing.

    The range of two or more repeats stands for their spread whatever their number.
    """
    known = tuple(value for value in values if value is not None)
    if not known:
        return None
    return Estimate(statistics.median(known), min(known), max(known), known)


@functools.cache
def student_t_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """The `t` with `P(|T| <= t) = confidence` (two-sided): 4.303 for 0.95 and 2 degrees.

    Found by bisection over the exact probability.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(200):  # more halvings than a double has digits
        middle = (low + high) / 2
        t = math.sqrt(degrees_of_freedom) * math.tan(middle)
        if student_t_probability(t, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan((low + high) / 2)


def student_t_probability(t: float, degrees_of_freedom: int) -> float:
    """`P(|T| <= t)` for Student's t with whole degrees of freedom, exactly.

    26.7.3 (odd) and 26.7.4 (even): a finite sum of powers of the cosine of
    `theta = atan(t / sqrt(df))`.
    """
    theta = math.atan(t / math.sqrt(degrees_of_freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees_of_freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for step in range(1, degrees_of_freedom // 2 + 1):
        total += term
        ratio = 2 * step / (2 * step + 1) if odd else (2 * step - 1) / (2 * step)
        term *= ratio * cosine * cosine
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
