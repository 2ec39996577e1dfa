"""Figures over repeats: a center, a spread, the raw values, and when two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarking.metrics import intervals, scores

# Where a claim compares modes; under three there is a range, but no interval.
MIN_REPEATS_FOR_CLAIM = 3


@dataclass(frozen=True)
class Estimate:
    """A figure over repeats: its center, its interval or range, its raw values."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    is_interval: bool = False

    @property
    def repeats(self) -> int:
        """How many repeats it rests on."""
        return len(self.values)

    @property
    def spread_name(self) -> str:
        """What `low` and `high` are, in words."""
        if self.repeats == 1:
            return "n = 1"
        return f"{'95 % interval' if self.is_interval else 'range'}, n = {self.repeats}"

    def spread_text(self, write: Callable[[float], str]) -> str:
        """`8.75 ms to 13.8 ms; 95 % interval, n = 3`; without edges where they say nothing."""
        if self.repeats == 1 or math.isinf(self.low):
            return f"n = {self.repeats}"
        return f"{write(self.low)} to {write(self.high)}; {self.spread_name}"

    def text(self, decimals: int = 2, unit: str = "") -> str:
        """`1.95 (1.90 to 2.00; 95 % interval, n = 3)`, or `1.95 (n = 1)`."""
        mean, low, high = (  # the added zero turns "-0" into "0"
            f"{round(value, decimals) + 0.0:.{decimals}f}"
            for value in (self.mean, self.low, self.high)
        )
        if self.repeats < 2:
            return f"{mean}{unit} ({self.spread_name})"
        return f"{mean}{unit} ({low} to {high}; {self.spread_name})"

    def shows_difference_from(self, other: Estimate) -> bool:
        """Whether both rest on enough repeats and their intervals do not overlap.

        Ranges that lie apart show nothing: three repeats of the same often do.
        """
        if min(self.repeats, other.repeats) < MIN_REPEATS_FOR_CLAIM:
            return False
        if not (self.is_interval and other.is_interval):
            return False
        return not self.overlaps(other)

    def overlaps(self, other: Estimate) -> bool:
        """Whether both have a spread at all and the two overlap."""
        if min(self.repeats, other.repeats) < 2:
            return False
        return intervals.intervals_overlap(self._triple, other._triple)

    @property
    def _triple(self) -> tuple[float, float, float]:
        return (self.mean, self.low, self.high)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Geometric mean with interval of the known, positive values; `None` without any."""
    known = tuple(value for value in values if value is not None and value > 0)
    if not known:
        return None
    return Estimate(*intervals.geometric_mean_interval(known), known, is_interval=len(known) >= 3)


def overhead_estimate(stp: Estimate | None) -> Estimate | None:
    """The overhead (percent) that an STP estimate means; high STP is low overhead."""
    if stp is None:
        return None
    of = scores.overhead_percent
    raw = tuple(of(value) for value in stp.values)
    return Estimate(of(stp.mean), of(stp.high), of(stp.low), raw, stp.is_interval)


def excess_percent(ratio: Estimate | None) -> Estimate | None:
    """By how much a ratio lies over 1, in percent: 3.0 for 1.03."""
    if ratio is None:
        return None
    mean, low, high, *raw = (
        scores.difference_percent(1.0, value)
        for value in (ratio.mean, ratio.low, ratio.high, *ratio.values)
    )
    return Estimate(mean, low, high, tuple(raw), ratio.is_interval)


def range_estimate(values: Iterable[float | None]) -> Estimate | None:
    """Median and plain range of the known values: for figures of which a mean means nothing.

    The range of two or more repeats stands for their spread whatever their number.
    """
    known = tuple(value for value in values if value is not None)
    if not known:
        return None
    return Estimate(statistics.median(known), min(known), max(known), known)
