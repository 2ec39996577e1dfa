"""Services, percentiles, ramps and requirements in comparison.json: made-up runs of known truth."""

from __future__ import annotations

import pytest
import synthetic_runs
from made_up_reports import (
    change,
    compare,
    conclusion,
    mps,
    mps_limits,
    section,
    session,
    slow,
    time_slicing,
)

from benchmarking.report import export

NEW = "2026-06-01T00:00:00+00:00"
SLICING, SHARING = [4.0, 4.02, 4.04, 4.02], [2.0, 2.01, 2.02, 2.01]


# --- services and tails -------------------------------------------------------------------------


def as_service(made: dict, mean_ms: float, missed: int) -> dict:
    """Make the batch inference a service: 10 s windows, 200 answers a co-run."""

    def edit(record: dict) -> None:
        is_alone = record["phase"] == "baseline"
        ms = 10.0 if is_alone else mean_ms
        record["label"] = "Inference service"
        record["window_end_seconds"] = record["window_start_seconds"] + 10
        record["latency_ms"] = [ms] * 190 + [5 * ms] * 10
        record["units"] = {"request": {"count": 200, "seconds": 0.24 * ms, "latency": True}}
        if missed and not is_alone:
            failed = {"count": missed, "seconds": 0.0, "latency": False}
            record["units"]["missed_request"] = failed
        record["figures"] = {"request_rate": 20.0, "slo_ms": 100.0}

    change(made, edit, record="client", workload="batch_inference")
    window = {record["co_run"]: record["window_start_seconds"] for record in made["records"]}
    for record in made["records"]:
        if record["record"] == "co_run":
            record["window_end_seconds"] = window[record["co_run"]] + 10
    return made


def test_a_service_is_judged_by_its_answers_in_which_missed_requests_count():
    found = section(
        as_service(time_slicing(SLICING), mean_ms=15.0, missed=0),
        as_service(mps(SHARING), mean_ms=40.0, missed=50),
    )
    assert {group["throughput_clients"] for group in found["groups"]} == {3}
    one = conclusion(found, "Inference service")
    assert (one["figure"], one["best"], one["verdict"]) == ("median_ms", "time-slicing", "sure")
    tail = conclusion(found, "Inference service", "tail_ms")
    assert (tail["percent"], tail["is_claim"], tail["verdict"]) == (99, False, None)
    assert [mode["estimate"] and mode["estimate"]["mean"] for mode in tail["modes"]] == [75.0, None]
    assert tail["modes"][1]["reason"] == "too many requests failed"
    slicing, sharing = (group["client_rows"][1] for group in found["groups"])
    assert slicing["service"]["goodput_per_second"] == pytest.approx(20.0)
    assert (sharing["missed"], sharing["responses"]) == (200, 800)
    assert sharing["slo"]["percent"] == pytest.approx(100 * 760 / 1000)
    assert sharing["p99_ms"] is None


def test_most_requests_missed_leave_no_median_and_the_other_mode_is_not_called_better_for_sure():
    found = section(
        as_service(time_slicing(SLICING), mean_ms=15.0, missed=300),
        as_service(mps(SHARING), mean_ms=40.0, missed=0),
    )
    one = conclusion(found, "Inference service")
    assert one["best"] == "mps"
    assert one["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("rounds", "percent"), [(1, 95), (2, 95), (3, 99)]
)  # 200 responses a round
def test_a_percentile_stands_from_five_responses_beyond_it_on_of_all_rounds_together(
    rounds, percent
):
    row = section(mps(SHARING[:rounds]))["groups"][0]["client_rows"][1]
    assert row["tail_percent"] == percent
    assert (row["p99_ms"] is not None) == (percent == 99)
    assert row["tail_ms"]["mean"] == row["latency"][f"p{percent}"]
    assert row["is_closed_loop"]


# --- ramps --------------------------------------------------------------------------------------


def ramp(slowdowns: dict[int, list[float]], **more: object) -> dict:
    return synthetic_runs.run("ramp", "mps", slowdowns, mix="training", **more)


def failed(made: dict, co_run: str, status: str = "oom") -> dict:
    change(made, lambda r: r.update(outcome="failed", reason="client 1 failed"), co_run=co_run,
           record="co_run")  # fmt: skip
    return change(made, lambda r: r.update(status=status), co_run=co_run, client=1)


