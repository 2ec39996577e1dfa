"""Who harms whom: matrices of made-up runs of pairs whose right answer is known."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import synthetic_runs
from compared_runs import change, compare, markdown, sentences, time_slicing

from benchmarking import analyze_results
from benchmarking.analysis import export, heat_maps, noise

JOBS = ("resnet_training", "batch_inference", "bert_training")
RESNET, INFERENCE, BERT = (synthetic_runs.JOBS[job][0] for job in JOBS)
PAIRS = list(itertools.combinations_with_replacement(JOBS, 2))


def slowdown(job: str, beside: str) -> float:
    """1.5 to 2.5 beside anything; the inference job 8 times beside BERT."""
    return 8.0 if (job, beside) == ("batch_inference", "bert_training") else 1.5 + 0.5 * JOBS.index(
        beside
    )  # fmt: skip


def pairs_run(
    run_id: str = "pairs", mode: str = "mps", repeats: int = 1, **manifest: object
) -> dict:
    """Each job alone, then each pair `repeats` times."""
    made = synthetic_runs.run(run_id, mode, {}, mix="mixed", is_pairs=True, **manifest)
    made["manifest"]["mix"] = "pairs"
    rng = random.Random(1)
    planned = made["manifest"]["plan"]["co_runs"]
    for (one, other), repeat in itertools.product(PAIRS, range(repeats)):
        name = f"pairs-{one}-{other}-r{repeat}"
        members = [
            synthetic_runs.client_record(
                job, slowdown(job, beside) + repeat / 100, phase="co_run", co_run=name,
                start=3000.0, rng=rng, mode=mode, clients=2, client=number, repeat=repeat,
                slowdown=slowdown(job, beside) + repeat / 100,
            )
            for number, (job, beside) in enumerate([(one, other), (other, one)])
        ]  # fmt: skip
        record = {"record": "co_run", "phase": "co_run", "co_run": name, "mode": mode,
                  "clients": 2, "repeat": repeat, "outcome": "ok", "reason": None,
                  "warnings": [], "window_start_seconds": repeat, "window_end_seconds": 2,
                  "go_skew_ms": None, "start_skew_ms": None,
                  "gpu": {}, "summary": {"stp": 1.2, "antt": 1.7}}  # fmt: skip
        made["records"] += [*members, record]
        labels = [{"label": member["label"]} for member in members]
        planned.append({"co_run": name, "clients": labels})
    return made


def test_the_pair_that_hurts_most_is_named_with_its_mode_figure_and_run():
    text = sentences(compare(pairs_run("pairs-mps", repeats=3)))
    assert (
        f"Two at a time under MPS: {INFERENCE} suffers most, beside {BERT}: slowdown 8.01" in text
    )
    assert "95 % interval, n = 3" in text
    assert (
        f"the p99 latency that grew most in these runs is that of {INFERENCE} beside {BERT}" in text
    )
    assert "as seen in these runs" not in text
    assert text.endswith("no A/A was taken, so the noise floor is unknown.")


def test_the_worst_pair_of_two_calls_is_claimed_only_beyond_their_noise_floor():
    runs = [pairs_run("pairs-mps", repeats=3), pairs_run("again", repeats=3,
            created_at="2026-01-02T00:00:00+00:00")]  # fmt: skip
    quiet = sentences(compare(*runs))
    assert "suffers most, beside BERT fine-tuning: slowdown 8.01" in quiet
    assert quiet.endswith("noise floor of the slowdowns 0.0 %.")
    noisy = change(runs[1], lambda r: r.update(slowdown=5 * r["slowdown"]), record="client",
                   co_run="pairs-resnet_training-resnet_training-r1")  # fmt: skip
    for repeat in (0, 2):
        change(noisy, lambda r: r.update(slowdown=5 * r["slowdown"]), record="client",
               co_run=f"pairs-resnet_training-resnet_training-r{repeat}")  # fmt: skip
    loud = compare(runs[0], noisy)
    assert ", as seen in these runs: slowdown" in sentences(loud)
    assert "noise floor of the slowdowns 400.0 %" in sentences(loud)
    found = {(pair.figure, pair.label) for pair in loud.sections[0].same_twice}
    assert (noise.SLOWDOWN, RESNET) in found


def test_one_pair_alone_is_no_claim_that_it_is_the_worst():
    run = pairs_run()
    only = "pairs-batch_inference-batch_inference-r0"
    run["records"] = [r for r in run["records"] if r["phase"] == "baseline" or r["co_run"] == only]
    run["manifest"]["plan"]["co_runs"] = [
        planned for planned in run["manifest"]["plan"]["co_runs"] if planned["co_run"] == only
    ]
    assert "suffers most, beside itself, as seen in these runs" in sentences(compare(run))


def test_of_single_co_runs_the_worst_pair_is_said_as_seen():
    text = sentences(compare(pairs_run()))
    assert f"beside {BERT}, as seen in these runs: slowdown 8.00 (n = 1)" in text
    assert "repeat (`--repeats 3`) before relying on it" in text


def test_the_mode_under_which_a_pair_hurts_most_comes_first():
    worse = change(
        pairs_run("slicing", "time-slicing"), lambda r: r.update(slowdown=9.0),
        co_run="pairs-resnet_training-resnet_training-r0", record="client",
    )  # fmt: skip
    first, second = sentences(compare(pairs_run(), worse)).splitlines()
    assert f"time slicing: {RESNET} suffers most, beside itself, as seen" in first
    assert "under MPS" in second


def test_pairs_under_limits_of_mps_have_maps_of_their_own(tmp_path: Path):
    limits = {"percentages": ["50"], "memory_limits": [], "priorities": []}
    for made in (pairs_run(), pairs_run("half", mps_limits=limits)):
        synthetic_runs.write(tmp_path, made)
    folders, compared = analyze_results.read_and_compare(tmp_path)
    assert [matrix.title for matrix in compared.sections[0].matrices] == ["MPS", "MPS (50 %)"]
    analyze_results.draw_and_build(compared, folders, tmp_path)
    assert {path.name for path in tmp_path.glob("slowdowns-*.png")} == {
        "slowdowns-mps-pairs.png", "slowdowns-mps-50-pairs.png",
    }  # fmt: skip


def test_a_failed_pair_and_one_that_never_ran_are_said_and_are_no_zero():
    run = pairs_run()
    failed, lost = "pairs-batch_inference-bert_training-r0", "pairs-bert_training-bert_training-r0"
    change(run, lambda r: r.update(outcome="failed"), co_run=failed, record="co_run")
    change(run, lambda r: r.update(status="oom", slowdown=None), co_run=failed, record="client")
    run["records"] = [record for record in run["records"] if record.get("co_run") != lost]
    text = markdown(compare(run))
    assert f"- MPS: {INFERENCE} beside {BERT}: failed" in text
    assert f"- MPS: {BERT} beside itself: not measured" in text
    assert "3 of 9 figures are missing" in text
    assert f"| MPS | {BERT} | itself | not measured | – | – |" in text


def test_pairs_are_no_row_of_the_scorecard_and_stand_beside_other_mixes():
    compared = compare(pairs_run(), time_slicing([4.0]))
    assert [group.mix for group in compared.sections[0].groups] == ["mixed"]
    (matrix,) = json.loads(export.json_text(compared))["sections"][0]["interference"]
    cell = next(c for c in matrix["cells"] if (c["job"], c["beside"]) == (RESNET, BERT))
    assert cell["slowdown"]["mean"] == pytest.approx(2.5)
    assert cell["tail_slowdown"] is None
    assert matrix["latency_jobs"] == [INFERENCE]


def test_a_tail_of_few_responses_is_not_given():
    few = change(pairs_run(), lambda r: r.update(latency_ms=r["latency_ms"][:40]),
                 workload="batch_inference", phase="co_run")  # fmt: skip
    (matrix,) = compare(few).sections[0].matrices
    assert matrix.cell(INFERENCE, BERT).tail_slowdown is None
    assert matrix.cell(INFERENCE, BERT).responses == 40


def test_every_job_is_in_the_map_of_slowdowns_and_those_with_a_p99_in_that_of_tails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    every = tuple(synthetic_runs.MIXES["mixed"])
    pairs = list(itertools.combinations_with_replacement(every, 2))
    monkeypatch.setitem(globals(), "JOBS", every)
    monkeypatch.setitem(globals(), "PAIRS", pairs)
    (matrix,) = compare(pairs_run()).sections[0].matrices
    notebook = synthetic_runs.JOBS["jupyter_simulation"][0]
    assert notebook in matrix.latency_jobs
    drawn = heat_maps.slowdowns(matrix, [matrix], tmp_path / "slowdowns.png")
    rows = [job for job in matrix.jobs if drawn.svg.count(job.split()[0]) >= 2]  # row and column
    assert rows == list(matrix.jobs)
    assert matrix.jobs_with_tails == [INFERENCE]
    tails = heat_maps.tails(matrix, [matrix], tmp_path / "tails.png")
    assert tails.svg.count(notebook.split()[0]) == 1  # a column; its few answers have no p99


def test_the_report_holds_a_heat_map_of_slowdowns_and_one_of_tails(tmp_path: Path):
    synthetic_runs.write(tmp_path, pairs_run())
    folders, compared = analyze_results.read_and_compare(tmp_path)
    document = analyze_results.draw_and_build(compared, folders, tmp_path)
    analyze_results.write_files(compared, document, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"Under MPS p99 latency of {INFERENCE} grows the most beside {BERT}: " in page
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "slowdowns-mps-pairs.png", "tails-mps-pairs.png",
    }  # fmt: skip
