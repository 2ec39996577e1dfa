"""The figures against values worked out by hand."""

from __future__ import annotations

import math

import msgspec
import numpy
import pytest
import recorded_rows

from benchmarking.metrics import estimates, number_text, scores
from benchmarking.metrics.breaking_point import breaking_point, saturation_count, sufficient_count
from benchmarking.metrics.estimates import estimate
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures, Summary, Units


def unit(count: int, seconds: float, *, latency: bool = False) -> Units:
    return Units(count=count, seconds=seconds, latency=latency)


def client(job_key: str, units: dict[str, Units], **more: object) -> ClientRecord:
    changes = {"job_key": job_key, "units": units, "latency_ms": None, **more}
    return msgspec.convert(recorded_rows.client("mixed-2-r0", 0, **changes), ClientRecord)


# --- one client -----------------------------------------------------------------------------

STEP, TEST = {"train_step": 0.1}, {"test_step": 0.05}  # seconds alone


@pytest.mark.parametrize(
    ("units", "alone", "progress"),
    [
        # One kind: T over C, 0.1 s over 0.4 s.
        ({"train_step": unit(5, 2.0)}, STEP, 0.25),
        # Several are weighted as they ran: 20 x 0.1 + 10 x 0.05 = 2.5 s alone, 6 s here.
        ({"train_step": unit(20, 4.0), "test_step": unit(10, 2.0)}, STEP | TEST, 2.5 / 6),
        # A kind that never ran needs no baseline; one that ran does.
        ({"train_step": unit(5, 1.0), "test_step": unit(0, 0.0)}, STEP, 0.5),
        ({"train_step": unit(5, 2.0), "test_step": unit(1, 0.1)}, STEP, None),
        ({}, STEP, None),
        ({"train_step": unit(0, 0.0)}, STEP, None),
        # Requests that failed are no work.
        ({"missed_request": unit(50, 0.0), "request": unit(150, 3.0, latency=True)},
         {"request": 0.01}, 0.5),
    ],
)  # fmt: skip
def test_progress_is_the_work_alone_over_the_seconds_spent(units, alone, progress):
    found = scores.normalized_progress(units, alone)
    assert found == (progress and pytest.approx(progress))


def test_percentiles_interpolate_between_ranks_as_numpy_does():
    values = [5.0, 1.0, 9.0, 3.0]
    # ordered 1 3 5 9: rank of p50 is 1.5 -> 4; of p95 is 2.85 -> 5 + 0.85 x 4 = 8.4
    figures = scores.percentiles_ms(values)
    assert (figures["p50"], figures["median"], figures["mean"]) == (4.0, 4.0, 4.5)
    assert (figures["min"], figures["max"]) == (1.0, 9.0)
    assert figures["std"] == pytest.approx(math.sqrt((0.25 + 12.25 + 20.25 + 2.25) / 4))
    assert scores.percentile(values, 95) == pytest.approx(8.4)
    for percent in (0, 1, 37.5, 99, 100):
        expected = numpy.percentile(values, percent)
        assert scores.percentile(values, percent) == pytest.approx(expected)
    assert scores.percentiles_ms([]) is scores.percentiles_ms(None) is None
    for wrong in (([], 50), ([1.0], 101)):
        with pytest.raises(ValueError, match=r"at least one value|in 0\.\.100"):
            scores.percentile(*wrong)


@pytest.mark.parametrize(("percent", "fewest"), [(50, 1), (90, 50), (95, 100), (99, 500),
                                                 (99.9, 5000)])  # fmt: skip
def test_a_percentile_needs_five_responses_beyond_it_and_a_median_one(percent, fewest):
    enough = [1.0] * fewest
    assert scores.fewest_responses(percent) == fewest
    assert scores.latency_percentile(enough, percent) == 1.0
    assert scores.latency_percentile(enough[1:], percent) is None
    assert scores.tail_slowdown(enough[1:], enough, percent) is None
    assert scores.tail_slowdown(enough, enough[1:], percent) is None


def test_tail_slowdown_compares_percentiles_of_raw_latencies():
    alone = [10.0] * 495 + [20.0] * 5
    shared = [10.0] * 450 + [40.0] * 50
    assert scores.tail_slowdown(shared, alone, 50) == pytest.approx(1.0)
    # p99 alone: rank 494.01 -> 10 + 0.01 x 10 = 10.1; shared: 40
    assert scores.tail_slowdown(shared, alone, 99) == pytest.approx(40 / 10.1)
    for one, other in ((None, alone), (shared, []), (shared, [0.0] * 500)):
        assert scores.tail_slowdown(one, other, 99) is None


