"""What a fault did to its neighbors, in words: the conclusion, and the report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarking.command_line.number_text import significant

FAULT_WORDS = {
    "exit": "a client that ended with code 1",
    "oom": "a client that ran out of memory (its own cap)",
    "assert": "a failed assertion in a client's kernel",
    "illegal-access": "an illegal memory access of a client",
}
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
        f"Under {found['mode']}, {FAULT_WORDS[found['fault']]} left {survived} of "
        f"{len(neighbors)} neighbors alive{stall}.{lost_text}"
    )
    newcomer = found["newcomer"]
    if newcomer["works_after_seconds"] is None:
        second = f"No new client worked within {significant(newcomer['patience_seconds'])} s."
    else:
        tries = "" if newcomer["attempts"] == 1 else f", at attempt {newcomer['attempts']}"
        works, startup = newcomer["works_after_seconds"], newcomer["startup_seconds"]
        second = (
            f"A new client had done its first work {significant(works)} s after the fault{tries}; "
            f"{significant(startup)} s of that it was loading."
        )
    return f"{first} {second}"


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# Blast radius: {found['fault']} under {found['mode']}",
        "",
        conclusion(found),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for neighbor in found["neighbors"]:
        cells = [
            neighbor["client"], neighbor["label"], "yes" if neighbor["survived"] else "no",
            neighbor["proof"], _number(neighbor["rate_before"]), _number(neighbor["rate_after"]),
            _number(neighbor["longest_gap_ms"]), _number(neighbor["lost_seconds"]),
            neighbor["reason"] or "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    faulty = found["faulty"]
    lines += ["", f"The faulty client: {faulty['status']}, {faulty['reason']}."]
    if found["mps"] is not None:
        servers = found["mps"]
        lines.append(
            f"MPS servers before: {servers['servers_before']}, after: {servers['servers_after']}."
        )
        lines += [f"    {line}" for line in servers["server_log"]]
    where = found["gpu"]["name"] if found["gpu"] else "the CPU: this says nothing of a GPU"
    lines += ["", f"Measured on {where}, {found['created_at']}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "unknown" if value is None else significant(value)
