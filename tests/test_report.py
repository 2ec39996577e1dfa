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
    assert "95 % interval, n = 3) under MPS, 0.99 (" in text
    assert "Batch inference beside 3 others (`mixed`): choose MPS where its p99 matters" in text


def test_no_difference_is_shown_when_the_repeats_intervals_overlap():
    text = sentences(compare(time_slicing([4.0, 3.8, 4.2]), mps([3.9, 3.7, 4.1])))
    assert "no difference shown between MPS and time slicing (their spreads overlap)" in text
    assert "choose" not in text.splitlines()[0]


def test_single_co_runs_far_apart_are_still_no_difference_shown():
    text = sentences(compare(time_slicing([4.0]), mps([2.0])))
    assert "no difference shown between MPS and time slicing" in text
    assert "one co-run has no known spread" in text
    assert "STP 2.00 (n = 1) under MPS, 1.00 (n = 1) under time slicing" in text


def test_two_repeats_are_compared_by_their_ranges():
    text = sentences(compare(time_slicing([4.0, 4.1]), mps([2.0, 2.1])))
    assert "choose MPS for throughput" in text
    assert "range, n = 2" in text


def test_against_a_mode_measured_once_only_that_difference_stays_open():
    mig = synthetic_runs.run("mig", "mig", {4: [4.5]})
    text = sentences(compare(time_slicing([4.0, 4.04]), mps([2.0, 2.02]), mig))
    assert (
        "MPS delivers more than time slicing; no difference shown between MPS and MIG (one "
        "co-run has no known spread" in text
    )


def test_sharing_is_judged_against_running_one_after_another():
    text = sentences(compare(time_slicing([4.4, 4.42, 4.41]), mps([2.0, 2.02, 2.01])))
    assert "under MPS: sharing beats running the jobs one after another: overhead -50 %" in text
    assert (
        "under time slicing: running the jobs one after another would be faster: overhead 10 %"
        in text
    )


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
    assert "| ResNet50 training | alone | time of an epoch | 4.4 s | 60-120 s | below |" in text
    assert "test accuracy 81 % (70-85 %: inside)" in text


def test_the_proof_of_every_co_run_is_shown():
    text = markdown(compare(mps([2.0])))
    assert "- before the run: MIG mode: Disabled (ok)" in text
    assert "`mixed-4-r0`: 4 verified (client 0, 1, 2, 3: pid among the mode's" in text


def test_phases_show_why_one_was_skipped_and_problems_are_said():
    phases = [
        {"phase": 1, "name": "baseline", "status": "ok", "reason": "", "seconds": 61.4},
        {"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG mode is off: --mig"},
    ]
    text = markdown(compare(mps([2.0]), phases=phases, problems=["line 9 is torn, skipped"]))
    assert "| 4 | mig | skipped | MIG mode is off: --mig | – | – |" in text
    assert "- line 9 is torn, skipped" in text


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