def test_a_request_that_failed_counts_as_infinitely_late():
    answers = [float(n) for n in range(1, 496)]
    assert scores.latency_percentile(answers, 99, failed=5) == math.inf  # rank 494.01 of 499
    assert scores.latency_percentile([*answers, 496.0] * 2, 99, failed=1) == pytest.approx(492.0)
    assert scores.latency_percentile(None, 99, failed=500) == math.inf
    assert scores.tail_slowdown(answers, [1.0] * 500, 99, failed=5) == math.inf
    assert scores.tail_slowdown([1.0] * 500, answers, 99, failed_alone=5) is None
    assert scores.percentiles_ms(answers, failed=5)["p99"] == math.inf
    assert scores.slo_attainment_percent([20.0] * 150, 30.0, failed=50) == pytest.approx(75.0)
    assert scores.slo_attainment_percent([], 30.0, failed=50) == 0


def test_what_came_within_the_bound_is_a_share_and_a_rate():
    assert scores.slo_attainment_percent([1.0, 2.0, 3.0, 50.0], 3.0) == pytest.approx(75.0)
    assert scores.slo_attainment_percent([], 3.0) is None
    answers = [20.0] * 300 + [40.0] * 10
    assert scores.goodput_per_second(answers, 30.0, [10.0, 10.0]) == pytest.approx(15.0)
    assert scores.goodput_per_second(answers, 30.0, [10.0, None]) is None
    assert scores.goodput_per_second([], 30.0, []) is None


# --- all clients of a co-run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (scores.overhead_percent(0.8), 25.0),
        (scores.overhead_percent(2.0), -50.0),
        (scores.overhead_percent(None), None),
        (scores.jain_fairness([0.25] * 4), 1.0),
        (scores.jain_fairness([1.0, 0.0, 0.0, 0.0]), 0.25),
        (scores.jain_fairness([0.5, 1.0]), 1.5**2 / (2 * 1.25)),
        (scores.jain_fairness([0.0, 0.0]), None),
        (scores.energy_ratio(1350.0, [900.0, 900.0]), 0.75),
        (scores.energy_ratio(None, [1.0]), None),
        (scores.energy_ratio(10.0, [1.0, None]), None),
        (scores.energy_ratio(10.0, []), None),
        # Two whole jobs of 4 s, and half a third one.
        (scores.jobs_in_window([(0.0, 4.0), (4.0, 8.0)], 10.0), 2.5),
        (scores.jobs_in_window([], 10.0), None),
        (scores.jobs_in_window([(0.0, 4.0)], None), None),
        (scores.joules_per_job(900.0, [2.5, 2.0]), 200.0),
        (scores.joules_per_job(900.0, [2.5, None]), None),
        (scores.joules_per_job(None, [2.5]), None),
        (scores.success_rate_percent(["ok", "oom"]), 50.0),
        (scores.success_rate_percent(["interrupted", "ok"]), None),
    ],
)
def test_a_figure_follows_its_definition_and_is_unknown_where_a_part_is(found, expected):
    assert found == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("done", "baseline", "joules", "expected"),
    [
        # 30 units x (3000 J / 100 units)
        ({"step": unit(30, 9.0)}, {"step": unit(100, 10.0)}, 3000.0, 900.0),
        # Seconds alone: 5 x 0.1 + 2 x 0.05 = 0.6 of the baseline's 2 s, which took 400 J.
        ({"step": unit(5, 2.0), "test": unit(2, 0.4)},
         {"step": unit(10, 1.0), "test": unit(20, 1.0)}, 400.0, 120.0),
        ({"step": unit(1, 1.0)}, {}, 5.0, None),
        ({"step": unit(1, 1.0)}, {"step": unit(1, 1.0)}, None, None),
    ],
)  # fmt: skip
def test_a_client_is_charged_the_joules_of_its_work_alone(done, baseline, joules, expected):
    found = scores.solo_energy_joules(done, baseline, joules)
    assert found == (expected and pytest.approx(expected))


