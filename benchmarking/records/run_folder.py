"""Runs on disk: file names, writing and reading. What is in the files is published in `schemas/`.

    <results_dir>/<run_id>/
        plan.toml            the plan file that the run was given, if it was given one
        manifest.json        what was asked for, on what, how it ended; saved before anything runs
        records.jsonl        one line a client and one a co-run, appended as soon as it is known
        gpu_samples.jsonl    the sampler's output, with what it complained of in gpu_monitor.log
        clients/<co_run>/<client>.{events.jsonl,stdout.log,stderr.log}
        run.lock              held by the process that writes to the run
    <results_dir>/
        refusals.jsonl       commands that were refused before they had a run, and why
        phases.jsonl         what each phase of run_experiments.sh did

A finished run may be packed to be kept: `gzip records.jsonl gpu_samples.jsonl`, read as before.

Every write is atomic (temporary file, fsync, rename) or an append of one whole line. Readers check
every object against its schema. A line that is torn (a crash in the middle of a write) or edited is
named in `warnings` and skipped, and with it its whole co-run: half of one would give other figures.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from benchmarking.records import schema
from benchmarking.records.schema import SCHEMA_VERSION

MANIFEST_FILE = "manifest.json"
RECORDS_FILE = "records.jsonl"
SAMPLES_FILE = "gpu_samples.jsonl"
MONITOR_LOG_FILE = "gpu_monitor.log"
CLIENTS_FOLDER = "clients"
PLAN_FILE = "plan.toml"
LOCK_FILE = "run.lock"
PACKED_SUFFIX = ".gz"
REFUSALS_FILE = "refusals.jsonl"
PHASES_FILE = "phases.jsonl"

OUTCOMES = ("running", "complete", "failed", "interrupted", "invalid")

# A baseline is one job alone on the whole GPU; a share baseline is one alone on its own MIG
# instance; a co-run is jobs together.
PHASE_BASELINE = "baseline"
PHASE_SHARE_BASELINE = "share_baseline"
PHASE_CO_RUN = "co_run"

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunStoreError(Exception):
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
    manifest: dict[str, Any]
    client_records: list[dict[str, Any]]
    co_run_records: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        """Name of the run, which is its folder's."""
        return self.manifest["run_id"]

    def clients_of(self, co_run: str) -> list[dict[str, Any]]:
        """Client records of one co-run, in client order."""
        members = [record for record in self.client_records if record["co_run"] == co_run]
        return sorted(members, key=lambda record: record["client"])

    def baselines(self, phase: str = PHASE_BASELINE) -> dict[str, dict[str, Any]]:
        """Client records of a phase's successful baselines, by `job_key`; the latest of each."""
        found = successful_baselines(self.client_records, self.co_run_records, phase)
        return {record["job_key"]: record for record in found}

    def energy_alone_joules(self, phase: str = PHASE_BASELINE) -> dict[str, float | None]:
        """The card's joules over the window of each job's baseline, by `job_key`."""
        energy = {
            record["co_run"]: (record.get("gpu") or {}).get("energy_joules")
            for record in self.co_run_records
        }
        return {
            job_key: energy.get(record["co_run"])
            for job_key, record in self.baselines(phase).items()
        }


def successful_baselines(
    client_records: Sequence[dict[str, Any]],
    co_run_records: Sequence[dict[str, Any]],
    phase: str = PHASE_BASELINE,
) -> list[dict[str, Any]]:
    """Return the client records of one run that may serve as baselines, in order.

    The co-run must have ended well too: a client that was interrupted, or ran under a mode that was
    lost meanwhile, ends well by itself.
    """
    good = {
        record["co_run"]
        for record in co_run_records
        if record.get("phase") == phase and record.get("outcome") == "ok"
    }
    return [
        record
        for record in client_records
        if record["phase"] == phase and record["status"] == "ok" and record["co_run"] in good
    ]


