"""What a fault did to its neighbors, in words: the conclusion, and the report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarking.analysis.runs import mode_name
from benchmarking.metrics.number_text import significant

FAULT_WORDS = {
    "exit": "a client that ended with code 1",
    "oom": "a client that ran out of memory (its own cap)",
    "assert": "a failed assertion in a client's kernel",
    "illegal-access": "an illegal memory access of a client",
}
# A bar that begins no cell.
BAR = r"\|"

COLUMNS = (
    "client", "job", "survived", "proof", "units/s before", "after", "longest pause ms", "lost s",
    "reason",
)  # fmt: skip


def conclusion(found: Mapping[str, Any]) -> str:
    """Return the answer in two sentences, each with its numbers."""
    neighbors = found["neighbors"]
    survived = sum(neighbor["survived"] for neighbor in neighbors)
    gaps = [n["longest_gap_ms"] for n in neighbors if n["survived"] and n["longest_gap_ms"]]
    stall = f", with a longest pause of {significant(max(gaps))} ms" if gaps else ""
    lost = sum(neighbor["lost_seconds"] for neighbor in neighbors)
    lost_text = f" {significant(lost)} s of their work were lost." if lost else ""
    first = (
        f"Under {mode_name(found['mode'])}, {FAULT_WORDS[found['fault']]} left {survived} of "
        f"{len(neighbors)} neighbors alive{stall}.{lost_text}"
    )
    newcomer = found["newcomer"]
    if newcomer["works_after_seconds"] is None:
        second = f"No new client worked within {significant(newcomer['patience_seconds'])} s."
    else:
        tries = "" if newcomer["attempts"] == 1 else f", at attempt {newcomer['attempts']}"
        works, startup = newcomer["works_after_seconds"], newcomer["startup_seconds"]
        second = (
            f"The fault itself cost a new client {number(own_cost_seconds(newcomer))} s, its own "
            f"loading not counted: it had done its first work {number(works)} s after the "
            f"fault{tries}, and {number(startup)} s of that it was loading."
        )
    return f"{first} {second}"


def own_cost_seconds(newcomer: Mapping[str, Any]) -> float | None:
    """Return the time from the fault to a new client's first work, less what it took to load."""
    works, startup = newcomer["works_after_seconds"], newcomer["startup_seconds"]
    return None if works is None or startup is None else works - startup


def first_line(said: str | None) -> str:
    """Return the first line of a message: CUDA's errors have four more of general advice."""
    lines = (said or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        f"| {' | '.join(header)} |",
        "|" + " --- |" * len(header),
        *(f"| {' | '.join(str(cell).replace('|', BAR) for cell in row)} |"
          for row in rows),
    ]  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
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
    lines = [*head, conclusion(found), "", *table(COLUMNS, rows)]
    faulty = found["faulty"]
    reason = first_line(faulty["reason"]).rstrip(".") or "no reason known"
    lines += ["", f"The faulty client: {faulty['status']}, {reason}."]
    if found["mps"] is not None:
        servers = found["mps"]
        lines.append(
            f"MPS servers before: {servers['servers_before']}, after: {servers['servers_after']}."
        )
        if servers["server_log"]:
            lines += ["", *(f"    {line}" for line in servers["server_log"])]
    lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    where = found["gpu"]["name"] if found["gpu"] else "the CPU: this says nothing of a GPU"
    lines += ["", f"Measured on {where}, {found['created_at']}."]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Return a number with three significant digits; one that is not known says so."""
    return "unknown" if value is None else significant(value)
