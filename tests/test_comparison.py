"""What stands in comparison.json: of made-up runs whose right answer is known."""

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

from benchmarking.report import guide

OLD = "2025-01-01T00:00:00+00:00"
NEW = "2026-06-01T00:00:00+00:00"
GPU = synthetic_runs.GPU
SLICING, SHARING = [4.0, 4.02, 4.04, 4.02], [2.0, 2.01, 2.02, 2.01]

# --- which runs stand together ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": GPU | {"gpu_name": "Another GPU"}},
        {"environment": GPU | {"driver_version": "590.00"}},
        {"environment": GPU | {"versions": GPU["versions"] | {"torch": "2.12.0"}}},
        {"job_size": "quick"},
        {"method": 2},
    ],
)
def test_unlike_environments_stand_in_separate_sections_and_are_not_compared(changes):
    sections = compare(time_slicing([4.0]), mps([2.0], **changes))["sections"]
    assert [[group["mode"] for group in one["groups"]] for one in sections] == [
        ["mps"], ["time-slicing"],
    ] or [[group["mode"] for group in one["groups"]] for one in sections] == [
        ["time-slicing"], ["mps"],
    ]  # fmt: skip
    for one in sections:
        assert conclusion(one)["verdict"] == "not measured"


def test_another_precision_of_a_workload_opens_another_section():
    other = mps([2.0])
    change(other, lambda r: r["identity"].update(precision="fp32"), workload="bert_training")
    assert len(compare(time_slicing([4.0]), other)["sections"]) == 2


def test_a_run_without_versions_joins_its_gpus_section():
    unknown = mps([], environment=GPU | {"versions": {}}, outcome="failed")
    found = section(time_slicing([4.0]), unknown)
    assert found["run_ids"] == ["slicing", "mps"]


def test_runs_of_one_combination_are_merged_and_their_cards_named():
    other_card = GPU | {"gpu_uuid": "GPU-11111111"}
    found = section(mps([3.0, 3.1], "old", created_at=OLD, environment=other_card), mps([2.0]))
    (group,) = found["groups"]
    assert group["run_ids"] == ["mps", "old"]
    assert group["stp"]["values"] == pytest.approx([2.0, 4 / 3.0, 4 / 3.1])
    assert group["gpu_uuids"] == [GPU["gpu_uuid"], "GPU-11111111"]
    assert found["left_out"] == []
    assert any("merged from 2 runs on 2 cards of one model" in one for one in found["doubts"])


def contended(run: dict) -> None:
    change(run, lambda r: r.update(is_contended=True), record="co_run", phase="co_run")


def limited(run: dict, percentage: str) -> dict:
    """The run with limits that its plan file gave each client."""
    clients = [{"environment": {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage}}] * 4
    run["manifest"]["plan"] = {"co_runs": [{"co_run": "mixed-4-r0", "clients": clients}]}
    return run


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda run: run["manifest"].update(request={"window_seconds": 10.0}),
         "older than mps, window of 10 s and not of whole jobs"),
        (contended, "measured beside other people's processes, so it is no repeat of mps"),
        (lambda run: run["manifest"].update(is_contended=True),
         "measured beside other people's processes, so it is no repeat of mps"),
        (lambda run: run["manifest"].update(environment=GPU | {"git_commit": None}),
         "older than mps, commit unknown and not 0000000"),
        (lambda run: run["manifest"].update(environment=GPU | {"host_cores": 8}),
         "older than mps, host cores 8 and not 16"),
        (lambda run: change(run, lambda r: r.update(job_key="other"), record="client"),
         "other jobs than the newer mps"),
    ],
)  # fmt: skip
def test_a_run_that_differs_is_left_out_of_the_newer_ones_row_and_the_reason_given(edit, reason):
    old = mps([3.0], "mps-old", created_at=OLD)
    edit(old)
    found = section(old, mps([2.0]))
    assert [group["run_ids"] for group in found["groups"]] == [["mps"]]
    assert found["left_out"] == [f"mps-old (mps, mixed, 4 clients): {reason}"]


def test_a_run_that_had_the_card_to_itself_stands_before_a_newer_one_beside_others():
    newer = mps([9.0], "mps-contended", created_at=NEW)
    contended(newer)
    assert section(newer, mps([2.0]))["groups"][0]["run_ids"] == ["mps"]
    found = section(newer)
    assert found["groups"][0]["run_ids"] == ["mps-contended"]
    assert any("the figures hold beside them only" in doubt for doubt in found["doubts"])


def test_a_newer_run_that_proved_nothing_does_not_hide_an_older_one():
    found = section(mps([2.0], "invalid", created_at=NEW, outcome="invalid"), mps([2.5]))
    assert found["groups"][0]["run_ids"] == ["mps"]
    assert any(doubt.startswith("invalid: the run is invalid") for doubt in found["doubts"])


