"""The figures against values worked out by hand."""

from __future__ import annotations

import math

import msgspec
import numpy
import pytest
import recorded_rows

from benchmarking.metrics import estimates, scores
from benchmarking.metrics.breaking_point import breaking_point, saturation_count, sufficient_count
from benchmarking.metrics.estimates import estimate, excess_percent
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures, Summary, Units


def unit(count: int, seconds: float, *, latency: bool = False) -> Units:
    return Units(count=count, seconds=seconds, latency=latency)


def client(job_key: str, units: dict[str, Units], **more: object) -> ClientRecord:
    changes = {"job_key": job_key, "units": units, "latency_ms": None, **more}
    return msgspec.convert(recorded_rows.client("mixed-2-r0", 0, **changes), ClientRecord)


def slowdown(units: dict[str, Units], alone: dict[str, float]) -> float:
    return 1 / scores.normalized_progress(units, alone)


# --- one client -----------------------------------------------------------------------------


def test_with_one_kind_of_unit_progress_is_exactly_t_over_c():
    alone = scores.unit_seconds({"train_step": unit(10, 1.0)})  # T = 0.1 s
    shared = {"train_step": unit(5, 2.0)}  # C = 0.4 s
    assert alone == {"train_step": pytest.approx(0.1)}
    assert scores.normalized_progress(shared, alone) == pytest.approx(0.25)
    assert slowdown(shared, alone) == pytest.approx(4.0)


def test_several_kinds_of_unit_are_weighted_as_they_ran():
    alone = {"train_step": 0.1, "test_step": 0.05}
    shared = {"train_step": unit(20, 4.0), "test_step": unit(10, 2.0)}
    # W = 20 x 0.1 + 10 x 0.05 = 2.5 s alone; D = 4 + 2 = 6 s
    assert scores.normalized_progress(shared, alone) == pytest.approx(2.5 / 6)
    assert slowdown(shared, alone) == pytest.approx(2.4)


def test_progress_is_unknown_without_units_or_without_a_kinds_baseline():
    assert scores.normalized_progress({}, {"train_step": 0.1}) is None
    assert scores.normalized_progress({"train_step": unit(0, 0.0)}, {"train_step": 0.1}) is None
    both = {"train_step": unit(5, 2.0), "test_step": unit(1, 0.1)}
    assert scores.normalized_progress(both, {"train_step": 0.1}) is None


def test_a_kind_that_never_ran_in_the_window_needs_no_baseline():
    shared = {"train_step": unit(5, 1.0), "test_step": unit(0, 0.0)}
    assert scores.normalized_progress(shared, {"train_step": 0.1}) == pytest.approx(0.5)


def test_percentiles_interpolate_between_ranks_as_numpy_does():
    values = [5.0, 1.0, 9.0, 3.0]
    # ordered 1 3 5 9: rank of p50 is 1.5 -> 4; of p95 is 2.85 -> 5 + 0.85 x 4 = 8.4
    figures = scores.percentiles_ms(values)
    assert figures is not None
    assert (figures["p50"], figures["median"], figures["mean"]) == (4.0, 4.0, 4.5)
    assert scores.percentile(values, 95) == pytest.approx(8.4)
    assert (figures["min"], figures["max"]) == (1.0, 9.0)
    assert figures["std"] == pytest.approx(math.sqrt((0.25 + 12.25 + 20.25 + 2.25) / 4))
    for percent in (0, 1, 37.5, 99, 100):
        expected = numpy.percentile(values, percent)
        assert scores.percentile(values, percent) == pytest.approx(expected)


def test_percentiles_of_nothing_are_unknown_and_of_a_wrong_percent_an_error():
    assert scores.percentiles_ms([]) is None
    assert scores.percentiles_ms(None) is None
    with pytest.raises(ValueError, match="at least one value"):
        scores.percentile([], 50)
    with pytest.raises(ValueError, match=r"in 0\.\.100"):
        scores.percentile([1.0], 101)


def test_tail_slowdown_compares_percentiles_of_raw_latencies():
    alone = [10.0] * 495 + [20.0] * 5
    shared = [10.0] * 450 + [40.0] * 50
    assert scores.tail_slowdown(shared, alone, 50) == pytest.approx(1.0)
    # p99 alone: rank 494.01 -> 10 + 0.01 x 10 = 10.1; shared: 40
    assert scores.tail_slowdown(shared, alone, 99) == pytest.approx(40 / 10.1)
    assert scores.tail_slowdown(None, alone, 99) is None
    assert scores.tail_slowdown(shared, [], 99) is None
    assert scores.tail_slowdown(shared, [0.0] * 500, 99) is None


