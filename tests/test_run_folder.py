"""Runs on disk: what is written can be read back, and half-written lines don't stop a reader."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import synthetic_runs
from recorded_rows import client, co_run

from benchmarking.analysis import comparison
from benchmarking.analysis.runs import RunView
from benchmarking.modes import sharing_mode
from benchmarking.records import run_folder, schema
from benchmarking.suite import launcher
from benchmarking.suite import plan as planning

MANIFEST = {"mode": "mps", "effective_mode": "mps", "mix": "mixed", "plan": {}, "notes": []}


def test_a_new_run_is_named_after_mode_mix_and_time(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path / "results", MANIFEST)
    assert run.folder.name.startswith("mps-mixed-20")
    read = run_folder.read_run(run.folder)
    assert read.run_id == run.folder.name
    assert read.manifest["outcome"] == "running"
    assert read.manifest["schema_version"] == schema.SCHEMA_VERSION
    assert read.manifest["created_at"].endswith("+00:00")


def test_a_run_on_the_cpu_is_not_named_after_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, {**MANIFEST, "effective_mode": "cpu-demo"})
    assert run.folder.name.startswith("cpu-demo-mixed-20")
    assert run.manifest["mode"] == "mps"


def test_a_name_that_is_taken_gets_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FrozenTime(run_folder.datetime):
        @classmethod
        def now(cls, tz: object = None) -> FrozenTime:
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=run_folder.timezone.utc)

    monkeypatch.setattr(run_folder, "datetime", FrozenTime)
    names = [run_folder.create_run(tmp_path, MANIFEST).folder.name for _ in range(3)]
    first = "mps-mixed-20260102-030405"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_an_explicit_run_id_that_is_taken_is_refused(tmp_path: Path) -> None:
    run_folder.create_run(tmp_path, MANIFEST, run_id="mine")
    with pytest.raises(run_folder.RunStoreError, match="choose another --run-id"):
        run_folder.create_run(tmp_path, MANIFEST, run_id="mine")


@pytest.mark.parametrize("run_id", ["../escape", "a/b", "", ".hidden"])
def test_a_run_id_that_is_no_folder_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(run_folder.RunStoreError, match="not a folder name"):
        run_folder.create_run(tmp_path, MANIFEST, run_id=run_id)
    assert list(tmp_path.iterdir()) == []


def test_a_results_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(run_folder.RunStoreError, match="not a folder"):
        run_folder.create_run(tmp_path / "file", MANIFEST)


def test_records_come_back_sorted_by_kind_and_client(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("c", 1, clients=2))
    run.append_record(client("c", 0, clients=2))
    run.append_record(co_run("c", clients=2))
    read = run_folder.read_run(run.folder)
    assert [record["client"] for record in read.clients_of("c")] == [0, 1]
    assert read.clients_of("other") == []
    assert len(read.co_run_records) == 1
    assert read.warnings == []


def test_a_torn_last_line_is_skipped_and_said(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("c", 0))
    run.append_record(co_run("c"))
    with (run.folder / "records.jsonl").open("a") as stream:
        stream.write('{"record": "client", "pha')
    read = run_folder.read_run(run.folder)
    assert len(read.client_records) == 1
    assert len(read.warnings) == 1
    assert "line 3 is torn" in read.warnings[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "splendid"}, "status must be one of"),
        ({"slowdown": "2.4"}, "slowdown must be number or null"),
        ({"units": {"batch": {"count": -1, "seconds": 1.0, "latency": True}}}, "count must be"),
        ({"latency_ms": [1.0, None]}, r"latency_ms\[1\] must be number"),
        ({"record": "clyent"}, "line 2 is no record"),
        ({"clients": 3}, None),
    ],
)
def test_an_edited_record_is_named_and_its_co_run_left_out(
    tmp_path: Path, changes: dict, named: str | None
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("edited", 0, clients=2))
    run.append_record({**client("edited", 1, clients=2), **changes})
    run.append_record(co_run("edited", clients=2 if named else 3))
    run.append_record(client("good", 0))
    run.append_record(co_run("good"))
    read = run_folder.read_run(run.folder)
    assert [record["co_run"] for record in read.client_records] == ["good"]
    assert [record["co_run"] for record in read.co_run_records] == ["good"]
    if named:
        assert re.search(named, read.warnings[0])
    assert "edited left out: records of" in read.warnings[-1]


def test_of_a_line_that_the_disk_has_no_room_for_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("c", 0))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
        with pytest.raises(OSError, match="No space left"):
            run.append_record(co_run("c"))
    run.append_record(co_run("c"))
    read = run_folder.read_run(run.folder)
    assert read.warnings == []
    assert len(read.co_run_records) == 1


def test_not_a_number_is_no_record(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    line = json.dumps(client("c", 0)).replace('"slowdown": null', '"slowdown": NaN')
    (run.folder / "records.jsonl").write_text(line + "\n")
    read = run_folder.read_run(run.folder)
    assert read.client_records == [] and "line 1 is torn" in read.warnings[0]


def test_a_co_run_that_was_cut_off_is_left_out_and_the_one_done_again_counts(
    tmp_path: Path,
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("again", 0, figures={"try": 1}))
    run.append_record(client("again", 0, figures={"try": 2}))
    run.append_record(co_run("again"))
    run.append_record(client("cut", 0))
    read = run_folder.read_run(run.folder)
    assert [record["figures"] for record in read.client_records] == [{"try": 2}]
    assert len(read.warnings) == 1
    assert "cut left out: it has not ended (1 clients' records)" in read.warnings[0]


def test_a_torn_sample_is_skipped_and_the_monitor_line_is_no_sample(tmp_path: Path) -> None:
    lines = [
        '{"record": "monitor", "ready": true}',
        '{"record": "sample", "time_seconds": 1.0}',
        '{"record": "sample", "time_sec',
    ]
    (tmp_path / "gpu_samples.jsonl").write_text("\n".join(lines))
    samples, warnings = run_folder.read_samples(tmp_path)
    assert [sample["time_seconds"] for sample in samples] == [1.0]
    assert len(warnings) == 1


def packed_run(folder: Path) -> run_folder.RunWriter:
    run = run_folder.create_run(folder, MANIFEST)
    run.append_record(client("one", 0))
    run.append_record(co_run("one"))
    run.finish("complete")
    path = run.folder / "records.jsonl"
    path.with_name("records.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return run


def test_a_packed_run_is_read_like_any_other_and_takes_no_more_records(tmp_path: Path) -> None:
    read = run_folder.read_run(packed_run(tmp_path).folder)
    assert [record["co_run"] for record in read.client_records] == ["one"]
    assert read.warnings == []
    with pytest.raises(run_folder.RunStoreError, match="gunzip it to go on"):
        run_folder.reopen_run(read, {"one"})


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-12], lambda b: b"x" + b, lambda b: b[:20] + b"!" * 9]
)
def test_a_damaged_packed_file_is_named_and_skipped_as_a_whole(tmp_path: Path, harm) -> None:
    run = packed_run(tmp_path)
    path = run.folder / "records.jsonl.gz"
    path.write_bytes(harm(path.read_bytes()))
    read = run_folder.read_run(run.folder)
    assert read.client_records == []
    assert "records.jsonl.gz: is damaged, skipped (" in read.warnings[0]


def test_a_failed_write_leaves_the_old_manifest_and_no_temporary_file(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="JSON"):
        run.update_manifest(broken=float("nan"))
    assert "broken" not in run_folder.read_run(run.folder).manifest
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "run.lock"]


def test_finishing_notes_outcome_and_time(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.finish("complete")
    manifest = run_folder.read_run(run.folder).manifest
    assert manifest["outcome"] == "complete"
    assert manifest["finished_at"] >= manifest["created_at"]


def test_baselines_are_the_latest_successful_ones_with_their_energy(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    for number, status in enumerate(["ok", "ok", "failed"]):
        name = f"baseline-{number}"
        run.append_record(client(name, 0, phase="baseline", status=status))
        run.append_record(co_run(name, gpu={"energy_joules": number}))
    run.append_record(client("own", 0, phase="share_baseline"))
    run.append_record(co_run("own", "share_baseline"))
    read = run_folder.read_run(run.folder)
    assert read.baselines()["job"]["co_run"] == "baseline-1"
    assert read.energy_alone_joules() == {"job": 1}
    assert read.baselines(run_folder.PHASE_SHARE_BASELINE)["job"]["co_run"] == "own"


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "invalid", "timeout", None])
def test_a_baseline_that_did_not_end_well_is_none_though_its_client_did(
    tmp_path: Path, outcome: str | None
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.append_record(client("baseline-good", 0, phase="baseline"))
    run.append_record(co_run("baseline-good"))
    run.append_record(client("baseline-bad", 0, phase="baseline", job_key="other"))
    if outcome:  # else: the program was killed before it wrote the co-run's record
        run.append_record(co_run("baseline-bad", outcome=outcome))
    assert list(run_folder.read_run(run.folder).baselines()) == ["job"]


def test_a_report_takes_no_baseline_that_did_not_end_well() -> None:
    made = synthetic_runs.run("mps", "mps", {4: [2.0]})
    for record in made["records"]:
        if record["record"] == "co_run" and record["co_run"] == "alone-batch_inference":
            record["outcome"] = "interrupted"
    view = RunView("mps", made["manifest"], made["records"])
    section = comparison.compare([view]).sections[0]
    assert "batch_inference" not in [row.workload for row in section.alone]
    assert "resnet_training" in [row.workload for row in section.alone]
    assert section.groups[0].client_rows[1].tail_slowdown[99] is None


def test_runs_are_found_oldest_first_and_folders_without_a_manifest_are_passed_over(
    tmp_path: Path,
) -> None:
    for name, created in (("new", "2026-02-01"), ("old", "2026-01-01")):
        run_folder.create_run(tmp_path / "below", {**MANIFEST, "x": 1}, run_id=name)
        path = tmp_path / "below" / name / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "created_at": created}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert [folder.name for folder in run_folder.find_runs(tmp_path)] == ["old", "new"]


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST, run_id="mine")
    assert run_folder.resolve_run("mine", tmp_path) == run.folder
    assert run_folder.resolve_run(str(run.folder), tmp_path / "elsewhere") == run.folder
    with pytest.raises(run_folder.RunStoreError, match="no run 'other'"):
        run_folder.resolve_run("other", tmp_path)


@pytest.mark.parametrize("version", [0, schema.SCHEMA_VERSION + 1, "2", None, True])
def test_a_run_of_an_unknown_schema_version_is_refused(tmp_path: Path, version: object) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.update_manifest(schema_version=version)
    with pytest.raises(run_folder.RunStoreError, match=f"has schema version {version}, "):
        run_folder.read_run(run.folder)


def test_a_manifest_that_was_edited_is_refused_by_name(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.update_manifest(outcome="great")
    with pytest.raises(run_folder.RunStoreError, match="outcome must be one of"):
        run_folder.read_run(run.folder)


def test_a_run_of_the_first_schema_version_loads(tmp_path: Path) -> None:
    made = synthetic_runs.run("old", "mps", {2: [1.5]})
    assert made["manifest"]["schema_version"] == 1
    synthetic_runs.write(tmp_path, made)
    read = run_folder.read_run(tmp_path / "old")
    assert read.warnings == []
    assert read.manifest["schema_version"] == schema.SCHEMA_VERSION
    assert read.manifest["resumptions"] == []
    assert read.co_run_records[-1]["start_skew_ms"] is None
    assert len(read.clients_of("mixed-2-r0")) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"phase": [], "name": "mps", "status": "ok"}', "phase must be integer"),
        ('{"phase": 3, "name": "mps", "status": "great"}', "status must be one of"),
        ('{"phase": 3, "name": "mps"}', "must contain ['status']"),
        ('{"phase": 3, "name": "mps", "status": "ok", "reason": 7}', "reason must be string"),
        ('{"phase": 3, "name": "mp', "is torn"),
        ("[3]", "is torn"),
    ],
)
def test_a_line_of_a_phase_that_is_not_as_published_is_skipped_by_name(
    tmp_path: Path, line: str, words: str
) -> None:
    good = {"phase": 3, "name": "mps", "status": "failed", "reason": "r", "run_folder": "",
            "seconds": 3}  # fmt: skip
    (tmp_path / run_folder.PHASES_FILE).write_text(f"{line}\n{json.dumps(good)}\n")
    phases, (warning,) = run_folder.read_phases(tmp_path)
    assert phases == [good]
    assert f"{run_folder.PHASES_FILE}: line 1" in warning
    assert words in warning


def test_of_two_lines_of_a_phase_the_later_counts(tmp_path: Path) -> None:
    lines = [{"phase": 1, "name": "baseline", "status": status} for status in ("failed", "ok")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / run_folder.PHASES_FILE).write_text(text)
    assert run_folder.read_phases(tmp_path) == ([lines[1]], [])


def test_a_refusal_is_appended_behind_a_torn_one(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    run_folder.append_refusal(folder, ["a"], 3, "first")
    path = folder / run_folder.REFUSALS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    run_folder.append_refusal(folder, ["b", "c d"], 4, "second")
    (refusal,), (warning,) = run_folder.read_refusals(folder)
    assert (refusal["command"], refusal["exit_code"]) == (["b", "c d"], 4)
    assert "line 1 is torn" in warning


def test_the_schemas_name_the_values_that_the_program_writes() -> None:
    def values(kind: str, key: str) -> set[str]:
        path = schema.SCHEMAS / f"{kind}.schema.json"
        return set(json.loads(path.read_text())["properties"][key]["enum"])

    written = {value for name, value in vars(launcher).items() if name.startswith("STATUS_")}
    assert values(schema.CLIENT, "status") == written | {launcher.OUTCOME_INTERRUPTED}
    written = {value for name, value in vars(launcher).items() if name.startswith("OUTCOME_")}
    assert values(schema.CO_RUN, "outcome") == written
    assert values(schema.MANIFEST, "outcome") == set(run_folder.OUTCOMES)
    proof = json.loads((schema.SCHEMAS / "client.schema.json").read_text())["properties"]["proof"]
    verdicts = {sharing_mode.VERIFIED, sharing_mode.INVALID, sharing_mode.UNVERIFIED}
    verdicts.add(sharing_mode.NOT_APPLICABLE)
    assert set(proof["properties"]["verdict"]["enum"]) == verdicts
    modes = {*planning.MODES, planning.MODE_CPU_DEMO}
    assert values(schema.MANIFEST, "mode") == values(schema.CLIENT, "mode") == modes
