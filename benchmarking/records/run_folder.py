"""Runs on disk: file names, writing and reading. What is in the files is described in `types.py`.

    <results_dir>/<run_id>/
        plan.toml            the plan file that the run was given, if it was given one
        manifest.json        what was asked for, on what, how it ended; saved before anything runs
        records.jsonl        one line a client and one a co-run, appended as soon as it is known
        gpu_samples.jsonl    the sampler's output, with what it complained of in gpu_monitor.log
        clients/<co_run>/<client>.{events.jsonl,stdout.log,stderr.log}
        run.lock             held by the process that writes to the run
    <results_dir>/
        refusals.jsonl       commands that were refused before they had a run, and why
        phases.jsonl         what each phase of run_experiments.sh did

A finished run may be packed to be kept: `gzip records.jsonl gpu_samples.jsonl`, read as before. Run
folders are for their user alone, since command lines may hold what others should not read.

Every write is atomic (temporary file, fsync, rename) or an append of one whole line. A line that is
truncated (a crash in the middle of a write) or edited is named in `warnings` and skipped, and with
it its whole co-run: half of one would give other figures.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarking.cli import SuiteError
from benchmarking.records import files, types, writing
from benchmarking.records.files import write_json_atomic
from benchmarking.records.types import ClientRecord, CoRunRecord, Manifest, Phase, Record
from benchmarking.records.writing import LOCK_FILE, PLAN_FILE, REFUSALS_FILE, take_lock, utc_now

MANIFEST_FILE = "manifest.json"
RECORDS_FILE = "records.jsonl"
SAMPLES_FILE = "gpu_samples.jsonl"
MONITOR_LOG_FILE = "gpu_monitor.log"
CLIENTS_FOLDER = "clients"
PHASES_FILE = "phases.jsonl"

PHASE_BASELINE: Phase = "baseline"
PHASE_SHARE_BASELINE: Phase = "share_baseline"
PHASE_NULL: Phase = "null"
PHASE_CO_RUN: Phase = "co_run"

_TAKEN = "there is a run {!r} in {} already: choose another --run-id"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunStoreError(SuiteError):
    """A run cannot be created or read; the message is one sentence naming the fix."""


@dataclass(frozen=True)
class ClientPaths:
    """Where one client's output goes."""

    events: Path
    stdout: Path
    stderr: Path


@dataclass(frozen=True)
class Run:
    """One run as read back from disk: whole co-runs only, each of which has ended.

    `warnings` name what could not be read or was cut off.
    """

    folder: Path
    manifest: Manifest
    client_records: list[ClientRecord]
    co_run_records: list[CoRunRecord]
    warnings: list[str] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        """Name of the run, which is its folder's."""
        return self.manifest.run_id

    def clients_of(self, co_run: str) -> list[ClientRecord]:
        """Client records of one co-run, in client order."""
        members = [record for record in self.client_records if record.co_run == co_run]
        return sorted(members, key=lambda record: record.client)

    def baselines(self) -> dict[str, ClientRecord]:
        """Client records of the successful whole-GPU baselines, by `job_key`; repeats are pooled.

        The co-run must have ended well too: a client that was interrupted, or ran under a mode that
        was lost meanwhile, ends well by itself.
        """
        found: dict[str, list[ClientRecord]] = {}
        for record in self._good_baselines():
            found.setdefault(record.job_key, []).append(record)
        return {job_key: pooled(records) for job_key, records in found.items()}

    def energy_alone_joules(self) -> dict[str, float | None]:
        """The card's joules over the windows of each job's baselines, by `job_key`."""
        energy = {r.co_run: r.gpu.energy_joules for r in self.co_run_records if r.gpu is not None}
        joules: dict[str, float | None] = {}
        for record in self._good_baselines():
            before, more = joules.get(record.job_key, 0.0), energy.get(record.co_run)
            joules[record.job_key] = None if before is None or more is None else before + more
        return joules

    def _good_baselines(self) -> list[ClientRecord]:
        good = {
            record.co_run
            for record in self.co_run_records
            if record.phase == PHASE_BASELINE and record.outcome == "ok"
        }
        return [one for one in self.client_records if one.status == "ok" and one.co_run in good]


