"""The report of a sweep: which value was best for what, the chart, the table; and its JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking.analysis import cells
from benchmarking.analysis.document import (
    UNKNOWN,
    Bullets,
    Chapter,
    Document,
    Gallery,
    Paragraph,
    Table,
    code,
)
from benchmarking.analysis.noise import NO_FLOOR, is_shown
from benchmarking.analysis.report_content import CPU_DEMO_NOTICE
from benchmarking.analysis.runs import CPU_DEMO, clients_text, mode_name
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM, Estimate
from benchmarking.metrics.number_text import duration, joined
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL
from benchmarking.sweeping import chart
from benchmarking.sweeping.points import OK, Point, Tail

SCHEMA_VERSION = 1
CHART_FILE = "sweep.png"

HOW_TO_READ = (
    "**STP**: sum of the inverse slowdowns, in GPUs' worth of work; over 1, sharing beats running "
    "the jobs one after another.",
    "**ANTT**: mean slowdown, what users feel on average.",
    "**p99, times alone**: p99 of the raw latencies of all repeats over that of the job alone; in "
    f"the chart the geometric mean of the repeats' p99s. Of fewer than {FEWEST_FOR_A_TAIL} "
    "responses there is none, and a request that was missed counts as infinitely late (∞).",
    "A best value is named only where three or more "
    "repeats each have intervals that do not overlap; else it is said what was seen.",
)

ONE_BASELINE = "All values are measured against one baseline."
OWN_BASELINES = (
    "Each value is measured against the baseline of its own run: its figures say how well it "
    "shares the GPU, not how fast its jobs are."
)


@dataclass
class Sweep:
    """A sweep as far as it has come; `points` holds every value, those not run included."""

    knob: str
    command: list[str]
    created_at: str
    baseline: str | None
    points: list[Point]
    outcome: str = "running"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `sweep.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "knob": self.knob,
            "command": self.command,
            "created_at": self.created_at,
            "baseline": self.baseline,
            "outcome": self.outcome,
            "points": [point.to_dict() for point in self.points],
        }


def write(sweep: Sweep, folder: Path) -> None:
    """Draw the chart and write `report.html` and `report.md`."""
    from benchmarking.analysis import html_report, markdown_report

    said = sentences(sweep)
    picture = chart.draw(sweep.points, sweep.knob, _headline(sweep), folder / CHART_FILE)
    document = _document(sweep, said, [picture] if picture else [])
    (folder / "report.md").write_text(markdown_report.render(document), encoding="utf-8")
    (folder / "report.html").write_text(html_report.render(document), encoding="utf-8")


def _headline(sweep: Sweep) -> str:
    """The chart's message: the highest STP."""
    known = [point for point in sweep.points if point.stp is not None]
    if not known:
        return ""
    best = max(known, key=lambda point: point.stp.mean)
    return (
        f"STP is the highest at {sweep.knob} {best.value}: {best.stp.mean:.2f}, "
        f"n = {best.stp.repeats}"
    )


def sentences(sweep: Sweep) -> list[str]:
    """What may be said of the values: the best for throughput, for each latency job's p99."""
    known = [point for point in sweep.points if point.stp is not None]
    if not known:
        return []
    said = [_throughput_sentence(sweep.knob, known)]
    labels = dict.fromkeys(tail.label for point in known for tail in point.tails)
    return said + [_tail_sentence(sweep.knob, label, known) for label in labels]


def _throughput_sentence(knob: str, known: Sequence[Point]) -> str:
    best = max(known, key=lambda point: point.stp.mean)
    others = [point for point in known if point is not best]
    if not others:
        return f"STP {best.stp.text()} at {knob} {best.value}, the only value with figures."
    alike = [point.value for point in others if not is_shown(best.stp, point.stp, None)]
    lowest = min(others, key=lambda point: point.stp.mean)
    against = f"STP {best.stp.text()} against {lowest.stp.text()} at {lowest.value}, the lowest"
    lead = f"{knob} **{best.value}** gave the highest throughput"
    if not alike:
        return f"{lead}: {against}; {NO_FLOOR}."
    if all(point.stp.repeats >= MIN_REPEATS_FOR_CLAIM for point in known):
        return f"{lead} in these runs, no difference shown from {joined(alike)}: {against}."
    return f"{lead} in these runs: {against}; repeat (`--repeats 3`) before relying on it."


