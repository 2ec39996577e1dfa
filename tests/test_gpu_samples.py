"""The figures of a window, against values worked out by hand."""

from __future__ import annotations

import pytest

from benchmarking.hardware.gpu_samples import energy_between, summarize_samples
from benchmarking.records.types import GpuFigures, Sample


def samples(field: str, *points: tuple[float, object], **more: object) -> list[Sample]:
    return [Sample(time_seconds=time, **{field: value, **more}) for time, value in points]


def test_what_is_unknown_stays_unknown_and_does_not_become_zero() -> None:
    assert summarize_samples([], 0, 1) == GpuFigures()
    unknown = dict.fromkeys(
        ("utilization_gpu_percent", "power_draw_watts", "memory_used_mib", "energy_joules",
         "throttle_reasons")
    )  # fmt: skip
    seen = samples("host_cpu_percent", (0, 10.0), (1, 10.0), (2, 10.0), **unknown)
    assert summarize_samples(seen, 0, 2) == GpuFigures(
        host_cpu_percent=10.0, coverage_percent=100.0
    )


# A percentage counts for the time before its sample: the window 0.5..2.0 overlaps the second before
# 1.0 by half, the second before 2.0 wholly.
@pytest.mark.parametrize(
    ("field", "points", "window", "figure", "expected"),
    [
        ("sm_activity_percent", ((0, 7.0), (1, 40.0), (2, 70.0)), (0.5, 2.0),
         "sm_activity_percent", (0.5 * 40 + 1.0 * 70) / 1.5),
        # a null between values is left out of the mean
        ("power_draw_watts", ((0, 10.0), (1, 20.0), (2, None), (3, 40.0)), (0, 3),
         "power_draw_watts", 30.0),
        # of memory the maximum inside the window only
        ("memory_used_mib", ((0, 9000.0), (1, 100.0), (2, 300.0), (3, 9999.0)), (0.5, 2.5),
         "memory_used_mib_max", 300.0),
        # a hole in the samples is told
        ("host_cpu_percent", tuple((t, 1.0) for t in (0, 1, 2, 5, 6)), (1.0, 6.0),
         "coverage_percent", 40.0),
        # reasons are united, and idleness is none of them
        ("throttle_reasons", ((0, ["gpu_idle"]), (1, ["sw_power_cap"]), (2, []),
                              (3, ["hw_slowdown", "sw_power_cap"])), (0, 3),
         "throttle_reasons", ["hw_slowdown", "sw_power_cap"]),
        ("throttle_reasons", ((0, ["gpu_idle"]),), (0, 3), "throttle_reasons", []),
        ("utilization_source", ((0, "gpm"), (1, None)), (-1, 1), "utilization_source", "gpm"),
    ],
)  # fmt: skip
def test_a_windows_figure_comes_from_the_samples_in_it(
    field: str, points: tuple, window: tuple, figure: str, expected: object
) -> None:
    found = getattr(summarize_samples(samples(field, *points), *window), figure)
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_power_is_joules_over_seconds_where_there_is_a_counter() -> None:
    # NVML's own figure is a mean over a time that began before the window.
    points = ((0.0, 0.0), (1.0, 300.0), (2.0, 600.0))
    seen = samples("energy_joules", *points, power_draw_watts=100.0)
    assert summarize_samples(seen, 0.5, 2.0).power_draw_watts == pytest.approx(300.0)


@pytest.mark.parametrize(
    ("points", "window", "joules"),
    [
        # 100 W until 1.0, then 300 W: half a second of the one and half a second of the other
        (((0.0, 1000.0), (1.0, 1100.0), (2.0, 1400.0)), (0.5, 1.5), 50.0 + 150.0),
        # a small missing rest is taken at the mean power
        (((0.0, 0.0), (9.5, 950.0)), (0.0, 10.0), 1000.0),
        ((), (0.0, 10.0), None),
        (((0.0, 5.0),), (0.0, 10.0), None),
        (((0.0, 0.0), (5.0, 500.0)), (0.0, 10.0), None),  # half of the window
        (((20.0, 0.0), (25.0, 500.0)), (0.0, 10.0), None),  # all of it after the window
        # the driver was loaded anew, in the window and across its edge
        (((0.0, 900.0), (5.0, 10.0), (10.0, 20.0)), (0.0, 10.0), None),
        (((-1.0, 900.0), (1.0, 10.0), (10.0, 20.0)), (0.0, 10.0), None),
    ],
)
def test_energy_is_interpolated_between_readings_and_unknown_where_the_counter_does_not_tell(
    points: tuple, window: tuple[float, float], joules: float | None
) -> None:
    found = energy_between(samples("energy_joules", *points), *window)
    assert found == (None if joules is None else pytest.approx(joules))
