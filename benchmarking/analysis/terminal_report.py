"""The scorecard and the decision for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarking.analysis import cells
from benchmarking.analysis.comparison import Comparison
from benchmarking.analysis.document import plain
from benchmarking.analysis.report_content import CPU_DEMO_NOTICE, claims_of


def render(compared: Comparison) -> str:
    """The table and the decision of each section, as plain text."""
    parts = []
    for section in compared.sections:
        parts.append(section.title)
        if section.is_cpu_demo:
            parts.append(CPU_DEMO_NOTICE)
        if section.groups:
            parts.append(plain_table(cells.SCORE_HEADER, cells.score_rows(section.groups)))
        parts.append("Decision:")
        parts += [f"  * {plain(claim.text)}" for claim in claims_of(section)]
        parts.append("")
    return "\n".join(parts)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned by spaces."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )
