"""Going on with a run that was cut off: whether it may, and what of it is done already.

The run is laid out anew from its request, kept in the manifest. A co-run with an answer on record
is taken from there, so that ramp, carried flags and plan come out as they did; any other is done
again under its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarking.records import run_folder
from benchmarking.records.run_folder import (
    PHASE_CO_RUN,
    Run,
    RunStoreError,
    RunWriter,
)
from benchmarking.records.types import Environment
from benchmarking.suite import baselines
from benchmarking.suite.launcher import OUTCOME_OK, OUTCOME_TIMEOUT
from benchmarking.suite.mps_knobs import MpsKnobs
from benchmarking.suite.plan import MODE_TIME_SLICING
from benchmarking.suite.plan_file import PlanEntry, PlanFile
from benchmarking.suite.setup import EXIT_NO_GPU, EXIT_USAGE, Request, SuiteError

# What tells one environment from another beside what a baseline of another run is compared by.
COMPARED_FIELDS = ("gpu_uuid", "git_commit", "timeslice")

# Kinds of stop reasons that say nothing of the load: the co-run is done again.
NO_ANSWERS = ("refused", "killed", "damaged_file", "unreadable_image", "gpu_lost")

_START_ANEW = "start a new run (--baseline with this one's id reuses baselines that fit)"

Record = dict[str, Any]


@dataclass(frozen=True)
class EarlierPart:
    """A run up to where it was cut off, and the request that it was made for."""

    run: Run
    request: Request

    @property
    def outcome(self) -> str:
        """How the run had ended; one that was killed had no time to say so."""
        said = self.run.manifest.outcome
        return "interrupted" if said == "running" else said

    def finished(self, co_run: str) -> tuple[Record, list[Record]] | None:
        """Return the co-run's record and those of its clients, `None` where it is yet to do."""
        for record in msgspec.to_builtins(self.run.co_run_records):
            clients = msgspec.to_builtins(self.run.clients_of(co_run))
            if record["co_run"] == co_run and _is_answer(record, clients):
                return record, clients
        return None

    def reopen(self, notes: Sequence[str]) -> RunWriter:
        """Open the run for the rest of it; what a cut-off co-run left is put aside.

        `notes` are those of the start; they come in the place of what the end was called.
        """
        writer = run_folder.reopen_run(
            self.run, {record.co_run for record in self.run.co_run_records
                       if self.finished(record.co_run)},
        )  # fmt: skip
        ended = self.run.manifest.outcome
        writer.note_resumption("killed" if ended == "running" else ended, notes)
        return writer


def read_earlier(reference: str, results_dir: Path) -> EarlierPart:
    """Read the run to go on with, by id or folder.

    Raises `RunStoreError` where there is no such run, or nothing to go on with.
    """
    folder = run_folder.resolve_run(reference, results_dir)
    run = run_folder.read_run(folder)
    if run_folder.is_held(folder):
        raise RunStoreError(f"run {run.run_id} is still going on: wait for it, or stop it first")
    request = _request_of(run)
    earlier = EarlierPart(run, request)
    if run.manifest.outcome == "complete" or _broke_for_good(earlier):
        raise RunStoreError(
            f"run {run.run_id} is complete: start a new run, or look at {run.folder}"
        )
    return earlier


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
    then = msgspec.to_builtins(theirs.environment)
    now = {key: value for key, value in known_now.items() if value and then.get(key)}
    if "versions" in now:
        now["versions"] = {**then["versions"], **now["versions"]}
        then = {**then, "versions": {**now["versions"], **then["versions"]}}
    before, ours = (
        msgspec.structs.replace(theirs, environment=Environment(**environment))
        for environment in (then, {**then, **now})
    )
    found = [
        *baselines.differences(before, ours),
        *(
            f"{field} was {then[field]}, now it is {now[field]}"
            for field in COMPARED_FIELDS
            if field in now
            and now[field] != then[field]
            # Under the other modes its slices are nothing to a client.
            and (field != "timeslice" or theirs.effective_mode == MODE_TIME_SLICING)
        ),
        *baselines.data_differences(theirs.resolved_arguments, resolved, list(resolved)),
    ]
    if found:
        raise SuiteError(
            f"run {earlier.run.run_id} cannot go on here: {'; '.join(found)}; {_START_ANEW}",
            EXIT_USAGE,
        )


def request_data(request: Request) -> dict[str, Any]:
    """Return a request as plain data for the manifest; a plan file is kept there by itself."""
    data = {item.name: getattr(request, item.name) for item in dataclasses.fields(request)}
    for name in ("plan_file", "results_dir", "run_id"):
        del data[name]
    data["mps_knobs"] = dataclasses.asdict(request.mps_knobs)
    # The run may go on from another folder.
    data["data_dir"] = str(Path(request.data_dir).resolve()) if request.data_dir else None
    if request.baseline and Path(request.baseline).is_dir():
        data["baseline"] = str(Path(request.baseline).resolve())
    return data


def _request_of(run: Run) -> Request:
    data, plan = run.manifest.request, run.manifest.plan_file
    try:
        knobs = MpsKnobs.from_dict(data["mps_knobs"])
        values = {**_with_tuples(data), "mps_knobs": knobs}
        # Under MIG the newest baseline was looked for; there may be a newer one by now.
        values["baseline"] = values["baseline"] or _folder_of_baseline(run)
        return Request(**values, results_dir=run.folder.parent, plan_file=_plan_file(run, plan))
    except (TypeError, KeyError, AttributeError, OSError) as error:
        raise RunStoreError(
            f"run {run.run_id} was made by another version of this program, which kept too little "
            f"to go on with: {_START_ANEW}"
        ) from error


def _folder_of_baseline(run: Run) -> str | None:
    name = run.manifest.baseline_run_id
    folders = run_folder.find_runs(run.folder.parent) if name else []
    return next((str(folder) for folder in folders if folder.name == name), None)


def _plan_file(run: Run, plan: Mapping[str, Any] | None) -> PlanFile | None:
    """Return the plan file as it was read then: relative paths in it have been resolved."""
    if plan is None:
        return None
    text = (run.folder / run_folder.PLAN_FILE).read_text(encoding="utf-8")
    entries = tuple(PlanEntry(**_with_tuples(entry)) for entry in plan["clients"])
    return PlanFile(Path(plan["path"]), text, plan["name"], entries)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON makes of tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _is_answer(record: Record, clients: Sequence[Record]) -> bool:
    """Whether a co-run need not be done again: it went well, or broke under its load.

    A client that somebody else killed, or that met a torn file, says nothing of the load.
    """
    if record["outcome"] == OUTCOME_OK:
        return True
    reason = record.get("stop_reason") or {"kind": "refused"}
    return (
        record["phase"] == PHASE_CO_RUN
        and record["outcome"] in ("failed", OUTCOME_TIMEOUT)
        and reason["kind"] not in NO_ANSWERS
        and not any(client["exit_code"] == EXIT_NO_GPU for client in clients)
    )


def _broke_for_good(earlier: EarlierPart) -> bool:
    """Whether a failed run ended with its answer, a breaking point, and not before it."""
    records = earlier.run.co_run_records
    return (
        earlier.outcome == "failed"
        and any(record.outcome != OUTCOME_OK for record in records)
        and all(earlier.finished(record.co_run) for record in records)
    )
