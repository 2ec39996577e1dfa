"""Services, ramps, requirements and pairs in comparison.json: made-up runs of known truth."""

from __future__ import annotations

import itertools
import random

import pytest
import synthetic_runs
from made_up_reports import (
    SHARING,
    SLICING,
    change,
    compare,
    conclusion,
    failed,
    missed,
    mps,
    mps_limits,
    ramp,
    section,
    session,
    slow,
    time_slicing,
)

from benchmarking.records import run_folder
from benchmarking.suite import console

# --- services and tails -------------------------------------------------------------------------


def as_service(made: dict, mean_ms: float, late: int) -> dict:
    """Make the batch inference a service: 10 s windows, 200 answers a co-run, `late` ones more."""

    def edit(record: dict) -> None:
        is_alone = record["phase"] == "baseline"
        ms = 10.0 if is_alone else mean_ms
        record["label"] = "Inference service"
        record["window_end_seconds"] = record["window_start_seconds"] + 10
        record["latency_ms"] = [ms] * 190 + [5 * ms] * 10
        record["units"] = {"request": {"count": 200, "seconds": 0.24 * ms, "latency": True}}
        if late and not is_alone:
            lost = {"count": late, "seconds": 0.0, "latency": False}
            record["units"]["missed_request"] = lost
        record["figures"] = {"request_rate": 20.0, "slo_ms": 100.0}

    change(made, edit, record="client", workload="batch_inference")
    window = {record["co_run"]: record["window_start_seconds"] for record in made["records"]}
    return change(made, lambda r: r.update(window_end_seconds=window[r["co_run"]] + 10),
                  record="co_run")  # fmt: skip


def test_a_service_is_judged_by_its_answers_in_which_missed_requests_count():
    slicing = as_service(time_slicing(SLICING), mean_ms=15.0, late=0)
    found = section(slicing, as_service(mps(SHARING), mean_ms=40.0, late=50))
    assert {group["throughput_clients"] for group in found["groups"]} == {3}
    one = conclusion(found, "Inference service")
    assert (one["figure"], one["best"], one["verdict"]) == ("median_ms", "time-slicing", "sure")
    tail = conclusion(found, "Inference service", "tail_ms")
    assert (tail["percent"], tail["is_claim"], tail["verdict"]) == (99, False, None)
    assert [mode["estimate"] and mode["estimate"]["mean"] for mode in tail["modes"]] == [75.0, None]
    assert tail["modes"][1]["reason"] == "too many requests failed"
    alone, sharing = (group["client_rows"][1] for group in found["groups"])
    assert alone["service"]["goodput_per_second"] == pytest.approx(20.0)
    assert (sharing["missed"], sharing["responses"], sharing["p99_ms"]) == (200, 800, None)
    assert sharing["slo"]["percent"] == pytest.approx(100 * 760 / 1000)
    # Where most were missed there is no median, and the other mode is not better for sure.
    worse = section(as_service(time_slicing(SLICING), mean_ms=15.0, late=300),
                    as_service(mps(SHARING), mean_ms=40.0, late=0))  # fmt: skip
    one = conclusion(worse, "Inference service")
    assert (one["best"], one["verdict"]) == ("mps", "cannot tell")


def test_the_p99_that_a_run_prints_at_its_end_counts_missed_requests(tmp_path, capsys):
    for name, late, said in (("some", 400, "inf"), ("none", 0, "75.0")):
        made = as_service(mps([2.0], name), mean_ms=15.0, late=late)
        for record in made["records"]:
            record["latency_ms"] = record.get("latency_ms") and record["latency_ms"] * 3
        console.print_summary(run_folder.read_run(synthetic_runs.write(tmp_path, made)))
        (row,) = [line for line in capsys.readouterr().out.splitlines()
                  if "Inference service" in line and "verified" in line]  # fmt: skip
        assert row.split()[-3] == said


