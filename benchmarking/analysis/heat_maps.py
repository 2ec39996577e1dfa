"""Heat maps of who harms whom, by mode: p99 tails of latency jobs, slowdowns of all others."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarking.analysis import cells, charts
from benchmarking.analysis.document import Picture
from benchmarking.analysis.interference import OK, InterferenceCell, InterferenceMatrix
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL

_LABEL_CHARACTERS = 12
_ROW_INCHES = 0.55
# From here on of the color scale the cells are dark, and their figures white.
_DARK = 0.55

Value = Callable[[InterferenceCell], float | None]


def slowdowns(
    matrix: InterferenceMatrix, every: Sequence[InterferenceMatrix], path: Path
) -> Picture | None:
    """Slowdown of each job beside each job; `None` where none is known.

    `every` are the matrices that the reader will see beside it, for one scale of shades.
    """
    highest = _highest(every, slowdown_of, lambda one: one.jobs)
    return _draw(
        matrix, matrix.jobs, slowdown_of, highest, path,
        "slowdown (times alone)", "{job} is slowed the most by {beside}",
    )  # fmt: skip


def tails(
    matrix: InterferenceMatrix, every: Sequence[InterferenceMatrix], path: Path
) -> Picture | None:
    """p99 of each job that has one, beside each job over its p99 alone; `None` where none is."""
    return _draw(
        matrix, matrix.jobs_with_tails, tail_of,
        _highest(every, tail_of, lambda one: one.jobs_with_tails), path,
        "p99 latency (times that alone)", "p99 latency of {job} grows the most beside {beside}",
    )  # fmt: skip


def slowdown_of(cell: InterferenceCell) -> float | None:
    """The figure of the slowdown map."""
    return cell.slowdown.mean if cell.slowdown else None


def tail_of(cell: InterferenceCell) -> float | None:
    """The figure of the map of tails."""
    return cell.tail_slowdown


def _highest(
    matrices: Sequence[InterferenceMatrix],
    value: Value,
    jobs_of: Callable[[InterferenceMatrix], Collection[str]],
) -> float:
    """Where the scale of shades ends: the worst figure of all maps, 2 at least."""
    found = [value(cell) for one in matrices for cell in one.cells if cell.job in jobs_of(one)]
    return max([2.0, *(figure for figure in found if figure is not None and figure < math.inf)])


def missing_text(cell: InterferenceCell, value: Value) -> str:
    """Why a cell has no figure, in a word or two."""
    if cell.outcome != OK:
        return cell.outcome
    if value is tail_of and cell.responses < FEWEST_FOR_A_TAIL:
        return f"n = {cell.responses}"
    return "unknown"


def _draw(
    matrix: InterferenceMatrix,
    rows: Sequence[str],
    value: Value,
    highest: float,
    path: Path,
    label: str,
    message: str,
) -> Picture | None:
    """A row a job that suffers, a column a job beside it; darker is worse, 1 is white."""
    table = [[matrix.cell(job, beside) for beside in matrix.jobs] for job in rows]
    known = [cell for line in table for cell in line if value(cell) is not None]
    if not known:
        return None
    worst = max(known, key=value)
    with charts.drawing_rules():
        figure, (panel,) = charts.new_figure(1.0 + _ROW_INCHES * len(rows))
        shades = [
            [math.nan if value(c) is None else min(value(c), highest) for c in line]
            for line in table
        ]
        # One hue whose lightness falls evenly: the order of the cells survives a grey print. As
        # shapes and not as a picture, which an SVG inside a page would have to embed.
        panel.pcolormesh(
            range(len(matrix.jobs) + 1), range(len(rows) + 1), shades,
            cmap="Blues", vmin=1, vmax=highest, edgecolors="0.6", linewidth=0.8,
        )  # fmt: skip
        for row, line in enumerate(table):
            for column, cell in enumerate(line):
                found = value(cell)
                is_dark = found is not None and (found - 1) / (highest - 1) > _DARK
                panel.annotate(
                    missing_text(cell, value) if found is None else cells.number(found),
                    (column + 0.5, row + 0.5), ha="center", va="center",
                    color="white" if is_dark else "black",
                    fontweight="normal" if found is None else "bold",
                    style="italic" if found is None else "normal",
                )  # fmt: skip
        panel.invert_yaxis()
        panel.set_xticks(_middles(matrix.jobs), [_wrapped(job) for job in matrix.jobs])
        panel.set_yticks(_middles(rows), [_wrapped(job) for job in rows])
        panel.set_xlabel("beside")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        figure.supxlabel(f"{label}; darker is worse", fontsize=8)
        return charts.save(
            figure, path,
            f"Under {matrix.title} {message.format(job=worst.job, beside=worst.other)}: "
            f"{cells.number(value(worst))} times",
            f"Heat map of {label} under {matrix.title}; rows suffer, columns stand beside.",
        )  # fmt: skip


def _middles(cells: Sequence[str]) -> list[float]:
    return [place + 0.5 for place in range(len(cells))]


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LABEL_CHARACTERS)
