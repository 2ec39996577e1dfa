"""What a fault did to its neighbors, as people read it: one report, or one table of several."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarking.cli import EXIT_USAGE, SuiteError
from benchmarking.metrics.number_text import significant
from benchmarking.records.types import Mode
from benchmarking.report import render
from benchmarking.report.foreign import read_struct
from benchmarking.report.tables import Table
from benchmarking.report.wording import mode_name, mode_order

RECORD_FILE = "blast_radius.json"
SCHEMA_VERSION = 2
FAULTS = {
    "exit": "a client that ended with code 1",
    "oom": "a client that ran out of memory (its own cap)",
    "assert": "a failed assertion in a client's kernel",
    "illegal-access": "an illegal memory access of a client",
}
NO_GPU = {"name": "the CPU, which says nothing of a GPU"}

Record = Mapping[str, Any]


class Neighbor(msgspec.Struct):
    """What is read of a neighbor in a record."""

    survived: bool
    proof: str | None
    longest_gap_ms: float | None
    lost_seconds: float


class Newcomer(msgspec.Struct):
    """What is read of the new client in a record."""

    works_after_seconds: float | None
    startup_seconds: float | None
    patience_seconds: float


class Card(msgspec.Struct):
    """What is read of the card in a record."""

    name: str | None


class Fault(msgspec.Struct, kw_only=True):
    """A record, as far as the summary reads it; of a fault that did not happen `not_run` says why.

    The first version had no `not_run`.
    """

    schema_version: Literal[1, 2]  # SCHEMA_VERSION
    created_at: str
    mode: Mode
    fault: Literal["exit", "oom", "assert", "illegal-access"]
    not_run: str | None = None
    gpu: Card | None = None
    neighbors: list[Neighbor] = []
    newcomer: Newcomer | None = None

    def __post_init__(self) -> None:
        """Refuse the record of a fault that happened, but to nobody."""
        if not self.not_run and self.newcomer is None:
            raise ValueError("it has no newcomer")


SUMMARY_HEADER = (
    "mode", "fault", "neighbors survived", "longest pause ms", "lost s",
    "new client after s (its loading not counted)", "with its loading", "not run, because",
)  # fmt: skip


def markdown(found: Record) -> str:
    """Return the report of one fault as Markdown."""
    values = {"found": found, "faults": FAULTS, "card": (found.get("gpu") or NO_GPU)["name"]}
    if not found["not_run"]:
        values |= {
            "own_cost": own_cost_seconds(found["newcomer"]),
            "reason": first_line(found["faulty"]["reason"]).rstrip(".") or "no reason known",
        }
    title = f"Blast radius: {found['fault']} under {mode_name(found['mode'])}"
    return render.render_page("md", "blast.j2", title, values)


def summary_row(record: Record) -> list[str]:
    """What one fault did, in a line."""
    head = [mode_name(record["mode"]), record["fault"]]
    if not record["is_measured"]:
        return [*head, "", "", "", "", "", first_line(record["not_run"])]
    neighbors, newcomer = record["neighbors"], record["newcomer"]
    survived = [one for one in neighbors if one["survived"]]
    doubt = "" if all(one["proof"] == "verified" for one in survived) else " (mode not verified)"
    pauses = [one["longest_gap_ms"] for one in survived if one["longest_gap_ms"]]
    works = newcomer["works_after_seconds"]
    none_worked = f"none within {number(newcomer['patience_seconds'])}"
    return [
        *head,
        f"{len(survived)} of {len(neighbors)}{doubt}",
        number(max(pauses, default=None)),
        number(sum(one["lost_seconds"] for one in neighbors)),
        none_worked if works is None else number(own_cost_seconds(newcomer)),
        "" if works is None else number(works),
        "",
    ]


def own_cost_seconds(newcomer: Record) -> float | None:
    """Return the time from the fault to a new client's first work, less what it took to load."""
    works, startup = newcomer["works_after_seconds"], newcomer["startup_seconds"]
    return None if works is None or startup is None else works - startup


def first_line(said: str | None) -> str:
    """Return the first line of a message: CUDA's errors have four more of general advice."""
    return (said or "").strip().partition("\n")[0].strip()


def number(value: float | None) -> str:
    """Return a number with three significant digits; one that is not known says so."""
    return "unknown" if value is None else significant(value)


def summary(folders: Iterable[Path]) -> str:
    """Return one table of the records in folders, or directly below them, by mode and fault.

    Raises `SuiteError` where a folder has none, or one that cannot be read.
    """
    paths: list[Path] = []
    for folder in folders:
        own = folder / RECORD_FILE
        below = sorted(glob.glob(f"*/{RECORD_FILE}", root_dir=folder))
        found = [own] if os.path.isfile(own) else [folder / name for name in below]
        if not found:
            raise SuiteError(
                f"{folder} holds no {RECORD_FILE}: name folders of this program", EXIT_USAGE
            )
        paths += [path.resolve() for path in found]
    records = [read_record(path) for path in dict.fromkeys(paths)]
    faults = list(FAULTS)
    records.sort(
        key=lambda one: (mode_order(one["mode"]), faults.index(one["fault"]), one["created_at"])
    )
    cards = [(one["gpu"] or NO_GPU)["name"] for one in records if one["is_measured"]]
    table = Table(SUMMARY_HEADER, [*map(summary_row, records)])
    values = {"table": table, "cards": [*dict.fromkeys(cards)]}
    return render.render_page("md", "blast.j2", "Blast radius", values)


def is_measured(folder: Path) -> bool:
    """Whether a folder has a record of a fault that happened, or one that cannot be read."""
    path = folder / RECORD_FILE
    try:
        return os.path.exists(path) and read_record(path)["is_measured"]
    except SuiteError:
        return True


def read_record(path: Path) -> Record:
    """Read one record; raises `SuiteError` where it is none, or another version's."""
    try:
        record = read_struct(path, Fault)
    except ValueError as error:
        raise SuiteError(
            f"{path} is no record of a fault by this version of the program ({error}): measure it "
            "again", EXIT_USAGE,
        ) from error  # fmt: skip
    return {**msgspec.to_builtins(record), "is_measured": not record.not_run}