def test_each_variant_of_a_mode_has_a_row_of_its_own():
    found = section(
        time_slicing([4.0]),
        time_slicing([4.0], "long", environment=GPU | {"timeslice": "Long"}),
        mps([2.5]),
        mps([2.0], "even", mps_limits=mps_limits("even")),
        mps([2.2], "parts", mps_limits=mps_limits("50", "25")),
        limited(mps([2.1], "plan"), "30"),
        mps([2.3], "partitions", mps_limits={"partitions": True}),
    )
    names = [(group["variant"], group["settings"]) for group in found["groups"]]
    assert names == [
        ("time-slicing", ""), ("time-slicing:long", "long slices"), ("mps", ""),
        ("mps:50/25", "50/25 %"), ("mps:even", "even"), ("mps:plan", "limits of the plan"),
        ("mps:partitions", "static partitions"),
    ]  # fmt: skip
    assert conclusion(found)["best"] == "mps:even"
    assert found["left_out"] == []


def test_two_layouts_of_mig_are_told_apart():
    layouts = (["1g.10gb"] * 4, ["2g.20gb"] * 4)
    made = [
        synthetic_runs.run(f"mig{number}", "mig", {4: [4.0 - number]}, mig_layout=layout)
        for number, layout in enumerate(layouts)
    ]
    assert [one["variant"] for one in conclusion(section(*made))["modes"]] == [
        "mig:1g.10gb,1g.10gb,1g.10gb,1g.10gb", "mig:2g.20gb,2g.20gb,2g.20gb,2g.20gb",
    ]  # fmt: skip
    assert conclusion(section(made[0]))["best"] == "mig"


def carrying(made: dict, *words: str) -> dict:
    client = {"label": "Inference service", "job_key": "serving", "command": ["serve", *words]}
    made["manifest"]["plan"]["co_runs"] = [{"co_run": "mixed-4-r0", "clients": [client]}]
    return made


@pytest.mark.parametrize("flag", ["--rate", "--cell-repeats"])
def test_runs_at_unlike_calibrated_load_are_neither_merged_nor_compared(flag):
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
    assert error["rounds"] == 4
    # Of the units of all rounds the mean: rounds that were slower did fewer of them.
    assert error["percent"] == pytest.approx(0.0, abs=0.2)
    assert not error["is_over_limit"]
    assert found["drift_guarded"]
    felt = [group["client_rows"][0]["slowdown"]["mean"] for group in found["groups"]]
    assert felt == pytest.approx([4.02 / 1.03, 2.01 / 1.03], rel=2e-3)
    alone = next(pair for pair in conclusion(found)["pairs"]
                 if {pair["one"], pair["other"]} == {"time-slicing", "alone"})  # fmt: skip
    assert alone["verdict"] == "cannot tell"  # the baselines' own spread is in it
    bad = section(*session(SLICING, SHARING, null=1.05))["own_error"]
    assert (round(bad["percent"], 1), bad["is_over_limit"]) == (5.0, True)


def test_runs_by_hand_are_compared_and_their_drift_is_not_guarded():
    found = section(time_slicing(SLICING), mps(SHARING))
    assert (conclusion(found)["best"], conclusion(found)["verdict"]) == ("mps", "sure")
    assert not found["drift_guarded"]
    assert found["own_error"] is None
    assert sum("drift not guarded" in doubt for doubt in found["doubts"]) == 2


def test_a_disturbed_baseline_is_left_out_and_what_it_makes_impossible_is_invalid():
    made = session(SLICING, SHARING)
    change(made[0], lambda r: r.update(outcome="invalid"), phase="baseline", repeat=0,
           record="co_run")  # fmt: skip
    slow(made[0], 3.0, phase="baseline", repeat=0)
    assert section(*made)["groups"][0]["stp"]["mean"] == pytest.approx(4 / 4.02, rel=1e-3)
    made = session([0.9] * 4, SHARING)
    found = section(*made)
    group = next(group for group in found["groups"] if group["mode"] == "time-slicing")
    assert group["invalid"] == "invalid: the baseline was disturbed"
    whole = conclusion(found)
    assert whole["modes"][0]["estimate"] is None
    assert whole["modes"][0]["reason"] == "invalid: the baseline was disturbed"
    assert (whole["best"], whole["verdict"]) == ("mps", "not measured")
    assert any("ResNet50 training: invalid" in doubt for doubt in found["doubts"])


def reusing(experiment: str) -> dict:
    """A run that took its baselines from a run of the id `baseline`."""
    made = mps([2.0], baseline_run_id="baseline")
    records = [record for record in made["records"] if record["phase"] == "co_run"]
    return made | {"records": records, "experiment": experiment}


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
    found = compare(*lenders, reusing("first"))
    (group,) = [group for one in found["sections"] for group in one["groups"]]
    assert (group["stp"] and group["stp"]["mean"]) == (stp and pytest.approx(stp))


