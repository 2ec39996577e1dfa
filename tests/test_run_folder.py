"""Runs on disk: what is written can be read back, and half-written lines don't stop a reader."""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import synthetic_runs
from made_up_reports import section
from recorded_rows import client, co_run, plain

from benchmarking.modes import names
from benchmarking.records import files, run_folder, schema, types, writing
from benchmarking.report.runs import read_run

MANIFEST = {"mode": "mps", "effective_mode": "mps", "mix": "mixed", "plan": {}, "notes": []}
NOT_OWN = "is a link or another user's"


def append(run: run_folder.RunWriter, *records: dict[str, Any]) -> None:
    for record in records:
        run.append_record(msgspec.convert(record, types.Record))


def written(folder: Path, *records: dict[str, Any], **names: str) -> run_folder.RunWriter:
    """A run of these records, as far as they are as published; the others as plain lines."""
    run = run_folder.create_run(folder, MANIFEST, **names)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run.folder / run_folder.RECORDS_FILE).write_text(lines)
    return run


# --- making and finding -------------------------------------------------------------------------


def test_a_new_run_is_named_after_the_effective_mode_mix_and_time(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path / "results", {**MANIFEST, "effective_mode": "cpu-demo"})
    assert run.folder.name.startswith("cpu-demo-mixed-20")
    read = run_folder.read_run(run.folder)
    assert read.run_id == run.folder.name
    assert (read.manifest.mode, read.manifest.outcome) == ("mps", "running")
    assert read.manifest.schema_version == types.SCHEMA_VERSION
    assert read.manifest.created_at.endswith("+00:00")


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


@pytest.mark.parametrize(
    ("run_id", "said"),
    [("taken", "choose another --run-id"), ("../escape", "not a folder name"),
     ("a/b", "not a folder name"), ("", "not a folder name"), (".hidden", "not a folder name")],
)  # fmt: skip
def test_an_explicit_run_id_that_cannot_be_is_refused(
    tmp_path: Path, run_id: str, said: str
) -> None:
    run_folder.create_run(tmp_path, MANIFEST, run_id="taken")
    with pytest.raises(run_folder.RunStoreError, match=said):
        run_folder.create_run(tmp_path, MANIFEST, run_id=run_id)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_results_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(run_folder.RunStoreError, match="choose another --results-dir"):
        run_folder.create_run(tmp_path / "file", MANIFEST)


def test_runs_are_found_oldest_first_and_folders_without_a_manifest_are_passed_over(
    tmp_path: Path,
) -> None:
    for name, created in (("new", "2026-02-01"), ("old", "2026-01-01")):
        known = {**MANIFEST, "created_at": created}
        run_folder.create_run(tmp_path / "below", known, run_id=name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert [folder.name for folder in run_folder.find_runs(tmp_path)] == ["old", "new"]


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST, run_id="mine")
    assert run_folder.resolve_run("mine", tmp_path) == run.folder
    assert run_folder.resolve_run(str(run.folder), tmp_path / "elsewhere") == run.folder
    with pytest.raises(run_folder.RunStoreError, match="no run 'other'"):
        run_folder.resolve_run("other", tmp_path)


# --- the manifest -------------------------------------------------------------------------------


