"""What is claimed: runs made up so that the right answer is known."""

from __future__ import annotations

import pytest
import synthetic_runs
from compared_runs import change, compare, markdown, mps, sentences, time_slicing


def test_a_mode_is_chosen_when_the_repeats_intervals_lie_apart():
    text = sentences(compare(time_slicing([4.0, 4.04, 4.08]), mps([2.0, 2.02, 2.04])))
    assert "choose MPS for throughput: STP 1.98 (" in text
    assert "95 % interval, n = 3) against 0.99 (" in text
    assert "Batch inference beside 3 others (`mixed`): choose MPS where its p99 latency" in text
    assert "in these runs" not in text


def test_no_difference_is_shown_when_the_repeats_intervals_overlap():
    text = sentences(compare(time_slicing([4.0, 3.8, 4.2]), mps([3.9, 3.7, 4.1])))
    assert "no difference shown between MPS and time slicing (their spreads overlap)" in text
    assert "choose" not in text.splitlines()[0]


def test_of_single_co_runs_far_apart_only_what_was_seen_is_said():
    first, *others = sentences(compare(time_slicing([4.0]), mps([2.0]))).splitlines()
    assert first == (
        "`mixed` with 4 clients: in these runs MPS delivered more: STP 2.00 against 1.00 under "
        "time slicing (1 = as much as one job after another). One co-run each, so their spread is "
        "unknown: repeat (`--repeats 3`) before relying on it."
    )
    (p99,) = [line for line in others if line.startswith("Batch inference")]
    assert "in these runs its p99 latency was lower under MPS: " in p99
    assert p99.endswith(" under time slicing (n = 1 each: repeat before relying on it).")
    assert "choose" not in "\n".join([first, *others])


def test_where_the_budget_ended_the_repeats_a_larger_one_is_advised():
    planned = [{"co_run": f"mixed-4-r{n}", "clients": [{}] * 4} for n in range(3)]
    run = mps([2.0], plan={"baseline": [], "co_runs": planned})
    first = sentences(compare(time_slicing([4.0]), run)).splitlines()[0]
    assert "The time budget allowed no more: repeat with a larger one" in first
    assert "`--repeats 3`" not in first


def test_single_co_runs_with_the_same_figure_are_called_the_same():
    text = sentences(compare(time_slicing([3.999]), mps([4.0])))
    assert "in these runs the same was delivered by time slicing and MPS: STP 1.00" in text


def test_of_three_modes_run_once_the_best_is_named():
    mig = synthetic_runs.run("mig", "mig", {4: [2.5]})
    first = sentences(compare(time_slicing([4.0]), mps([2.0]), mig)).splitlines()[0]
    assert (
        "in these runs MPS delivered the most: STP 2.00 against 1.60 under MIG and 1.00 under "
        "time slicing" in first
    )


def test_a_single_co_run_against_one_after_another_is_said_as_seen():
    text = sentences(compare(time_slicing([4.4]), mps([2.0])))
    assert (
        "under MPS: together took 50.0 % less time than one after another in this run (n = 1); "
        "each job took 2.00 times as long as alone, on average." in text
    )
    assert "under time slicing: together took 10.0 % more time than one after another in" in text
    even = sentences(compare(time_slicing([4.0])))
    assert "together took as long as one after another in this run (n = 1)" in even


def test_the_only_mode_measured_gets_one_sentence_for_throughput():
    (only,) = sentences(compare(mps([2.0]))).splitlines()
    assert only.startswith("`mixed` with 4 clients under MPS: together took 50.0 % less time")
    assert only.endswith("; STP 2.00 (n = 1), no other mode was measured.")


def test_two_repeats_show_a_range_but_are_too_few_for_a_claim():
    text = sentences(compare(time_slicing([4.0, 4.1]), mps([2.0, 2.1])))
    assert "choose MPS" not in text
    assert "in these runs MPS delivered more" in text
    assert "fewer than three co-runs: too few for an interval" in text
    assert "range, n = 2" in text


def test_against_a_mode_measured_once_only_that_difference_stays_open():
    mig = synthetic_runs.run("mig", "mig", {4: [4.5]})
    text = sentences(compare(time_slicing([4.0, 4.04, 4.02]), mps([2.0, 2.02, 2.01]), mig))
    assert (
        "MPS delivers more than time slicing; in these runs MPS delivered more than MIG: STP "
        in text
    )
    assert "One co-run only under MIG: its spread is unknown: repeat" in text
    assert "(n = 3, 3 and 1: repeat before relying on it)" in text