def test_a_round_without_an_answer_is_no_round_less_in_a_services_interval():
    sharing = as_service(mps(SHARING), mean_ms=40.0, late=0)

    def lose_all(record: dict) -> None:
        record["latency_ms"] = None
        record["units"] = {"missed_request": {"count": 200, "seconds": 0.0, "latency": False}}

    change(sharing, lose_all, workload="batch_inference", phase="co_run", repeat=1)
    row = section(sharing)["groups"][0]["client_rows"][1]
    assert (row["responses"], row["missed"], row["latency"]["p50"]) == (600, 200, 40.0)
    assert row["median_ms"] is None


@pytest.mark.parametrize("rounds", [(0, 1, 2, 3), (2,)])
def test_a_client_that_finished_nothing_is_named_and_not_a_missing_baseline(rounds):
    starved = mps(SHARING)
    for repeat in rounds:
        change(starved, lambda record: record.update(units={}), client=3, repeat=repeat,
               phase="co_run")  # fmt: skip
    found = section(time_slicing(SLICING), starved)
    nothing = "BERT fine-tuning finished no unit of work in the window"
    for subject in ("whole card", "BERT fine-tuning"):
        one = conclusion(found, subject)
        assert (one["best"], one["modes"][1]["estimate"]) == ("time-slicing", None)
        assert one["modes"][1]["reason"] == nothing
    assert conclusion(found, "ResNet50 training")["best"] == "mps"
    assert found["groups"][1]["stp"] is None
    assert f"mps, 4 clients: {nothing}, so STP and overhead are unknown" in found["doubts"]


# --- ramps --------------------------------------------------------------------------------------


def test_a_ramp_says_how_many_fit_where_it_breaks_and_from_where_on_more_gain_nothing():
    steps = {1: [1.0], 2: [1.25], 4: [2.3], 8: [5.0]}
    (one,) = section(failed(ramp(steps), co_run="training-8-r0"))["ramps"]
    assert (one["variant"], one["clients"], one["fits"]) == ("mps", [1, 2, 4, 8], 4)
    point = one["breaking_point"]
    assert (point["clients"], point["criterion"], one["sufficient_clients"]) == (8, "oom", 4)
    whole = section(ramp({1: [1.0], 2: [2.0], 4: [4.4]}))["ramps"][0]
    assert (whole["fits"], whole["breaking_point"]["clients"]) == (4, None)
    assert (whole["saturation_clients"], whole["sufficient_clients"]) == (4, 1)
    assert section(synthetic_runs.run("mixed", "mps", {1: [1.0], 4: [2.0]}))["ramps"] == []


def test_a_bound_is_held_against_a_counts_estimate_and_not_its_worst_client():
    lucky = ramp({1: [1.0], 2: [2.0, 2.0]}, bounds={"max_slowdown": 2.05})
    slow(lucky, 1.04, co_run="training-2-r0", client=1)  # 2.08, 2.02 on average
    assert section(lucky)["ramps"][0]["fits"] == 2
    slow(lucky, 1.1, co_run="training-2-r1")
    (one,) = section(lucky)["ramps"]
    assert (one["fits"], one["breaking_point"]["criterion"]) == (1, "slowdown")
    # One that did nothing at all is no better than one that was slow.
    starved = ramp({1: [1.0], 2: [1.5]}, bounds={"max_slowdown": 2.05})
    change(starved, lambda record: record.update(units={}), co_run="training-2-r0", client=1)
    (one,) = section(starved)["ramps"]
    assert (one["fits"], one["breaking_point"]["criterion"]) == (1, "slowdown")
    assert one["breaking_point"]["detail"].endswith("finished no unit of work in the window")


def test_a_count_that_failed_once_in_any_call_is_where_the_ramp_breaks():
    first = failed(ramp({1: [1.0], 2: [1.5]}), co_run="training-2-r0")
    again = ramp({1: [1.0], 2: [1.5]}, created_at="2026-06-01T00:00:00+00:00")
    again["manifest"]["run_id"] = "again"
    point = section(first, again)["ramps"][0]["breaking_point"]
    assert (point["clients"], point["broken_repeats"], point["judged_repeats"]) == (2, 1, 2)


# --- requirements -------------------------------------------------------------------------------