def test_finishing_notes_outcome_and_time(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    run.finish("complete")
    manifest = run_folder.read_run(run.folder).manifest
    assert manifest.outcome == "complete"
    assert manifest.finished_at >= manifest.created_at


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"plan": {"x": float("nan")}}, ValueError), ({"outcome": "great"}, msgspec.ValidationError),
     ({"unheard_of": 1}, TypeError)],
)  # fmt: skip
def test_a_change_that_cannot_be_kept_leaves_the_old_manifest_and_no_temporary_file(
    tmp_path: Path, changes: dict, error: type[Exception]
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(error):
        run.update_manifest(**changes)
    assert (run.folder / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "run.lock"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [*(({"schema_version": version}, "schema_version") for version in (0, 2, 4, "3", None, True)),
     ({"outcome": "great"}, "outcome"), ({"plan": None}, "plan"), ({"mix": ""}, "mix"),
     ({"environment": {"timeslice": "a b"}}, r"environment\.timeslice")],
)  # fmt: skip
def test_a_manifest_that_was_edited_or_is_of_another_version_is_refused_by_name(
    tmp_path: Path, changes: dict, named: str
) -> None:
    path = run_folder.create_run(tmp_path, MANIFEST).folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(
        run_folder.RunStoreError, match=rf"schema version 3 \(.*\$\.{named}"
    ) as said:
        run_folder.read_run(path.parent)
    assert "use the version of the program that wrote it" in str(said.value)


# --- records ------------------------------------------------------------------------------------


def test_records_come_back_sorted_by_kind_and_client(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    append(run, client("c", 1, clients=2), client("c", 0, clients=2), co_run("c", clients=2))
    read = run_folder.read_run(run.folder)
    assert [record.client for record in read.clients_of("c")] == [0, 1]
    assert read.clients_of("other") == []
    assert [record.co_run for record in read.co_run_records] == ["c"]
    assert read.warnings == []


@pytest.mark.parametrize(
    "last", [b'{"record": "client", "pha', b'{"record": "\xff"}', b"[" * 100_000, b"\x00", b"NaN"]
)
def test_a_truncated_last_line_is_skipped_and_said(tmp_path: Path, last: bytes) -> None:
    run = written(tmp_path, client("c", 0), co_run("c"))
    with (run.folder / "records.jsonl").open("ab") as stream:
        stream.write(last)
    read = run_folder.read_run(run.folder)
    assert len(read.client_records) == 1
    (warning,) = read.warnings
    assert "records.jsonl: line 3 is truncated or edited, skipped (" in warning
    assert len(warning) < 500


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "splendid"}, "splendid.*status"),
        ({"slowdown": "2.4"}, "str.*slowdown"),
        ({"slowdown": float("nan")}, "malformed"),
        ({"units": {"batch": {"count": -1, "seconds": 1.0, "latency": True}}}, ">= 0.*count"),
        ({"units": {}, "jobs": 1}, "array.*jobs"),
        ({"latency_ms": [1.0, None]}, r"null.*latency_ms\[1\]"),
        ({"record": "clyent"}, "line 2 .*clyent"),
        ({"clients": 3}, None),
    ],
)
def test_an_edited_record_is_named_and_its_co_run_excluded(
    tmp_path: Path, changes: dict, named: str | None
) -> None:
    run = written(
        tmp_path,
        client("edited", 0, clients=2),
        {**client("edited", 1, clients=2), **changes},
        co_run("edited", clients=2 if named else 3),
        client("good", 0),
        co_run("good"),
    )
    read = run_folder.read_run(run.folder)
    assert [record.co_run for record in read.client_records] == ["good"]
    assert [record.co_run for record in read.co_run_records] == ["good"]
    if named:
        assert re.search(named, read.warnings[0])
    assert "edited excluded: records of" in read.warnings[-1]


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    run = written(tmp_path, {**client("c", 0), "invented": [1, {"x": 2}]}, co_run("c"))
    assert run_folder.read_run(run.folder).warnings == []


def test_of_a_line_that_the_disk_has_no_room_for_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    append(run, client("c", 0))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
        with pytest.raises(OSError, match="No space left"):
            append(run, co_run("c"))
    append(run, co_run("c"))
    read = run_folder.read_run(run.folder)
    assert read.warnings == []
    assert len(read.co_run_records) == 1


def test_not_a_number_is_not_written_as_unknown(tmp_path: Path) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    record = msgspec.convert(client("c", 0), types.ClientRecord)
    record.slowdown = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        run.append_record(record)
    assert not (run.folder / "records.jsonl").exists()


def test_a_co_run_that_was_cut_off_is_excluded_and_the_one_done_again_counts(
    tmp_path: Path,
) -> None:
    tries = [client("again", 0, figures={"try": number}) for number in (1, 2)]
    run = written(tmp_path, *tries, co_run("again"), client("cut", 0))
    read = run_folder.read_run(run.folder)
    assert [record.figures for record in read.client_records] == [{"try": 2}]
    (warning,) = read.warnings
    assert "cut excluded: it has not ended (1 clients' records)" in warning


def test_a_truncated_sample_is_skipped_and_the_monitor_line_is_no_sample(tmp_path: Path) -> None:
    lines = [
        '{"record": "monitor", "ready": true}',
        '{"record": "sample", "time_seconds": 1.0}',
        '{"record": "sample", "time_sec',
    ]
    (tmp_path / "gpu_samples.jsonl").write_text("\n".join(lines))
    samples, warnings = run_folder.read_samples(tmp_path)
    assert [sample.time_seconds for sample in samples] == [1.0]
    assert len(warnings) == 1


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "invalid", "timeout", None])
def test_baselines_whose_client_and_co_run_ended_well_are_pooled_with_their_energy(
    tmp_path: Path, outcome: str | None
) -> None:
    rows = []
    for number, status in enumerate(["ok", "ok", "failed"]):
        name = f"baseline-{number}"
        units = {"batch": {"count": 2.5, "seconds": 0.5 + number, "latency": True}}
        rows.append(client(name, 0, phase="baseline", status=status, units=units))
        rows.append(co_run(name, gpu={"energy_joules": number}))
    rows.append(client("baseline-bad", 0, phase="baseline", job_key="other"))
    if outcome:  # else: the program was killed before it wrote the co-run's record
        rows.append(co_run("baseline-bad", outcome=outcome))
    rows += [client("own", 0, phase="share_baseline"), co_run("own", "share_baseline")]
    read = run_folder.read_run(written(tmp_path, *rows).folder)
    assert {key: record.co_run for key, record in read.baselines().items()} == {"job": "baseline-1"}
    assert read.energy_alone_joules() == {"job": 1}
    (batch,) = read.baselines()["job"].units.values()
    assert (batch.count, batch.seconds) == (5.0, 2.0)
    assert len(read.baselines()["job"].latency_ms) == 4


