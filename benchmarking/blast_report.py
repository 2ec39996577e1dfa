"""What a fault did to its neighbors, as people read it: one report, or one table of several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.analysis.runs import mode_name, mode_order
from benchmarking.cli import EXIT_USAGE, SuiteError
from benchmarking.metrics.number_text import significant
from benchmarking.suite.program import markdown_table

RECORD_FILE = "blast_radius.json"
SCHEMA_VERSION = 2
FAULTS = {
    "exit": "a client that ended with code 1",
    "oom": "a client that ran out of memory (its own cap)",
    "assert": "a failed assertion in a client's kernel",
    "illegal-access": "an illegal memory access of a client",
}
NEIGHBOR_COLUMNS = (
    "client", "job", "survived", "proof", "units/s before", "after", "longest pause ms", "lost s",
    "reason",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "mode", "fault", "neighbors survived", "longest pause ms", "lost s",
    "new client after s (its loading not counted)", "with its loading", "not run, because",
)  # fmt: skip

Record = Mapping[str, Any]


def markdown(found: Record) -> str:
    """Return the report of one fault as Markdown."""
    head = [f"# Blast radius: {found['fault']} under {mode_name(found['mode'])}", ""]
    if found["not_run"]:
        return "\n".join([*head, f"Not run, because {found['not_run']}."]) + "\n"
    rows = [
        [
            neighbor["client"], neighbor["label"], "yes" if neighbor["survived"] else "no",
            neighbor["proof"], number(neighbor["rate_before"]), number(neighbor["rate_after"]),
            number(neighbor["longest_gap_ms"]), number(neighbor["lost_seconds"]),
            first_line(neighbor["reason"]),
        ]
        for neighbor in found["neighbors"]
    ]  # fmt: skip
    lines = [*head, conclusion(found), "", *markdown_table(NEIGHBOR_COLUMNS, rows)]
    faulty, servers = found["faulty"], found["mps"]
    reason = first_line(faulty["reason"]).rstrip(".") or "no reason known"
    lines += ["", f"The faulty client: {faulty['status']}, {reason}."]
    if servers is not None:
        before, after = servers["servers_before"], servers["servers_after"]
        lines.append(f"MPS servers before: {before}, after: {after}.")
        if servers["server_log"]:
            lines += ["", *(f"    {line}" for line in servers["server_log"])]
    lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    where = found["gpu"]["name"] if found["gpu"] else "the CPU: this says nothing of a GPU"
    return "\n".join([*lines, "", f"Measured on {where}, {found['created_at']}."]) + "\n"


def conclusion(found: Record) -> str:
    """Return the answer in two sentences, each with its numbers."""
    neighbors, newcomer = found["neighbors"], found["newcomer"]
    survived = sum(neighbor["survived"] for neighbor in neighbors)
    gaps = [n["longest_gap_ms"] for n in neighbors if n["survived"] and n["longest_gap_ms"]]
    pause = f", with a longest pause of {significant(max(gaps))} ms" if gaps else ""
    lost = sum(neighbor["lost_seconds"] for neighbor in neighbors)
    first = (
        f"Under {mode_name(found['mode'])}, {FAULTS[found['fault']]} left {survived} of "
        f"{len(neighbors)} neighbors alive{pause}."
        f"{f' {significant(lost)} s of their work were lost.' if lost else ''}"
    )
    if newcomer["works_after_seconds"] is None:
        return f"{first} No new client worked within {significant(newcomer['patience_seconds'])} s."
    tries = "" if newcomer["attempts"] == 1 else f", at attempt {newcomer['attempts']}"
    return (
        f"{first} The fault itself cost a new client {number(own_cost_seconds(newcomer))} s, its "
        f"own loading not counted: it had done its first work "
        f"{number(newcomer['works_after_seconds'])} s after the fault{tries}, and "
        f"{number(newcomer['startup_seconds'])} s of that it was loading."
    )


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


# --- several --------------------------------------------------------------------------------------


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
    lines = ["# Blast radius", "", *markdown_table(SUMMARY_COLUMNS, map(_summary_row, records))]
    measured = [record["gpu"] for record in records if not record.get("not_run")]
    cards = [gpu["name"] if gpu else "the CPU, which says nothing of a GPU" for gpu in measured]
    if cards:
        lines += ["", f"Measured on {', '.join(dict.fromkeys(cards))}."]
    return "\n".join(lines) + "\n"


def is_measured(folder: Path) -> bool:
    """Whether a folder has a record of a fault that happened, or one that cannot be read."""
    path = folder / RECORD_FILE
    try:
        return path.exists() and not read_record(path).get("not_run")
    except SuiteError:
        return True


def read_record(path: Path) -> Record:
    """Read one record; raises `SuiteError` where it is none, or another version's."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, known = record["schema_version"], record["fault"] in FAULTS
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SuiteError(f"{path} is no record of a fault: measure it again", EXIT_USAGE) from error
    if version not in (1, SCHEMA_VERSION) or not known:
        raise SuiteError(
            f"{path} was made by another version of this program: measure it again", EXIT_USAGE
        )
    return record


def _summary_row(record: Record) -> Sequence[str]:
    head = [mode_name(record["mode"]), record["fault"]]
    if record.get("not_run"):
        return [*head, "", "", "", "", "", first_line(record["not_run"])]
    neighbors, newcomer = record["neighbors"], record["newcomer"]
    survived = [one for one in neighbors if one["survived"]]
    is_proved = all(one["proof"] == "verified" for one in survived)
    gaps = [one["longest_gap_ms"] for one in survived if one["longest_gap_ms"]]
    works = newcomer["works_after_seconds"]
    return [
        *head,
        f"{len(survived)} of {len(neighbors)}{'' if is_proved else ' (mode not verified)'}",
        number(max(gaps, default=None)),
        number(sum(one["lost_seconds"] for one in neighbors)),
        f"none within {number(newcomer['patience_seconds'])}"
        if works is None
        else number(own_cost_seconds(newcomer)),
        "" if works is None else number(works),
        "",
    ]
