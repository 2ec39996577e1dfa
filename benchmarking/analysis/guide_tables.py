"""The report's tables of measured values beside the guide's expected ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarking.analysis.comparison import Section
from benchmarking.analysis.document import UNKNOWN, Block, Chapter, Paragraph, Table
from benchmarking.analysis.expectations import Expectation
from benchmarking.analysis.groups import Group
from benchmarking.analysis.guide_checks import Check
from benchmarking.metrics.number_text import duration, significant

_TITLE = "Against the guide's expected ranges"


def guide_ranges(section: Section) -> Chapter | None:
    """Modes and jobs alone beside their ranges, then the same jobs together for orientation."""
    job_size = section.environment.get("job_size")
    if job_size != "guide":
        text = (
            "Not compared: the guide's ranges are for its full job sizes on a GPU, these jobs "
            f"ran at size `{job_size}`."
        )
        return Chapter(_TITLE, [Paragraph(text)])
    modes = [_row(g.mode_name, check) for g in section.groups for check in g.checks]
    alone = [_row(row.label, check) for row in section.alone for check in row.checks]
    rows, together = [*modes, *alone], _together(section)
    if not rows and not together:
        return None
    inside = sum(row[5] == "inside" for row in rows)
    text = (
        f"{inside} of {len(rows)} measured values lie inside. The ranges for a workload are for "
        "the job alone on an unnamed GPU."
    )
    header = ["what", "situation", "quantity", "measured", "guide expects", "verdict",
              "where in the guide"]  # fmt: skip
    return Chapter(_TITLE, [Paragraph(text), Table(header, rows, keys=3), *together],
                   is_folded=True)  # fmt: skip


def _measured(check: Check) -> str:
    """The measured value to three significant digits, with its unit; from 1000 ms on in s."""
    if check.expectation.unit == "ms":
        return duration(check.value)
    return f"{significant(check.value)} {check.expectation.unit}"


def _row(name: str, check: Check) -> list[str]:
    expected = check.expectation
    note = f"; {expected.note}" if expected.note else ""
    return [
        name, check.situation, expected.name, _measured(check),
        expected.range_text, check.verdict, f"{expected.experiment}, {expected.where}{note}",
    ]  # fmt: skip


def _together(section: Section) -> list[Block]:
    """Each job's quantities alone and beside the others, a column a mode; a table a mix and count.

    Copies of one job share a line.
    """
    blocks: list[Block] = []
    subjects: dict[str, list[Group]] = {}
    for group in section.groups:
        subjects.setdefault(group.subject, []).append(group)
    alone = [(row.label, row.checks) for row in section.alone]
    for subject, groups in subjects.items():
        columns = [[(row.label, row.checks) for row in group.client_rows] for group in groups]
        lines = dict.fromkeys(
            (label, check.expectation)
            for column in columns
            for label, checks in column
            for check in checks
        )
        rows = [
            [
                label,
                expected.name,
                expected.range_text,
                *(_found(column, label, expected) for column in [alone, *columns]),
            ]
            for label, expected in lines
        ]
        if rows:
            header = ["job", "quantity", "guide expects, alone", "alone"]
            title = f"The same jobs, {subject} at the same time, for orientation:"
            table = Table([*header, *(group.mode_name for group in groups)], rows, keys=2)
            blocks += [Paragraph(title), table]
    return blocks


def _found(rows: Iterable[tuple[str, Sequence[Check]]], label: str, expected: Expectation) -> str:
    """What clients with this label measured of a quantity, lowest to highest, with verdicts."""
    found = sorted(
        (
            check
            for row_label, checks in rows
            for check in checks
            if row_label == label and check.expectation == expected
        ),
        key=lambda check: check.value,
    )
    if not found:
        return UNKNOWN
    values = dict.fromkeys(_measured(check) for check in (found[0], found[-1]))
    verdicts = dict.fromkeys(check.verdict for check in found)
    return f"{' to '.join(values)}: {', '.join(verdicts)}"