def test_sharing_is_judged_against_running_one_after_another():
    text = sentences(compare(time_slicing([4.4, 4.42, 4.41]), mps([2.0, 2.02, 2.01])))
    assert (
        "under MPS: sharing beats running the jobs one after another: together took 49.8 % less "
        "time (49.1 to 50.4 %; 95 % interval, n = 3)" in text
    )
    assert (
        "under time slicing: running the jobs one after another would be faster: together took "
        "10.2 % more time (" in text
    )
    unclear = sentences(compare(time_slicing([4.1, 3.9, 4.0])))
    assert "no difference shown from running the jobs one after another: overhead 0.0 %" in unclear


def test_a_co_run_that_failed_is_reported_as_such_and_not_as_a_result():
    def fail(record: dict) -> None:
        record.update(outcome="failed", reason="client 1 ran out of memory")
        record["summary"].update(stp=None, antt=None, success_rate_percent=75.0)

    broken = change(mps([2.0]), fail, record="co_run", phase="co_run")
    compared = compare(time_slicing([4.0]), broken)
    assert "does not work under MPS: failed, client 1 ran out of memory" in sentences(compared)
    group = next(group for group in compared.sections[0].groups if group.mode == "mps")
    assert (group.stp, group.success_rate_percent) == (None, 75.0)


def test_a_ramp_tells_breaking_point_and_saturation_apart():
    ramp = synthetic_runs.run(
        "ramp", "mps", {1: [1.0], 2: [1.1], 4: [2.0], 6: [3.6], 8: [8.0]}, mix="training"
    )

    def fail(record: dict) -> None:
        record["status" if record["record"] == "client" else "outcome"] = "failed"
        record["reason"] = "client 3: exit code 1"

    change(ramp, fail, phase="co_run", clients=8)
    compared = compare(ramp)
    (found,) = compared.sections[0].ramps
    assert (found.breaking_point["clients"], found.saturation_clients) == (8, 6)
    text = sentences(compared)
    assert "Breaking point of `training` under MPS: 8 clients (failed: client 3: exit" in text
    assert (
        "in these runs (n = 1) more than 4 clients gained nothing (up to 5 % counts as "
        "nothing): STP 2.00 (n = 1) with 4 clients; saturation at 6 clients (STP under 95 % of the "
        "best); repeat (`--repeats 3`) before relying on it." in text
    )
    assert "| MPS | training | 1, 2, 4, 6, 8 | 8 | failed: client 3" in markdown(compared)


def test_one_client_under_a_mode_gives_its_mechanism_overhead():
    compared = compare(synthetic_runs.run("one", "mps", {1: [1.03]}, mix="training"))
    (group,) = compared.sections[0].groups
    assert group.mechanism_overhead_percent.mean == pytest.approx(3.0)


def same_mode_twice(first: list[float], second: list[float]) -> list[dict]:
    """Time slicing taken in two calls that differ in nothing but when they were."""
    again = synthetic_runs.run(
        "again", "time-slicing", {4: second}, seed=7, created_at="2026-01-02T00:00:00+00:00"
    )
    return [time_slicing(first), again]


def test_a_difference_inside_the_noise_floor_is_called_so():
    twice = same_mode_twice([4.0, 4.01, 4.02], [4.4, 4.41, 4.42])
    compared = compare(*twice, mps([3.9, 3.901, 3.902]))
    throughput = sentences(compared).splitlines()[0]
    assert (
        "the difference between MPS and time slicing is inside the noise floor of 10.0 %: STP "
        in throughput
    )
    assert "choose" not in throughput
    (noise,) = [line for line in sentences(compared).splitlines() if line.startswith("Noise")]
    assert "STP 10.0 % (0.91 and 1.00, time slicing with 4 clients)" in noise
    assert "Batch inference p99 latency" in noise
    assert "ANTT 10.0 % (4.41 and 4.01, time slicing with 4 clients)" in noise
    assert "BERT fine-tuning slowdown 10.0 % (4.41 and 4.01, " in noise


def test_a_difference_beyond_the_noise_floor_is_still_claimed():
    twice = same_mode_twice([4.0, 4.01, 4.02], [4.04, 4.05, 4.06])
    text = sentences(compare(*twice, mps([2.0, 2.01, 2.02])))
    assert "choose MPS for throughput: STP 1.99 (" in text
    assert "n = 3) against 0.99 (0.99 to 1.00; 95 % interval, n = 6) under time slicing" in text


def test_repeats_inside_one_call_are_no_check_of_a_mode_against_itself():
    compared = compare(time_slicing([4.0, 4.5]), mps([2.0, 2.1]))
    assert compared.sections[0].same_twice == []
    assert "Noise floor" not in sentences(compared)


