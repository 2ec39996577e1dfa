"""What a span of samples says of the card: the `gpu` of a co-run's record. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarking.records.types import GpuFigures, Sample

# A GPU that has nothing to do lowers its clock too; NVML lists that among the reasons, but it is
# no throttling.
NOT_THROTTLING = frozenset({"gpu_idle"})
# The fields of a sample whose mean over the window is told.
MEANS = (
    "utilization_gpu_percent", "sm_activity_percent", "sm_occupancy_percent",
    "tensor_activity_percent", "dram_activity_percent", "power_draw_watts", "sm_clock_mhz",
    "host_cpu_percent",
)  # fmt: skip
# Energy is told only where the counter was read over at least this part of the window.
ENERGY_COVERAGE = 0.9
# The sampler takes ten samples a second; between two further apart than this there is a hole.
HOLE_SECONDS = 1.0


def summarize_samples(
    samples: Sequence[Sample], start_seconds: float, end_seconds: float
) -> GpuFigures:
    """Return the figures of one GPU between two moments on CLOCK_MONOTONIC.

    `samples` are in the order of time. The figures are the means of `MEANS`, the largest
    `memory_used_mib_max` and `temperature_celsius_max`, `energy_joules` over the window from the
    counter (and the power as these over its seconds), the sorted `throttle_reasons` of the whole
    window, and how much of it the samples cover. Unknown is None.

    A sample's percentages describe the time since the sample before, so each counts as much as that
    time overlaps the window.
    """
    inside = [s for s in samples if start_seconds <= s.time_seconds <= end_seconds]
    weights = _overlaps([s.time_seconds for s in samples], start_seconds, end_seconds)
    counted = [sample for sample, weight in zip(samples, weights, strict=True) if weight]
    sources = {s.utilization_source for s in counted if s.utilization_source is not None}
    reasons = [s.throttle_reasons for s in inside if s.throttle_reasons is not None]
    temperatures = [s.temperature_celsius for s in inside if s.temperature_celsius is not None]
    joules = energy_between(samples, start_seconds, end_seconds)
    means = {name: _weighted_mean([getattr(s, name) for s in samples], weights) for name in MEANS}
    if joules is not None:  # NVML's power is a trailing mean, which begins before the window
        means["power_draw_watts"] = joules / (end_seconds - start_seconds)
    return GpuFigures(
        **means,
        utilization_source="+".join(sorted(sources)) or None,
        memory_used_mib_max=max(
            (s.memory_used_mib for s in inside if s.memory_used_mib is not None), default=None
        ),
        energy_joules=joules,
        temperature_celsius_max=max(temperatures, default=None),
        coverage_percent=_coverage_percent(samples, start_seconds, end_seconds),
        throttle_reasons=sorted({*itertools.chain(*reasons)} - NOT_THROTTLING) if reasons else None,
    )


def _coverage_percent(samples: Sequence[Sample], start: float, end: float) -> float | None:
    """Return for how much of a span there are samples no further apart than `HOLE_SECONDS`."""
    times = [s.time_seconds for s in samples]
    if len(times) < 2 or end <= start:
        return None
    covered = sum(
        max(0.0, min(later, end) - max(earlier, start))
        for earlier, later in itertools.pairwise(times)
        if later - earlier <= HOLE_SECONDS
    )
    return 100 * covered / (end - start)


def energy_between(
    samples: Sequence[Sample], start_seconds: float, end_seconds: float
) -> float | None:
    """Return the joules that a counter gained between two moments.

    The counter is interpolated between its readings. Where the readings end up to 10 % short of
    the window, the missing rest is taken at the mean power of what was seen. None where there are
    fewer readings, or where the counter ran backwards (the driver was loaded anew).
    """
    points = [(s.time_seconds, s.energy_joules) for s in samples if s.energy_joules is not None]
    if len(points) < 2 or end_seconds <= start_seconds:
        return None
    start, end = max(start_seconds, points[0][0]), min(end_seconds, points[-1][0])
    coverage = (end - start) / (end_seconds - start_seconds)
    runs_backwards = any(
        later[1] < earlier[1]
        for earlier, later in itertools.pairwise(points)
        if later[0] > start and earlier[0] < end
    )
    if coverage < ENERGY_COVERAGE or runs_backwards:
        return None
    return (_interpolate(points, end) - _interpolate(points, start)) / coverage


def _overlaps(times: Sequence[float], start: float, end: float) -> list[float]:
    """Return how many seconds of the time before each sample lie in the window.

    The first sample has no predecessor and is taken to stand for as long as the second.
    """
    if len(times) == 1:
        return [1.0 if start <= times[0] <= end else 0.0]
    previous = [2 * times[0] - times[1], *times[:-1]] if times else []
    return [
        max(0.0, min(time, end) - max(before, start))
        for before, time in zip(previous, times, strict=True)
    ]


def _weighted_mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    pairs = [
        (value, weight)
        for value, weight in zip(values, weights, strict=True)
        if value is not None and weight > 0
    ]
    if not pairs:
        return None
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _interpolate(points: Sequence[tuple[float, float]], time: float) -> float:
    """Return the counter at a moment within the readings."""
    for (time_a, value_a), (time_b, value_b) in itertools.pairwise(points):
        if time_a <= time <= time_b:
            return value_a + (value_b - value_a) * (time - time_a) / (time_b - time_a)
    return points[-1][1]
