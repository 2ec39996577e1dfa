"""The report's chapter on inference services: latency, goodput and requests missed, by mode."""

from __future__ import annotations

from benchmarking.analysis import cells
from benchmarking.analysis.clients import ClientRow
from benchmarking.analysis.comparison import Section
from benchmarking.analysis.document import UNKNOWN, Bullets, Chapter, Paragraph, Table
from benchmarking.metrics.number_text import duration

HEADER = (
    "where", "service", "offered /s", "mean latency", "p99 latency", "mean slowdown",
    "p99 slowdown", "goodput /s", "within the bound", "answered", "missed",
)  # fmt: skip


def chapter(section: Section) -> Chapter | None:
    """What each service answered, alone and beside others; `None` without a service."""
    found = [("alone", row) for row in section.alone if row.service is not None]
    together = [
        (f"{group.mode_name}, {group.subject}", row)
        for group in section.groups
        for row in group.client_rows
        if row.service is not None
    ]
    if not together:
        return None
    found += together
    blocks = [
        Paragraph(
            "Requests come at a fixed average rate (Poisson), the same alone and in every mode; "
            "latency counts from when a request was due. So the service stays out of STP, ANTT, "
            "overhead and fairness, which are of the **throughput clients only**; its slowdown is "
            "latency beside others over latency alone. **Goodput**: requests a second answered "
            "within the bound. **Missed**: failed, or past the bound without an answer; in the "
            "p99 these count as infinitely late, the mean latency is of the answers alone."
        ),
        Table(HEADER, [[where, *_cells(row)] for where, row in found], keys=2),
    ]
    limits = [
        f"{row.label}, {where}: {row.service.limit}" for where, row in found if row.service.limit
    ]
    if limits:
        blocks.append(Bullets.of(limits))
    return Chapter("Inference service", blocks)


def _cells(row: ClientRow) -> list[str]:
    service, latency = row.service, row.latency
    return [
        f"{row.client}: {row.label}",
        cells.number(service.offered_per_second, 1),
        UNKNOWN if latency is None else duration(latency["mean"]),
        UNKNOWN if latency is None or latency["p99"] is None else duration(latency["p99"]),
        cells.spread(row.slowdown),
        cells.number(row.tail_slowdown[99]),
        cells.number(service.goodput_per_second, 1),
        cells.slo(row),
        str(service.answered),
        str(service.missed),
    ]