def test_mig_is_also_given_per_multiprocessor_and_has_no_figure_without_its_own_baseline():
    mig = synthetic_runs.run("mig", "mig", {4: [4.0]})
    change(mig, lambda r: r["identity"].update(multiprocessor_count=16), record="client")
    (group,) = section(mig)["groups"]
    assert group["stp_per_multiprocessor"] == pytest.approx(1.0 * 132 / 64)
    assert group["interference_overhead_percent"] is None


def test_a_co_run_with_an_unproved_client_is_in_no_figure_and_an_unverified_one_is_said():
    run = mps([2.0, 9.0])
    change(run, lambda r: r["proof"].update(verdict="invalid"), co_run="mixed-4-r1", client=2,
           record="client")  # fmt: skip
    change(run, lambda r: r["proof"].update(verdict="unverified"), co_run="mixed-4-r0",
           record="client")  # fmt: skip
    found = section(run)
    (group,) = found["groups"]
    assert group["stp"]["values"] == pytest.approx([2.0])
    assert group["is_unverified"]
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


def test_the_best_may_be_another_mode_for_a_job_and_the_worst_is_named_with_its_neighbors():
    made = slow(mps(SHARING), 3.0, phase="co_run", workload="bert_training")
    found = section(time_slicing(SLICING), made)
    assert conclusion(found)["best"] == "mps"
    bert = conclusion(found, "BERT fine-tuning")
    assert (bert["best"], bert["verdict"], bert["workload"]) == (
        "time-slicing", "sure", "bert_training",
    )  # fmt: skip
    worst = found["worst_slowdowns"][0]
    assert (worst["variant"], worst["label"]) == ("mps", "BERT fine-tuning")
    assert worst["slowdown"]["mean"] == pytest.approx(6.03, rel=1e-2)
    assert worst["caused_by"] is None
    assert worst["next_to"] == ["ResNet50 training", "Batch inference", "Interactive session"]


def test_the_guide_and_the_rule_of_thumb_are_held_against_this_mix():
    found = section(time_slicing([4.7, 4.71, 4.72, 4.71]), mps(SHARING))["expectations"]
    holds = {(one["source"], one["rule"]): one["holds"] for one in found}
    assert holds == {
        ("guide", "overhead under time-slicing"): "yes",
        ("guide", "overhead under mps"): "no",
        ("vendor", "time slicing for throughput"): "no",
        ("vendor", "time slicing for notebooks"): "no",
        ("vendor", "SM sharing (MPS) for latency-sensitive inference"): "yes",
    }
    few = section(time_slicing([4.7]), mps([2.0]))["expectations"]
    assert {one["holds"] for one in few} == {"cannot tell"}


def test_measured_values_stand_next_to_the_guides_ranges():
    found = section(mps([2.0]))
    alone = {row["workload"]: row["checks"] for row in found["alone"]}
    resnet = {one["expectation"]["quantity"]: one["verdict"] for one in alone["resnet_training"]}
    assert (resnet["epoch_seconds"], resnet["test_accuracy_percent"]) == ("below", "inside")
    latency = [one["expectation"] for one in alone["batch_inference"]
               if one["expectation"]["quantity"] == "mean_latency_ms"]  # fmt: skip
    assert [(one["batch_size"], one["low"], one["high"]) for one in latency] == [(32, 30, 50)]
    modes = {one["expectation"]["quantity"] for one in found["groups"][0]["checks"]}
    assert modes == {"success_rate_percent", "overhead_percent", "utilization_gpu_percent"}


def test_migs_zero_overhead_is_read_as_a_whole_number():
    (zero,) = [one for one in guide.EXPECTATIONS
               if one.quantity == "interference_overhead_percent"]  # fmt: skip
    assert [zero.verdict(value) for value in (-0.4, 0.4, 3.0)] == ["inside", "inside", "above"]
    assert zero.range_text == "0 %"


def test_what_was_not_measured_is_said_with_the_reason():
    found = section(time_slicing([4.0]))
    assert found["not_measured"] == [
        {"mode": "mps", "reason": "no run of it in this folder"},
        {"mode": "mig", "reason": "no run of it in this folder"},
    ]


def test_copies_of_one_job_are_one_subject_and_cause_what_they_feel_themselves():
    made = synthetic_runs.run("training", "mps", {4: [3.0, 3.1, 3.2]}, mix="training")
    found = section(made)
    one = conclusion(found, "ResNet50 training")
    assert one["copies"] == 4
    assert one["modes"][0]["estimate"]["values"] == pytest.approx([3.0, 3.1, 3.2])
    worst = found["worst_slowdowns"][0]
    assert (worst["caused_by"], worst["source"]) == ("ResNet50 training", "only neighbor")


def test_a_cpu_demonstration_concludes_nothing_of_modes():
    found = section(synthetic_runs.run("demo", "time-slicing", {4: [3.9] * 3}, gpu=False))
    assert found["cpu_demo"]
    whole = conclusion(found)
    assert (whole["verdict"], whole["reason"]) == (
        "not measured", "without a GPU nothing is said of sharing modes",
    )  # fmt: skip
    assert {one["reason"] for one in found["not_measured"]} == {"no GPU was used"}
