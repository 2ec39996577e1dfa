"""Who harms whom, and from where on a slice of one's own pays: made-up runs of two clients each."""

from __future__ import annotations

import itertools
import random

import pytest
import synthetic_runs
from made_up_reports import change, mps_limits, section, slow, time_slicing

JOBS = ("resnet_training", "batch_inference", "bert_training")
RESNET, INFERENCE, BERT = (synthetic_runs.JOBS[job][0] for job in JOBS)
PAIRS = list(itertools.combinations_with_replacement(JOBS, 2))


def slowdown(job: str, beside: str) -> float:
    """1.5 to 2.5 beside anything; the inference job 8 times beside BERT."""
    if (job, beside) == ("batch_inference", "bert_training"):
        return 8.0
    return 1.5 + 0.5 * JOBS.index(beside)


def two_clients(
    made: dict, name: str, mode: str, repeat: int, jobs: list[tuple[str, float]]
) -> list[dict]:
    """Add a co-run of two clients, each slowed so, to a made-up run; returns its clients."""
    rng = random.Random(1)
    members = [
        synthetic_runs.client_record(
            job, slower, phase="co_run", co_run=name, start=3000.0, rng=rng, mode=mode, clients=2,
            client=number, repeat=repeat,
        )
        for number, (job, slower) in enumerate(jobs)
    ]  # fmt: skip
    record = {
        "record": "co_run", "phase": "co_run", "co_run": name, "mode": mode, "clients": 2,
        "repeat": repeat, "outcome": "ok", "reason": None, "warnings": [],
        "window_start_seconds": 3000.0 + repeat, "window_end_seconds": 3010.0 + repeat,
        "go_skew_ms": None, "start_skew_ms": None, "gpu": {}, "summary": {},
    }  # fmt: skip
    made["records"] += [*members, record]
    return members


def pairs_run(run_id: str = "pairs", mode: str = "mps", repeats: int = 1, **more: object) -> dict:
    """Each job alone, then each pair `repeats` times."""
    made = synthetic_runs.run(run_id, mode, {}, is_pairs=True, **more)
    made["manifest"]["mix"] = "pairs"
    for (one, other), repeat in itertools.product(PAIRS, range(repeats)):
        name = f"pairs-{one}-{other}-r{repeat}"
        jobs = [(one, slowdown(one, other)), (other, slowdown(other, one))]
        members = two_clients(made, name, mode, repeat, jobs)
        clients = [{"label": member["label"], "job_key": member["job_key"]} for member in members]
        made["manifest"]["plan"]["co_runs"].append({"co_run": name, "clients": clients})
    return made


def cell(matrix: dict, job: str, beside: str) -> dict:
    (found,) = [one for one in matrix["cells"] if (one["job"], one["beside"]) == (job, beside)]
    return found


def test_pairs_are_no_row_of_the_scorecard_and_stand_next_to_other_mixes():
    found = section(pairs_run(), time_slicing([4.0]))
    assert [group["mix"] for group in found["groups"]] == ["mixed"]
    (matrix,) = found["interference"]
    assert len(matrix["cells"]) == 9
    assert matrix["latency_jobs"] == [INFERENCE]
    assert cell(matrix, RESNET, BERT)["slowdown"]["mean"] == pytest.approx(2.5)
    assert cell(matrix, INFERENCE, BERT)["slowdown"]["mean"] == pytest.approx(8.0)
    assert cell(matrix, INFERENCE, BERT)["tail_slowdown"] is None  # 200 responses
    assert {one["mix"] for one in found["conclusions"]} == {"mixed"}


def test_for_each_pair_it_is_said_which_mode_to_choose():
    worse = slow(pairs_run("slicing", "time-slicing", repeats=3), 1.5, phase="co_run")
    pair_choices = section(pairs_run(repeats=3), worse)["pair_choices"]
    assert len(pair_choices) == len(PAIRS)
    assert {(one["best"], one["verdict"]) for one in pair_choices} == {("mps", "sure")}
    assert [RESNET, INFERENCE] in [one["jobs"] for one in pair_choices]
    assert {one["verdict"] for one in section(pairs_run())["pair_choices"]} == {"not measured"}


def test_pairs_under_limits_of_mps_have_a_matrix_of_their_own():
    found = section(pairs_run(), pairs_run("half", mps_limits=mps_limits("50")))
    assert [one["variant"] for one in found["interference"]] == ["mps", "mps:50"]


