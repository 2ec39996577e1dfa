"""Records of several faults as one table: who survived what under which mode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.analysis.runs import mode_name, mode_order
from benchmarking.blast.text import FAULT_WORDS, first_line, number, own_cost_seconds, table

RECORD_FILE = "blast_radius.json"
SCHEMA_VERSION = 2
COLUMNS = (
    "mode", "fault", "neighbors survived", "longest pause ms", "lost s",
    "new client after s (its loading not counted)", "with its loading", "not run, because",
)  # fmt: skip

Record = Mapping[str, Any]


class RecordError(Exception):
    """A folder holds no record that can be read; the message names the fix."""


def not_run(mode: str, fault: str, command: Sequence[str], when: str, reason: str) -> Record:
    """Return the record of a fault that did not happen."""
    return {
        "schema_version": SCHEMA_VERSION, "created_at": when, "command": list(command),
        "mode": mode, "fault": fault, "not_run": reason,
    }  # fmt: skip


def may_be_measured(folder: Path) -> bool:
    """Whether a folder has a record of a fault that happened, or one that cannot be read."""
    path = folder / RECORD_FILE
    try:
        return path.exists() and not read_record(path).get("not_run")
    except RecordError:
        return True


def find_records(folders: Iterable[Path]) -> list[Record]:
    """Return the record of each folder, or of those directly below one without; each once.

    Raises:
        RecordError: A folder has none, or one that cannot be read.
    """
    paths: list[Path] = []
    for folder in folders:
        own = folder / RECORD_FILE
        found = [own] if own.is_file() else sorted(folder.glob(f"*/{RECORD_FILE}"))
        if not found:
            raise RecordError(f"{folder} holds no {RECORD_FILE}: name folders of this program")
        paths += [path.resolve() for path in found]
    return [read_record(path) for path in dict.fromkeys(paths)]


def read_record(path: Path) -> Record:
    """Read one record; raises `RecordError`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, known = record["schema_version"], record["fault"] in FAULT_WORDS
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{path} is no record of a fault: measure it again") from error
    if version not in (1, SCHEMA_VERSION) or not known:
        raise RecordError(f"{path} was made by another version of this program: measure it again")
    return record


def markdown(records: Sequence[Record]) -> str:
    """Return the table of all records, by mode and fault."""
    faults = tuple(FAULT_WORDS)
    ordered = sorted(
        records,
        key=lambda one: (mode_order(one["mode"]), faults.index(one["fault"]), one["created_at"]),
    )
    lines = ["# Blast radius", "", *table(COLUMNS, map(_cells, ordered))]
    cards = dict.fromkeys(_card(one) for one in ordered if not one.get("not_run"))
    if cards:
        lines += ["", f"Measured on {', '.join(cards)}."]
    return "\n".join(lines) + "\n"


def _card(record: Record) -> str:
    gpu = record["gpu"]
    return gpu["name"] if gpu else "the CPU, which says nothing of a GPU"


def _cells(record: Record) -> list[str]:
    head = [mode_name(record["mode"]), record["fault"]]
    if record.get("not_run"):
        return [*head, "", "", "", "", "", first_line(record["not_run"])]
    neighbors, newcomer = record["neighbors"], record["newcomer"]
    survived = [one for one in neighbors if one["survived"]]
    proved = all(one["proof"] == "verified" for one in survived)
    gaps = [one["longest_gap_ms"] for one in survived if one["longest_gap_ms"]]
    works = newcomer["works_after_seconds"]
    return [
        *head,
        f"{len(survived)} of {len(neighbors)}{'' if proved else ' (mode not verified)'}",
        number(max(gaps, default=None)),
        number(sum(one["lost_seconds"] for one in neighbors)),
        f"none within {number(newcomer['patience_seconds'])}" if works is None
        else number(own_cost_seconds(newcomer)),
        "" if works is None else number(works),
        "",
    ]  # fmt: skip