def test_one_client_under_a_mode_gets_a_sentence_with_the_modes_own_cost():
    run = synthetic_runs.run("one", "mps", {1: [1.03, 1.04, 1.02], 2: [1.5]}, mix="training")
    (cost,) = [s for s in sentences(compare(run)).splitlines() if "mechanism overhead" in s]
    assert cost.startswith(
        "One ResNet50 training alone under MPS (`training`): 3.0 % slower than on the card"
    )
    assert "(0.5 % slower to 5.5 % slower; 95 % interval, n = 3)" in cost


def test_a_mode_under_which_one_client_is_faster_has_no_negative_slowness():
    run = synthetic_runs.run("one", "mps", {1: [0.995, 1.0]}, mix="training")
    (cost,) = [s for s in sentences(compare(run)).splitlines() if "mechanism overhead" in s]
    assert (
        ": in this run (n = 2) 0.3 % faster than on the card without it, the mechanism overhead; "
        "repeat (`--repeats 3`)"
    ) in cost


def cost_of_one(*runs: dict) -> str:
    (said,) = [s for s in sentences(compare(*runs)).splitlines() if "mechanism overhead" in s]
    return said


def test_a_cost_whose_interval_holds_none_is_no_cost():
    said = cost_of_one(synthetic_runs.run("one", "mps", {1: [0.97, 1.0, 1.04]}, mix="training"))
    assert ": no difference shown from the card without it (8.0 % faster to " in said
    assert said.endswith(": no mechanism overhead.")


def test_a_cost_inside_the_noise_floor_is_no_cost():
    first = synthetic_runs.run("first", "mps", {1: [1.02, 1.021, 1.022]}, mix="training")
    again = synthetic_runs.run("again", "mps", {1: [1.10, 1.101, 1.102]}, mix="training", seed=7,
                               created_at="2026-01-02T00:00:00+00:00")  # fmt: skip
    said = cost_of_one(first, again)
    assert " slower than on the card without it, inside the noise floor of 7.8 % (" in said
    assert said.endswith(": no mechanism overhead.")


def test_a_mig_slices_smaller_size_is_not_called_the_modes_cost_alone():
    run = synthetic_runs.run("one", "mig", {1: [6.0]}, mix="training")
    change(run, lambda r: r["identity"].update(multiprocessor_count=16), phase="co_run",
           record="client")  # fmt: skip
    text = sentences(compare(run))
    assert "alone under MIG on 16 of 132 multiprocessors (`training`): in this run (n = 1) " in text
    assert " 500.0 % slower than on the card without it" in text
    assert "| 500.0 (on 16 of 132 multiprocessors) |" in markdown(compare(run))


def test_a_single_client_of_a_mixed_mix_is_named_and_is_no_count_of_the_ramp():
    one = synthetic_runs.run("mps", "mps", {1: [1.1], 4: [2.0]})
    compared = compare(one)
    assert compared.sections[0].ramps == []
    text = sentences(compared)
    assert (
        "One ResNet50 training alone under MPS (`mixed`): in this run (n = 1) 10.0 % slow" in text
    )
    assert "gain" not in text
    (ramp,) = compare(synthetic_runs.run("mps", "mps", {1: [1.0], 4: [2.0], 8: [3.9], 12: [7.0]}))\
        .sections[0].ramps  # fmt: skip
    assert [group.clients for group in ramp.groups] == [4, 8, 12]


def many_clients(*repeats: tuple[int, list[float]]) -> str:
    run = synthetic_runs.run("ramp", "mps", dict(repeats), mix="training")
    (said,) = [s for s in sentences(compare(run)).splitlines() if s.startswith("`training` under")]
    return said


def test_more_clients_gain_nothing_is_claimed_of_three_repeats_with_both_figures():
    said = many_clients((2, [1.0, 1.01, 1.02]), (4, [1.99, 2.0, 2.01]), (8, [8.0, 8.1, 8.2]))
    assert "gained" not in said
    assert said.startswith(
        "`training` under MPS: more than 2 clients gain nothing (up to 5 % counts as nothing): "
        "STP 1.98 (1.93 to 2.03; 95 % interval, n = 3) with 2 clients, the best STP 2.00 ("
    )
    assert said.endswith("; no A/A was taken, so the noise floor is unknown.")


def test_a_gain_of_less_than_five_percent_that_is_shown_is_a_gain():
    said = many_clients((2, [1.0, 1.0001, 1.0002]), (4, [1.94, 1.9401, 1.9402]))
    assert "4 clients still gain: STP 2.06 (" in said
    assert said.endswith("; no A/A was taken, so the noise floor is unknown.")