def test_a_failed_pair_and_one_that_never_ran_are_said_and_are_no_zero():
    run = pairs_run()
    broken, lost = "pairs-batch_inference-bert_training-r0", "pairs-bert_training-bert_training-r0"
    change(run, lambda r: r.update(outcome="failed"), co_run=broken, record="co_run")
    change(run, lambda r: r.update(status="oom"), co_run=broken, record="client")
    run["records"] = [record for record in run["records"] if record.get("co_run") != lost]
    (matrix,) = section(run)["interference"]
    assert cell(matrix, INFERENCE, BERT)["outcome"] == "failed"
    assert cell(matrix, BERT, BERT)["outcome"] == "not measured"
    assert cell(matrix, BERT, BERT)["slowdown"] is None


def test_the_neighbor_that_a_pair_convicts_is_named_as_the_cause_in_a_larger_mix():
    mixed = synthetic_runs.run("mixed", "mps", {3: [3.0, 3.0, 3.0]})
    mixed["records"] = [record for record in mixed["records"] if record["phase"] == "co_run"]
    jobs = dict(enumerate(JOBS))

    def rename(record: dict) -> None:
        record |= {"workload": jobs[record["client"]], "job_key": jobs[record["client"]],
                   "label": synthetic_runs.JOBS[jobs[record["client"]]][0]}  # fmt: skip
        unit = record["units"].popitem()[1]
        kind, seconds = synthetic_runs.JOBS[record["workload"]][1:3]
        felt = 5.0 if record["workload"] == "batch_inference" else 2.0
        record["units"][kind] = unit | {"count": unit["seconds"] / (felt * seconds)}

    change(mixed, rename, record="client")
    mixed["manifest"]["baseline_run_id"] = "pairs"
    (worst,) = [one for one in section(pairs_run(), mixed)["worst_slowdowns"]
                if one["mix"] == "mixed"]  # fmt: skip
    assert worst["label"] == INFERENCE
    assert (worst["caused_by"], worst["source"]) == (BERT, "pairs")


# --- noisy neighbors ----------------------------------------------------------------------------


def noisy_run(mode: str, felt: dict[float, float]) -> dict:
    """The inference job next to an antagonist at each duty, slowed so."""
    made = synthetic_runs.run(f"noisy-{mode}", mode, {}, is_pairs=True)
    made["manifest"]["mix"] = "noisy"
    for duty, slower in felt.items():
        name = f"noisy-{duty}-r0"
        members = two_clients(
            made, name, mode, 0, [("batch_inference", slower), ("resnet_training", 1.0)]
        )
        key = f"antagonist --kind hbm --duty {duty}"
        members[1] |= {"workload": "antagonist", "label": "Antagonist", "job_key": key}
        clients = [{"label": member["label"], "job_key": member["job_key"]} for member in members]
        made["manifest"]["plan"]["co_runs"].append({"co_run": name, "clients": clients})
    return made


def test_the_duty_from_which_a_slice_is_better_is_interpolated():
    slicing = noisy_run("time-slicing", {0.25: 1.5, 0.5: 2.0, 1.0: 4.0})
    sharing = noisy_run("mps", {0.5: 1.2, 1.0: 1.4})
    (found,) = section(slicing, sharing, noisy_run("mig", {1.0: 2.5}))["noisy"]
    assert (found["label"], found["kind"]) == (INFERENCE, "hbm")
    points = {(one["variant"], one["duty"]): one["slowdown"]["mean"] for one in found["points"]}
    assert points[("time-slicing", 0.25)] == pytest.approx(1.5)
    by_mode = {one["variant"]: one for one in found["break_even"]}
    assert by_mode["time-slicing"]["duty"] == pytest.approx(0.625)  # 2 at 0.5, 4 at 1
    assert by_mode["mps"]["duty"] is None
    assert by_mode["mps"]["reason"] == "a slice is never better up to duty 1"


def test_without_mig_the_break_even_is_not_measured_and_no_mode_is_concluded_on():
    found = section(noisy_run("time-slicing", {1.0: 4.0}))
    assert found["noisy"][0]["break_even"][0]["reason"] == "not measured: no MIG"
    assert found["conclusions"] == found["pair_choices"] == found["interference"] == []
