"""What stands beside what: sections, merged runs, what is left out, where baselines come from."""

from __future__ import annotations

import pytest
import synthetic_runs
from compared_runs import change, compare, markdown, mps, sentences, time_slicing

from benchmarking.analysis import charts, comparison
from benchmarking.analysis.runs import RunView


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
    (name,) = changes
    (difference,) = compared.differences()
    assert difference.startswith(
        "version of torch" if name == "versions" else name.replace("_", " ")
    )
    assert "2 unlike environments. They stand" in markdown(compared)
    assert f"\n- {difference}\n" in markdown(compared)


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


def renamed(made: dict, run_id: str) -> dict:
    made["manifest"]["run_id"] = run_id
    return made


def test_runs_of_one_combination_are_merged_and_their_cards_named():
    other_card = synthetic_runs.GPU | {"gpu_uuid": "GPU-11111111"}
    older = renamed(
        mps([3.0, 3.1], created_at="2025-01-01T00:00:00+00:00", environment=other_card), "mps-old"
    )
    compared = compare(older, mps([2.0]))
    (group,) = compared.sections[0].groups
    assert group.run_ids == ("mps", "mps-old")
    assert group.stp.values == pytest.approx([2.0, 4 / 3.0, 4 / 3.1])
    assert group.gpu_uuids == [synthetic_runs.GPU["gpu_uuid"], "GPU-11111111"]
    assert compared.sections[0].left_out == []
    text = markdown(compared)
    assert "merged from 2 runs on 2 cards of one model" in text
    assert "*(runs `mps`, `mps-old`)*" in text


def _without_one_job(run: dict) -> None:
    run["records"] = [
        record | {"job_key": "other"} if record["record"] == "client" else record
        for record in run["records"]
    ]


def limited(run: dict, percentage: str) -> dict:
    """The run with limits that its plan file gave each client."""
    clients = [{"environment": {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage}}] * 4
    run["manifest"]["plan"] = {"co_runs": [{"co_run": "mixed-4-r0", "clients": clients}]}
    return run


def _contended(run: dict) -> None:
    change(run, lambda r: r.update(is_contended=True), record="co_run", phase="co_run")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda run: run["manifest"].update(request={"window_seconds": 10.0}),
         "older than mps, window of 10 s and not of whole jobs"),
        (_contended, "measured beside other people's processes, so it is no repeat of mps"),
        (lambda run: run["manifest"].update(is_contended=True),
         "measured beside other people's processes, so it is no repeat of mps"),
        (lambda run: run["manifest"].update(environment=synthetic_runs.GPU | {"git_commit": None}),
         "older than mps, commit unknown and not 0000000"),
        (lambda run: run["manifest"].update(environment=synthetic_runs.GPU | {"git_commit": "a"}),
         "older than mps, commit a and not 0000000"),
        (lambda run: run["manifest"].update(environment=synthetic_runs.GPU | {"host_cores": 8}),
         "older than mps, host cores 8 and not 16"),
        (_without_one_job, "other jobs than the newer mps"),
    ],
)  # fmt: skip
def test_a_run_that_differs_is_left_out_of_the_newer_ones_row_and_the_reason_given(edit, reason):
    old = renamed(mps([3.0], created_at="2025-01-01T00:00:00+00:00"), "mps-old")
    edit(old)
    (section,) = compare(old, mps([2.0])).sections
    assert [group.run_ids for group in section.groups] == [("mps",)]
    assert section.left_out == [f"mps-old (MPS, mixed, 4 clients): {reason}"]


def test_plans_with_other_limits_are_no_repeats_of_each_other():
    old = renamed(limited(mps([3.0], created_at="2025-01-01T00:00:00+00:00"), "25"), "mps-old")
    (section,) = compare(old, limited(mps([2.0]), "50")).sections
    assert [group.run_ids for group in section.groups] == [("mps",)]
    assert section.left_out == [
        "mps-old (MPS (limits of the plan), mixed, 4 clients): "
        "other settings of the mode than the newer mps"
    ]


def test_a_run_that_had_the_card_to_itself_stands_before_a_newer_one_beside_others():
    contended = renamed(mps([9.0], created_at="2026-06-01T00:00:00+00:00"), "mps-contended")
    _contended(contended)
    (section,) = compare(contended, mps([2.0])).sections
    assert [group.run_ids for group in section.groups] == [("mps",)]
    (section,) = compare(contended).sections
    assert section.groups[0].run_ids == ("mps-contended",)
    assert any("the figures hold beside them only" in doubt for doubt in section.doubts)