def answers(made: dict, count: int) -> dict:
    """Let the inference job have answered so often."""
    return change(made, lambda r: r.update(latency_ms=[9.0] * count), workload="batch_inference")


def void(made: dict) -> dict:
    """Let every co-run lack the proof of its mode."""
    return change(made, lambda r: r.update(outcome="invalid"), record="co_run", phase="co_run")


EVEN = mps([2.0], "even", mps_limits=mps_limits("even"))
HALF = mps([2.5], "half", mps_limits=mps_limits("50"))
TRAININGS, TRAININGS_MPS = (
    synthetic_runs.run(f"training-{mode}", mode, {4: [3.0]}, mix="training")
    for mode in ("time-slicing", "mps")
)


@pytest.mark.parametrize(
    ("made", "required", "said"),
    [
        ((mps([2.5]), EVEN), "mps:work>1.9", ["under mps,"]),
        ((mps([2.5]), EVEN), "mps:even:work>1.9", []),
        ((mps([2.5]), EVEN), "mps:50:work>1.9", ["nothing was measured"]),
        ((mps([2.5]), EVEN), "mps:even:BERT fine-tuning:slowdown<1.9x", ["under mps:even,"]),
        ((mps([2.5]), EVEN), "work>0.9", []),
        ((mps([2.0]),), "overhead < -49.5 %", []),
        ((mps([2.0]),), "overhead<-51%", ["overhead is -"]),
        ((time_slicing([4.0]), EVEN), "slowdown<3", ["under time-slicing,"] * 4),
        # Of a mode of which only variants ran, it speaks of all of them.
        ((HALF, EVEN), "mps:work>1.9", ["under mps:50, mixed with 4 clients: work is 1.6"]),
        (session([0.9] * 4, SHARING), "time-slicing:work>1", ["the baseline was disturbed"]),
        ((failed(mps([2.0]), phase="co_run"),), "work>0.1", ["failed"]),
        ((failed(mps([2.0]), phase="co_run"),), "success>=75 %", []),
        ((time_slicing([4.0]), void(mps([2.0]))), "work>0.1", ["under mps, mixed: no co-run"]),
        ((time_slicing([4.0]), void(mps([2.0]))), "time-slicing:work>0.1", []),
        (
            (time_slicing([4.0]), mps([2.0]), TRAININGS, void(TRAININGS_MPS)),
            "BERT fine-tuning:slowdown<9",
            [],
        ),
        ((TRAININGS, void(TRAININGS_MPS)), "work>0.1", ["under mps, training: no co-run"]),
        ((failed(mps([2.0]), phase="co_run"),), "success>75", ["success is 75"]),
        # Too few answers to tell: 50 of four jobs under one mode, 600 under the other.
        (
            (answers(time_slicing([4.0]), 50), answers(mps([2.0]), 600)),
            "p99<1s",
            ["under time-slicing, mixed with 4 clients: p99 of Batch inference is unknown"],
        ),
        # None at all, where another job answers and the job did alone.
        (
            (change(mps([2.0]), lambda r: r.update(latency_ms=[]), phase="co_run", client=1),),
            "mps:mean<10s",
            ["under mps, mixed with 4 clients: mean of Batch inference is unknown"],
        ),
    ],
)
def test_a_requirement_speaks_of_the_variant_that_it_names(made, required, said):
    sentences = missed(required, compare(*made))
    assert len(sentences) == len(said)
    assert all(part in sentence for part, sentence in zip(said, sentences, strict=True))


def test_a_mode_that_failed_once_has_no_response_times_either():
    slicing = failed(answers(time_slicing([4.0] * 2), 600), co_run="mixed-4-r1")
    found = section(slicing, answers(mps([2.0] * 2), 600))
    tail = conclusion(found, "Batch inference", "tail_ms")
    known = {mode["variant"]: (mode["estimate"] is not None, mode["reason"])
             for mode in tail["modes"]}  # fmt: skip
    assert known == {"time-slicing": (False, "failed"), "mps": (True, None)}


# --- pairs: who harms whom ----------------------------------------------------------------------