def test_a_percentile_needs_five_responses_beyond_it_and_a_median_one():
    for percent, fewest in ((90, 50), (95, 100), (99, scores.FEWEST_FOR_A_TAIL), (99.9, 5000)):
        assert scores.fewest_responses(percent) == fewest
        enough = [1.0] * fewest
        assert scores.latency_percentile(enough, percent) == 1.0
        assert scores.latency_percentile(enough[1:], percent) is None
        assert scores.tail_slowdown(enough[1:], enough, percent) is None
        assert scores.tail_slowdown(enough, enough[1:], percent) is None
    assert scores.percentiles_ms([2.0])["p50"] == 2.0
    assert scores.percentiles_ms([2.0])["p99"] is None


def test_a_request_that_failed_counts_as_infinitely_late():
    answers = [float(n) for n in range(1, 496)]
    assert scores.latency_percentile(answers, 99, failed=5) == math.inf  # rank 494.01 of 499
    assert scores.latency_percentile([*answers, 496.0] * 2, 99, failed=1) == pytest.approx(492.0)
    assert scores.latency_percentile(answers, 50, failed=495) == math.inf
    assert scores.latency_percentile(None, 99, failed=500) == math.inf
    assert scores.tail_slowdown(answers, [1.0] * 500, 99, failed=5) == math.inf
    assert scores.tail_slowdown([1.0] * 500, answers, 99, failed_alone=5) is None
    assert scores.percentiles_ms(answers, failed=5)["p99"] == math.inf


def test_a_repeat_without_a_bound_leaves_the_interval_none():
    now_and_then = estimate([math.inf, 20.0, 21.0])
    assert (now_and_then.mean, now_and_then.low, now_and_then.high) == (math.inf, 0, math.inf)
    assert estimate([math.inf] * 3).low == math.inf


def test_the_excess_of_a_ratio_keeps_its_interval():
    ratio = estimate([1.02, 1.03, 1.04])
    found = excess_percent(ratio)
    assert found.mean == pytest.approx(100 * (ratio.mean - 1))
    assert (found.low, found.high) == pytest.approx((100 * (ratio.low - 1), 100 * (ratio.high - 1)))
    assert (found.repeats, found.is_interval) == (3, True)
    assert excess_percent(None) is None


# --- all clients of a co-run ----------------------------------------------------------------


def test_overhead_follows_its_definition():
    assert scores.overhead_percent(0.8) == pytest.approx(25.0)
    assert scores.overhead_percent(2.0) == pytest.approx(-50.0)
    assert scores.overhead_percent(None) is None