def test_runs_of_unknown_commit_are_merged_and_that_is_a_doubt():
    unknown = synthetic_runs.GPU | {"git_commit": None}
    old = renamed(mps([3.0], created_at="2025-01-01T00:00:00+00:00", environment=unknown), "old")
    (section,) = compare(old, mps([2.0], environment=unknown)).sections
    assert section.groups[0].run_ids == ("mps", "old")
    said = "mps and old, 4 clients: the commit of these runs is unknown, and may differ"
    assert said in section.doubts
    (section,) = compare(renamed(mps([3.0], created_at="2025-01-01T00:00:00+00:00"), "old"),
                         mps([2.0])).sections  # fmt: skip
    assert not [doubt for doubt in section.doubts if "unknown" in doubt]


def sliced(length: str | None, run_id: str = "slicing", **more: object) -> dict:
    environment = synthetic_runs.GPU | {"timeslice": length}
    return renamed(time_slicing([4.0], environment=environment, **more), run_id)


def test_other_lengths_of_the_time_slice_have_rows_of_their_own_and_an_unknown_one_joins_none():
    (section,) = compare(sliced("Default"), sliced("Long", "long"), mps([2.0])).sections
    assert [group.mode_name for group in section.groups] == [
        "time slicing", "time slicing (long slices)", "MPS",
    ]  # fmt: skip
    assert section.left_out == section.same_twice == []
    old = sliced(None, "old", created_at="2025-01-01T00:00:00+00:00")
    (section,) = compare(sliced("Default"), old).sections
    assert section.left_out == [
        "old (time slicing, mixed, 4 clients): older than slicing, time slice unknown and not "
        "Default"
    ]


EVEN = {"percentages": ["even"], "memory_limits": [], "priorities": []}


def test_limited_mps_is_compared_with_time_slicing_and_other_limits_have_a_row_of_their_own():
    even = mps([2.0, 2.02, 2.04], mps_limits=EVEN)
    compared = compare(time_slicing([4.0, 4.02, 4.04]), even)
    (section,) = compared.sections
    assert [(group.mode_name, group.mix) for group in section.groups] == [
        ("time slicing", "mixed"), ("MPS (even)", "mixed"),
    ]  # fmt: skip
    text = sentences(compared)
    assert text.count("choose MPS (even) for throughput") == 1
    assert "no other mode was measured" not in text
    halves = renamed(mps([3.0], mps_limits=EVEN | {"percentages": ["50"]}), "halves")
    (section,) = compare(even, halves, renamed(mps([2.5], mps_limits=None), "free")).sections
    assert [group.mode_name for group in section.groups] == ["MPS", "MPS (50 %)", "MPS (even)"]
    assert section.left_out == section.same_twice == []


def test_settings_of_one_mode_share_its_color_in_a_chart_and_nothing_else():
    looks = charts.styles([("mps", "MPS"), ("mps", "MPS (even)"), ("mps", "MPS"), ("mig", "MIG")])
    assert looks["MPS"] == charts.style("mps")
    assert looks["MIG"] == charts.style("mig")
    assert looks["MPS (even)"]["color"] == looks["MPS"]["color"]
    for kind in ("hatch", "marker", "linestyle"):
        assert looks["MPS (even)"][kind] != looks["MPS"][kind]


def carrying(made: dict, *words: str) -> dict:
    client = {"label": "Inference service", "job_key": "serving", "command": ["serve", *words]}
    made["manifest"]["plan"]["co_runs"] = [{"co_run": "mixed-4-r0", "clients": [client]}]
    return made


@pytest.mark.parametrize("flag", ["--rate", "--cell-repeats"])
@pytest.mark.parametrize("other", [mps, time_slicing])
def test_runs_at_unlike_calibrated_load_are_neither_merged_nor_compared(flag, other):
    old = renamed(other([4.0], created_at="2025-01-01T00:00:00+00:00"), "old")
    alike = compare(carrying(old, flag, "9", flag, "10"), carrying(mps([2.0]), flag, "10"))
    assert len(alike.sections) == 1
    unlike = compare(carrying(old, flag, "10.1"), carrying(mps([2.0]), flag, "10"))
    assert [len(section.groups) for section in unlike.sections] == [1, 1]
    assert unlike.differences() == [
        f"calibrated {flag} of serving in mixed: 10 in section 1, 10.1 in section 2; give all "
        "runs one `--baseline` to compare them"
    ]


def test_a_newer_run_that_proved_nothing_does_not_hide_an_older_one():
    newer = mps([2.0], created_at="2026-06-01T00:00:00+00:00", outcome="invalid")
    newer["manifest"]["run_id"] = "mps-invalid"
    compared = compare(newer, mps([2.5]))
    (group,) = compared.sections[0].groups
    assert group.run_ids == ("mps",)
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
