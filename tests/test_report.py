"""What the report says, as Markdown, on the terminal and for programs."""

from __future__ import annotations

import json

import pytest
import synthetic_runs
from compared_runs import change, compare, markdown, mps, sentences, time_slicing

from benchmarking.analysis import cells, export, markdown_report, terminal_report
from benchmarking.analysis.document import UNKNOWN, Table
from benchmarking.metrics import estimates


def test_a_cpu_demonstration_says_that_it_says_nothing_about_modes():
    compared = compare(synthetic_runs.run("demo", "mps", {4: [3.9]}, gpu=False))
    text = markdown(compared)
    assert text.index("CPU demonstration: no GPU was used") < text.index("### Scorecard")
    assert "says nothing about time slicing, MPS or MIG" in sentences(compared)
    assert "| CPU demo | mixed | 4 |" in text
    assert "Not compared: the guide's ranges" in text
    assert "Proof of mode" not in text
    assert "no GPU was used" in terminal_report.render(compared)


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
        record["latency_ms"] = [12833.0, *[13036.3] * 98, 13039.6]

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
    (row,) = export.flat_rows(compared)
    assert row["energy_ratio_mean"] is None
    assert row["fairness_mean"] is None
    (scores,) = cells.score_rows(compared.sections[0].groups)
    assert scores[cells.SCORE_HEADER.index("fairness")] == UNKNOWN


def test_text_from_records_cannot_break_a_table():
    table = markdown_report.table(Table(["a", "b"], [["x | y", "two\nlines"]]))
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
    value = json.loads(export.json_text(compared))
    groups = value["sections"][0]["groups"]
    assert [group["mode"] for group in groups] == ["time-slicing", "mps"]
    assert groups[0]["stp"]["values"] == pytest.approx([4 / 4.0, 4 / 4.02, 4 / 4.04])
    assert groups[1]["client_rows"][1]["latency"]["p99"] > 0


def test_a_rounded_zero_has_no_sign_and_one_client_is_singular():
    assert cells.number(-0.004, 0) == "0"
    assert estimates.estimate([1.0]).text(0) == "1 (n = 1)"
    near_zero = estimates.overhead_estimate(estimates.estimate([1.001]))
    assert near_zero.text(0, " %") == "0 % (n = 1)"
    compared = compare(synthetic_runs.run("demo", "mps", {1: [1.0]}, gpu=False, mix="training"))
    assert "One ResNet50 training (`training`) on these CPU cores" in sentences(compared)


def test_repeats_have_their_spread_in_every_table_of_the_report():
    slowdowns = [2.0, 2.02, 2.04]
    run = mps(slowdowns)
    for repeat, (fairness, energy) in enumerate([(0.9, 0.7), (0.92, 0.8), (0.97, 0.9)]):
        change(run, lambda r, f=fairness, e=energy: r["summary"].update(fairness=f, energy_ratio=e),
               record="co_run", phase="co_run", repeat=repeat)  # fmt: skip
    text = markdown(compare(run))
    clients = text.split("### Clients")[1]
    assert "| MPS, mixed, 4 | 0: ResNet50 training | ok | verified | 2.02 [1.97, 2.07] |" in clients
    assert "| 0.92 [0.90, 0.97] |" in text  # fairness: median and range
    assert "| 102.0 [97.1, 107.0] |" in text
    assert "| 0.80 [0.58, 1.09] |" in text