JOBS = ("resnet_training", "batch_inference", "bert_training")
RESNET, INFERENCE, BERT = (synthetic_runs.JOBS[job][0] for job in JOBS)
PAIRS = list(itertools.combinations_with_replacement(JOBS, 2))


def slowdown(job: str, neighbor: str) -> float:
    """1.5 to 2.5 next to anything; the inference job 8 times next to BERT."""
    if (job, neighbor) == ("batch_inference", "bert_training"):
        return 8.0
    return 1.5 + 0.5 * JOBS.index(neighbor)


def add_two(made: dict, name: str, mode: str, repeat: int, jobs: dict[str, float] | list) -> list:
    """Add a co-run of two clients, each slowed so, to a made-up run; returns its clients."""
    members = [
        synthetic_runs.client_record(
            job, slower, phase="co_run", co_run=name, start=3000.0, rng=random.Random(1),
            mode=mode, clients=2, client=number, repeat=repeat,
        )
        for number, (job, slower) in enumerate(jobs)
    ]  # fmt: skip
    record = synthetic_runs.co_run_record(name, members, mode, "co_run", repeat, gpu=True)
    made["records"] += [*members, record]
    return members


def plan(made: dict, name: str, members: list[dict]) -> None:
    clients = [{"label": member["label"], "job_key": member["job_key"]} for member in members]
    made["manifest"]["plan"]["co_runs"].append({"co_run": name, "clients": clients})


def pairs_run(run_id: str = "pairs", mode: str = "mps", repeats: int = 1, **more: object) -> dict:
    """Each job alone, then each pair `repeats` times."""
    made = synthetic_runs.run(run_id, mode, {}, is_pairs=True, **more)
    made["manifest"]["mix"] = "pairs"
    for (one, other), repeat in itertools.product(PAIRS, range(repeats)):
        name = f"pairs-{one}-{other}-r{repeat}"
        jobs = [(one, slowdown(one, other)), (other, slowdown(other, one))]
        plan(made, name, add_two(made, name, mode, repeat, jobs))
    return made


def cell(matrix: dict, job: str, neighbor: str) -> dict:
    (found,) = [one for one in matrix["cells"] if (one["job"], one["beside"]) == (job, neighbor)]
    return found


def test_pairs_are_no_row_of_the_scorecard_and_stand_next_to_other_mixes():
    half = pairs_run("half", mps_limits=mps_limits("50"))
    found = section(pairs_run(), half, time_slicing([4.0]))
    assert [group["mix"] for group in found["groups"]] == ["mixed"]
    assert {one["mix"] for one in found["conclusions"]} == {"mixed"}
    matrix, of_half = found["interference"]
    assert (matrix["variant"], of_half["variant"]) == ("mps", "mps:50")
    assert (len(matrix["cells"]), matrix["latency_jobs"]) == (9, [INFERENCE])
    assert cell(matrix, RESNET, BERT)["slowdown"]["mean"] == pytest.approx(2.5)
    assert cell(matrix, INFERENCE, BERT)["slowdown"]["mean"] == pytest.approx(8.0)
    assert cell(matrix, INFERENCE, BERT)["tail_slowdown"] is None  # 200 responses


def test_a_failed_pair_and_one_that_never_ran_are_said_and_are_no_zero():
    run = failed(pairs_run(), co_run="pairs-batch_inference-bert_training-r0")
    lost = "pairs-bert_training-bert_training-r0"
    run["records"] = [record for record in run["records"] if record.get("co_run") != lost]
    (matrix,) = section(run)["interference"]
    assert cell(matrix, INFERENCE, BERT)["outcome"] == "failed"
    missing = cell(matrix, BERT, BERT)
    assert (missing["outcome"], missing["slowdown"]) == ("not measured", None)