def test_a_larger_gain_that_the_intervals_do_not_show_is_not_called_one():
    said = many_clients((2, [1.0, 1.2, 1.4]), (4, [1.8, 2.0, 2.3]))
    assert "4 clients delivered the most in these runs, no difference shown from 2: STP" in said


def test_that_more_gain_nothing_is_claimed_only_where_no_gain_is_left_possible():
    said = many_clients((2, [0.9, 1.03, 1.2]), (4, [1.99, 2.0, 2.01]))
    assert "no gain is shown past 2 clients, nor that there is none: STP " in said
    assert "gain nothing" not in said


def test_a_count_that_lost_the_gpu_says_nothing_of_the_mode():
    run = synthetic_runs.run("ramp", "mps", {2: [1.0, 1.01, 1.02], 4: [2.0]}, mix="training")
    change(run, lambda r: r.update(outcome="failed", reason="the GPU was lost",
                                   stop_reason={"kind": "gpu_lost", "detail": "the GPU was lost"}),
           record="co_run", co_run="training-2-r2")  # fmt: skip
    text = sentences(compare(run))
    assert "does not always work" not in text
    (group, _) = compare(run).sections[0].groups
    assert (group.outcome, group.stp.repeats) == ("ok", 2)


def answering(made: dict, by_repeat: list[list[float]]) -> dict:
    """The inference job of the made-up run answered so in each repeat."""
    for repeat, latencies in enumerate(by_repeat):
        change(made, lambda r, ms=latencies: r.update(latency_ms=ms), record="client",
               workload="batch_inference", phase="co_run", repeat=repeat)  # fmt: skip
    return made


def p99_claim(compared) -> str:
    said = [s for s in sentences(compared).splitlines() if s.startswith("Batch inference")]
    return next(sentence for sentence in said if " beside " in sentence)


def test_ranges_of_p99_that_lie_apart_are_no_claim_where_the_intervals_overlap():
    slicing = answering(time_slicing([4.0] * 3), [[ms] * 100 for ms in (10.0, 12.0, 16.0)])
    fast = answering(mps([2.0] * 3), [[ms] * 100 for ms in (7.0, 8.0, 9.9)])
    said = p99_claim(compare(slicing, fast))
    assert "no difference shown between MPS and time slicing (their spreads overlap): 8.2" in said
    assert "95 % interval, n = 3) under MPS against 12.4 ms (" in said
    assert "choose" not in said


def test_of_few_responses_the_slowdown_is_said_and_no_p99():
    few = [[10.0 + n / 10 for n in range(40)]] * 3
    runs = (answering(time_slicing([4.0, 4.04, 4.08]), few), answering(mps([2.0, 2.02, 2.04]), few))
    said = p99_claim(compare(*runs))
    assert (
        "Batch inference beside 3 others (`mixed`): choose MPS where its slowdown matters: "
        "2.02 (1.97 to 2.07; 95 % interval, n = 3) against 4.04 (" in said
    )
    assert "(120 responses, under 100 in a repeat: too few for a p99)" in said
    forty = compare(*(answering(run, few[:1]) for run in (time_slicing([4.0]), mps([2.0]))))
    assert "p99 latency" not in p99_claim(forty)
    assert "| 11.9 ms / – / – (n = 40) |" in markdown(forty)


def test_a_repeat_with_few_responses_takes_the_p99_from_all_since_it_was_the_slow_one():
    many, few = [10.0] * 200, [30.0] * 40
    slicing = answering(time_slicing([4.0, 4.04, 4.08]), [many, many, few])
    said = p99_claim(compare(slicing, answering(mps([2.0, 2.02, 2.04]), [many] * 3)))
    assert "p99 latency" not in said
    assert "choose MPS where its slowdown matters: " in said
    assert "(440 responses, under 100 in a repeat: too few for a p99)" in said


def test_the_worst_copy_of_a_job_stands_for_all_of_them():
    def run_of(run_id: str, mode: str, worst: float) -> dict:
        made = synthetic_runs.run(run_id, mode, {4: [3.0] * 3}, mix="inference")
        change(made, lambda r: r.update(latency_ms=[10.0] * 100), phase="co_run", record="client")
        return change(made, lambda r: r.update(latency_ms=[worst * (1 + r["repeat"] / 100)] * 100),
                      phase="co_run", client=3, record="client")  # fmt: skip

    said = p99_claim(
        compare(run_of("a", "time-slicing", 12.0), run_of("b", "mps", 50.0), slo_ms=11)
    )
    assert said.startswith(
        "Batch inference, the worst of 4 copies, beside 3 others (`inference`): "
    )
    assert "choose time slicing where its p99 latency matters: 12.1 ms" in said
    assert "against 50.5 ms" in said
    bounds = sentences(compare(run_of("b", "mps", 50.0), slo_ms=11))
    assert "the worst of 4 copies, under MPS (`inference`, 4 clients): 0.0 % of responses" in bounds