def summary_of_two(**changes: object) -> Summary:
    """Summary of two clients with T/C of 0.5 and 0.25, with the second one's record changed."""
    baselines = {
        "resnet": client("resnet", {"train_step": unit(100, 10.0)}),
        "batch": client("batch", {"batch": unit(1000, 10.0, latency=True)}),
    }

    def job(seconds: float, in_window: bool = True) -> dict:
        return {"index": 0, "start_seconds": 0.0, "end_seconds": 8.0, "duration_seconds": seconds,
                "in_window": in_window}  # fmt: skip

    window = {"window_start_seconds": 5.0, "window_end_seconds": 15.0}
    second = {"job_key": "batch", "units": {"batch": unit(250, 10.0, latency=True)},
              "jobs": [job(3.0), job(5.0), job(99.0, in_window=False)]}  # fmt: skip
    clients = [
        client("resnet", {"train_step": unit(50, 10.0)}, jobs=[job(8.0)], **window),
        client(**{**second, **window, **changes}),
    ]
    return scores.summarize_co_run(
        clients, baselines, GpuFigures(energy_joules=900.0),
        energy_alone_joules={"resnet": 1000.0, "batch": 2000.0},
    )  # fmt: skip


UNKNOWN = dict.fromkeys(("stp", "antt", "overhead_percent", "fairness", "energy_ratio"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {
            "stp": 0.75, "antt": 3.0, "overhead_percent": 100 / 3,
            "interference_overhead_percent": 200.0,
            "fairness": 0.75**2 / (2 * (0.25 + 0.0625)),
            # 50 of 100 steps: 500 J; 250 of 1000 batches: 500 J; together 900 J
            "energy_ratio": 0.9, "success_rate_percent": 100,
            "average_duration_seconds": (8 + 4) / 2, "total_gpu_time_seconds": 12,
        }),
        # Pauses are no work, but slow nobody down.
        ({"units": {"batch": unit(125, 5.0, latency=True)}}, {"stp": 0.5 + 0.125, "antt": 3.0}),
        # A failed client makes it no result of one client fewer.
        ({"status": "oom"}, UNKNOWN | {"success_rate_percent": 50, "average_duration_seconds": 8,
                                       "total_gpu_time_seconds": None}),
        # Without a baseline nothing is claimed, but durations stay.
        ({"job_key": "never measured alone"}, UNKNOWN | {"total_gpu_time_seconds": 12}),
        # A client at an offered rate is no throughput, and lasts as long as it was told to.
        ({"units": {"request": unit(250, 10.0, latency=True)}},
         {"clients": 2, "throughput_clients": 1, "stp": 0.5, "energy_ratio": None,
          "total_gpu_time_seconds": 8}),
    ],
    ids=["whole", "pauses", "failed", "no baseline", "offered rate"],
)  # fmt: skip
def test_a_co_run_is_summed_up_from_its_clients(changes, expected):
    summary = summary_of_two(**changes)
    for name, value in expected.items():
        assert getattr(summary, name) == (value and pytest.approx(value)), name


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
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 10, 2.228),
     (0.99, 2, 9.925), (0.99, 5, 4.032), (0.90, 4, 2.132), (0.95, 120, 1.980)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_printed_table(confidence, degrees, table):
    assert estimates.student_t_quantile(confidence, degrees) == pytest.approx(table, abs=5e-4)


def test_three_repeats_give_a_t_interval_on_the_logarithms_and_fewer_only_the_range():
    found = estimate([math.e, math.e**2, None, math.e**3])
    # logs 1 2 3: mean 2, standard deviation 1; half width 4.30265 / sqrt(3) = 2.48414
    assert found.mean == pytest.approx(math.e**2)
    assert math.log(found.low) == pytest.approx(2 - 2.48414, abs=1e-4)
    assert math.log(found.high) == pytest.approx(2 + 2.48414, abs=1e-4)
    two = estimate([8.0, 2.0])
    assert (two.mean, two.low, two.high) == (pytest.approx(4.0), 2.0, 8.0)
    assert estimate([1.02]) == estimates.Estimate(1.02, 1.02, 1.02, (1.02,))
    now_and_then = estimate([math.inf, 20.0, 21.0])
    assert (now_and_then.mean, now_and_then.low, now_and_then.high) == (math.inf, 0, math.inf)
    assert estimate([math.inf] * 3).low == math.inf
    assert estimate([None, 0.0, -2.0, math.nan]) is None


