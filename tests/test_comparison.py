"""What stands in comparison.json: of made-up runs whose right answer is known."""

from __future__ import annotations

import re
import shutil

import pytest
import synthetic_runs
from conftest import PROJECT_ROOT
from made_up_reports import (
    SHARING,
    SLICING,
    change,
    compare,
    conclusion,
    failed,
    mps,
    mps_limits,
    on_terminal,
    section,
    session,
    slow,
    time_slicing,
)

from benchmarking.report import comparison, runs

OLD, NEW = "2025-01-01T00:00:00+00:00", "2026-06-01T00:00:00+00:00"
GPU = synthetic_runs.GPU

# --- which runs stand together ------------------------------------------------------------------


def set_manifest(**changes: object):
    return lambda run: run["manifest"].update(changes)


def set_records(changes: dict, **where: object):
    return lambda run: change(run, lambda record: record.update(changes), **where)


contended = set_records({"is_contended": True}, record="co_run", phase="co_run")


@pytest.mark.parametrize(
    "edit",
    [
        set_manifest(environment=GPU | {"gpu_name": "Another GPU"}),
        set_manifest(environment=GPU | {"driver_version": "590.00"}),
        set_manifest(environment=GPU | {"versions": GPU["versions"] | {"torch": "2.12.0"}}),
        set_manifest(job_size="quick"),
        set_manifest(method=2),
        lambda run: change(run, lambda r: r["identity"].update(precision="fp32"),
                           workload="bert_training"),
    ],
)  # fmt: skip
def test_unlike_environments_stand_in_separate_sections_and_are_not_compared(edit):
    other = mps([2.0])
    edit(other)
    sections = compare(time_slicing([4.0]), other)["sections"]
    modes = sorted(group["mode"] for one in sections for group in one["groups"])
    assert (len(sections), modes) == (2, ["mps", "time-slicing"])
    assert {conclusion(one)["verdict"] for one in sections} == {"not measured"}


@pytest.mark.parametrize("changes", [{"job_key": "batch_inference --batch-size 1"},
                                     {"job_key": "b.py", "label": "b.py"}])  # fmt: skip
def test_modes_that_ran_unlike_jobs_are_not_compared_but_renamed_jobs_are(changes):
    other = mps(SHARING, created_at=NEW)
    set_records(changes, record="client", client=1)(other)
    found = section(time_slicing(SLICING), other)
    assert conclusion(found)["verdict"] == "not measured"
    assert [group["variant"] for group in found["groups"]] == ["mps"]
    assert (
        "slicing (time-slicing, mixed, 4 clients): other jobs than the newer mps"
        in (found["left_out"])
    )
    renamed = mps(SHARING, created_at=NEW)
    set_records({"label": "another name"}, record="client", client=1)(renamed)
    assert conclusion(section(time_slicing(SLICING), renamed))["verdict"] == "sure"


def test_runs_of_one_combination_are_merged_and_their_cards_named():
    other_card = GPU | {"gpu_uuid": "GPU-11111111"}
    found = section(mps([3.0, 3.1], "old", created_at=OLD, environment=other_card), mps([2.0]))
    (group,) = found["groups"]
    assert (group["run_ids"], found["left_out"]) == (["mps", "old"], [])
    assert group["stp"]["values"] == pytest.approx([2.0, 4 / 3.0, 4 / 3.1])
    assert group["gpu_uuids"] == [GPU["gpu_uuid"], "GPU-11111111"]
    assert any("merged from 2 runs on 2 cards of one model" in one for one in found["doubts"])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (set_manifest(request={"window_seconds": 10.0}), "window of 10 s and not of whole jobs"),
        (contended, "beside other people's processes"),
        (set_manifest(is_contended=True), "beside other people's processes"),
        (set_manifest(environment=GPU | {"git_commit": None}), "commit unknown and not 0000000"),
        (set_manifest(environment=GPU | {"host_cores": 8}), "host cores 8 and not 16"),
        (set_records({"job_key": "other"}, record="client"), "other jobs than the newer mps"),
    ],
)
def test_a_run_that_differs_is_left_out_of_the_newer_ones_row_and_the_reason_given(edit, reason):
    old = mps([3.0], "mps-old", created_at=OLD)
    edit(old)
    found = section(old, mps([2.0]))
    assert [group["run_ids"] for group in found["groups"]] == [["mps"]]
    (said,) = found["left_out"]
    assert said.startswith("mps-old (mps, mixed, 4 clients): ") and reason in said