def test_jain_fairness_is_one_for_equals_and_one_over_n_when_one_takes_all():
    assert scores.jain_fairness([0.25] * 4) == pytest.approx(1.0)
    assert scores.jain_fairness([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert scores.jain_fairness([0.5, 1.0]) == pytest.approx(1.5**2 / (2 * 1.25))
    assert scores.jain_fairness([0.0, 0.0]) is None


def test_energy_ratio_charges_each_unit_its_solo_joules():
    baseline = {"train_step": unit(100, 10.0)}
    solo = scores.solo_energy_joules({"train_step": unit(30, 9.0)}, baseline, 3000.0)
    assert solo == pytest.approx(900.0)  # 30 units x (3000 J / 100 units)
    assert scores.energy_ratio(1350.0, [solo, solo]) == pytest.approx(0.75)


def test_energy_of_several_kinds_is_shared_by_their_seconds_alone():
    baseline = {"train_step": unit(10, 1.0), "test_step": unit(20, 1.0)}
    shared = {"train_step": unit(5, 2.0), "test_step": unit(2, 0.4)}
    # seconds-alone: 5 x 0.1 + 2 x 0.05 = 0.6 of the baseline's 2 s, which took 400 J
    assert scores.solo_energy_joules(shared, baseline, 400.0) == pytest.approx(120.0)


def test_energy_ratio_is_unknown_when_any_part_is():
    assert scores.energy_ratio(None, [1.0]) is None
    assert scores.energy_ratio(10.0, [1.0, None]) is None
    assert scores.energy_ratio(10.0, []) is None
    assert scores.solo_energy_joules({"x": unit(1, 1.0)}, {}, 5.0) is None
    one = {"x": unit(1, 1.0)}
    assert scores.solo_energy_joules(one, one, None) is None


def summary_of_two(**changes: object) -> Summary:
    """Summary of two clients with T/C of 0.5 and 0.25, with the second one's record changed."""
    baselines = {
        "resnet": client("resnet", {"train_step": unit(100, 10.0)}),
        "batch": client("batch", {"batch": unit(1000, 10.0, latency=True)}),
    }
    job = {"index": 0, "start_seconds": 0.0, "end_seconds": 8.0, "duration_seconds": 8.0}
    second = {
        "job_key": "batch",
        "units": {"batch": unit(250, 10.0, latency=True)},
        "jobs": [
            job | {"duration_seconds": 3.0, "in_window": True},
            job | {"duration_seconds": 5.0, "in_window": True},
            job | {"duration_seconds": 99.0, "in_window": False},
        ],
    }
    window = {"window_start_seconds": 5.0, "window_end_seconds": 15.0}
    clients = [
        client(
            "resnet", {"train_step": unit(50, 10.0)}, jobs=[job | {"in_window": True}], **window
        ),
        client(**{**second, **window, **changes}),
    ]
    return scores.summarize_co_run(
        clients,
        baselines,
        GpuFigures(energy_joules=900.0),
        energy_alone_joules={"resnet": 1000.0, "batch": 2000.0},
    )


def test_a_co_run_is_summed_up_from_its_clients():
    summary = summary_of_two()
    assert summary.stp == pytest.approx(0.75)
    assert summary.antt == pytest.approx(3.0)
    assert summary.overhead_percent == pytest.approx(100 / 3)
    assert summary.interference_overhead_percent == pytest.approx(200.0)
    assert summary.fairness == pytest.approx(0.75**2 / (2 * (0.25 + 0.0625)))
    # 50 of 100 steps: 500 J; 250 of 1000 batches: 500 J; together 900 J
    assert summary.energy_ratio == pytest.approx(0.9)
    assert summary.success_rate_percent == 100
    assert summary.average_duration_seconds == pytest.approx((8 + 4) / 2)
    assert summary.total_gpu_time_seconds == pytest.approx(12)


def test_pauses_are_no_work_but_slow_nobody_down():
    half_idle = summary_of_two(units={"batch": unit(125, 5.0, latency=True)})
    assert half_idle.stp == pytest.approx(0.5 + 0.125)
    assert half_idle.antt == pytest.approx(3.0)


def test_a_co_run_with_a_failed_client_is_no_result_of_one_client_fewer():
    summary = summary_of_two(status="oom")
    assert summary.success_rate_percent == 50
    for figure in ("stp", "antt", "overhead_percent", "fairness", "energy_ratio"):
        assert getattr(summary, figure) is None
    assert summary.average_duration_seconds == pytest.approx(8)
    assert summary.total_gpu_time_seconds is None


def test_without_a_baseline_nothing_is_claimed_but_durations_stay():
    summary = summary_of_two(job_key="never measured alone")
    assert summary.stp is None
    assert summary.overhead_percent is None
    assert summary.energy_ratio is None
    assert summary.total_gpu_time_seconds == pytest.approx(12)


def test_clients_at_an_offered_rate_stay_out_of_throughput_figures():
    summary = summary_of_two(units={"request": unit(250, 10.0, latency=True)})
    assert (summary.clients, summary.throughput_clients) == (2, 1)
    assert summary.stp == pytest.approx(0.5)
    assert summary.energy_ratio is None
    # What lasts as long as it was told to says nothing, either.
    assert summary.total_gpu_time_seconds == pytest.approx(8)


def test_failed_requests_are_no_work_but_count_against_the_bound():
    units = {"missed_request": unit(50, 0.0), "request": unit(150, 3.0, latency=True)}
    assert slowdown(units, {"request": 0.01}) == pytest.approx(2.0)
    assert scores.slo_attainment_percent([20.0] * 150, 30.0, failed=50) == pytest.approx(75.0)
    assert scores.slo_attainment_percent([], 30.0, failed=50) == 0


def test_goodput_is_what_was_answered_in_time_over_all_windows():
    answers = [20.0] * 300 + [40.0] * 10
    assert scores.goodput_per_second(answers, 30.0, [10.0, 10.0]) == pytest.approx(15.0)
    assert scores.goodput_per_second(answers, 30.0, [10.0, None]) is None
    assert scores.goodput_per_second([], 30.0, []) is None


def test_interference_under_mig_is_judged_on_the_clients_own_instance():
    whole_gpu = {"resnet": client("resnet", {"train_step": unit(100, 1.0)})}
    instance = {"resnet": client("resnet", {"train_step": unit(100, 6.0)})}
    window = {"window_start_seconds": 1.0, "window_end_seconds": 7.3}
    shared = [client("resnet", {"train_step": unit(100, 6.3)}, mode="mig", **window)]
    without = scores.summarize_co_run(shared, whole_gpu, None)
    assert without.interference_overhead_percent is None
    summary = scores.summarize_co_run(shared, whole_gpu, None, share_baselines=instance)
    assert summary.interference_overhead_percent == pytest.approx(5.0)
    assert summary.stp == pytest.approx(1 / 6.3)


# --- repeats --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "degrees", "table"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 9, 2.262), (0.95, 10, 2.228),
     (0.99, 2, 9.925), (0.99, 5, 4.032), (0.90, 4, 2.132), (0.95, 120, 1.980)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_printed_table(confidence, degrees, table):
    assert estimates.student_t_quantile(confidence, degrees) == pytest.approx(table, abs=5e-4)


def test_t_quantiles_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="degrees of freedom"):
        estimates.student_t_quantile(0.95, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimates.student_t_quantile(95, 2)


def test_three_repeats_give_a_t_interval_on_the_logarithms():
    mean, low, high = estimates.geometric_mean_interval([math.e, math.e**2, math.e**3])
    # logs 1 2 3: mean 2, standard deviation 1; half width 4.30265 / sqrt(3) = 2.48414
    assert mean == pytest.approx(math.e**2)
    assert math.log(low) == pytest.approx(2 - 2.48414, abs=1e-4)
    assert math.log(high) == pytest.approx(2 + 2.48414, abs=1e-4)


def test_under_three_repeats_there_is_only_the_range():
    mean, low, high = estimates.geometric_mean_interval([8.0, 2.0])
    assert (mean, low, high) == (pytest.approx(4.0), 2.0, 8.0)
    assert estimates.geometric_mean_interval([1.02]) == (1.02, 1.02, 1.02)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [1.0, -2.0], [1.0, math.nan]])