def test_the_neighbor_that_a_pair_convicts_is_named_as_the_cause_in_a_larger_mix():
    mixed = synthetic_runs.run("mixed", "mps", {3: [3.0, 3.0, 3.0]}, baseline_run_id="pairs")
    mixed["records"] = [record for record in mixed["records"] if record["phase"] == "co_run"]

    def rename(record: dict) -> None:
        job = JOBS[record["client"]]
        label, kind, seconds = synthetic_runs.JOBS[job][:3]
        record |= {"workload": job, "job_key": job, "label": label}
        unit = record["units"].popitem()[1]
        felt = 5.0 if job == "batch_inference" else 2.0
        record["units"][kind] = unit | {"count": unit["seconds"] / (felt * seconds)}

    change(mixed, rename, record="client")
    (worst,) = [one for one in section(pairs_run(), mixed)["worst_slowdowns"]
                if one["mix"] == "mixed"]  # fmt: skip
    assert (worst["label"], worst["caused_by"], worst["source"]) == (INFERENCE, BERT, "pairs")


# --- noisy neighbors ----------------------------------------------------------------------------


def noisy_run(mode: str, felt: dict[float, float]) -> dict:
    """The inference job next to an antagonist at each duty, slowed so."""
    made = synthetic_runs.run(f"noisy-{mode}", mode, {}, is_pairs=True)
    made["manifest"]["mix"] = "noisy"
    for duty, slower in felt.items():
        name = f"noisy-{duty}-r0"
        jobs = [("batch_inference", slower), ("resnet_training", 1.0)]
        members = add_two(made, name, mode, 0, jobs)
        key = f"antagonist --kind hbm --duty {duty}"
        members[1] |= {"workload": "antagonist", "label": "Antagonist", "job_key": key}
        plan(made, name, members)
    return made


def test_a_pair_that_was_faster_than_alone_has_no_figure_in_either_table():
    (found,) = section(noisy_run("time-slicing", {0.5: 0.5, 1.0: 4.0}))["noisy"]
    felt = {one["duty"]: one["slowdown"] and one["slowdown"]["mean"] for one in found["points"]}
    assert felt == {0.5: None, 1.0: pytest.approx(4.0)}
    (matrix,) = section(slow(pairs_run(), 0.1, workload="bert_training", phase="co_run"))[
        "interference"
    ]
    cells = [one for one in matrix["cells"] if one["job"] == BERT]
    assert {(one["outcome"], one["slowdown"]) for one in cells} == {
        ("invalid: the baseline was disturbed", None)
    }
    assert all(one["stp"] is None for one in matrix["cells"] if one["beside"] == BERT)


def test_the_duty_from_which_a_slice_is_better_is_interpolated():
    slicing = noisy_run("time-slicing", {0.25: 1.5, 0.5: 2.0, 1.0: 4.0})
    sharing = noisy_run("mps", {0.5: 1.2, 1.0: 1.4})
    (found,) = section(slicing, sharing, noisy_run("mig", {1.0: 2.5}))["noisy"]
    assert (found["label"], found["kind"]) == (INFERENCE, "hbm")
    points = {(one["variant"], one["duty"]): one["slowdown"]["mean"] for one in found["points"]}
    assert points["time-slicing", 0.25] == pytest.approx(1.5)
    by_mode = {one["variant"]: one for one in found["break_even"]}
    assert by_mode["time-slicing"]["duty"] == pytest.approx(0.625)  # 2 at 0.5, 4 at 1
    assert by_mode["mps"]["duty"] is None
    assert by_mode["mps"]["reason"] == "a slice is never better up to duty 1"
    # Of two layouts the better one counts.
    layouts = [noisy_run("mig", {1.0: slower}) for slower in (2.5, 3.5)]
    for number, one in enumerate(layouts):
        one["manifest"] |= {"run_id": f"mig-{number}", "mig_layout": [f"{1 + number}g.10gb"] * 2}
    (found,) = section(slicing, *layouts)["noisy"]
    assert [one["variant"] for one in found["break_even"]] == ["time-slicing"]
    assert found["break_even"][0]["duty"] == pytest.approx(0.625)
    # Without MIG nothing is said, and no mode is concluded on.
    alone = section(noisy_run("time-slicing", {1.0: 4.0}))
    assert alone["noisy"][0]["break_even"][0]["reason"] == "not measured: no MIG"
    assert alone["conclusions"] == alone["pair_choices"] == alone["interference"] == []
