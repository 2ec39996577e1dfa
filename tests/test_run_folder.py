"""Runs on disk: what is written can be read back, and half-written lines don't stop a reader."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from recorded_rows import client, co_run, plain

from benchmarking.modes import names
from benchmarking.records import files, run_folder, schema, types, writing
from benchmarking.report.runs import read_run

MANIFEST = {"mode": "mps", "effective_mode": "mps", "mix": "mixed", "plan": {}, "notes": []}
NOT_OWN = "is a link or another user's"
RunStoreError = run_folder.RunStoreError


def new_run(folder: Path, *records: dict, **known: object) -> run_folder.RunWriter:
    """A run with lines of these records, whether they are as published or not."""
    run = run_folder.create_run(folder, {**MANIFEST, **known})
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run.folder / run_folder.RECORDS_FILE).write_text(lines)
    return run


def struct(record: dict) -> types.ClientRecord | types.CoRunRecord:
    return msgspec.convert(record, types.Record)


# --- making and finding -------------------------------------------------------------------------


def test_a_new_run_is_named_after_mode_mix_and_time_and_a_taken_name_gets_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FrozenTime(run_folder.datetime):
        @classmethod
        def now(cls, tz: object = None) -> FrozenTime:
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=run_folder.timezone.utc)

    monkeypatch.setattr(run_folder, "datetime", FrozenTime)
    runs = [new_run(tmp_path, effective_mode="cpu-demo") for _ in range(3)]
    first = "cpu-demo-mixed-20260102-030405"
    assert [run.folder.name for run in runs] == [first, f"{first}-2", f"{first}-3"]
    read = run_folder.read_run(runs[0].folder)
    assert (read.run_id, read.manifest.mode, read.manifest.outcome) == (first, "mps", "running")
    assert read.manifest.schema_version == types.SCHEMA_VERSION
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", read.manifest.created_at)
    runs[0].finish("complete")
    manifest = run_folder.read_run(runs[0].folder).manifest
    assert manifest.outcome == "complete"
    assert manifest.finished_at >= manifest.created_at


def test_names_and_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    run_folder.create_run(tmp_path, MANIFEST, run_id="taken")
    for run_id, said in (("taken", "choose another --run-id"), ("../escape", "not a folder name"),
                         ("a/b", "not a folder name"), ("", "not a folder name"),
                         (".hidden", "not a folder name")):  # fmt: skip
        with pytest.raises(RunStoreError, match=said):
            run_folder.create_run(tmp_path, MANIFEST, run_id=run_id)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStoreError, match="choose another --results-dir"):
        new_run(tmp_path / "file")


def test_runs_are_found_oldest_first_by_name_and_by_path(tmp_path: Path) -> None:
    for name, created in (("new", "2026-02-01"), ("old", "2026-01-01")):
        known = {**MANIFEST, "created_at": created}
        run_folder.create_run(tmp_path / "below", known, run_id=name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    found = run_folder.find_runs(tmp_path)
    assert [folder.name for folder in found] == ["old", "new"]
    assert run_folder.resolve_run("old", tmp_path / "below") == found[0]
    assert run_folder.resolve_run(str(found[0]), tmp_path / "elsewhere") == found[0]
    with pytest.raises(RunStoreError, match="no run 'other'"):
        run_folder.resolve_run("other", tmp_path)


def test_a_change_that_cannot_be_kept_leaves_the_old_manifest_and_no_temporary_file(
    tmp_path: Path,
) -> None:
    run = new_run(tmp_path)
    before = (run.folder / "manifest.json").read_bytes()
    for changes in ({"plan": {"x": float("nan")}}, {"outcome": "great"}, {"unheard_of": 1}):
        with pytest.raises((ValueError, msgspec.ValidationError, TypeError)):
            run.update_manifest(**changes)
    assert (run.folder / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "run.lock"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [*(({"schema_version": version}, "schema_version") for version in (2, 4, "3", None)),
     ({"outcome": "great"}, "outcome"), ({"plan": None}, "plan"), ({"mix": ""}, "mix"),
     ({"environment": {"timeslice": "a b"}}, r"environment\.timeslice")],
)  # fmt: skip
def test_a_manifest_that_was_edited_or_is_of_another_version_is_refused_by_name(
    tmp_path: Path, changes: dict, named: str
) -> None:
    path = new_run(tmp_path).folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RunStoreError, match=rf"schema version 3 \(.*\$\.{named}") as said:
        run_folder.read_run(path.parent)
    assert "use the version of the program that wrote it" in str(said.value)


# --- records ------------------------------------------------------------------------------------


def test_records_come_back_by_kind_and_client_and_of_a_full_disk_no_line_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path)
    run.append_record(struct(client("c", 1, clients=2)))
    run.append_record(struct(client("c", 0, clients=2)))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
        with pytest.raises(OSError, match="No space left"):
            run.append_record(struct(co_run("c", clients=2)))
    unknown = struct(client("c", 0))
    unknown.slowdown = float("nan")
    with pytest.raises(ValueError, match="JSON"):  # or it would be null
        run.append_record(unknown)
    run.append_record(struct(co_run("c", clients=2)))
    read = run_folder.read_run(run.folder)
    assert [record.client for record in read.clients_of("c")] == [0, 1]
    assert read.clients_of("other") == []
    assert [record.co_run for record in read.co_run_records] == ["c"]
    assert read.warnings == []


def test_truncated_lines_are_skipped_and_said(tmp_path: Path) -> None:
    bad = [b"NaN", b'{"record": "\xff"}', b"[" * 100_000, b'{"record": "client", "pha']
    run = new_run(tmp_path, client("c", 0), co_run("c"))
    with (run.folder / "records.jsonl").open("ab") as stream:
        stream.write(b"\n".join(bad))
    read = run_folder.read_run(run.folder)
    assert len(read.client_records) == 1
    for number, warning in enumerate(read.warnings, start=3):
        assert f"records.jsonl: line {number} is truncated or edited, skipped (" in warning
        assert len(warning) < 500
    assert len(read.warnings) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "splendid"}, "splendid.*status"),
        ({"slowdown": float("nan")}, "malformed"),
        ({"units": {"batch": {"count": -1, "seconds": 1.0, "latency": True}}}, ">= 0.*count"),
        ({"latency_ms": [1.0, None]}, r"null.*latency_ms\[1\]"),
        ({"record": "clyent"}, "line 2 .*clyent"),
        ({"clients": 3}, None),
    ],
)
def test_an_edited_record_is_named_and_its_co_run_excluded(
    tmp_path: Path, changes: dict, named: str | None
) -> None:
    run = new_run(
        tmp_path,
        client("edited", 0, clients=2),
        {**client("edited", 1, clients=2), **changes},
        co_run("edited", clients=2 if named else 3),
        {**client("good", 0), "of_a_later_version": [1, {"x": 2}]},
        co_run("good"),
    )
    read = run_folder.read_run(run.folder)
    for records in (read.client_records, read.co_run_records):
        assert [record.co_run for record in records] == ["good"]
    if named:
        assert re.search(named, read.warnings[0])
    assert "edited excluded: records of" in read.warnings[-1]


def test_a_co_run_that_was_cut_off_is_excluded_and_the_one_done_again_counts(
    tmp_path: Path,
) -> None:
    tries = [client("again", 0, figures={"try": number}) for number in (1, 2)]
    run = new_run(tmp_path, *tries, co_run("again"), client("cut", 0))
    read = run_folder.read_run(run.folder)
    assert [record.figures for record in read.client_records] == [{"try": 2}]
    (warning,) = read.warnings
    assert "cut excluded: it has not ended (1 clients' records)" in warning


def test_a_co_run_that_had_ended_keeps_its_clients_when_it_is_begun_again_and_cut_off(
    tmp_path: Path,
) -> None:
    first, again = (client("baseline-a", 0, phase="baseline", exit_code=code) for code in (0, 9))
    run = new_run(tmp_path, first, co_run("baseline-a"), again)
    assert [one.exit_code for one in run_folder.read_run(run.folder).client_records] == [0]
    run = new_run(tmp_path, first, co_run("baseline-a"), again, co_run("baseline-a"))
    assert [one.exit_code for one in run_folder.read_run(run.folder).client_records] == [9]


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "invalid", None])
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
    read = run_folder.read_run(new_run(tmp_path, *rows).folder)
    assert {key: record.co_run for key, record in read.baselines().items()} == {"job": "baseline-1"}
    assert read.energy_alone_joules() == {"job": 1}
    (batch,) = read.baselines()["job"].units.values()
    assert (batch.count, batch.seconds) == (5.0, 2.0)
    assert len(read.baselines()["job"].latency_ms) == 4


def test_a_run_whose_records_have_grown_past_what_is_read_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path, client("one", 0), co_run("one"))
    run.finish("interrupted")
    read = run_folder.read_run(run.folder)
    monkeypatch.setattr(run_folder.files, "MAX_MIB", 0)
    with pytest.raises(RunStoreError, match="holds more than 0 MiB: start a new run"):
        run_folder.reopen_run(read, set())


def test_a_packed_run_is_read_like_any_other_takes_no_more_records_and_may_be_damaged(
    tmp_path: Path,
) -> None:
    run = new_run(tmp_path, client("one", 0), co_run("one"))
    run.finish("complete")
    path, packed = (run.folder / f"records.jsonl{suffix}" for suffix in ("", ".gz"))
    whole = gzip.compress(path.read_bytes())
    packed.write_bytes(whole)
    path.unlink()
    read = run_folder.read_run(run.folder)
    assert [record.co_run for record in read.client_records] == ["one"]
    assert read.warnings == []
    with pytest.raises(RunStoreError, match="gunzip it to go on"):
        run_folder.reopen_run(read, {"one"})
    for damaged in (whole[:-12], b"x" + whole, whole[:20] + b"!" * 9):
        packed.write_bytes(damaged)
        read = run_folder.read_run(run.folder)
        assert read.client_records == []
        (warning,) = read.warnings
        assert "records.jsonl.gz: is damaged (" in warning and warning.endswith("), skipped")


# --- lines of other files -----------------------------------------------------------------------


def test_a_truncated_sample_is_skipped_and_the_monitor_line_is_no_sample(tmp_path: Path) -> None:
    lines = ['{"record": "monitor", "ready": true}', '{"record": "sample", "time_seconds": 1.0}',
             '{"record": "sample", "time_sec']  # fmt: skip
    (tmp_path / "gpu_samples.jsonl").write_text("\n".join(lines))
    (sample,), (warning,) = run_folder.read_samples(tmp_path)
    assert sample.time_seconds == 1.0
    assert "line 3 is truncated" in warning


def test_of_two_lines_of_a_phase_the_later_counts_and_those_not_as_published_are_named(
    tmp_path: Path,
) -> None:
    good = {"phase": 3, "name": "mps", "status": "failed", "reason": "r", "run_folder": "",
            "seconds": 3}  # fmt: skip
    bad = {
        '{"phase": [], "name": "mps", "status": "ok"}': "phase",
        '{"phase": 3, "name": "mps", "status": "great"}': "status",
        '{"phase": 3, "name": "mp': "malformed",
    }
    lines = [*bad, json.dumps({**good, "status": "ok"}), json.dumps(good)]
    (tmp_path / run_folder.PHASES_FILE).write_text("\n".join(lines) + "\n")
    phases, warnings = run_folder.read_phases(tmp_path)
    assert plain(phases) == [good]
    for (number, named), warning in zip(enumerate(bad.values(), 1), warnings, strict=True):
        assert f"{run_folder.PHASES_FILE}: line {number} is truncated or edited" in warning
        assert named in warning.partition("(")[2]


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


def hard_link(path: Path, target: Path) -> None:
    target.touch()
    path.hardlink_to(target)


def another_users(path: Path, _: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.touch()
    os.chown(path, 4242, 4242)


@pytest.mark.parametrize(
    "plant",
    [lambda path, target: path.symlink_to(target), hard_link, lambda path, _: os.mkfifo(path),
     another_users],
)  # fmt: skip
def test_nothing_is_appended_through_a_planted_file(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    results, target = tmp_path / "results", tmp_path / "target"
    results.mkdir()
    plant(results / "refusals.jsonl", target)
    with pytest.raises(OSError, match=NOT_OWN):
        writing.append_text(results / "refusals.jsonl", "{}")
    assert not target.exists() or target.read_bytes() == b""


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    target = tmp_path / "target"
    target.write_text("theirs")
    manifest = run.folder / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(target)
    run.update_manifest(notes=["x"])
    assert target.read_text() == "theirs"
    assert not manifest.is_symlink()


@pytest.mark.parametrize(
    "planted", ["gpu_samples.jsonl", "gpu_monitor.log", "run.lock", "clients", "."]
)
def test_a_run_goes_on_in_no_folder_where_others_planted_something(
    tmp_path: Path, planted: str
) -> None:
    run = new_run(tmp_path)
    run.finish("interrupted")
    path = run.folder / planted
    if planted == ".":
        another_users(path, path)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path if planted == "clients" else tmp_path / "target")
    with pytest.raises(RunStoreError, match=f"{NOT_OWN}|not this user's own run"):
        run_folder.reopen_run(run_folder.read_run(run.folder), set())
    assert not (tmp_path / "target").exists()


def test_a_run_whose_plan_cannot_be_kept_has_no_manifest_that_could_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "write_text_atomic", is_full)
    with pytest.raises(OSError, match="No space left"):
        run_folder.create_run(tmp_path, MANIFEST, run_id="mine", plan_text="x")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = run_folder.create_run(tmp_path, MANIFEST, plan_text="x")
        run.append_record(struct(co_run("c")))
        writing.append_refusal(tmp_path, ["a"], 3, "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.folder.stat().st_mode) == 0o700
    made = [*run.folder.iterdir(), tmp_path / run_folder.REFUSALS_FILE]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    assert len(made) == 5


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate((files.MAX_MIB + 1) * 1024**2)


def nested(path: Path) -> None:
    path.write_text("[" * 1_000_000)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (os.mkfifo, "is no regular file, skipped"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link, skipped"),
        (lambda path: path.mkdir(), "Is a directory, skipped"),
        (sparse, "holds more than 2 MiB, skipped"),
        (nested, "line 1 is truncated or edited, skipped"),
        (lambda path: path.write_text("x\n" * 100_000), "so are 99980 more lines, skipped"),
    ],
)
def test_a_file_made_to_stop_the_reader_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None], said: str
) -> None:
    monkeypatch.setattr(files, "MAX_MIB", 2)
    run = new_run(tmp_path)
    plant(run.folder / "records.jsonl")
    read = run_folder.read_run(run.folder)
    assert read.client_records == []
    assert said in read.warnings[-1]
    assert len(read.warnings) < 25


@pytest.mark.parametrize("depth", [900, 950, 999])
def test_what_is_nested_too_deeply_fails_where_it_is_read_or_nowhere(
    tmp_path: Path, depth: int
) -> None:
    line = json.dumps(client("c", 0, figures={"x": "DEEP"}))
    run = new_run(tmp_path, co_run("c"))
    with (run.folder / "records.jsonl").open("a") as stream:
        stream.write(line.replace('"DEEP"', f"{'[' * depth}0{']' * depth}") + "\n")
    (said, *_) = read_run(run.folder).problems
    assert "recursion" in said or "nested" in said


@pytest.mark.parametrize("plant", [os.mkfifo, sparse, nested])
def test_a_manifest_made_to_stop_the_reader_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(files, "MAX_MIB", 1)
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / "manifest.json")
    assert run_folder.find_runs(tmp_path) == []
    with pytest.raises(RunStoreError) as said:
        run_folder.read_run(tmp_path / "run")
    assert "\n" not in str(said.value)


def test_the_published_schemas_are_those_of_the_structs_and_name_the_programs_modes() -> None:
    texts = schema.schema_texts()
    assert sorted(schema.SCHEMAS.iterdir()) == sorted(texts)
    for path, text in texts.items():
        assert path.read_text() == text, schema.__doc__
        published = schema.PUBLISHED[path.name.split(".")[0]]
        wanted = schema.without_indentation(plain(msgspec.json.schema(published)))
        assert json.loads(text).items() >= wanted.items()
    assert set(get_args(types.Mode)) == {*names.MODES, names.MODE_CPU_DEMO}