# --- how many clients -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "stp_by_clients", "clients"),
    [
        # The first count under 95 % of the best so far.
        (saturation_count, {1: 1.0, 2: 1.6, 4: 1.9, 6: 1.81, 8: 1.7}, 8),
        (saturation_count, {8: 1.7, 4: 1.9, 6: 1.8, 1: 1.0}, 6),
        (saturation_count, {1: 1.0, 2: 0.96, 4: 1.0}, None),
        (saturation_count, {1: 1.0, 2: None, 4: 0.9}, 4),
        (saturation_count, {}, None),
        # The first count near the best.
        (sufficient_count, {1: 1.0, 2: 1.2, 4: 1.45, 6: 1.5, 8: None}, 4),
        (sufficient_count, {1: 0.98, 2: 1.0}, 1),
        (sufficient_count, {1: None}, None),
    ],
)
def test_more_clients_gain_nothing_from_a_count_on(find, stp_by_clients, clients):
    assert find(stp_by_clients) == clients


def co_run(clients: int, outcome: str = "ok", repeat: int = 0, **more: object) -> CoRunRecord:
    name = f"training-{clients}-r{repeat}"
    changes = {"outcome": outcome, "clients": clients, **more}
    return msgspec.convert(recorded_rows.co_run(name, "co_run", **changes), CoRunRecord)


def members_of(co_run: CoRunRecord, *changes: dict) -> list[ClientRecord]:
    rows = [recorded_rows.client(co_run.co_run, n, **change) for n, change in enumerate(changes)]
    return msgspec.convert(rows, list[ClientRecord])


LOST = {"stop_reason": {"kind": "gpu_lost"}}


@pytest.mark.parametrize(
    ("co_runs", "expected"),
    [
        ([co_run(1), co_run(2), co_run(4)],
         {"clients": None, "last_good_clients": 4, "highest_clients_tried": 4}),
        # One failing repeat breaks a count; an invalid co-run proves nothing.
        ([co_run(1), co_run(2, "invalid"), co_run(4), co_run(4, "failed", repeat=1)],
         {"clients": 4, "not_judged": [2], "last_good_clients": 1, "broken_repeats": 1,
          "judged_repeats": 2}),
        ([co_run(1), co_run(2), co_run(4, "invalid")],
         {"highest_clients_tried": 2, "not_judged": [4]}),
        ([co_run(1, "invalid")], {"highest_clients_tried": None}),
        # A GPU that was lost says nothing of the load.
        ([co_run(1), co_run(2, "failed", **LOST)],
         {"clients": None, "not_judged": [2], "last_good_clients": 1}),
    ],
)  # fmt: skip
def test_the_breaking_point_is_the_first_count_that_a_valid_co_run_broke(co_runs, expected):
    point = breaking_point(co_runs)
    assert {name: point[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("statuses", "criterion"),
    [(["ok", "oom"], "oom"), (["killed", "failed"], "failed"), (["ok", "timeout"], "timeout"),
     (["ok", "killed"], "killed"), (["killed", "oom"], "oom"), ([], "failed")],
)  # fmt: skip
def test_the_breaking_point_names_the_criterion_that_fired(statuses, criterion):
    broken = co_run(4, "failed", reason="client 3 ran out of memory")
    members = members_of(broken, *({"status": status} for status in statuses))
    point = breaking_point([co_run(1), co_run(2), broken], members)
    assert (point["clients"], point["criterion"], point["last_good_clients"]) == (4, criterion, 2)
    assert point["detail"] == "client 3 ran out of memory"


# --- numbers in texts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (number_text.significant(0), "0"), (number_text.significant(0.2804), "0.280"),
        (number_text.significant(9.996), "10.0"), (number_text.significant(-11.599), "-11.6"),
        (number_text.significant(12833.4), "12,833"),
        (number_text.significant(0.000123), "0.000123"),
        (number_text.duration(999.4), "999 ms"), (number_text.duration(999.6), "1.00 s"),
        (number_text.duration(math.inf), "∞"),
        (number_text.durations([12833.0, 13036.3, 13039.6]), "12.8 / 13.0 / 13.0 s"),
        (number_text.durations([500, 1500]), "500 ms / 1.50 s"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_no_exponent_and_a_fitting_unit(written, text):
    assert written == text