@pytest.mark.parametrize(
    ("edit", "doubt"),
    [(contended, "the figures hold beside them only"),
     (set_manifest(outcome="invalid"), "newer: the run is invalid")],
)  # fmt: skip
def test_a_newer_run_that_proves_less_does_not_hide_an_older_one(edit, doubt):
    newer = mps([9.0], "newer", created_at=NEW)
    edit(newer)
    assert section(newer, mps([2.0]))["groups"][0]["run_ids"] == ["mps"]
    assert any(doubt in one for one in section(newer)["doubts"])


def test_each_variant_of_a_mode_has_a_row_of_its_own():
    planned = mps([2.1], "plan")
    clients = [{"environment": {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}}] * 4
    planned["manifest"]["plan"] = {"co_runs": [{"co_run": "mixed-4-r0", "clients": clients}]}
    layouts = {name: [f"{name}.{gigabytes}gb"] * 4 for name, gigabytes in (("1g", 10), ("2g", 20))}
    found = section(
        time_slicing([4.0]),
        time_slicing([4.0], "long", environment=GPU | {"timeslice": "Long"}),
        mps([2.5]),
        mps([2.0], "even", mps_limits=mps_limits("even")),
        mps([2.2], "parts", mps_limits=mps_limits("50", "25")),
        planned,
        mps([2.3], "partitions", mps_limits={"partitions": True}),
        *[synthetic_runs.run(name, "mig", {4: [4.0]}, mig_layout=layout)
          for name, layout in layouts.items()],
    )  # fmt: skip
    names = [(group["variant"], group["settings"]) for group in found["groups"]]
    assert names[:7] == [
        ("time-slicing", ""), ("time-slicing:long", "long slices"), ("mps", ""),
        ("mps:50/25", "50/25 %"), ("mps:even", "even"), ("mps:plan", "limits of the plan"),
        ("mps:partitions", "static partitions"),
    ]  # fmt: skip
    assert [name for name, _ in names[7:]] == [
        "mig:" + ",".join(layout) for layout in layouts.values()
    ]
    assert (conclusion(found)["best"], found["left_out"]) == ("mps:even", [])


@pytest.mark.parametrize("flag", ["--rate", "--cell-repeats"])
def test_runs_at_unlike_calibrated_load_are_neither_merged_nor_compared(flag):
    def carrying(made: dict, *words: str) -> dict:
        client = {"label": "Service", "job_key": "serving", "command": ["serve", *words]}
        made["manifest"]["plan"]["co_runs"] = [{"co_run": "mixed-4-r0", "clients": [client]}]
        return made

    old = time_slicing([4.0], created_at=OLD)
    alike = compare(carrying(old, flag, "9", flag, "10"), carrying(mps([2.0]), flag, "10"))
    assert len(alike["sections"]) == 1
    unlike = compare(carrying(old, flag, "10.1"), carrying(mps([2.0]), flag, "10"))
    assert [len(one["groups"]) for one in unlike["sections"]] == [1, 1]
    assert unlike["differences"] == [
        {"fact": f"calibrated {flag} of serving in mixed", "values": ["10", "10.1"]}
    ]


# --- against the jobs alone ---------------------------------------------------------------------


def test_baselines_are_those_of_all_rounds_and_the_null_gives_the_methods_own_error():
    found = section(*session(SLICING, SHARING, null=1.03, drift=1.06))
    error = found["own_error"]
    assert (error["rounds"], error["is_over_limit"], found["drift_guarded"]) == (4, False, True)
    # Of the units of all rounds the mean: rounds that were slower did fewer of them.
    assert error["percent"] == pytest.approx(0.0, abs=0.2)
    felt = [group["client_rows"][0]["slowdown"]["mean"] for group in found["groups"]]
    assert felt == pytest.approx([4.02 / 1.03, 2.01 / 1.03], rel=2e-3)
    alone = next(pair for pair in conclusion(found)["pairs"]
                 if {pair["one"], pair["other"]} == {"time-slicing", "alone"})  # fmt: skip
    assert alone["verdict"] == "cannot tell"  # the baselines' own spread is in it
    bad = section(*session(SLICING, SHARING, null=1.05))["own_error"]
    assert (round(bad["percent"], 1), bad["is_over_limit"]) == (5.0, True)
    by_hand = section(time_slicing(SLICING), mps(SHARING))
    assert (by_hand["own_error"], by_hand["drift_guarded"]) == (None, False)
    assert sum("drift not guarded" in doubt for doubt in by_hand["doubts"]) == 2


