"""What the report says, as Markdown and on the terminal, from runs whose right answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import synthetic_runs

from benchmarking.report import render
from benchmarking.report.comparison import compare
from benchmarking.report.runs import read_results


def compared(folder: Path, *made: dict, **more: Any) -> dict[str, Any]:
    """The comparison of made-up runs."""
    for run in made:
        synthetic_runs.write(folder, run)
    return compare(read_results(folder), **more)[0]


def slicing(*slowdowns: float, mix: str = "mixed", **more: Any) -> dict:
    return synthetic_runs.run("slicing", "time-slicing", {4: list(slowdowns)}, mix=mix, **more)


def mps(*slowdowns: float, mix: str = "mixed", **more: Any) -> dict:
    return synthetic_runs.run("mps", "mps", {4: list(slowdowns)}, mix=mix, seed=7, **more)


def slower(run: dict, client: int, times: float) -> dict:
    """The run with one client that many times slower: its units take longer, and are fewer."""
    for record in run["records"]:
        if record["phase"] == "co_run" and record.get("client") == client:
            for unit in record["units"].values():
                unit["count"] = round(unit["count"] / times)
    return run


RAMP = {1: [1.0], 2: [1.5], 4: [3.0]}
THREE = (4.0, 4.04, 4.08)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (lambda: [slicing(*THREE), mps(2.0, 2.02, 2.04)],
         "For this mix on this card: MPS delivers 1.98 GPUs' worth of work."),
        (lambda: [slicing(*THREE), slower(mps(2.0, 2.02, 2.04), 3, 3.0)],
         "; time slicing where the BERT fine-tuning matters."),
        (lambda: [slicing(4.0), mps(2.0)],
         "MPS delivered the most, 2.00 GPUs' worth of work, seen once."),
        (lambda: [slicing(2.0, 2.001, 2.002), mps(2.001, 2.0, 2.002)],
         "deliver the same, 2.00 GPUs' worth of work."),
        (lambda: [slicing(*THREE), mps(4.2, 3.9, 4.0)],
         "GPUs' worth of work, but "),
        (lambda: [mps(2.0, 2.02, 2.04)],
         "MPS delivers 1.98 GPUs' worth of work; no other mode was measured."),
        (lambda: [synthetic_runs.run("demo", "mps", {4: [4.0]}, gpu=False)],
         "On these CPU cores mixed with 4 clients did 1.00 times the work of one job after"),
        (lambda: [synthetic_runs.run("alone", "exclusive", {})],
         "Each job was measured alone; nothing here says anything about modes."),
    ],
    ids=["sure", "another mode for a job", "once", "no difference", "cannot tell", "one mode",
         "CPU", "baselines"],
)  # fmt: skip
def test_the_headline_says_which_mode_and_how_sure(runs, said: str, tmp_path: Path) -> None:
    comparison = compared(tmp_path, *runs())
    shown = " ".join(render.render_terminal(comparison, 100).split())
    assert said in shown
    assert said in render.render_markdown(comparison)
    assert ("GPUs' worth" in shown) == ("For this mix on this card" in shown)


def test_a_mix_that_is_faster_one_after_another_is_told_so(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(5.0, 5.05, 5.1))
    whole = comparison["sections"][0]["conclusions"][0]
    (pair,) = [
        one for one in whole["pairs"] if {one["one"], one["other"]} == {"time-slicing", "alone"}
    ]
    pair |= {"verdict": "sure", "better": "alone"}
    said = (
        "running the jobs one after another is faster; of the modes time slicing is the best with"
    )
    assert said in " ".join(render.render_terminal(comparison, 100).split())


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_terminal_shows_the_decision_first_and_no_line_is_wider(
    width: int, tmp_path: Path
) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04))
    shown = render.render_terminal(comparison, width)
    assert shown.startswith("For this mix on this card: MPS delivers")
    assert max(map(len, shown.splitlines())) <= width
    words = " ".join(shown.split())
    for title in ("Worst slowdown: ", "Not measured: MIG: ", "The method's own error: ",
                  "The guide expects: ", "Rule of thumb: "):  # fmt: skip
        assert title in words


def test_the_best_of_each_row_is_marked_with_how_sure(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), slower(mps(2.0, 2.02, 2.04), 3, 3.0))
    text = render.render_markdown(comparison)
    assert "|  | time slicing | MPS | how sure |" in text
    assert "| ResNet50 training: times as long | 4.04 | **2.02** | sure: 50 % less than" in text
    assert (
        "| BERT fine-tuning: times as long | **4.04** | 6.06 | sure: 33 % less than MPS |" in text
    )


def test_a_method_whose_own_error_is_too_large_says_so_before_anything_else(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04))
    error = {"percent": 3.14, "ratio": None, "label": "X", "rounds": 4, "is_over_limit": True}
    comparison["sections"][0]["own_error"] = error
    notice = "The method's own error here is 3.1 %, over the limit of 2 %"
    assert render.render_terminal(comparison, 100).startswith(notice)
    page = render.render_html(comparison)
    assert page.index("own error here is 3.1 %") < page.index("<h1>")


@pytest.mark.parametrize("gpu", [True, False], ids=["GPU", "CPU"])
def test_a_ramp_says_how_many_fit_in_one_line_and_names_its_breaking_point(
    gpu: bool, tmp_path: Path
) -> None:
    whole = synthetic_runs.run("mps", "mps", RAMP, mix="training", gpu=gpu)
    comparison = compared(tmp_path / "whole", whole)
    name = "MPS" if gpu else "CPU demo"
    said = f"{name} fits 4 of training: breaking point not reached by 4 clients"
    assert said in " ".join(render.render_terminal(comparison, 100).split())
    broken = synthetic_runs.run("mps", "mps", RAMP, mix="training", gpu=gpu)
    for record in broken["records"]:
        if record["co_run"] == "training-4-r0":
            is_client = record["record"] == "client"
            record |= (
                {"status": "oom"} if is_client else {"outcome": "failed", "reason": "no memory"}
            )
    comparison = compared(tmp_path / "broken", broken)
    said = f"{name} fits 2 of training: breaking point 4 clients (oom: "
    assert said in " ".join(render.render_terminal(comparison, 100).split())


def pairs(run_id: str, mode: str, slowdown: float) -> dict:
    """ResNet next to BERT, two at a time."""
    run = synthetic_runs.run(run_id, mode, {2: [slowdown]}, is_pairs=True)
    labels = ("ResNet50 training", "Batch inference")
    planned = [{"client": number, "label": label, "workload": "x", "job_key": "x",
                "command": [], "environment": {}}
               for number, label in enumerate(labels)]  # fmt: skip
    co_run = {
        "co_run": "mixed-2-r0",
        "clients": planned,
        "repeat": 0,
        "mode": mode,
        "phase": "co_run",
    }
    run["manifest"]["plan"]["co_runs"] = [co_run]
    return run


def test_pairs_say_which_mode_for_each_pair(tmp_path: Path) -> None:
    comparison = compared(tmp_path, pairs("slicing", "time-slicing", 2.0), pairs("mps", "mps", 1.5))
    text = render.render_markdown(comparison)
    assert "of 1 pairs MPS delivered the most work in 1; seen once." in text
    assert "| ResNet50 training | – | MPS |" in text
    assert "| time slicing | ResNet50 training | Batch inference | 2.00 |" in text


def test_prices_give_the_cost_of_work_under_each_mode(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04), gpu_price_per_hour=3.6)
    shown = " ".join(render.render_terminal(comparison, 100).split())
    assert "Cost of 1,000 s of work: time slicing 1.01 for the GPU; MPS 0.505 for the GPU" in shown


def test_a_noisy_neighbor_is_a_table_of_job_resource_and_mode(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04))
    found = {"mean": 1.5, "low": 1.4, "high": 1.6, "values": [1.5] * 3, "is_interval": True}
    comparison["sections"][0]["noisy"] = [{
        "label": "BERT fine-tuning", "kind": "memory bandwidth",
        "points": [{"variant": "mps", "duty": 0.5, "slowdown": found}],
        "break_even": [{"variant": "mps", "duty": 0.25, "reason": None}],
    }]  # fmt: skip
    text = render.render_markdown(comparison)
    assert "| BERT fine-tuning | memory bandwidth | 0.50 | 1.50 [1.40, 1.60] |" in text
    assert "| BERT fine-tuning | memory bandwidth | a slice is better | from 0.25 on |" in text


def test_noisy_neighbors_by_themselves_are_the_first_screen(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04))
    section = comparison["sections"][0]
    section["conclusions"] = []
    felt = {"time-slicing": 1.9, "mps": 38.0, "mps:even": 1.7}
    section["noisy"] = [{
        "label": "Token generation", "kind": "hbm", "break_even": [],
        "points": [
            {"variant": variant, "duty": 1.0, "slowdown": {
                "mean": mean, "low": mean, "high": mean, "values": [mean], "is_interval": False}}
            for variant, mean in felt.items()
        ],
    }]  # fmt: skip
    shown = " ".join(render.render_terminal(comparison, 100).split())
    assert (
        "Next to a neighbor that presses the card's memory all the time, Token generation takes "
        "38.00 times as long as alone under MPS, and 1.70 times under MPS with even shares; seen "
        "once."
    ) in shown
    assert "Token generation hbm 1.00 1.90 38.00 1.70" in shown
    assert shown.count("Token generation") == 2


def test_both_reports_hold_every_part_and_unknown_is_a_dash(tmp_path: Path) -> None:
    run = mps(2.0, 2.02, 2.04, notes=["a note of the run"])
    for record in run["records"]:
        if record["record"] == "co_run":
            record["summary"] |= {"energy_ratio": None, "fairness": None}
            record["gpu"]["power_draw_watts"] = None
    comparison = compared(tmp_path, slicing(*THREE), run)
    comparison["phases"] = [
        {"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG is off"}
    ]
    comparison["problems"] = ["line 9 is truncated, skipped"]
    comparison["refusals"] = [
        {"created_at": "2026-01-01", "exit_code": 4, "sentence": "not in force",
         "command": ["suite.py", "--mode", "mig"]},
    ]  # fmt: skip
    text = render.render_markdown(comparison)
    parts = [
        "### Every comparison with its interval", "### Scorecard", "### Clients",
        "### Each job alone", "### The guide's ranges", "### Proof of mode",
        "### Environment and runs",
        "### Notes on the data", "### Phases", "### What was refused", "### Problems while reading",
        "### How to read the figures",
    ]  # fmt: skip
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert text.index("GPUs' worth") < text.index(parts[0])
    page = render.render_html(comparison)
    assert page.count("<details>") == len(parts)
    for said in (
        "| 4 | mig | skipped | MIG is off | – | – |",
        "| 5 | analysis | ok | this report | – | – |",
        "- line 9 is truncated, skipped",
        "| 2026-01-01 | 4 | not in force | `suite.py --mode mig` |",
        "| mixed-4-r0 | 0: ResNet50 training, verified | pid among the mode's processes: 4242",
        "| before the run |  | MIG mode: Disabled (ok) |",
        "- a note of the run (mps)",
        "| ResNet50 training | alone | time of an epoch | 4.40 s | 60-120 s | below |",
        "| MPS, mixed, 4 | 0: ResNet50 training | ok | verified | 2.02 [1.97, 2.07] |",
    ):
        assert said in text
    scorecard = text[text.index("### Scorecard") : text.index("### Clients")]
    (costs,) = [line for line in scorecard.splitlines() if "| -50" not in line and "| MPS" in line
                and "| 5,000 |" in line]  # fmt: skip
    assert costs.endswith("| – |")  # the power of this run is unknown, that of the other is not


def test_a_mode_that_failed_is_named_with_its_reason(tmp_path: Path) -> None:
    broken = slicing(*THREE)
    for record in broken["records"]:
        if record["record"] == "co_run" and record["phase"] == "co_run":
            record |= {"outcome": "failed", "reason": "out of memory"}
    shown = " ".join(render.render_terminal(compared(tmp_path, broken, mps(2.0)), 100).split())
    assert "MPS delivers 2.00 GPUs' worth of work, seen once; time slicing did not work." in shown
    assert "Did not work: time slicing: failed: out of memory." in shown


def test_a_mix_of_services_alone_is_decided_by_its_jobs(tmp_path: Path) -> None:
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04))
    (section,) = comparison["sections"]
    section["conclusions"] = [one for one in section["conclusions"]
                              if one["subject"] == "Batch inference"]  # fmt: skip
    shown = render.render_terminal(comparison, 100)
    assert shown.startswith("For this mix on this card: MPS where the Batch inference matters.")


def test_of_several_mixes_the_one_that_says_most_comes_first_and_the_others_are_folded(
    tmp_path: Path,
) -> None:
    other = synthetic_runs.run("other", "mps", {4: [2.0]}, mix="inference")
    comparison = compared(tmp_path, slicing(*THREE), mps(2.0, 2.02, 2.04), other)
    shown = " ".join(render.render_terminal(comparison, 100).split())
    assert shown.startswith("For mixed with 4 clients on this card: MPS delivers 1.98 GPUs' worth")
    assert " For inference with 4 clients on this card: MPS delivers 2.00" in shown
    page = render.render_html(comparison)
    assert page.count("<h1>For mixed with 4 clients") == 1
    assert page.count("<summary>For inference with 4 clients") == 1


def test_unlike_environments_stand_apart_and_all_but_the_newest_are_folded(tmp_path: Path) -> None:
    older = slicing(*THREE, environment=synthetic_runs.GPU | {"gpu_name": "Another GPU"})
    newer = mps(2.0, created_at="2026-02-01T00:00:00+00:00")
    page = render.render_html(compared(tmp_path, older, newer))
    assert "The runs come from 2 unlike environments" in page
    assert page.index("<h1>") < page.index("<summary>2. Another GPU")
    assert page.count("<h1>") == 1
