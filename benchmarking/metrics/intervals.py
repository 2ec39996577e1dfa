"""Intervals over repeats: pure functions over plain numbers.

Source: M. Abramowitz and I. Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4
(Student's t).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def student_t_probability(t: float, degrees_of_freedom: int) -> float:
    """`P(|T| <= t)` for Student's t with whole degrees of freedom, exactly.

    Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even): a finite sum of powers of the cosine of
    `theta = atan(t / sqrt(df))`. Raises `ValueError` under one degree of freedom.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees of freedom must be 1 or more, not {degrees_of_freedom}")
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


def student_t_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """The `t` with `P(|T| <= t) = confidence` (two-sided): 4.303 for 0.95 and 2 degrees.

    Found by bisection over the exact probability. Raises `ValueError` when `confidence` is not
    between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(200):  # more halvings than a double has digits
        middle = (low + high) / 2
        t = math.sqrt(degrees_of_freedom) * math.tan(middle)
        if student_t_probability(t, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan((low + high) / 2)


def geometric_mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Geometric mean of repeats with its interval: `(mean, low, high)`.

    From three values on the interval is Student's t on the logarithms (df = n - 1); ratios are
    skewed, their logarithms less so. Under three it is only the range of the values. Of infinite
    values among finite ones the logarithms have no bounded spread: the interval is all that is
    positive. Raises `ValueError` without values, or when one is not positive.
    """
    if not values or any(not value > 0 for value in values):
        raise ValueError(f"a geometric mean needs positive values, not {list(values)}")
    if math.inf in values:
        low = min(values) if len(values) < 3 or min(values) == math.inf else 0.0
        return math.inf, low, math.inf
    logs = [math.log(value) for value in values]
    center = statistics.fmean(logs)
    if len(logs) < 3:
        low, high = min(values), max(values)
        return min(max(math.exp(center), low), high), low, high  # exp(log(x)) is not always x
    half = student_t_quantile(confidence, len(logs) - 1) * statistics.stdev(logs)
    half /= math.sqrt(len(logs))
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def intervals_overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether two `(mean, low, high)` intervals share a point: then no difference is shown."""
    return one[1] <= other[2] and other[1] <= one[2]