def pooled(records: Sequence[ClientRecord]) -> ClientRecord:
    """Return repeats of one client as one: the latest, with the units and latencies of all."""
    units: dict[str, types.Units] = {}
    for kind, unit in (item for record in records for item in record.units.items()):
        before = units.get(kind) or types.Units(count=0, seconds=0.0, latency=unit.latency)
        units[kind] = types.Units(
            count=before.count + unit.count,
            seconds=before.seconds + unit.seconds,
            latency=unit.latency,
        )
    latencies = [ms for record in records for ms in record.latency_ms or ()]
    apart: dict[str, list[float]] = {}
    for record in records:
        for kind, values in (record.apart_latency_ms or {}).items():
            apart.setdefault(kind, []).extend(values)
    return msgspec.structs.replace(
        records[-1], units=units, latency_ms=latencies or None, apart_latency_ms=apart or None
    )


# --- writing --------------------------------------------------------------------------------


class RunWriter:
    """Writes one run: the manifest whole, records line by line."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Take over a folder for as long as this process lives, and save the manifest there.

        Raises `RunStoreError` when another process writes to it.
        """
        # 0600, as all files: who may only read the run must not be able to hold its lock
        self._lock = writing.open_own(folder / LOCK_FILE)
        if not take_lock(self._lock):
            os.close(self._lock)
            raise RunStoreError(f"another process is at work in {folder}: wait for it to end")
        self.folder = folder
        self.manifest = manifest
        self.samples_path = folder / SAMPLES_FILE
        self.monitor_log_path = folder / MONITOR_LOG_FILE
        self.update_manifest()

    def update_manifest(self, **changes: Any) -> None:
        """Change these fields of the manifest, structs or plain data, and save it whole.

        Raises `msgspec.ValidationError` for a value that the field does not hold.
        """
        changed = msgspec.structs.replace(self.manifest, **changes)
        self.manifest = msgspec.convert(msgspec.structs.asdict(changed), Manifest)
        write_json_atomic(self.folder / MANIFEST_FILE, self.manifest)

    def note_resumption(
        self, ended: types.RunOutcome | Literal["killed"], notes: Sequence[str]
    ) -> None:
        """Note that the run goes on with these notes, and how it `ended` before, with its notes."""
        before = self.manifest
        entry = types.Resumption(
            resumed_at=utc_now(), ended=ended, finished_at=before.finished_at, notes=before.notes
        )
        resumptions = [*before.resumptions, entry]
        self.update_manifest(
            resumptions=resumptions, outcome="running", finished_at=None, notes=list(notes)
        )

    def finish(self, outcome: types.RunOutcome) -> None:
        """Note how the run ended, and when; the folder is free from then on."""
        self.update_manifest(outcome=outcome, finished_at=utc_now())
        os.close(self._lock)

    def append_record(self, record: Record) -> None:
        """Append one record as a whole line; it is on disk when this returns."""
        writing.append_text(self.folder / RECORDS_FILE, files.json_text(record))

    def client_paths(self, co_run: str, client: int) -> ClientPaths:
        """Paths of one client's output; their folder is there when this returns."""
        folder = self.folder / CLIENTS_FOLDER / co_run
        folder.mkdir(parents=True, exist_ok=True)
        return ClientPaths(
            events=folder / f"{client}.events.jsonl",
            stdout=folder / f"{client}.stdout.log",
            stderr=folder / f"{client}.stderr.log",
        )