def test_a_claim_without_an_a_a_says_that_the_noise_floor_is_unknown():
    modes = time_slicing([4.4, 4.42, 4.41]), mps([2.0, 2.02, 2.01])
    claims = sentences(compare(*modes)).splitlines()
    assert all("o A/A was taken, so the noise floor is unknown." in claim for claim in claims)
    assert len(claims) == 5
    again = mps([2.01, 2.0, 2.02], created_at="2026-01-02T00:00:00+00:00", seed=7)
    again["manifest"]["run_id"] = "again"
    assert "A/A" not in sentences(compare(*modes, again))
    assert "A/A" not in sentences(compare(time_slicing([4.0]), mps([2.0])))


def test_against_one_after_another_the_noise_floor_and_the_one_baseline_count():
    quiet = sentences(compare(*same_mode_twice([3.9, 3.901, 3.902], [3.7, 3.701, 3.702])))
    assert "inside the noise floor of 5.4 %: overhead -5.0 % (" in quiet
    assert "against one baseline" not in quiet  # each call took its own
    once = sentences(compare(time_slicing([3.9, 3.901, 3.902])))
    assert "% interval, n = 3), against one baseline; each job took" in once


def test_a_count_that_failed_once_in_any_call_is_where_the_ramp_breaks():
    older = synthetic_runs.run(
        "older", "mps", {1: [1.0], 2: [1.2]}, mix="training",
        created_at="2025-01-01T00:00:00+00:00",
    )  # fmt: skip
    change(older, lambda r: r.update(outcome="failed", reason="oom"), record="co_run", clients=2)
    newer = synthetic_runs.run("newer", "mps", {1: [1.0], 2: [1.2, 1.21]}, mix="training", seed=7)
    compared = compare(older, newer)
    text = sentences(compared)
    assert "Breaking point of `training` under MPS: 2 clients (failed: oom; in 1 of 3" in text
    assert (
        "`training` with 2 clients does not always work (not in 1 of 3 repeats) under MPS: failed, "
        "oom." in text
    )
    assert compared.sections[0].left_out == []


def test_the_share_of_responses_within_a_bound_is_given_where_one_was_asked_for():
    run = mps([2.0], bounds={"max_slowdown": None, "max_p99_ms": 6.0})
    change(run, lambda r: r.update(latency_ms=[5.0, 6.0, 7.0, 8.0]), client=1, phase="co_run")
    assert "50.0 % of responses within 6.00 ms (n = 1)" in sentences(compare(run))
    assert "75.0 % of responses within 7.00 ms (n = 1)" in sentences(compare(run, slo_ms=7.0))
    assert "| 50.0 % in 6.00 ms |" in markdown(compare(run))
    assert "within the bound" not in markdown(compare(mps([2.0])))


def test_a_bound_that_was_asked_for_breaks_a_ramp_and_the_recorded_cause_is_told():
    slowdowns = {1: [1.0], 2: [1.5], 4: [4.0]}
    bounds = {"max_slowdown": 2.0, "max_p99_ms": None}
    ramp = synthetic_runs.run("ramp", "mps", slowdowns, mix="training", bounds=bounds)
    assert (
        "Breaking point of `training` under MPS: 4 clients (slowdown: slowdown 4.00 passes the "
        "bound of 2)" in sentences(compare(ramp))
    )
    cause = {"kind": "lost_neighbor", "detail": "MPS client has been terminated"}
    change(ramp, lambda r: r.update(outcome="failed", stop_reason=cause), clients=4,
           record="co_run")  # fmt: skip
    assert "4 clients (lost neighbor: MPS client has been terminated)" in sentences(compare(ramp))


def test_an_interrupted_co_run_is_in_no_figure_and_said_to_be_interrupted():
    run = mps([2.0, 9.0], outcome="interrupted")
    change(run, lambda r: r.update(outcome="interrupted"), record="co_run", co_run="mixed-4-r1")
    compared = compare(run)
    assert compared.sections[0].groups[0].stp.values == (2.0,)
    assert "mps, mixed-4-r1: interrupted, so it is in no figure" in compared.sections[0].doubts