def test_a_ramp_says_how_many_fit_where_it_breaks_and_from_where_on_more_gain_nothing():
    found = section(failed(ramp({1: [1.0], 2: [1.25], 4: [2.3], 8: [5.0]}), "training-8-r0"))
    (one,) = found["ramps"]
    assert (one["variant"], one["clients"]) == ("mps", [1, 2, 4, 8])
    assert (one["fits"], one["breaking_point"]["clients"]) == (4, 8)
    assert one["breaking_point"]["criterion"] == "oom"
    assert one["sufficient_clients"] == 4
    whole = section(ramp({1: [1.0], 2: [2.0], 4: [4.4]}))["ramps"][0]
    assert (whole["fits"], whole["breaking_point"]["clients"]) == (4, None)
    assert (whole["saturation_clients"], whole["sufficient_clients"]) == (4, 1)


def test_a_bound_is_held_against_a_counts_estimate_and_not_its_worst_client():
    bounds = {"max_slowdown": 2.05}
    lucky = ramp({1: [1.0], 2: [2.0, 2.0]}, bounds=bounds)
    slow(lucky, 1.04, co_run="training-2-r0", client=1)  # 2.08, 2.02 on average
    (one,) = section(lucky)["ramps"]
    assert (one["fits"], one["bounds"]) == (2, bounds)
    slow(lucky, 1.1, co_run="training-2-r1")
    (one,) = section(lucky)["ramps"]
    assert (one["fits"], one["breaking_point"]["criterion"]) == (1, "slowdown")


def test_a_count_that_failed_once_in_any_call_is_where_the_ramp_breaks():
    first = failed(ramp({1: [1.0], 2: [1.5]}), "training-2-r0")
    again = ramp({1: [1.0], 2: [1.5]}, created_at=NEW)
    again["manifest"]["run_id"] = "again"
    (one,) = section(first, again)["ramps"]
    point = one["breaking_point"]
    assert (point["clients"], point["broken_repeats"], point["judged_repeats"]) == (2, 1, 2)


def test_one_and_four_clients_of_a_mixed_mix_are_no_ramp():
    assert section(synthetic_runs.run("r", "mps", {1: [1.0], 4: [2.0]}))["ramps"] == []


def test_one_client_under_mps_gives_its_mechanism_overhead_and_under_time_slicing_none():
    for mode, known in (("mps", True), ("time-slicing", False)):
        made = synthetic_runs.run("one", mode, {1: [1.04, 1.05, 1.06]}, mix="training")
        found = section(made)["groups"][0]["mechanism_overhead_percent"]
        assert (found is not None) == known


# --- requirements -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("required", "missed_under"),
    [
        ("mps:work>1.9", ["mps"]),
        ("mps:even:work>1.9", []),
        ("mps:50:work>1.9", ["nothing was measured"]),
        ("mps:even:BERT fine-tuning:slowdown<1.9x", ["mps:even"]),
        ("work>0.9", []),
        ("slowdown<3", ["time-slicing"] * 4),
    ],
)
def test_a_requirement_speaks_of_the_variant_that_it_names(required, missed_under):
    found = compare(
        time_slicing([4.0]), mps([2.5]), mps([2.0], "even", mps_limits=mps_limits("even"))
    )
    missed = export.Requirement.parse(required).missed(found)
    assert len(missed) == len(missed_under)
    for sentence, part in zip(missed, missed_under, strict=True):
        assert f"under {part}," in sentence or part in sentence


def test_a_requirement_on_a_mode_of_which_only_variants_ran_speaks_of_all_of_them():
    found = compare(mps([2.5], "half", mps_limits=mps_limits("50")),
                    mps([2.0], "even", mps_limits=mps_limits("even")))  # fmt: skip
    (missed,) = export.Requirement.parse("mps:work>1.9").missed(found)
    assert "under mps:50, mixed with 4 clients: work is 1.6" in missed


def test_figures_against_a_disturbed_baseline_and_of_a_count_that_failed_meet_nothing():
    found = compare(*session([0.9] * 4, SHARING))
    (missed,) = export.Requirement.parse("time-slicing:work>1").missed(found)
    assert missed.endswith("invalid: the baseline was disturbed")
    broken = mps([2.0])
    change(broken, lambda r: r.update(outcome="failed"), phase="co_run", record="co_run")
    (missed,) = export.Requirement.parse("work>0.1").missed(compare(broken))
    assert missed.endswith("failed")