def test_a_disturbed_baseline_is_left_out_and_what_it_makes_impossible_is_invalid():
    made = session(SLICING, SHARING)
    for repeat, outcome in enumerate(("invalid", "interrupted")):
        where = {"phase": "baseline", "repeat": repeat}
        set_records({"outcome": outcome}, record="co_run", **where)(made[0])
        slow(made[0], 3.0, **where)
    assert section(*made)["groups"][0]["stp"]["mean"] == pytest.approx(4 / 4.02, rel=1e-3)
    found = section(*session([0.9] * 4, SHARING))
    whole = conclusion(found)
    reason = "invalid: the baseline was disturbed"
    assert {group["mode"]: group["invalid"] for group in found["groups"]} == {
        "time-slicing": reason, "mps": None,
    }  # fmt: skip
    assert (whole["modes"][0]["estimate"], whole["modes"][0]["reason"]) == (None, reason)
    assert (whole["best"], whole["verdict"]) == ("mps", "not measured")
    assert any("ResNet50 training: invalid" in doubt for doubt in found["doubts"])


@pytest.mark.parametrize("why", ["disturbed", "failed"])
def test_no_price_expectation_or_energy_is_told_of_a_row_whose_figures_are_void(why):
    made = mps([0.5, 0.5, 0.5])
    if why == "failed":
        made = failed(mps([2.0, 2.0, 2.0]), repeat=1)
    compared = compare(time_slicing([4.0, 4.02, 4.04]), made, gpu_price_per_hour=3.0, kwh_price=0.3)
    (found,) = compared["sections"]
    void = next(group for group in found["groups"] if group["mode"] == "mps")
    figures = ("stp", "antt", "overhead_percent", "interference_overhead_percent", "fairness",
               "energy_ratio", "joules_per_work", "cost_per_1000_work",
               "energy_cost_per_1000_work")  # fmt: skip
    assert {name: void[name] for name in figures} == dict.fromkeys(figures)
    assert [row["slowdown"] is not None for row in void["client_rows"]] == [True] * 4
    energy = conclusion(found, figure="energy_joules_per_work")
    assert [mode["variant"] for mode in energy["modes"] if mode["estimate"]] == ["time-slicing"]
    assert [one["variant"] for one in found["worst_slowdowns"]] == ["time-slicing"]
    assert not any("no baseline for every job" in doubt for doubt in found["doubts"])
    said = " ".join(on_terminal(compared).split())
    assert "An overhead of 5-15 % under MPS: cannot tell." in said
    assert "Cost of 1,000 s of work: time slicing 0.8" in said
    assert "; MPS" not in said[said.index("Cost of") :]


def baseline(experiment: str, times_slower: float = 1.0, **more: object) -> dict:
    """A run of the id `baseline` in that experiment."""
    made = slow(synthetic_runs.run("baseline", "exclusive", {}, **more), times_slower)
    return made | {"experiment": experiment}


@pytest.mark.parametrize(
    ("lenders", "stp"),
    [
        ([baseline("first", 2.0), baseline("second")], 4.0),
        ([baseline("second"), baseline("first", 2.0)], 4.0),
        ([baseline("second")], 2.0),
        ([baseline("other", environment=GPU | {"gpu_name": "Another GPU"})], None),
        ([baseline("other", created_at=NEW)], None),
    ],
)
def test_a_reused_baseline_is_that_beside_it_else_an_earlier_one_of_a_like_card(lenders, stp):
    reusing = mps([2.0], baseline_run_id="baseline") | {"experiment": "first"}
    reusing["records"] = [one for one in reusing["records"] if one["phase"] == "co_run"]
    sections = compare(*lenders, reusing)["sections"]
    (group,) = [group for one in sections for group in one["groups"]]
    assert (group["stp"] and group["stp"]["mean"]) == (stp and pytest.approx(stp))