def _tail_sentence(knob: str, label: str, known: Sequence[Point]) -> str:
    tails = {point.value: tail for point in known if (tail := point.tail(label)) is not None}
    values = sorted(tails, key=lambda value: tails[value].p99_ms.mean)
    listed = [f"{_p99_text(tails[value].p99_ms)} at {value}" for value in (values[0], values[-1])]
    if len(values) == 1:
        return f"p99 latency of {label}: {listed[0]}."
    return (
        f"p99 latency of {label} was the lowest at {knob} **{values[0]}** in these runs: "
        f"{listed[0]} against {listed[1]}, the highest."
    )


def _p99_text(found: Estimate) -> str:
    return f"{duration(found.mean)} ({found.spread_text(duration)})"


def _document(sweep: Sweep, said: Sequence[str], pictures: Sequence[Any]) -> Document:
    decision = Chapter("Decision", level=2, is_decision=True)
    if any(point.mode == CPU_DEMO for point in sweep.points):
        decision.blocks.append(Paragraph(CPU_DEMO_NOTICE, is_notice=True))
    decision.blocks.append(Bullets.of(said or ["No value has figures."]))
    chapters = [decision, Chapter("What ran", [Paragraph(_subject(sweep))], level=2)]
    if pictures:
        chapters.append(Chapter("Chart", [Gallery(pictures)], level=2))
    chapters.append(Chapter("Values", [_table(sweep)], level=2))
    bad = [point for point in sweep.points if point.outcome != OK]
    if bad:
        texts = [f"{p.value}: {p.outcome}{', ' + p.reason if p.reason else ''}" for p in bad]
        chapters.append(Chapter("Values without figures", [Bullets.of(texts)], level=2))
    how_to_read = [*HOW_TO_READ, ONE_BASELINE if sweep.baseline else OWN_BASELINES]
    chapters.append(Chapter("How to read the figures", [Bullets.of(how_to_read)], level=2))
    return Document(f"Sweep of {sweep.knob}", chapters)


def _subject(sweep: Sweep) -> str:
    measured = [point for point in sweep.points if point.clients is not None]
    modes = joined(list(dict.fromkeys(mode_name(point.mode or "") for point in measured)))
    unverified = " (mode unverified)" if any(point.is_unverified for point in measured) else ""
    under = f" under {modes}{unverified}" if modes else ""
    baseline = code(sweep.baseline) if sweep.baseline else "of each value's own"
    return (
        f"{len(measured)} of {len(sweep.points)} values measured{under}; baseline "
        f"{baseline}; command {code(shlex.join(sweep.command))}; "
        f"outcome {sweep.outcome}."
    )


def _table(sweep: Sweep) -> Table:
    labels = list(dict.fromkeys(tail.label for point in sweep.points for tail in point.tails))
    header = [sweep.knob, "outcome", "clients", "STP", "ANTT",
              *(f"p99 of {label} (times alone)" for label in labels), "run"]  # fmt: skip
    rows = [
        [
            point.value,
            point.outcome,
            UNKNOWN if point.clients is None else clients_text(point.clients),
            cells.spread(point.stp),
            cells.spread(point.antt),
            *(_tail_text(point.tail(label)) for label in labels),
            code(point.run_id or ""),
        ]
        for point in sweep.points
    ]
    return Table(header, rows)


def _tail_text(tail: Tail | None) -> str:
    if tail is None:
        return UNKNOWN
    times = "" if tail.slowdown is None else f" ({cells.number(tail.slowdown)})"
    return f"{duration(tail.merged_ms)}{times}"