def test_a_geometric_mean_needs_positive_values(values):
    with pytest.raises(ValueError, match="positive values"):
        estimates.geometric_mean_interval(values)


# --- stress test ----------------------------------------------------------------------------


def co_run(clients: int, outcome: str = "ok", repeat: int = 0, **more: object) -> CoRunRecord:
    name = f"training-{clients}-r{repeat}"
    changes = {"outcome": outcome, "clients": clients, **more}
    return msgspec.convert(recorded_rows.co_run(name, "co_run", **changes), CoRunRecord)


def members_of(co_run: CoRunRecord, *changes: dict) -> list[ClientRecord]:
    rows = [recorded_rows.client(co_run.co_run, n, **change) for n, change in enumerate(changes)]
    return msgspec.convert(rows, list[ClientRecord])


def test_saturation_is_the_first_count_under_95_percent_of_the_best_so_far():
    assert saturation_count({1: 1.0, 2: 1.6, 4: 1.9, 6: 1.81, 8: 1.7}) == 8
    assert saturation_count({8: 1.7, 4: 1.9, 6: 1.8, 1: 1.0}) == 6
    assert saturation_count({1: 1.0, 2: 0.96, 4: 1.0}) is None
    assert saturation_count({1: 1.0, 2: None, 4: 0.9}) == 4
    assert saturation_count({}) is None


def test_a_ramp_in_which_everything_holds_has_no_breaking_point():
    point = breaking_point([co_run(1), co_run(2), co_run(4)])
    assert point["clients"] is None
    assert (point["last_good_clients"], point["highest_clients_tried"]) == (4, 4)


