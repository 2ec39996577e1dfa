"""What a fault did to its neighbors, as people read it: one report, or one table of several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarking.cli import EXIT_USAGE, SuiteError
from benchmarking.metrics.number_text import significant
from benchmarking.report import render
from benchmarking.report.runs import cleaned
from benchmarking.report.tables import Column, table_of
from benchmarking.report.wording import mode_name, mode_order

RECORD_FILE = "blast_radius.json"
SCHEMA_VERSION = 2
FAULTS = {
    "exit": "a client that ended with code 1",
    "oom": "a client that ran out of memory (its own cap)",
    "assert": "a failed assertion in a client's kernel",
    "illegal-access": "an illegal memory access of a client",
}
NO_GPU = "the CPU, which says nothing of a GPU"

Record = Mapping[str, Any]

NEIGHBOR_COLUMNS: Mapping[str, Column] = {
    "client": lambda n: str(n["client"]),
    "job": lambda n: n["label"],
    "survived": lambda n: "yes" if n["survived"] else "no",
    "proof": lambda n: str(n["proof"]),
    "units/s before": lambda n: number(n["rate_before"]),
    "after": lambda n: number(n["rate_after"]),
    "longest pause ms": lambda n: number(n["longest_gap_ms"]),
    "lost s": lambda n: number(n["lost_seconds"]),
    "reason": lambda n: first_line(n["reason"]),
}
SUMMARY_COLUMNS: Mapping[str, Column] = {
    "mode": lambda r: mode_name(r["mode"]),
    "fault": lambda r: r["fault"],
    "neighbors survived": lambda r: survivors(r) if r["is_measured"] else "",
    "longest pause ms": lambda r: number(longest_pause_ms(r)) if r["is_measured"] else "",
    "lost s": lambda r: number(lost_seconds(r)) if r["is_measured"] else "",
    "new client after s (its loading not counted)":
        lambda r: newcomer_text(r["newcomer"]) if r["is_measured"] else "",
    "with its loading": lambda r: works_text(r["newcomer"]) if r["is_measured"] else "",
    "not run, because": lambda r: first_line(r.get("not_run")),
}  # fmt: skip


def markdown(found: Record) -> str:
    """Return the report of one fault as Markdown."""
    neighbors = [] if found["not_run"] else found["neighbors"]
    values = {
        "found": found,
        "faults": FAULTS,
        "neighbors": table_of(neighbors, NEIGHBOR_COLUMNS),
        "own_cost": None if found["not_run"] else own_cost_seconds(found["newcomer"]),
        "reason": "no reason known",
        "card": found["gpu"]["name"] if found.get("gpu") else NO_GPU,
    }
    if not found["not_run"]:
        values["reason"] = first_line(found["faulty"]["reason"]).rstrip(".") or values["reason"]
    title = f"Blast radius: {found['fault']} under {mode_name(found['mode'])}"
    return render.render_page("md", "blast.j2", title, values)


def survivors(record: Record) -> str:
    """How many neighbors survived, and whether their mode was proved."""
    survived = [one for one in record["neighbors"] if one["survived"]]
    is_proved = all(one["proof"] == "verified" for one in survived)
    doubt = "" if is_proved else " (mode not verified)"
    return f"{len(survived)} of {len(record['neighbors'])}{doubt}"


def longest_pause_ms(record: Record) -> float | None:
    """The longest time without work of a neighbor that survived."""
    gaps = [one["longest_gap_ms"] for one in record["neighbors"] if one["survived"]]
    return max(filter(None, gaps), default=None)


def lost_seconds(record: Record) -> float:
    """The work of all neighbors that is gone."""
    return sum(one["lost_seconds"] for one in record["neighbors"])


def newcomer_text(newcomer: Record) -> str:
    """What the fault cost a new client."""
    if newcomer["works_after_seconds"] is None:
        return f"none within {number(newcomer['patience_seconds'])}"
    return number(own_cost_seconds(newcomer))


def works_text(newcomer: Record) -> str:
    """When a new client had done its first work."""
    works = newcomer["works_after_seconds"]
    return "" if works is None else number(works)


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
        found = [own] if own.is_file() else sorted(folder.glob(f"*/{RECORD_FILE}"))
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
    cards = [record["gpu"]["name"] if record["gpu"] else NO_GPU
             for record in records if record["is_measured"]]  # fmt: skip
    values = {"table": table_of(records, SUMMARY_COLUMNS), "cards": list(dict.fromkeys(cards))}
    return render.render_page("md", "blast.j2", "Blast radius", values)


def is_measured(folder: Path) -> bool:
    """Whether a folder has a record of a fault that happened, or one that cannot be read."""
    path = folder / RECORD_FILE
    try:
        return path.exists() and read_record(path)["is_measured"]
    except SuiteError:
        return True


def read_record(path: Path) -> Record:
    """Read one record; raises `SuiteError` where it is none, or another version's."""
    try:
        record = cleaned(json.loads(path.read_text(encoding="utf-8")))
        version, known = record["schema_version"], record["fault"] in FAULTS
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SuiteError(f"{path} is no record of a fault: measure it again", EXIT_USAGE) from error
    if version not in (1, SCHEMA_VERSION) or not known:
        raise SuiteError(
            f"{path} was made by another version of this program: measure it again", EXIT_USAGE
        )
    return {**record, "is_measured": not record.get("not_run")}
