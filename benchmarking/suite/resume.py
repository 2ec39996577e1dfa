"""Going on with a run that was cut off: whether it may, and what of it is done already.

The run is laid out anew from its request, kept in the manifest, and its `plan.toml`. A co-run with
an answer on record is taken from there, so that ramp, calibrated flags and plan come out as they
did; any other is done again under its name. What goes on with a run executes what its folder says,
so the folder must be the caller's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarking.cli import EXIT_NO_GPU, EXIT_USAGE, SuiteError
from benchmarking.measuring import baselines
from benchmarking.modes.names import MODE_CPU_DEMO, MODE_TIME_SLICING
from benchmarking.planning.plan_file import PlanFile, parse_plan, say_the_same, text_hash
from benchmarking.planning.redaction import NotRevealedError, reveal
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import MIXES, PAIRED_MIXES
from benchmarking.records import run_folder
from benchmarking.records.files import json_text, read_file
from benchmarking.records.run_folder import (
    PHASE_CO_RUN,
    Run,
    RunStoreError,
    RunWriter,
)
from benchmarking.records.types import ClientRecord, CoRunRecord, RunOutcome
from benchmarking.records.writing import is_held, is_of_others

# What tells one environment from another, versions apart.
COMPARED_FIELDS = (*baselines.COMPARED_FIELDS, "gpu_uuid", "git_commit")

# Kinds of stop reasons that say nothing of the load: the co-run is done again.
NO_ANSWERS = ("refused", "killed", "damaged_file", "unreadable_image", "gpu_lost")

# What of a request the run's own folder says.
NOT_IN_MANIFEST = ("results_dir", "run_id", "plan_file")

_START_ANEW = "start a new run (--baseline with this one's id reuses baselines that fit)"


@dataclass(frozen=True)
class EarlierPart:
    """A run up to where it was cut off, and the request that it was made for."""

    run: Run
    request: Request

    @property
    def outcome(self) -> RunOutcome:
        """How the run had ended; one that was killed had no time to say so."""
        said = self.run.manifest.outcome
        return "interrupted" if said == "running" else said

    def finished(self, co_run: str) -> tuple[CoRunRecord, list[ClientRecord]] | None:
        """Return the co-run's record and those of its clients, `None` where it is yet to do."""
        clients = self.run.clients_of(co_run)
        records = (record for record in self.run.co_run_records if record.co_run == co_run)
        return next(((one, clients) for one in records if _is_answer(one, clients)), None)

    def reopen(self, notes: Sequence[str]) -> RunWriter:
        """Open the run for the rest of it; what a cut-off co-run left is put aside.

        `notes` are those of the start; they come in the place of what the end was called.
        """
        names = {record.co_run for record in self.run.co_run_records}
        writer = run_folder.reopen_run(self.run, {name for name in names if self.finished(name)})
        ended = self.run.manifest.outcome
        if ended == "complete":  # the next round of it
            writer.update_manifest(outcome="running", finished_at=None)
        else:
            writer.note_resumption("killed" if ended == "running" else ended, notes)
        return writer


def read_rounds_before(request: Request) -> EarlierPart | None:
    """Read the rounds that a run has already, `None` before its first.

    Raises `RunStoreError` where it is another run, or somebody else could have written it.
    """
    folder = request.results_dir / str(request.run_id)
    if not (folder / run_folder.MANIFEST_FILE).exists():
        return None
    _require_own(folder)
    run = run_folder.read_run(folder)
    if run.manifest.request != request_data(request):
        raise RunStoreError(
            f"run {run.run_id} was made with other flags or another version: start a new run"
        )
    kept, plan = folder / run_folder.PLAN_FILE, request.plan_file
    if plan and kept.exists() and not say_the_same(read_file(kept).decode(), plan.text):
        raise RunStoreError(
            f"{plan.path} was changed since run {run.run_id} was begun with it: put back what "
            f"{kept} says, or start a new run"
        )
    return EarlierPart(run, request)


def read_earlier(reference: str, results_dir: Path) -> EarlierPart:
    """Read the run to go on with, by id or folder.

    Raises `RunStoreError` where there is no such run, nothing to go on with, or somebody else could
    have written what it would execute.
    """
    folder = run_folder.resolve_run(reference, results_dir)
    _require_own(folder)
    run = run_folder.read_run(folder)
    if is_held(folder):
        raise RunStoreError(f"run {run.run_id} is still going on: wait for it, or stop it first")
    earlier = EarlierPart(run, _request_of(run))
    if run.manifest.outcome == "complete" or _broke_for_good(earlier):
        raise RunStoreError(
            f"run {run.run_id} is complete: start a new run, or look at {run.folder}"
        )
    return earlier


def _require_own(folder: Path) -> None:
    """Refuse a run that somebody else than its user, or root, may have written."""
    files = (run_folder.MANIFEST_FILE, run_folder.PLAN_FILE, run_folder.RECORDS_FILE)
    for path in (folder, *(folder / name for name in files)):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if is_of_others(found):
            raise RunStoreError(
                f"{path} may have been written by somebody else, and --resume executes what it "
                "says: copy the folder, look at its plan.toml, and chmod -R go-w it"
            )