class RunWriter:
    """Writes one run: the manifest whole, records line by line."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Take over a folder for as long as this process lives, and save the manifest there.

        Raises `RunStoreError` when another process writes to it.
        """
        # 0600: who may only read the run must not be able to hold its lock
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._lock = os.fdopen(os.open(folder / LOCK_FILE, flags, 0o600), "ab")
        if not _lock(self._lock):
            raise RunStoreError(f"another process is at work in {folder}: wait for it to end")
        self.folder = folder
        self.manifest = manifest
        self.samples_path = folder / SAMPLES_FILE
        self.monitor_log_path = folder / MONITOR_LOG_FILE
        self.update_manifest()

    def update_manifest(self, **changes: Any) -> None:
        """Change these fields of the manifest and save it whole."""
        self.manifest.update(changes)
        write_json_atomic(self.folder / MANIFEST_FILE, self.manifest)

    def save_plan_file(self, text: str) -> None:
        """Keep the plan file of the run as it was."""
        (self.folder / PLAN_FILE).write_text(text, encoding="utf-8")

    def note_resumption(self, ended: str, notes: Sequence[str]) -> None:
        """Note that the run goes on with these notes, and how it `ended` before, with its notes."""
        earlier = {key: self.manifest[key] for key in ("finished_at", "notes")}
        entry = {"resumed_at": utc_now(), "ended": ended, **earlier}
        resumptions = [*self.manifest["resumptions"], entry]
        self.update_manifest(
            resumptions=resumptions, outcome="running", finished_at=None, notes=list(notes)
        )

    def finish(self, outcome: str) -> None:
        """Note how the run ended, and when; the folder is free from then on."""
        self.update_manifest(outcome=outcome, finished_at=utc_now())
        self._lock.close()

    def append_record(self, record: dict[str, Any]) -> None:
        """Append one record as a whole line; it is on disk when this returns."""
        append_json_line(self.folder / RECORDS_FILE, record)

    def client_paths(self, co_run: str, client: int) -> ClientPaths:
        """Paths of one client's output; their folder is there when this returns."""
        folder = self.folder / CLIENTS_FOLDER / co_run
        folder.mkdir(parents=True, exist_ok=True)
        return ClientPaths(
            events=folder / f"{client}.events.jsonl",
            stdout=folder / f"{client}.stdout.log",
            stderr=folder / f"{client}.stderr.log",
        )


# --- writing --------------------------------------------------------------------------------


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def create_run(
    results_dir: Path, manifest: dict[str, Any], *, run_id: str | None = None
) -> RunWriter:
    """Make the folder of a new run and save its first manifest.

    `manifest` holds the fields that the caller knows; `schema_version`, `run_id`, `created_at`,
    `finished_at` and `outcome` are added here. Without `run_id` the name is
    `<effective mode>-<mix>-<YYYYmmdd-HHMMSS>` in UTC, with `-2`, `-3`, ... when taken. Raises
    `RunStoreError` when the folder cannot be made or an explicit name is not free.
    """
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise RunStoreError(
            f"run id {run_id!r} is not a folder name: use letters, digits, '.', '_' and '-'"
        )
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    base = run_id or f"{manifest['effective_mode']}-{manifest['mix']}-{stamp}"
    folder = _make_folder(Path(results_dir), base, may_rename=run_id is None)
    first = {
        "schema_version": SCHEMA_VERSION,
        "run_id": folder.name,
        "created_at": utc_now(),
        **manifest,
        "finished_at": None,
        "outcome": "running",
        "resumptions": [],
    }
    return RunWriter(folder, first)


def reopen_run(run: Run, finished: Collection[str]) -> RunWriter:
    """Open a run for more records; what clients of other co-runs than `finished` left is put aside.

    Such a folder becomes `<co_run>.interrupted-1`, `-2`, ... Raises `RunStoreError` when another
    process writes to the run, or when it is packed.
    """
    packed = sorted(run.folder.glob(f"*.jsonl{PACKED_SUFFIX}"))
    if packed:
        raise RunStoreError(f"{packed[0]} is packed: gunzip it to go on with the run")
    writer = RunWriter(run.folder, run.manifest)
    for path in (run.folder / RECORDS_FILE, writer.samples_path):
        _end_torn_line(path)
    clients = run.folder / CLIENTS_FOLDER
    for folder in sorted(clients.iterdir()) if clients.is_dir() else []:
        if folder.name not in finished and ".interrupted-" not in folder.name:
            number = 1
            while (aside := clients / f"{folder.name}.interrupted-{number}").exists():
                number += 1
            folder.rename(aside)
    return writer


