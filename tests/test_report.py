"""What the report says, as Markdown, as a page and on the terminal, from runs of known truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import synthetic_runs
from made_up_reports import (
    as_markdown,
    as_page,
    change,
    compare,
    failed,
    mps,
    mps_limits,
    on_terminal,
    ramp,
    session,
    slow,
    time_slicing,
)

SLICED, SHARED = [4.0, 4.04, 4.08], [2.0, 2.02, 2.04]
STEPS = {1: [1.0], 2: [1.5], 4: [3.0]}


def two_modes(**options: Any) -> dict:
    """MPS twice as good as time slicing."""
    return compare(time_slicing(SLICED), mps(SHARED), **options)


def one_better_under_time_slicing() -> dict:
    return compare(time_slicing(SLICED), slow(mps(SHARED), 3.0, phase="co_run", client=3))


def edited(edit: Callable[[dict], None]) -> dict:
    """The comparison of two modes, its only section edited."""
    compared = two_modes()
    edit(compared["sections"][0])
    return compared


def one_after_another(idle: float) -> dict:
    """Modes that deliver less than one job after another; jobs that pause for that part of a time.

    Together the pauses are filled with the others' work.
    """
    made = session([4.6, 4.61, 4.62, 4.61], [4.5, 4.51, 4.52, 4.51])

    def stretch(record: dict) -> None:
        if record["phase"] != "co_run":
            start = record["window_start_seconds"]
            record["window_end_seconds"] += idle * (record["window_end_seconds"] - start)

    for run in made:
        change(run, stretch)
    return compare(*made)


def next_to_a_service(compared: dict) -> dict:
    """The comparison, one of whose clients is a service."""
    for group in compared["sections"][0]["groups"]:
        group["throughput_clients"] = group["clients"] - 1
    return compared


def services_only(section: dict) -> None:
    section["conclusions"] = [
        one for one in section["conclusions"] if one["subject"] == "Batch inference"
    ]


def pairs(run_id: str, mode: str, slowdown: float) -> dict:
    """ResNet next to an inference job, two at a time."""
    run = synthetic_runs.run(run_id, mode, {2: [slowdown]}, is_pairs=True)
    labels = ("ResNet50 training", "Batch inference")
    clients = [{"client": number, "label": label, "workload": "x", "job_key": "x", "command": [],
                "environment": {}} for number, label in enumerate(labels)]  # fmt: skip
    run["manifest"]["plan"]["co_runs"] = [
        {"co_run": "mixed-2-r0", "clients": clients, "repeat": 0, "mode": mode, "phase": "co_run"}
    ]
    return run


def felt(mean: float) -> dict:
    return {"mean": mean, "low": mean, "high": mean, "values": [mean], "is_interval": False}


def noisy_neighbors(section: dict) -> None:
    section["noisy"] = [{
        "label": "Token generation", "kind": "hbm",
        "points": [{"variant": variant, "mode": variant.partition(":")[0],
                    "settings": variant.partition(":")[2], "duty": 1.0, "slowdown": felt(mean)}
                   for variant, mean in (("time-slicing", 1.9), ("mps", 38.0), ("mps:even", 1.7))],
        "break_even": [{"variant": "mps", "duty": 0.25, "reason": None}],
    }]  # fmt: skip


def noisy_neighbors_only(section: dict) -> None:
    noisy_neighbors(section)
    section["conclusions"] = []


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        (two_modes, "For this mix on this card: MPS delivers 1.98 GPUs' worth of work."),
        (one_better_under_time_slicing, "; time slicing where the BERT fine-tuning matters."),
        (lambda: compare(time_slicing([4.0]), mps([2.0])),
         "MPS delivered the most, 2.00 GPUs' worth of work, seen once."),
        (lambda: compare(time_slicing([2.0, 2.001, 2.002]), mps([2.001, 2.0, 2.002])),
         "deliver the same, 2.00 GPUs' worth of work."),
        (lambda: compare(time_slicing(SLICED), mps([4.2, 3.9, 4.0])), "GPUs' worth of work, but "),
        (lambda: compare(mps(SHARED), synthetic_runs.run("s", "time-slicing", {2: [2.0]})),
         "no other mode can be compared."),
        (lambda: compare(failed(time_slicing(SLICED), phase="co_run"), mps([2.0])),
         "seen once; time slicing did not work."),
        (lambda: compare(time_slicing([0.5]), mps([2.0])),
         "seen once; time slicing has no figures."),
        (lambda: compare(time_slicing(SLICED), change(mps(SHARED), lambda r: r.update(units={}),
                                                      record="client", client=2)),
         "MPS has no figures for the whole card; MPS where the ResNet50 training, "),
        (lambda: compare(failed(time_slicing(SLICED)), failed(mps([2.0]))),
         "No mode has figures for this mix: failed: no memory."),
        (lambda: compare(failed(synthetic_runs.run("demo", "mps", {4: [4.0]}, gpu=False))),
         "mixed with 4 clients has no figures on these CPU cores."),
        (lambda: one_after_another(0.0),
         "running the jobs one after another is faster; of the modes MPS is the best with"),
        (lambda: one_after_another(1.0),
         "For this mix on this card: MPS delivers 0.89 GPUs' worth of work."),
        (lambda: next_to_a_service(one_after_another(0.0)),
         "this card: MPS delivers 0.89 GPUs' worth of work next to the service."),
        (lambda: edited(services_only),
         "For this mix on this card: MPS where the Batch inference matters."),
        (lambda: compare(synthetic_runs.run("demo", "mps", {4: [4.0]}, gpu=False)),
         "On these CPU cores mixed with 4 clients did 1.00 times the work of one job after"),
        (lambda: compare(failed(ramp(STEPS), co_run="training-4-r0")),
         "How many clients of training fit on this card: 2 to 3 under MPS; seen once."),
        (lambda: compare(failed(ramp(STEPS), co_run="training-2-r0"), ramp(STEPS, "time-slicing")),
         "fit on this card: 4 or more under time slicing, 1 under MPS; seen once."),
        (lambda: compare(failed(ramp({1: [1.0], 2: [1.5]}), co_run="training-2-r0")),
         "fit on this card: 1 under MPS; seen once."),
        (lambda: compare(failed(ramp({1: [1.0]}), co_run="training-1-r0")),
         "How many clients of training fit on this card: none under MPS; seen once."),
        (lambda: compare(failed(ramp({2: [1.5], 4: [3.0]}), co_run="training-2-r0")),
         "fit on this card: 0 to 1 under MPS; seen once."),
        (lambda: compare(failed(
            synthetic_runs.run("m", "mps", {4: [2.0], 8: [4.0], 9: [5.0]},
                               bounds={"max_slowdown": 9.0}), co_run="mixed-9-r0")),
         "For this mix on this card: MPS delivers "),
        (lambda: compare(*(ramp(STEPS, mode, bounds={"max_slowdown": bound})
                           for mode, bound in (("mps", 2.0), ("time-slicing", 9.0)))),
         "For this mix on this card: time slicing and MPS delivered about the same, 1.33 GPUs' "
         "worth of work, seen once."),
        (lambda: compare(ramp(STEPS, gpu=False, bounds={"max_slowdown": 9.0})),
         "How many clients of training fit on these CPU cores, at a slowdown of 9 at most: 4 or "
         "more."),
        (lambda: compare(synthetic_runs.run("alone", "exclusive", {})),
         "Each job was measured alone; nothing here says anything about modes."),
        (lambda: edited(noisy_neighbors_only),
         "presses the card's memory all the time, Token generation takes 38.00 times as long as "
         "alone under MPS, 1.90 times under time slicing and 1.70 times under MPS with even "
         "shares"),
    ],
    ids=["sure", "another mode for a job", "once", "no difference", "cannot tell", "one mode",
         "one failed", "one void", "void as a whole", "all failed", "CPU failed",
         "one after another", "jobs that pause", "next to a service", "services alone", "CPU",
         "ramp", "ramps of two modes", "one fits", "none fits",
         "ramp from 2 on", "ramp of other shares", "ramps of unlike bounds", "ramp on the CPU",
         "baselines", "neighbors"],
)  # fmt: skip
def test_the_headline_says_which_mode_and_how_sure(compared, said: str) -> None:
    compared = compared()
    shown = " ".join(on_terminal(compared).split())
    assert said in shown[:400]
    assert said in as_markdown(compared)
    assert ("GPUs' worth" in shown) <= shown.startswith("For this mix on this card")


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        (lambda: two_modes(gpu_price_per_hour=3.6),
         "Cost of 1,000 s of work: time slicing 1.01 for the GPU; MPS 0.505 for the GPU"),
        (lambda: compare(failed(time_slicing(SLICED), phase="co_run"), mps([2.0])),
         "Did not work: time slicing: failed: no memory."),
        (lambda: compare(failed(time_slicing(SLICED), phase="co_run"), mps([2.0])),
         "no other mode has figures"),
        (lambda: compare(time_slicing([0.5]), mps([2.0])),
         "Without figures: time slicing: invalid: the baseline was disturbed."),
        (lambda: compare(failed(ramp(STEPS), co_run="training-4-r0")),
         "breaking point 4 clients (oom: no memory)."),
        (lambda: compare(failed(synthetic_runs.run("demo", "mps", {4: [4.0]}, gpu=False))),
         "Did not work: CPU demo: failed: no memory."),
        (lambda: compare(synthetic_runs.run("demo", "mps", {4: [4.0]}, gpu=False)),
         " all jobs: work delivered 1.00 "),
        (lambda: compare(mps([4.0], environment={})),
         "; GPU unknown, driver unknown, job size guide;"),
        (lambda: compare(time_slicing([4.0, 4.001, 3.999])), "does not hold here, found 0.0 %."),
        (lambda: edited(noisy_neighbors_only), " 1.90 38.00 1.70 MPS"),
        (lambda: compare(ramp(STEPS)),
         "MPS fits 4 of training: breaking point not reached by 4 clients; past 2 clients no work "
         "is gained."),
        (lambda: compare(ramp({1: [1.0], 2: [2.1]})), "past 1 client no work is gained."),
        (lambda: compare(ramp(STEPS, gpu=False)),
         "CPU demo fits 4 of training: breaking point not reached by 4 clients"),
        (lambda: compare(failed(ramp(STEPS), co_run="training-4-r0")),
         "MPS fits 2 of training: breaking point 4 clients (oom: "),
        *[(two_modes, title) for title in (
            "Worst slowdown: ", "Not measured: MIG: ", "The method's own error: ",
            "The guide expects: ", "Rule of thumb: ")],
    ],
)  # fmt: skip
def test_the_terminal_has_a_line_for_each_thing_that_was_found(compared, said: str) -> None:
    assert said in " ".join(on_terminal(compared()).split())


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_terminal_shows_the_decision_first_and_no_line_is_wider(width: int) -> None:
    shown = on_terminal(two_modes(), width)
    assert shown.startswith("For this mix on this card: MPS delivers")
    assert max(map(len, shown.splitlines())) <= width


def test_a_difference_within_an_own_error_that_is_too_large_is_not_sure() -> None:
    slowdowns = [4.0, 4.01, 4.0, 4.01], [3.84, 3.85, 3.84, 3.85]
    for null, said in ((1.0, "MPS delivers 1.04"), (1.05, "MPS delivered the most in these runs")):
        assert said in as_markdown(compare(*session(*slowdowns, null=null)))


def test_a_method_whose_own_error_is_too_large_says_so_before_anything_else() -> None:
    error = {"percent": 3.14, "ratio": None, "label": "X", "rounds": 4, "is_over_limit": True}
    compared = edited(lambda section: section.update(own_error=error))
    assert on_terminal(compared).startswith(
        "The method's own error here is 3.1 %, over the limit of 2 %"
    )
    page = as_page(compared)
    assert page.index("own error here is 3.1 %") < page.index("<h1>")


@pytest.mark.parametrize(
    ("compared", "rows"),
    [
        (lambda: compare(pairs("slicing", "time-slicing", 2.0), pairs("mps", "mps", 1.5)),
         ["of 1 pair MPS delivered the most work in 1; seen once.",
          "| ResNet50 training | – | MPS |",
          "size guide; each mode was proved for every client",
          "2.00 times as long as alone under time slicing, because of ",
          " (as measured two at a time).",
          "| time slicing | ResNet50 training | Batch inference | 2.00 |"]),
        (lambda: compare(pairs("slicing", "time-slicing", 1.51), pairs("mps", "mps", 1.5)),
         ["of 1 pair no single mode delivered the most work in 1; seen once.",
          "| ResNet50 training | – | either; MPS |"]),
        (lambda: compare(pairs("mps", "mps", 1.5)),
         ["## No co-run here supports a statement about modes.\n"]),
        (lambda: compare(*(failed(pairs(mode, mode, 1.5)) for mode in ("time-slicing", "mps"))),
         ["of 1 pair no single mode delivered the most work in 1.\n"]),
        (lambda: edited(noisy_neighbors),
         ["| Token generation, memory: a slice of its own pays | – | from 25 % on |"]),
    ],
    ids=["pairs", "pairs alike", "pairs of one mode", "pairs that all failed", "noisy neighbors"],
)  # fmt: skip
def test_pairs_and_neighbors_are_tables(compared, rows: list[str]) -> None:
    text = as_markdown(compared())
    assert [row for row in rows if row not in text] == []


def test_the_terminal_says_what_stands_in_the_matrix_of_pairs() -> None:
    shown = on_terminal(compare(pairs("slicing", "time-slicing", 1.51), pairs("mps", "mps", 1.5)))
    assert "(either: no difference that matters; ?: not told apart)" in " ".join(shown.split())


def test_both_reports_hold_every_part_and_unknown_is_a_dash() -> None:
    run = mps(SHARED, notes=["a note of the run"])
    change(run, lambda r: (r["summary"].update(energy_ratio=None, fairness=None),
                           r["gpu"].update(power_draw_watts=None)), record="co_run")  # fmt: skip
    compared = compare(time_slicing(SLICED), run)
    compared["phases"] = [{"phase": 4, "name": "mig", "status": "skipped", "reason": "MIG is off"}]
    compared["problems"] = ["line 9 is truncated, skipped"]
    compared["refusals"] = [{"created_at": "2026-01-01", "exit_code": 4, "sentence": "not in force",
                             "command": ["suite.py", "--mode", "mig"]}]  # fmt: skip
    text = as_markdown(compared)
    parts = [f"### {title}" for title in (
        "Every comparison with its interval", "Scorecard", "Clients", "Each job alone",
        "The guide's ranges", "Proof of mode", "Environment and runs", "Notes on the data",
        "Phases", "What was refused", "Problems while reading", "How to read the figures",
    )]  # fmt: skip
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert text.index("GPUs' worth") < text.index(parts[0])
    assert as_page(compared).count("<details>") == len(parts)
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
    (costs,) = [line for line in scorecard.splitlines() if "| MPS" in line and "| 5,000 |" in line]
    assert costs.endswith("| – |")  # the power of this run is unknown, that of the other is not


def test_a_mode_whose_rounds_were_all_invalid_is_not_said_to_have_no_run() -> None:
    invalid = change(mps(SHARED), lambda record: record["proof"].update(verdict="invalid"),
                     record="client", phase="co_run")  # fmt: skip
    text = as_markdown(compare(time_slicing(SLICED), invalid))
    assert "Not measured: MPS: no co-run of it can be compared (see the notes on the data)." in text


def test_clocks_that_nothing_limited_are_not_called_unknown() -> None:
    def untold(run: dict) -> dict:
        return change(run, lambda record: record["gpu"].update(throttle_reasons=None),
                      record="co_run")  # fmt: skip

    known = as_markdown(compare(time_slicing(SLICED), mps(SHARED)))
    assert "| clocks limited by |" in known and "| nothing |" in known
    assert "clocks limited by." in as_markdown(compare(untold(time_slicing(SLICED))))


def test_of_several_mixes_the_one_that_says_most_comes_first_and_the_others_are_folded() -> None:
    other = synthetic_runs.run("other", "mps", {4: [2.0]}, mix="inference")
    compared = compare(time_slicing(SLICED), mps(SHARED), other)
    shown = " ".join(on_terminal(compared).split())
    assert shown.startswith("For mixed with 4 clients on this card: MPS delivers 1.98 GPUs' worth")
    assert " For inference with 4 clients on this card: MPS delivers 2.00" in shown
    page = as_page(compared)
    assert page.count("<h1>For mixed with 4 clients") == 1
    assert page.count("<summary>For inference with 4 clients") == 1


def test_unlike_environments_stand_apart_and_all_but_the_newest_are_folded() -> None:
    older = time_slicing(SLICED, environment=synthetic_runs.GPU | {"gpu_name": "Another GPU"})
    newer = mps([2.0], created_at="2026-02-01T00:00:00+00:00")
    compared = compare(older, newer)
    page = as_page(compared)
    for shown in (page, " ".join(on_terminal(compared).split())):
        assert "The runs come from 2 unlike environments (gpu name), which are not" in shown
    assert "Time slicing: its runs are of another environment." in page
    assert page.index("<h1>") < page.index("<summary>2. Another GPU")
    assert page.count("<h1>") == 1


def test_a_count_that_broke_without_a_reason_says_so() -> None:
    broken = failed(ramp(STEPS), co_run="training-4-r0")
    change(broken, lambda record: record.update(reason=None), record="co_run")
    compared = compare(broken)
    for shown in (as_markdown(compared), on_terminal(compared, 200)):
        assert "4 clients (oom: no reason recorded)" in shown
        assert "None" not in shown


def test_an_older_environment_that_has_only_jobs_alone_is_folded_too() -> None:
    another = synthetic_runs.GPU | {"gpu_name": "Another GPU"}
    older = synthetic_runs.run("alone", "exclusive", {}, environment=another)
    newer = mps([2.0], created_at="2026-02-01T00:00:00+00:00")
    compared = compare(older, newer)
    assert "<summary>2. Another GPU, driver 580.00, job size " in as_page(compared)
    assert "Each job was measured alone" in as_markdown(compared)


def test_a_sentence_lists_the_first_of_many_neighbors_and_counts_the_others() -> None:
    made = change(
        synthetic_runs.run("many", "mps", {64: [2.0]}),
        lambda r: r.update(label=f"job {r['client']}"), record="client", phase="co_run",
    )  # fmt: skip
    said = " ".join(on_terminal(compare(made)).split())
    assert f"next to {', '.join(f'job {n}' for n in range(1, 11))} and 53 more" in said


def test_a_terminal_shows_the_figures_of_all_modes_however_many_there_are() -> None:
    shares = range(70, 100)
    made = [
        mps([share / 10], f"mps-{share}", mps_limits=mps_limits(*[str(share)] * 4))
        for share in shares
    ]
    table = on_terminal(compare(*made), 80).partition("Worst slowdown")[0]
    assert not [share for share in shares if f"{share / 10:.2f}" not in table]