def test_a_report_takes_no_baseline_that_did_not_end_well() -> None:
    made = synthetic_runs.run("mps", "mps", {4: [2.0]})
    for record in made["records"]:
        if record["record"] == "co_run" and record["co_run"] == "alone-batch_inference":
            record["outcome"] = "interrupted"
    found = section(made)
    assert "batch_inference" not in [row["workload"] for row in found["alone"]]
    assert "resnet_training" in [row["workload"] for row in found["alone"]]
    assert found["groups"][0]["client_rows"][1]["slowdown"] is None


# --- packed runs --------------------------------------------------------------------------------


def packed_run(folder: Path) -> Path:
    run = written(folder, client("one", 0), co_run("one"))
    run.finish("complete")
    path = run.folder / "records.jsonl"
    path.with_name("records.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return run.folder


def test_a_packed_run_is_read_like_any_other_and_takes_no_more_records(tmp_path: Path) -> None:
    read = run_folder.read_run(packed_run(tmp_path))
    assert [record.co_run for record in read.client_records] == ["one"]
    assert read.warnings == []
    with pytest.raises(run_folder.RunStoreError, match="gunzip it to go on"):
        run_folder.reopen_run(read, {"one"})


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-12], lambda b: b"x" + b, lambda b: b[:20] + b"!" * 9]
)
def test_a_damaged_packed_file_is_named_and_skipped_as_a_whole(
    tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    path = packed_run(tmp_path) / "records.jsonl.gz"
    path.write_bytes(harm(path.read_bytes()))
    read = run_folder.read_run(path.parent)
    assert read.client_records == []
    (warning,) = read.warnings
    assert "records.jsonl.gz: is damaged (" in warning and warning.endswith("), skipped")


# --- beside the runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"phase": [], "name": "mps", "status": "ok"}', "phase"),
        ('{"phase": 3, "name": "mps", "status": "great"}', "status"),
        ('{"phase": 3, "name": "mps"}', "status"),
        ('{"phase": 3, "name": "mps", "status": "ok", "reason": 7}', "reason"),
        ('{"phase": 3, "name": "mp', "malformed"),
        ("[3]", "array"),
    ],
)
def test_a_line_of_a_phase_that_is_not_as_published_is_skipped_by_name(
    tmp_path: Path, line: str, named: str
) -> None:
    good = {"phase": 3, "name": "mps", "status": "failed", "reason": "r", "run_folder": "",
            "seconds": 3}  # fmt: skip
    (tmp_path / run_folder.PHASES_FILE).write_text(f"{line}\n{json.dumps(good)}\n")
    phases, (warning,) = run_folder.read_phases(tmp_path)
    assert plain(phases) == [good]
    assert f"{run_folder.PHASES_FILE}: line 1 is truncated or edited, skipped" in warning
    assert named in warning.partition("(")[2]


def test_of_two_lines_of_a_phase_the_later_counts(tmp_path: Path) -> None:
    lines = [{"phase": 1, "name": "baseline", "status": status} for status in ("failed", "ok")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / run_folder.PHASES_FILE).write_text(text)
    (phase,), warnings = run_folder.read_phases(tmp_path)
    assert (phase.status, warnings) == ("ok", [])


