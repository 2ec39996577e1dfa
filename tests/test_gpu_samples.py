"""The figures of a window, against values worked out by hand."""

from __future__ import annotations

import pytest

from benchmarking.hardware.gpu_samples import energy_between, summarize_samples
from benchmarking.records.types import GpuFigures, Sample


def sample(time_seconds: float, **fields: object) -> Sample:
    return Sample(time_seconds=time_seconds, **fields)


def energy_line(*points: tuple[float, float]) -> list[Sample]:
    return [sample(time, energy_joules=joules) for time, joules in points]


def test_without_samples_every_figure_is_unknown() -> None:
    assert summarize_samples([], 0, 1) == GpuFigures()


def test_unknown_fields_stay_unknown_and_do_not_become_zero() -> None:
    samples = [
        sample(t, utilization_gpu_percent=None, power_draw_watts=None, memory_used_mib=None,
               energy_joules=None, throttle_reasons=None, host_cpu_percent=10.0)
        for t in (0.0, 1.0, 2.0)
    ]  # fmt: skip
    assert summarize_samples(samples, 0, 2) == GpuFigures(
        host_cpu_percent=10.0, coverage_percent=100.0
    )


def test_a_hole_in_the_samples_is_told() -> None:
    samples = [sample(t) for t in (0.0, 1.0, 2.0, 5.0, 6.0)]
    assert summarize_samples(samples, 1.0, 6.0).coverage_percent == pytest.approx(40.0)


def test_power_is_joules_over_seconds_where_there_is_a_counter() -> None:
    # NVML's own figure is a mean over a time that began before the window.
    samples = [sample(t, power_draw_watts=100.0, energy_joules=300.0 * t) for t in (0.0, 1.0, 2.0)]
    assert summarize_samples(samples, 0.5, 2.0).power_draw_watts == pytest.approx(300.0)


def test_a_percentage_counts_for_the_time_before_its_sample() -> None:
    # The window 0.5..2.0 overlaps the second before 1.0 by half, the second before 2.0 wholly.
    samples = [sample(t, sm_activity_percent=v) for t, v in ((0, 7.0), (1, 40.0), (2, 70.0))]
    summary = summarize_samples(samples, 0.5, 2.0)
    assert summary.sm_activity_percent == pytest.approx((0.5 * 40 + 1.0 * 70) / 1.5)


def test_a_null_between_values_is_left_out_of_the_mean() -> None:
    values = ((0, 10.0), (1, 20.0), (2, None), (3, 40.0))
    samples = [sample(t, power_draw_watts=v) for t, v in values]
    assert summarize_samples(samples, 0, 3).power_draw_watts == pytest.approx(30.0)


def test_memory_is_the_maximum_inside_the_window_only() -> None:
    samples = [
        sample(t, memory_used_mib=v) for t, v in ((0, 9000.0), (1, 100.0), (2, 300.0), (3, 9999.0))
    ]
    assert summarize_samples(samples, 0.5, 2.5).memory_used_mib_max == 300.0


def test_throttle_reasons_are_united_and_idleness_is_none_of_them() -> None:
    reasons = (["gpu_idle"], ["sw_power_cap"], [], ["hw_slowdown", "sw_power_cap"])
    samples = [sample(t, throttle_reasons=names) for t, names in enumerate(reasons)]
    summary = summarize_samples(samples, 0, 3)
    assert summary.throttle_reasons == ["hw_slowdown", "sw_power_cap"]
    assert summarize_samples(samples[:1], 0, 3).throttle_reasons == []


def test_the_source_of_the_utilization_is_named() -> None:
    samples = [
        sample(0, utilization_gpu_percent=50.0, utilization_source="gpm"),
        sample(1, utilization_gpu_percent=None, utilization_source=None),
    ]
    assert summarize_samples(samples, -1, 1).utilization_source == "gpm"


def test_energy_is_interpolated_between_the_readings_around_the_window() -> None:
    # 100 W until 1.0, then 300 W: half a second of the one and half a second of the other.
    samples = energy_line((0.0, 1000.0), (1.0, 1100.0), (2.0, 1400.0))
    assert energy_between(samples, 0.5, 1.5) == pytest.approx(50 + 150)


def test_energy_of_a_small_missing_rest_is_taken_at_the_mean_power() -> None:
    samples = energy_line((0.0, 0.0), (9.5, 950.0))
    assert energy_between(samples, 0.0, 10.0) == pytest.approx(1000.0)


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0.0, 5.0),),
        ((0.0, 0.0), (5.0, 500.0)),  # half of the window
        ((20.0, 0.0), (25.0, 500.0)),  # all of it after the window
        ((0.0, 900.0), (5.0, 10.0), (10.0, 20.0)),  # the driver was loaded anew
        ((-1.0, 900.0), (1.0, 10.0), (10.0, 20.0)),  # the same across the window's edge
    ],
)
def test_energy_is_unknown_where_the_counter_does_not_tell(points: tuple) -> None:
    assert energy_between(energy_line(*points), 0.0, 10.0) is None