def unlike_environment(
    earlier: EarlierPart,
    known_now: Mapping[str, Any],
    resolved: Mapping[str, Sequence[str]],
) -> None:
    """Raise `SuiteError` where the rest of a run would not be like the part that is there.

    `known_now` holds what is known of the environment now, `resolved` the flags that each job's
    data and weights were found under. What is unknown now or then is not compared.
    """
    theirs = earlier.run.manifest
    then = msgspec.structs.asdict(theirs.environment)
    before, now = then["versions"], known_now.get("versions") or {}
    pairs = {name: (then[name], known_now.get(name)) for name in COMPARED_FIELDS}
    pairs |= {
        f"version of {name}": (before.get(name), now.get(name))
        for name in baselines.COMPARED_VERSIONS
    }
    if theirs.effective_mode == MODE_TIME_SLICING:  # else its slices are nothing to a client
        pairs["timeslice"] = (theirs.environment.timeslice, known_now.get("timeslice"))
    if theirs.effective_mode == MODE_CPU_DEMO:
        pairs["host cores"] = (theirs.environment.host_cores, known_now.get("host_cores"))
    found = [
        *baselines.unlike({name: pair for name, pair in pairs.items() if all(pair)}),
        *baselines.data_differences(theirs.resolved_arguments, resolved, list(resolved)),
    ]
    if found:
        raise SuiteError(
            f"run {earlier.run.run_id} cannot go on here: {'; '.join(found)}; {_START_ANEW}",
            EXIT_USAGE,
        )


def request_data(request: Request) -> dict[str, Any]:
    """Return a request as plain data for the manifest."""
    plain = msgspec.structs.replace(request, results_dir=None, plan_file=None)
    data = {
        name: value
        for name, value in msgspec.to_builtins(plain).items()
        if name not in NOT_IN_MANIFEST
    }
    # The run may go on from another folder.
    data["data_dir"] = str(Path(request.data_dir).resolve()) if request.data_dir else None
    if request.baseline and Path(request.baseline).is_dir():
        folder = Path(request.baseline).resolve()
        is_next_to_it = folder.parent == request.results_dir.resolve()  # and is moved with it
        data["baseline"] = folder.name if is_next_to_it else str(folder)
    return msgspec.json.decode(json_text(request.secrets.hide(data)))


def _request_of(run: Run) -> Request:
    try:
        data = reveal(run.manifest.request, os.environ)
        known = set(Request.__struct_fields__) - set(NOT_IN_MANIFEST)
        request = msgspec.convert(data, Request)
        is_mix = run.manifest.plan_file is not None or request.mix in (*MIXES, *PAIRED_MIXES)
        if set(data) != known or not request.counts or not is_mix:
            raise KeyError
        for rows in run.manifest.plan.values():  # rows of the rest come next to these
            _ = [row["co_run"] for row in rows]
        return msgspec.structs.replace(
            request,
            results_dir=run.folder.parent,
            plan_file=_plan_file(run),
            # Under MIG the newest baseline was looked for; there may be a newer one by now.
            baseline=request.baseline or _folder_of_baseline(run),
        )
    except NotRevealedError as error:
        raise RunStoreError(f"run {run.run_id} cannot go on: {error}") from error
    except (TypeError, KeyError, OSError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise RunStoreError(
            f"run {run.run_id} was made by another version of this program, or edited, and holds "
            f"too little to go on with: {_START_ANEW}"
        ) from error


def _folder_of_baseline(run: Run) -> str | None:
    name = run.manifest.baseline_run_id
    folders = run_folder.find_runs(run.folder.parent) if name else []
    return next((str(folder) for folder in folders if folder.name == name), None)


def _plan_file(run: Run) -> PlanFile | None:
    """Return the plan that is kept with the run, which is the one that was looked at then.

    Raises `PlanFileError` where what it names is no longer there.
    """
    recorded = run.manifest.plan_file
    if recorded is None:
        return None
    path = run.folder / run_folder.PLAN_FILE
    text = read_file(path).decode()
    if text_hash(text) != recorded["sha256"]:
        raise RunStoreError(f"{path} is not the plan that the run was started with: {_START_ANEW}")
    return parse_plan(text, recorded["path"], Path(recorded["folder"]))


def _is_answer(record: CoRunRecord, clients: Sequence[ClientRecord]) -> bool:
    """Whether a co-run need not be done again: it went well, or broke under its load.

    A client that somebody else killed, or that met a truncated file, says nothing of the load.
    """
    if record.outcome == "ok":
        return True
    reason = record.stop_reason or {"kind": "refused"}
    return (
        record.phase == PHASE_CO_RUN
        and record.outcome in ("failed", "timeout")
        and reason["kind"] not in NO_ANSWERS
        and not any(client.exit_code == EXIT_NO_GPU for client in clients)
    )


def _broke_for_good(earlier: EarlierPart) -> bool:
    """Whether a failed run ended with its answer, a breaking point, and not before it."""
    records = earlier.run.co_run_records
    return (
        earlier.outcome == "failed"
        and any(record.outcome != "ok" for record in records)
        and all(earlier.finished(record.co_run) for record in records)
    )