def is_held(folder: Path) -> bool:
    """Whether a living process writes to this run."""
    try:
        with (folder / LOCK_FILE).open("rb") as stream:
            return not _lock(stream)
    except (FileNotFoundError, PermissionError):
        return False  # no lock, or another user's run, of whose end only its manifest tells


def _lock(stream: IO[bytes]) -> bool:
    """Take the lock until the stream is closed; False when it is taken.

    The kernel lets go of it when its holder dies, however that comes.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_torn_line(path: Path) -> None:
    """Give a last line that was cut off an end, or the next one would be part of it."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")


def _make_folder(results_dir: Path, base: str, *, may_rename: bool) -> Path:
    number = 1
    while True:
        folder = results_dir / (base if number == 1 else f"{base}-{number}")
        try:
            results_dir.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder.resolve()
        except FileExistsError:
            if not results_dir.is_dir():
                raise RunStoreError(
                    f"{results_dir} is not a folder: choose another --results-dir"
                ) from None
            if not may_rename:
                raise RunStoreError(
                    f"there is a run {base!r} in {results_dir} already: choose another --run-id"
                ) from None
            number += 1
        except OSError as error:
            raise RunStoreError(
                f"cannot create {folder} ({error.strerror}): choose another --results-dir"
            ) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as JSON so that readers see the old file or the new one, never half."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text so that readers see the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line, by one write; it is on disk when this returns.

    Raises `OSError` when it cannot be written, on a full disk for instance; nothing of the line is
    there then.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def append_refusal(
    results_dir: Path, command: Sequence[str], exit_code: int, sentence: str
) -> None:
    """Note a command that was refused before there was a run to write to.

    Raises `OSError` when it cannot be written.
    """
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / REFUSALS_FILE
    _end_torn_line(path)
    refusal = {"created_at": utc_now(), "command": list(command), "exit_code": exit_code,
               "sentence": sentence}  # fmt: skip
    append_json_line(path, refusal)


# --- reading --------------------------------------------------------------------------------


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the objects of a JSON-lines file, and a warning for each line that is not one.

    A file that is not there has no lines.
    """
    numbered, warnings = _read_numbered(path)
    return [value for _, value in numbered], warnings


def _read_numbered(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Read the objects of a JSON-lines file with their line numbers, and the warnings."""
    try:
        content = _content(path)
    except FileNotFoundError:
        return [], []
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return [], [f"{path}{PACKED_SUFFIX}: is damaged, skipped ({error})"]
    values: list[tuple[int, dict[str, Any]]] = []
    warnings: list[str] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_refuse_constant)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append((number, value))
        else:
            warnings.append(f"{path}: line {number} is torn, skipped ({len(line)} bytes)")
    return values, warnings