def require_new(results_dir: Path, run_id: str | None) -> None:
    """Raise `RunStoreError` for a folder that cannot be made there, as far as can be told."""
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise RunStoreError(
            f"run id {run_id!r} is not a folder name: use letters, digits, '.', '_' and '-'"
        )
    if run_id is not None and os.path.lexists(results_dir / run_id):
        raise RunStoreError(_TAKEN.format(run_id, results_dir))
    there = next(one for one in (results_dir, *results_dir.parents) if os.path.lexists(one))
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise RunStoreError(
            f"cannot create {results_dir} ({there} is no folder that you may write to): choose "
            "another --results-dir"
        )


def create_run(
    results_dir: Path,
    known: Mapping[str, Any],
    *,
    run_id: str | None = None,
    plan_text: str | None = None,
) -> RunWriter:
    """Make the folder of a new run and save its plan file, if it has one, and first manifest.

    In this order: what has a manifest can go on.

    `known` holds the fields of the manifest that the caller knows, as structs or plain data; the
    others are added here. Without `run_id` the name is `<effective mode>-<mix>-<YYYYmmdd-HHMMSS>`
    in UTC, with `-2`, `-3`, ... when taken. Raises `RunStoreError` when the folder cannot be made
    or an explicit name is not free.
    """
    require_new(results_dir, run_id)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    base = run_id or f"{known['effective_mode']}-{known['mix']}-{stamp}"
    names = (
        [base] if run_id else itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2)))
    )
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        for folder in (results_dir / name for name in names):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)  # for this user alone
                break
        else:
            raise RunStoreError(_TAKEN.format(base, results_dir))
    except OSError as error:
        raise RunStoreError(
            f"cannot create {results_dir / base} ({error.strerror}): choose another --results-dir"
        ) from error
    if plan_text is not None:
        writing.write_text_atomic(folder / PLAN_FILE, plan_text, mode=0o600)
    first = {"schema_version": types.SCHEMA_VERSION, "run_id": folder.name, "created_at": utc_now()}
    return RunWriter(folder.resolve(), msgspec.convert({**first, **known}, Manifest))


def reopen_run(run: Run, finished: Collection[str]) -> RunWriter:
    """Open a run for more records; what clients of other co-runs than `finished` left is put aside.

    Such a folder becomes `<co_run>.interrupted-1`, `-2`, ... Raises `RunStoreError` when another
    process writes to the run, when it is packed, or when something in it is another's to write to.
    """
    packed = sorted(run.folder.glob(f"*.jsonl{files.PACKED_SUFFIX}"))
    if packed:
        raise RunStoreError(f"{packed[0]} is packed: gunzip it to go on with the run")
    try:
        files.read_file(run.folder / RECORDS_FILE)
    except FileNotFoundError:
        pass  # nothing was measured yet
    except OSError as error:  # all would be measured again, and be as unreadable
        raise RunStoreError(f"{error.filename} {error.strerror}: start a new run") from error
    clients = run.folder / CLIENTS_FOLDER
    if run.folder.stat().st_uid != os.geteuid() or clients.is_symlink():
        raise RunStoreError(f"{run.folder} is not this user's own run: start a new one")
    try:
        for name in (SAMPLES_FILE, MONITOR_LOG_FILE):  # the sampler appends to them by itself
            if os.path.lexists(run.folder / name):
                os.close(writing.open_own(run.folder / name))
        writer = RunWriter(run.folder, run.manifest)
    except PermissionError as error:
        raise RunStoreError(f"cannot go on in {run.folder}: {error.strerror}") from error
    for folder in sorted(clients.iterdir()) if clients.is_dir() else []:
        if folder.name not in finished and ".interrupted-" not in folder.name:
            numbered = (clients / f"{folder.name}.interrupted-{n}" for n in itertools.count(1))
            folder.rename(next(aside for aside in numbered if not os.path.lexists(aside)))
    return writer