def test_mig_is_also_given_per_multiprocessor_and_has_no_figure_without_its_own_baseline():
    mig = synthetic_runs.run("mig", "mig", {4: [4.0]})
    change(mig, lambda r: r["identity"].update(multiprocessor_count=16), record="client")
    (group,) = section(mig)["groups"]
    assert group["stp_per_multiprocessor"] == pytest.approx(1.0 * 132 / 64)
    assert group["interference_overhead_percent"] is None


def test_a_co_run_with_an_unproved_client_is_in_no_figure_and_an_unverified_one_is_said():
    run = mps([2.0, 9.0])
    for verdict, where in (
        ("invalid", {"co_run": "mixed-4-r1", "client": 2}),
        ("unverified", {"co_run": "mixed-4-r0"}),
    ):
        change(run, lambda r, v=verdict: r["proof"].update(verdict=v), record="client", **where)
    found = section(run)
    (group,) = found["groups"]
    assert (group["stp"]["values"], group["is_unverified"]) == (pytest.approx([2.0]), True)
    assert any("mixed-4-r1: invalid, a client was not proved" in one for one in found["doubts"])


# --- conclusions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slicing", "sharing", "best", "verdict", "rounds"),
    [
        (SLICING, SHARING, "mps", "sure", 4),
        ([4.0], [2.0], "mps", "not enough rounds", 1),
        ([4.0, 4.0], [2.0, 2.0, 2.0], "mps", "not enough rounds", 2),
        (SLICING, [4.001, 4.019, 4.041, 4.02], None, "no difference that matters", 4),
        ([4.0, 4.4, 3.8], [3.9, 4.2, 3.6], "mps", "cannot tell", 3),
        (SLICING, [], "time-slicing", "not measured", 4),
    ],
)
def test_the_whole_cards_conclusion_says_which_mode_is_best_and_how_sure(
    slicing, sharing, best, verdict, rounds
):
    whole = conclusion(section(time_slicing(slicing), mps(sharing)))
    assert (whole["verdict"], whole["rounds"]) == (verdict, rounds)
    if best is not None:
        assert whole["best"] == best
        assert [mode["variant"] for mode in whole["modes"] if mode["is_best"]] == [best]
    if verdict == "cannot tell":
        assert whole["smallest_shown_percent"] > 5


def test_a_cpu_demonstration_concludes_nothing_of_modes():
    found = section(synthetic_runs.run("demo", "time-slicing", {4: [3.9] * 3}, gpu=False))
    whole = conclusion(found)
    assert (found["cpu_demo"], whole["verdict"]) == (True, "not measured")
    assert "without a GPU" in whole["reason"]
    assert {one["reason"] for one in found["not_measured"]} == {"no GPU was used"}


def test_runs_that_share_an_id_are_named_by_their_paths_and_a_copy_is_left_out():
    unlike = GPU | {"driver_version": "590.00"}
    made = [mps([2.0]) | {"experiment": "first"}, mps([2.0]) | {"experiment": "second"},
            mps([2.0], environment=unlike) | {"experiment": "third"},
            time_slicing([4.0]) | {"experiment": "first"}]  # fmt: skip
    compared = compare(*made)
    assert sorted(name for one in compared["sections"] for group in one["groups"] for name in
                  group["run_ids"]) == ["first/mps", "slicing", "third/mps"]  # fmt: skip
    (said,) = compared["problems"]
    assert re.fullmatch(r"\S+/second/mps left out: a copy of \S+/first/mps", said)


def test_rounds_before_two_copies_of_a_run_went_on_count_once():
    one, other = mps([2.0, 2.1, 2.2]), mps([2.0, 2.1, 2.2])
    went_on = set_records({"window_end_seconds": 1e6}, record="co_run", co_run="mixed-4-r2")
    went_on(other)
    compared = compare(one | {"experiment": "first"}, other | {"experiment": "second"})
    (group,) = compared["sections"][0]["groups"]
    assert len(group["stp"]["values"]) == 3
    assert "a copy of" in compared["problems"][0]


def test_what_was_measured_once_and_kept_twice_counts_once(tmp_path):
    shutil.copytree(PROJECT_ROOT / "examples" / "h200-mixed-4", tmp_path, dirs_exist_ok=True)
    once = comparison.compare(runs.read_results(tmp_path))[0]
    for name in ("baseline", "mps"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}.kept")
    twice = comparison.compare(runs.read_results(tmp_path))[0]
    assert twice["sections"] == once["sections"]
    assert len(twice["problems"]) == 2