def _content(path: Path) -> bytes:
    """Return what is in a file, or in its packed form where that is what there is."""
    packed = path.with_name(path.name + PACKED_SUFFIX)
    if packed.exists() and not path.exists():
        return gzip.decompress(packed.read_bytes())
    return path.read_bytes()


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises `RunStoreError` when there is no readable manifest of a known schema version.
    """
    manifest, version = _read_manifest(folder)
    path = folder / RECORDS_FILE
    numbered, warnings = _read_numbered(path)
    clients: dict[str, dict[int, dict[str, Any]]] = {}
    ended: dict[str, dict[str, Any]] = {}
    for number, line in numbered:
        kind = line.get("record")
        if kind not in (schema.CLIENT, schema.CO_RUN):
            warnings.append(f"{path}: line {number} is no record, skipped")
            continue
        record = schema.upgraded(kind, line, version)
        wrong = schema.problem(kind, record)
        if wrong:
            warnings.append(f"{path}: line {number} is not as it was written, skipped ({wrong})")
        elif kind == schema.CO_RUN:
            ended[record["co_run"]] = record
        else:
            # A co-run that was cut off and done again has records of both; the later count.
            clients.setdefault(record["co_run"], {})[record["client"]] = record
    whole = {name: record for name, record in ended.items()
             if len(clients.get(name, {})) == record["clients"]}  # fmt: skip
    for name in sorted({*clients, *ended} - {*whole}):
        warnings.append(
            f"{path}: {name} left out: {_missing(ended.get(name), len(clients.get(name, {})))}"
        )
    return Run(
        folder=folder,
        manifest=manifest,
        client_records=[record for name in whole for record in clients[name].values()],
        co_run_records=list(whole.values()),
        warnings=warnings,
    )


def _missing(co_run: dict[str, Any] | None, clients: int) -> str:
    """Say why a co-run's records cannot be used."""
    if co_run is None:
        return f"it has not ended ({clients} clients' records)"
    return f"records of {clients} of its {co_run['clients']} clients"


def _read_manifest(folder: Path) -> tuple[dict[str, Any], int]:
    """Return a run's manifest in the present schema version, and the version that it had."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise RunStoreError(f"{folder} is not a run: {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise RunStoreError(f"{path} is not JSON ({error}): take that folder away") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    try:
        manifest = schema.upgraded(schema.MANIFEST, manifest, version)
    except schema.UnknownVersionError as error:
        raise RunStoreError(
            f"{path} {error}: use the version of the program that wrote it"
        ) from error
    wrong = schema.problem(schema.MANIFEST, manifest)
    if wrong:
        raise RunStoreError(f"{path} is not as it was written ({wrong}): take that folder away")
    return manifest, version


def read_samples(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the sampler's samples of a run, in order, and warnings about lines that are none."""
    is_sample = ("record", schema.SAMPLE)
    return _read_checked(folder / SAMPLES_FILE, schema.SAMPLE, only=is_sample)


def read_phases(results_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read what each phase of an unattended run did, and warnings about lines that do not say it.

    Phases that were cut off and done again have two lines; the later counts.
    """
    lines, warnings = _read_checked(results_dir / PHASES_FILE, schema.PHASE)
    return list({line["phase"]: line for line in lines}.values()), warnings


def read_refusals(results_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read what was refused before there was a run, in order, and warnings."""
    return _read_checked(results_dir / REFUSALS_FILE, schema.REFUSAL)


def _read_checked(
    path: Path, kind: str, *, only: tuple[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the lines that are as the schema of their kind has them, and warnings about the others.

    `only` is a field and its value: other lines are passed over.
    """
    numbered, warnings = _read_numbered(path)
    good = []
    for number, line in numbered:
        if only is not None and line.get(only[0]) != only[1]:
            continue
        wrong = schema.problem(kind, line)
        if wrong:
            warnings.append(f"{path}: line {number} is not as it was written, skipped ({wrong})")
        else:
            good.append(line)
    return good, warnings


def find_runs(results_dir: Path) -> list[Path]:
    """Return the folders of all runs at or below `results_dir`, oldest first.

    A folder is a run when it holds a manifest that can be read; others are passed over.
    """
    found = []
    for path in Path(results_dir).rglob(MANIFEST_FILE):
        try:
            manifest, _ = _read_manifest(path.parent)
        except RunStoreError:
            continue
        found.append((manifest.get("created_at") or "", path.parent.name, path.parent))
    return [folder for _, _, folder in sorted(found)]


def resolve_run(reference: str, results_dir: Path) -> Path:
    """Return the folder of a run given by path or by run id.

    Raises `RunStoreError` when neither is one.
    """
    for folder in (Path(reference), Path(results_dir) / reference):
        if (folder / MANIFEST_FILE).is_file():
            return folder.resolve()
    raise RunStoreError(
        f"there is no run {reference!r}, neither as a folder nor in {results_dir}: "
        "give a run folder or one of the names in the results folder"
    )
