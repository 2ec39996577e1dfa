"""What is compared, claimed and said: runs made up so that the right answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import synthetic_runs

from benchmarking import comparison, decision, estimates, report
from benchmarking.comparison import Comparison, RunView


def view(made: dict) -> RunView:
    """The made-up run as the analysis sees it after reading."""
    return RunView(made["manifest"]["run_id"], made["manifest"], made["records"])


def compare(*made: dict, **more: object) -> Comparison:
    return decision.decide(comparison.compare([view(run) for run in made], **more))


def sentences(compared: Comparison, section: int = 0) -> str:
    return "\n".join(claim.text for claim in compared.sections[section].claims)


def markdown(compared: Comparison) -> str:
    return report.markdown(compared, [[] for _ in compared.sections])


def change(made: dict, edit: Callable[[dict], None], **where: object) -> dict:
    """Edit every record of the made-up run whose fields are as named."""
    for record in made["records"]:
        if all(record.get(key) == value for key, value in where.items()):
            edit(record)
    return made


def time_slicing(stp_slowdowns: list[float], **more: object) -> dict:
    return synthetic_runs.run("slicing", "time-slicing", {4: stp_slowdowns}, **more)


def mps(stp_slowdowns: list[float], **more: object) -> dict:
    return synthetic_runs.run("mps", "mps", {4: stp_slowdowns}, **more)


# --- claims ---------------------------------------------------------------------------------


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
    assert "saturation at 6 clients" in text
    assert "the best STP is 2.00 (n = 1) with 4 clients" in text
    assert "| MPS | training | 1, 2, 4, 6, 8 | 8 | failed: client 3" in markdown(compared)


def test_one_client_under_a_mode_gives_its_mechanism_overhead():
    compared = compare(synthetic_runs.run("one", "mps", {1: [1.03]}, mix="training"))
    (group,) = compared.sections[0].groups
    assert group.mechanism_overhead_percent == pytest.approx(3.0)


# --- what stands beside what ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu_name": "Another GPU"},
        {"driver_version": "590.00"},
        {"versions": {"torch": "2.15.0"}},
    ],
)
def test_unlike_environments_stand_in_separate_sections_and_are_not_compared(changes):
    other = mps([2.0, 2.02], environment=synthetic_runs.GPU | changes)
    compared = compare(time_slicing([4.0, 4.02]), other)
    assert len(compared.sections) == 2
    assert "no other mode was measured" in sentences(compared)
    assert "2 unlike environments" in markdown(compared)


def test_another_job_size_precision_or_engine_opens_another_section():
    assert len(compare(time_slicing([4.0]), mps([2.0], job_size="quick")).sections) == 2
    for field, value in (("precision", "fp32"), ("engine", "eager")):
        other = change(
            mps([2.0]), lambda r, f=field, v=value: r["identity"].update({f: v}), record="client"
        )
        assert len(compare(time_slicing([4.0]), other).sections) == 2


def test_a_run_without_versions_joins_its_gpus_section():
    early = mps([], environment=synthetic_runs.GPU | {"versions": {}}, outcome="failed")
    early["records"].clear()
    compared = compare(time_slicing([4.0]), early)
    assert len(compared.sections) == 1
    assert any("the run's outcome is failed" in doubt for doubt in compared.sections[0].doubts)


def test_the_newest_run_of_a_combination_is_compared_and_older_ones_are_listed():
    old = mps([3.0], created_at="2025-01-01T00:00:00+00:00")
    old["manifest"]["run_id"] = "mps-old"
    compared = compare(old, mps([2.0]))
    (group,) = compared.sections[0].groups
    assert group.run.run_id == "mps"
    assert compared.sections[0].left_out == ["mps-old (MPS, mixed, 4 clients): older than mps"]


def test_a_newer_run_that_proved_nothing_does_not_hide_an_older_one():
    newer = mps([2.0], created_at="2026-06-01T00:00:00+00:00", outcome="invalid")
    newer["manifest"]["run_id"] = "mps-invalid"
    compared = compare(newer, mps([2.5]))
    (group,) = compared.sections[0].groups
    assert group.run.run_id == "mps"
    assert "mps-invalid: the run is invalid" in markdown(compared)


def test_a_co_run_with_an_unproved_client_is_in_no_figure():
    run = mps([2.0, 9.0])
    change(run, lambda r: r["proof"].update(verdict="invalid"), co_run="mixed-4-r1", client=2,
           record="client")  # fmt: skip
    compared = compare(run)
    (group,) = compared.sections[0].groups
    assert group.stp.values == (2.0,)
    assert "mixed-4-r1: invalid, a client was not proved" in markdown(compared)


def test_unverified_clients_are_compared_and_said_to_be_unverified():
    run = mps([2.0])
    change(run, lambda r: r["proof"].update(verdict="unverified"), record="client")
    text = markdown(compare(run))
    assert "under MPS (mode unverified)" in text
    assert "| ok, unverified |" in text
    assert "unverified, the clients could not be matched" in text


def test_tails_use_the_baseline_that_a_run_reused():
    reusing = mps([2.0], baseline_run_id="slicing")
    reusing["records"] = [r for r in reusing["records"] if r["phase"] == "co_run"]
    compared = compare(time_slicing([4.0]), reusing)
    group = next(group for group in compared.sections[0].groups if group.mode == "mps")
    assert group.client_rows[1].tail_slowdown[99] == pytest.approx(2.0, rel=0.1)
    alone = compare(reusing).sections[0].groups[0]
    assert alone.client_rows[1].tail_slowdown[99] is None


def reusing_mps(experiment: str) -> RunView:
    """A run that took its baselines from a run of the id `baseline`."""
    made = mps([2.0], baseline_run_id="baseline")
    records = [record for record in made["records"] if record["phase"] == "co_run"]
    return RunView(f"{experiment}/mps", made["manifest"], records, experiment=experiment)


def baseline(experiment: str, times_slower: float = 1.0, **more: object) -> RunView:
    """A run of the id `baseline` in that experiment."""
    made = synthetic_runs.run("baseline", "exclusive", {}, **more)
    for record in made["records"]:
        if record.get("latency_ms"):
            record["latency_ms"] = [times_slower * value for value in record["latency_ms"]]
    name = f"{experiment}/baseline"
    return RunView(name, made["manifest"], made["records"], experiment=experiment)


def p99_slowdown(views: list[RunView]) -> float | None:
    """The p99 slowdown of the batch inference in the only co-run."""
    sections = comparison.compare(views).sections
    (group,) = [group for section in sections for group in section.groups]
    return group.client_rows[1].tail_slowdown[99]


def test_a_reused_baseline_is_looked_for_in_the_same_experiment_first():
    views = [baseline("first", 2.0), baseline("second"), reusing_mps("first")]
    assert p99_slowdown(views) == pytest.approx(1.0, rel=0.1)
    assert p99_slowdown([views[1], views[0], views[2]]) == pytest.approx(1.0, rel=0.1)
    assert p99_slowdown([views[1], views[2]]) == pytest.approx(2.0, rel=0.1)


def test_the_baseline_of_another_experiment_must_be_earlier_and_of_a_like_environment():
    unlike = baseline("other", environment=synthetic_runs.GPU | {"gpu_name": "Another GPU"})
    later = baseline("other", created_at="2026-02-01T00:00:00+00:00")
    assert p99_slowdown([unlike, reusing_mps("own")]) is None
    assert p99_slowdown([later, reusing_mps("own")]) is None


def test_migs_stp_is_also_given_per_multiprocessor():
    mig = synthetic_runs.run("mig", "mig", {4: [4.0]})
    change(mig, lambda r: r["identity"].update(multiprocessor_count=16), record="client")
    (group,) = compare(mig).sections[0].groups
    assert group.stp_per_multiprocessor == pytest.approx(1.0 * 132 / 64)


# --- the texts ------------------------------------------------------------------------------


def test_a_cpu_demonstration_says_that_it_says_nothing_about_modes():
    compared = compare(synthetic_runs.run("demo", "mps", {4: [3.9]}, gpu=False))
    text = markdown(compared)
    assert text.index("CPU demonstration: no GPU was used") < text.index("### Scorecard")
    assert "says nothing about time slicing, MPS or MIG" in sentences(compared)
    assert "| CPU demo | mixed | 4 |" in text
    assert "Not compared: the guide's ranges" in text
    assert "Proof of mode" not in text
    assert "no GPU was used" in report.terminal_text(compared)


def test_the_decision_comes_first_and_every_sentence_names_its_run():
    text = markdown(compare(time_slicing([4.0, 4.02]), mps([2.0, 2.02])))
    start, end = text.index("## Decision"), text.index("### Scorecard")
    claims = [line for line in text[start:end].splitlines() if line.startswith("- ")]
    assert len(claims) >= 3
    assert all("`mps`" in line or "`slicing`" in line for line in claims)
    assert all(any(digit in line for digit in "0123456789") for line in claims)


def test_measured_values_stand_beside_the_guides_ranges():
    text = markdown(compare(time_slicing([4.0])))
    assert "| time slicing | mixed, 4 clients | overhead | 0 % | 10-30 % | below |" in text
    assert "| ResNet50 training | alone | time of an epoch | 4.40 s | 60-120 s | below |" in text


def test_beside_others_a_job_stands_in_one_line_with_the_guides_range_and_its_time_alone():
    text = markdown(compare(time_slicing([4.0]), mps([2.0])))
    start = text.index("The same jobs, mixed, 4 clients at the same time")
    assert "| job | quantity | guide expects, alone | alone | time slicing | MPS |" in text[start:]
    assert (
        "| ResNet50 training | test accuracy | 70-85 % | 81.0 %: inside | 81.0 %: inside "
        "| 81.0 %: inside |" in text[start:]
    )


def test_copies_of_a_job_share_a_line_with_their_lowest_and_highest_value():
    run = synthetic_runs.run("mps", "mps", {2: [1.5]}, mix="training")
    change(run, lambda r: r.update(figures={"epoch_seconds": 70.0}), client=1, phase="co_run")
    assert (
        "| ResNet50 training | time of an epoch | 60-120 s | 4.40 s: below "
        "| 4.40 s to 70.0 s: below, inside |" in markdown(compare(run))
    )


def test_durations_from_one_second_on_are_given_in_seconds():
    def slow(record: dict) -> None:
        record["latency_ms"] = [12833.0, 13036.3, 13039.6]

    text = markdown(compare(change(mps([2.0]), slow, client=1, phase="co_run")))
    assert "| 13.0 / 13.0 / 13.0 s |" in text
    assert "| Batch inference | mean latency | 30-50 ms | " in text
    assert " ms: below | 13.0 s: above |" in text
    assert "e+0" not in text


def test_the_proof_of_every_co_run_is_shown():
    text = markdown(compare(mps([2.0])))
    assert "- before the run: MIG mode: Disabled (ok)" in text
    assert (
        "- `mixed-4-r0`: 4 verified\n"
        "  - client 0, ResNet50 training, verified: pid among the mode's processes: 4242 (ok)\n"
        "  - client 1, Batch inference, verified: pid among" in text
    )


def test_phases_show_why_one_was_skipped_and_problems_are_said():
    phases = [
        {"phase": 1, "name": "baseline", "status": "ok", "reason": "", "seconds": 61.4},
        {"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG mode is off: --mig"},
    ]
    text = markdown(compare(mps([2.0]), phases=phases, problems=["line 9 is torn, skipped"]))
    assert "| 4 | mig | skipped | MIG mode is off: --mig | – | – |" in text
    assert "| 5 | analysis | ok | this report | – | – |" in text
    assert "- line 9 is torn, skipped" in text


def test_the_line_of_an_earlier_analysis_gives_way_to_this_one():
    phases = [
        {"phase": 4, "name": "mig", "status": "skipped"},
        {"phase": 5, "name": "analysis", "status": "failed", "reason": "status 1", "seconds": 2},
    ]
    text = markdown(compare(mps([2.0]), phases=phases))
    assert text.count("| analysis |") == 1
    assert "| 5 | analysis | ok | this report | – | – |" in text


def test_unknown_is_a_dash_and_never_zero():
    run = mps([2.0])
    change(run, lambda r: r["summary"].update(energy_ratio=None, fairness=None), record="co_run")
    compared = compare(run)
    (row,) = report.flat_rows(compared)
    assert row["energy_ratio"] is None
    assert row["fairness"] is None
    cells = report.score_rows(compared.sections[0])[0]
    assert cells[report.SCORE_HEADER.index("fairness")] == report.UNKNOWN


def test_text_from_records_cannot_break_a_table():
    table = report.table(["a", "b"], [["x | y", "two\nlines"]])
    assert table.splitlines()[-1] == "| x \\| y | two lines |"


def test_an_exclusive_run_alone_is_reported_without_a_statement_about_modes():
    run = synthetic_runs.run("alone", "exclusive", {})
    compared = compare(run)
    assert compared.sections[0].groups == []
    text = markdown(compared)
    assert "No co-run here supports a statement about modes." in text
    assert "### Each job alone" in text
    assert "| BERT fine-tuning |" in text


def test_the_json_holds_every_raw_value_and_is_strict():
    compared = compare(time_slicing([4.0, 4.02, 4.04]), mps([2.0]))
    value = json.loads(report.json_text(compared))
    groups = value["sections"][0]["groups"]
    assert [group["mode"] for group in groups] == ["time-slicing", "mps"]
    assert groups[0]["stp"]["values"] == pytest.approx([4 / 4.0, 4 / 4.02, 4 / 4.04])
    assert groups[1]["client_rows"][1]["latency"]["p99"] > 0


def test_a_rounded_zero_has_no_sign_and_one_client_is_singular():
    assert report.number(-0.004, 0) == "0"
    assert estimates.estimate([1.0]).text(0) == "1 (n = 1)"
    near_zero = estimates.overhead_estimate(estimates.estimate([1.001]))
    assert near_zero.text(0, " %") == "0 % (n = 1)"
    compared = compare(synthetic_runs.run("demo", "mps", {1: [1.0]}, gpu=False, mix="training"))
    assert "`training` with 1 client on these CPU cores" in sentences(compared)