# --- reading --------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises `RunStoreError` when there is no readable manifest of this schema version.
    """
    manifest = _read_manifest(folder)
    path = folder / RECORDS_FILE
    records: list[Record]
    records, warnings = files.read_lines(path, Record)
    clients: dict[str, dict[int, ClientRecord]] = {}
    open_ones: dict[str, dict[int, ClientRecord]] = {}
    ended: dict[str, CoRunRecord] = {}
    for record in records:
        if isinstance(record, CoRunRecord):
            ended[record.co_run] = record
            clients[record.co_run] = open_ones.pop(record.co_run, {})
        else:
            # A co-run that was cut off and done again has records of both; the later count.
            open_ones.setdefault(record.co_run, {})[record.client] = record
    # One that had ended, was begun again and was cut off stands as it had ended.
    clients = open_ones | clients
    whole = {
        name: record
        for name, record in ended.items()
        if len(clients.get(name, {})) == record.clients
    }
    for name in sorted({*clients, *ended} - {*whole}):
        there = len(clients.get(name, {}))
        reason = (
            f"records of {there} of its {ended[name].clients} clients"
            if name in ended
            else f"it has not ended ({there} clients' records)"
        )
        warnings.append(f"{path}: {name} excluded: {reason}")
    return Run(
        folder=folder,
        manifest=manifest,
        client_records=[record for name in whole for record in clients[name].values()],
        co_run_records=list(whole.values()),
        warnings=warnings,
    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        return files.decode(msgspec.json.Decoder(Manifest), files.read_file(path))
    except OSError as error:
        raise RunStoreError(f"{folder} is not a run: {path.name}: {error.strerror}") from error
    except files.NOT_DECODED as error:
        said = str(error)[: files.SHOWN_CHARACTERS]
        raise RunStoreError(
            f"{path} is no manifest of schema version {types.SCHEMA_VERSION} ({said}): use the "
            "version of the program that wrote it, or take that folder away"
        ) from error


def read_samples(folder: Path) -> tuple[list[types.Sample], list[str]]:
    """Read the sampler's samples of a run, in order, and warnings about lines that are none."""
    lines: list[types.Sample | types.Monitor]
    lines, warnings = files.read_lines(folder / SAMPLES_FILE, types.Sample | types.Monitor)
    return [line for line in lines if isinstance(line, types.Sample)], warnings


def read_phases(results_dir: Path) -> tuple[list[types.PhaseRecord], list[str]]:
    """Read what each phase of an unattended run did, and warnings about lines that do not say it.

    In the order of phases and names. Phases that were cut off and done again have two lines; the
    later counts.
    """
    lines, warnings = files.read_lines(results_dir / PHASES_FILE, types.PhaseRecord)
    latest = {(line.phase, line.name): line for line in lines}
    return [latest[key] for key in sorted(latest)], warnings


def read_refusals(results_dir: Path) -> tuple[list[types.Refusal], list[str]]:
    """Read what was refused before there was a run, in order, and warnings."""
    return files.read_lines(results_dir / REFUSALS_FILE, types.Refusal)


def find_runs(results_dir: Path) -> list[Path]:
    """Return the folders of all runs at or below `results_dir`, oldest first.

    A folder is a run when it holds a manifest that can be read; others are passed over.
    """
    found = []
    for path in results_dir.rglob(MANIFEST_FILE):
        try:
            created_at = _read_manifest(path.parent).created_at
        except RunStoreError:
            continue
        found.append((created_at, path.parent.name, path.parent))
    return [folder for _, _, folder in sorted(found)]


def resolve_run(reference: str, results_dir: Path) -> Path:
    """Return the folder of a run given by path or by run id.

    Raises `RunStoreError` when neither is one.
    """
    for folder in (Path(reference), results_dir / reference):
        if os.path.isfile(folder / MANIFEST_FILE):  # Path's raises for a name that is too long
            return folder.resolve()
    raise RunStoreError(
        f"there is no run {reference!r}, neither as a folder nor in {results_dir}: "
        "give a run folder or one of the names in the results folder"
    )
