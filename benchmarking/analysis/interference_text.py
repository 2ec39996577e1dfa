"""Who harms whom in words: the pair that hurts most under each mode, the table of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarking.analysis import cells, noise
from benchmarking.analysis.document import (
    UNKNOWN,
    Bullets,
    Chapter,
    Gallery,
    Paragraph,
    Picture,
    Table,
    code,
)
from benchmarking.analysis.interference import OK, InterferenceCell, InterferenceMatrix
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM
from benchmarking.metrics.number_text import duration
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL


def worst_pairs(matrices: Sequence[InterferenceMatrix]) -> list[tuple[str, tuple[str, ...]]]:
    """Sentences on the pair that hurts most under each mode, each with its runs.

    The mode that hurts most comes first.
    """
    found = []
    for matrix in matrices:
        known = [cell for cell in matrix.cells if cell.slowdown is not None]
        if known:
            worst = max(known, key=lambda cell: cell.slowdown.mean)
            found.append((worst.slowdown.mean, _sentence(matrix, worst), worst.run_ids))
    found.sort(key=lambda item: item[0], reverse=True)
    return [(sentence, run_ids) for _, sentence, run_ids in found]


def _sentence(matrix: InterferenceMatrix, worst: InterferenceCell) -> str:
    others = [c.slowdown for c in matrix.cells if c.slowdown is not None and c is not worst]
    floor = noise.widest(pair for pair in matrix.same_twice if pair.figure == noise.SLOWDOWN)
    is_claim = bool(others) and all(
        noise.is_shown(worst.slowdown, other, floor) for other in others
    )
    seen = "" if is_claim else ", as seen in these runs"
    unverified = " (mode unverified)" if any(cell.is_unverified for cell in matrix.cells) else ""
    text = (
        f"Two at a time under {matrix.title}{unverified}: **{worst.job} suffers most, beside "
        f"{worst.other}**{seen}: slowdown {worst.slowdown.text()}"
    )
    tails = [cell for cell in matrix.cells if cell.tail_slowdown is not None]
    if tails:
        tail = max(tails, key=lambda cell: cell.tail_slowdown)
        text += (
            f"; the p99 latency that grew most in these runs is that of {tail.job} beside "
            f"{tail.other}: "
            f"{duration(tail.p99_ms)}, {tail.tail_slowdown:.2f} times that alone "
            f"({tail.responses} responses)"
        )
    missing = len(_gaps(matrix))
    if missing:
        text += f"; {missing} of {len(matrix.jobs) ** 2} figures are missing"
    if worst.slowdown.repeats < MIN_REPEATS_FOR_CLAIM:
        text += "; repeat (`--repeats 3`) before relying on it"
    if is_claim and floor is None:
        text += f"; {noise.NO_FLOOR}"
    elif floor is not None:
        text += f"; noise floor of the slowdowns {floor.percent:.1f} %"
    return f"{text}."


def chapter(matrices: Sequence[InterferenceMatrix], pictures: Sequence[Picture]) -> Chapter | None:
    """The heat maps, what is missing in them, and every pair's figures."""
    if not matrices:
        return None
    found = Chapter("Pair by pair: who harms whom")
    found.blocks.append(
        Paragraph(
            "Each job beside each other one and beside itself, two at a time; a job beside itself "
            "pools both copies. Rows suffer, columns stand beside. Figures are against the job "
            "alone, under MIG too on the whole GPU; a p99 of fewer than "
            f"{FEWEST_FOR_A_TAIL} responses (n), alone or together, is not given, and such a "
            "job stands in the map of slowdowns."
        )
    )
    if pictures:
        found.blocks.append(Gallery(pictures))
    gaps = [
        f"{matrix.title}: {cell.job} beside {cell.other}: {cell.outcome}"
        for matrix in matrices
        for cell in _gaps(matrix)
    ]
    if gaps:
        found.blocks += [Paragraph("Pairs without figures:"), Bullets.of(gaps)]
    header = ["mode", "job", "beside", "slowdown", "p99", "p99, times alone", "responses",
              "STP of both", "runs"]  # fmt: skip
    rows = [_row(matrix, cell) for matrix in matrices for cell in matrix.every_cell()]
    found.blocks.append(Table(header, rows, keys=3))
    return found


def _gaps(matrix: InterferenceMatrix) -> list[InterferenceCell]:
    return [cell for cell in matrix.every_cell() if cell.outcome != OK]


def _row(matrix: InterferenceMatrix, cell: InterferenceCell) -> list[str]:
    has_latency = cell.job in matrix.latency_jobs
    return [
        matrix.title,
        cell.job,
        cell.other,
        cells.spread(cell.slowdown) if cell.outcome == OK else cell.outcome,
        UNKNOWN if cell.p99_ms is None else duration(cell.p99_ms),
        cells.number(cell.tail_slowdown),
        str(cell.responses) if has_latency else UNKNOWN,
        cells.spread(cell.stp),
        ", ".join(map(code, cell.run_ids)) or UNKNOWN,
    ]