@pytest.mark.parametrize(
    ("statuses", "criterion"),
    [(["ok", "oom"], "oom"), (["killed", "failed"], "failed"), (["ok", "timeout"], "timeout"),
     (["ok", "killed"], "killed"), (["killed", "oom"], "oom"), ([], "failed")],
)  # fmt: skip
def test_the_breaking_point_names_the_criterion_that_fired(statuses, criterion):
    failed = co_run(4, "failed", reason="client 3 ran out of memory")
    members = members_of(failed, *({"status": status} for status in statuses))
    point = breaking_point([co_run(1), co_run(2), failed], members)
    assert (point["clients"], point["criterion"]) == (4, criterion)
    assert point["detail"] == "client 3 ran out of memory"
    assert point["last_good_clients"] == 2


def test_a_slowdown_past_its_bound_breaks_only_when_a_bound_was_asked_for():
    members = members_of(co_run(4), {"slowdown": 3.5})
    assert breaking_point([co_run(4)], members)["clients"] is None
    assert breaking_point([co_run(4)], members, max_slowdown=4.0)["clients"] is None
    point = breaking_point([co_run(4)], members, max_slowdown=3.0)
    assert (point["clients"], point["criterion"]) == (4, "slowdown")
    assert "3.50" in point["detail"]


def test_a_p99_past_its_bound_is_taken_from_raw_latencies():
    members = members_of(co_run(2), {"latency_ms": [5.0] * 90 + [50.0] * 10})
    assert breaking_point([co_run(2)], members, max_p99_ms=60)["clients"] is None
    point = breaking_point([co_run(2)], members, max_p99_ms=40)
    assert (point["clients"], point["criterion"]) == (2, "p99")


def test_one_failing_repeat_breaks_a_count_and_an_invalid_co_run_proves_nothing():
    runs = [co_run(1), co_run(2, "invalid"), co_run(4), co_run(4, "failed", repeat=1)]
    point = breaking_point(runs)
    assert point["clients"] == 4
    assert point["not_judged"] == [2]
    assert point["last_good_clients"] == 1
    assert (point["broken_repeats"], point["judged_repeats"]) == (1, 2)


def test_a_count_that_no_co_run_judged_was_not_tried():
    point = breaking_point([co_run(1), co_run(2), co_run(4, "invalid")])
    assert (point["highest_clients_tried"], point["not_judged"]) == (2, [4])
    assert breaking_point([co_run(1, "invalid")])["highest_clients_tried"] is None


def test_a_gpu_that_was_lost_says_nothing_of_the_load():
    lost = co_run(2, "failed", stop_reason={"kind": "gpu_lost"})
    point = breaking_point([co_run(1), lost])
    assert (point["clients"], point["not_judged"], point["last_good_clients"]) == (None, [2], 1)


# --- bounds, joules, how many clients -------------------------------------------------------


def test_slo_attainment_is_the_share_of_raw_latencies_within_the_bound():
    assert scores.slo_attainment_percent([1.0, 2.0, 3.0, 50.0], 3.0) == pytest.approx(75.0)
    assert scores.slo_attainment_percent([], 3.0) is None
    assert scores.slo_attainment_percent(None, 3.0) is None


def test_a_job_that_the_windows_end_cuts_counts_in_part():
    # two whole jobs of 4 s, and half a third one
    assert scores.jobs_in_window([(0.0, 4.0), (4.0, 8.0)], 10.0) == pytest.approx(2.5)
    assert scores.jobs_in_window([], 10.0) is None
    assert scores.jobs_in_window([(0.0, 4.0)], None) is None


def test_joules_a_job_need_the_jobs_of_all_clients():
    assert scores.joules_per_job(900.0, [2.5, 2.0]) == pytest.approx(900 / 4.5)
    assert scores.joules_per_job(900.0, [2.5, None]) is None
    assert scores.joules_per_job(None, [2.5]) is None
    assert scores.joules_per_job(900.0, []) is None


def test_more_clients_gain_nothing_from_the_first_count_near_the_best_on():
    assert sufficient_count({1: 1.0, 2: 1.2, 4: 1.45, 6: 1.5, 8: None}) == 4
    assert sufficient_count({1: 0.98, 2: 1.0}) == 1
    assert sufficient_count({1: None}) is None


def test_nothing_is_said_of_the_success_of_clients_that_were_interrupted():
    assert scores.success_rate_percent(["ok", "oom"]) == 50.0
    assert scores.success_rate_percent(["interrupted", "ok"]) is None