def test_a_refusal_is_appended_behind_a_truncated_one(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    writing.append_refusal(folder, ["a"], 3, "first")
    path = folder / run_folder.REFUSALS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    writing.append_refusal(folder, ["b", "c d"], 4, "second")
    (refusal,), (warning,) = run_folder.read_refusals(folder)
    assert (refusal.command, refusal.exit_code) == (["b", "c d"], 4)
    assert "line 1 is truncated" in warning


# --- a folder that others can write to, or that comes from elsewhere ------------------------------


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def hard_link(path: Path, target: Path) -> None:
    target.touch()
    path.hardlink_to(target)


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def another_users(path: Path, _: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.touch()
    os.chown(path, 4242, 4242)


@pytest.mark.parametrize("plant", [link, hard_link, fifo, another_users])
@pytest.mark.parametrize("name", ["refusals.jsonl", "phases.jsonl"])
def test_nothing_is_appended_through_a_planted_file(
    tmp_path: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    results, target = tmp_path / "results", tmp_path / "target"
    results.mkdir()
    plant(results / name, target)
    with pytest.raises(OSError, match=NOT_OWN):
        files.append_line(results / name, {})
    assert not target.exists() or target.read_bytes() == b""


@pytest.mark.parametrize("name", ["manifest.json", "plan.toml"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(
    tmp_path: Path, name: str
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST)
    target = tmp_path / "target"
    target.write_text("theirs")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(target)
    run.update_manifest(notes=["x"])
    run.save_plan_file("ours")
    assert target.read_text() == "theirs"
    assert not (run.folder / name).is_symlink()


@pytest.mark.parametrize(
    "planted", ["gpu_samples.jsonl", "gpu_monitor.log", "run.lock", "clients", "."]
)
def test_a_run_goes_on_in_no_folder_where_others_planted_something(
    tmp_path: Path, planted: str
) -> None:
    run = run_folder.create_run(tmp_path, MANIFEST, run_id="mine")
    run.finish("interrupted")
    path = run.folder / planted
    if planted == ".":
        another_users(path, path)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path if planted == "clients" else tmp_path / "target")
    with pytest.raises(run_folder.RunStoreError, match=f"{NOT_OWN}|not this user's own run"):
        run_folder.reopen_run(run_folder.read_run(run.folder), set())
    assert not (tmp_path / "target").exists()


def test_a_run_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = run_folder.create_run(tmp_path, MANIFEST)
        append(run, client("c", 0), co_run("c"))
        run.save_plan_file("x")
        writing.append_refusal(tmp_path, ["a"], 3, "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.folder.stat().st_mode) == 0o700
    written_files = [*run.folder.iterdir(), tmp_path / run_folder.REFUSALS_FILE]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written_files} == {0o600}
    assert len(written_files) == 5


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate((files.MAX_MIB + 1) * 1024**2)


def packed_zeros(path: Path) -> None:
    with gzip.open(path.with_name(path.name + ".gz"), "wb", compresslevel=1) as stream:
        for _ in range(files.MAX_MIB + 1):
            stream.write(bytes(1024**2))


def nested(path: Path) -> None:
    path.write_text("[" * 1_000_000)


def many_bad_lines(path: Path) -> None:
    path.write_text("x\n" * 100_000)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda path: os.mkfifo(path), "is no regular file, skipped"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link, skipped"),
        (lambda path: path.mkdir(), "Is a directory, skipped"),
        (sparse, "holds more than 16 MiB, skipped"),
        (packed_zeros, "holds more than 16 MiB, skipped"),
        (nested, "line 1 is truncated or edited, skipped"),
        (many_bad_lines, "so are 99980 more lines, skipped"),
    ],
)
def test_a_file_made_to_stop_the_reader_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None], said: str
) -> None:
    monkeypatch.setattr(files, "MAX_MIB", 16)
    run = written(tmp_path)
    (run.folder / "records.jsonl").unlink()
    plant(run.folder / "records.jsonl")
    read = run_folder.read_run(run.folder)
    assert read.client_records == []
    assert said in read.warnings[-1]
    assert len(read.warnings) < 25


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_what_is_nested_too_deeply_fails_where_it_is_read_or_nowhere(
    tmp_path: Path, depth: int
) -> None:
    line = json.dumps(client("c", 0)).replace('"figures": {}', f'"figures": {{"x": {"[" * depth}0')
    assert "[[" in line
    run = written(tmp_path, co_run("c"))
    with (run.folder / "records.jsonl").open("a") as stream:
        stream.write(line.replace("[0", "[0" + "]" * depth + "}") + "\n")
    (said, *_) = read_run(run.folder).problems
    assert "recursion" in said or "nested" in said


@pytest.mark.parametrize("plant", [lambda path: os.mkfifo(path), sparse, nested])
def test_a_manifest_made_to_stop_the_reader_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(files, "MAX_MIB", 1)
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / "manifest.json")
    assert run_folder.find_runs(tmp_path) == []
    with pytest.raises(run_folder.RunStoreError) as said:
        run_folder.read_run(tmp_path / "run")
    assert "\n" not in str(said.value)


# --- published schemas --------------------------------------------------------------------------


def test_the_published_schemas_are_those_of_the_structs() -> None:
    texts = schema.schema_texts()
    assert sorted(schema.SCHEMAS.iterdir()) == sorted(texts)
    for path, text in texts.items():
        assert path.read_text() == text, schema.__doc__
        struct = schema.PUBLISHED[path.name.split(".")[0]]
        assert json.loads(text).items() >= plain(msgspec.json.schema(struct)).items()


def test_the_structs_name_the_modes_that_the_program_knows() -> None:
    assert set(get_args(types.Mode)) == {*names.MODES, names.MODE_CPU_DEMO}
