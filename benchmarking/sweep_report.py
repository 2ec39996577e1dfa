"""The report of a sweep: what each value gave, which was best for what, the chart, the table."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.analysis import cells, charts, html_report, markdown_report
from benchmarking.analysis.clients import ClientRow, copies_by_label, worst_copy
from benchmarking.analysis.comparison import compare
from benchmarking.analysis.document import (
    UNKNOWN,
    Bullets,
    Chapter,
    Document,
    Gallery,
    Paragraph,
    Picture,
    Table,
    code,
)
from benchmarking.analysis.export import finite
from benchmarking.analysis.noise import NO_FLOOR, is_shown
from benchmarking.analysis.report_content import CPU_DEMO_NOTICE
from benchmarking.analysis.runs import CPU_DEMO, RunView, clients_text, mode_name
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM, Estimate
from benchmarking.metrics.number_text import duration, joined
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL
from benchmarking.records import run_folder, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 1
CHART_FILE = "sweep.png"
OK, INTERRUPTED, NOT_RUN = "ok", "interrupted", "not run"

HOW_TO_READ = (
    "**STP**: sum of the inverse slowdowns, in GPUs' worth of work; over 1, sharing beats running "
    "the jobs one after another.",
    "**ANTT**: mean slowdown, what users feel on average.",
    "**p99, times alone**: p99 of the raw latencies of all repeats over that of the job alone; in "
    f"the chart the geometric mean of the repeats' p99s. Of fewer than {FEWEST_FOR_A_TAIL} "
    "responses there is none, and a failed or timed-out request counts as infinitely late (∞).",
    "A best value is named only where three or more "
    "repeats each have intervals that do not overlap; else it is said what was seen.",
)
ONE_BASELINE = "All values are measured against one baseline."
OWN_BASELINES = (
    "Each value is measured against the baseline of its own run: its figures say how well it "
    "shares the GPU, not how fast its jobs are."
)

# Looks of the latency jobs in the chart: they differ by marker and line as well as by shade.
_TAIL_LOOKS = (("o", "-", "0.1"), ("s", "--", "0.45"), ("^", ":", "0.3"), ("D", "-.", "0.6"))
_NOTE = {"ha": "center", "style": "italic", "fontsize": 8}

# --- what each value gave -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """p99 response time of one latency job, of copies the worst one's.

    `p99_ms` has the p99 of each repeat; `merged_ms` is that of all raw latencies together,
    `slowdown` the same over p99 alone, where that is known. Failed and timed-out requests count
    as infinitely late; of too few responses there is no tail.
    """

    label: str
    p99_ms: Estimate
    merged_ms: float
    slowdown: float | None

    @property
    def is_unbounded(self) -> bool:
        """Whether so many requests failed that their p99 is infinite."""
        return math.inf in (self.merged_ms, self.p99_ms.mean)

    @property
    def times_alone(self) -> Estimate | None:
        """The repeats' p99 over p99 alone; `None` where that is infinite or not known."""
        if self.slowdown is None or self.is_unbounded:
            return None
        scale, found = self.slowdown / self.merged_ms, self.p99_ms
        mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
        return Estimate(mean, low, high, found.values, found.is_interval)


@dataclass(frozen=True)
class Point:
    """One value of the knob: how its run ended, and its figures where it ended well."""

    value: str
    outcome: str
    run_id: str | None = None
    reason: str | None = None
    clients: int | None = None
    mode: str | None = None
    is_unverified: bool = False
    stp: Estimate | None = None
    antt: Estimate | None = None
    tails: tuple[Tail, ...] = ()

    def tail(self, label: str) -> Tail | None:
        """Return the p99 of the latency job called `label`."""
        return next((tail for tail in self.tails if tail.label == label), None)


@dataclass
class Sweep:
    """A sweep as far as it has come; `points` holds every value, those not run included.

    `directory` is where the command was given: relative paths in it count from there.
    """

    knob: str
    command: list[str]
    created_at: str
    baseline: str | None
    points: list[Point]
    outcome: str = "running"
    directory: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `sweep.json`; what is infinite is `None`."""
        return {"schema_version": SCHEMA_VERSION, **finite(dataclasses.asdict(self))}


def read_point(value: str, folder: Path, baseline: Path | None, reason: str | None) -> Point:
    """Read what one value gave from its run's folder, by the rules of every report.

    `baseline` is the run that it took its baselines from, `reason` why the suite ended badly where
    it did.
    """
    if not (folder / run_folder.MANIFEST_FILE).is_file():
        if reason == INTERRUPTED:
            return Point(value, INTERRUPTED)
        return Point(value, "failed", reason=reason)
    view = _view(folder)
    found = compare([view], references=[_view(baseline)] if baseline else [])
    groups = [group for section in found.sections for group in section.groups]
    outcome = str(view.manifest.get("outcome"))
    if not groups or outcome != "complete":
        return Point(value, "failed" if outcome == "complete" else outcome, view.run_id, reason)
    group = groups[-1]
    worst = (
        worst_copy(copies, lambda row: row.p99_ms and row.p99_ms.mean)
        for copies in copies_by_label(group.client_rows).values()
    )
    return Point(
        value=value,
        outcome=group.outcome,
        run_id=view.run_id,
        reason=group.reason,
        clients=group.clients,
        mode=group.mode,
        is_unverified=group.is_unverified,
        stp=group.stp,
        antt=group.antt,
        tails=tuple(_tail(row) for row in worst if row is not None),
    )


def _view(folder: Path) -> RunView:
    run = run_folder.read_run(folder)
    return RunView.of(run, run.run_id)


def _tail(row: ClientRow) -> Tail:
    merged = row.latency["p99"] if row.latency else math.inf  # not one was answered
    return Tail(row.label, row.p99_ms, merged, row.tail_slowdown[99])


# --- the report -----------------------------------------------------------------------------------


def write(sweep: Sweep, folder: Path) -> None:
    """Draw the chart and write `report.html` and `report.md`; raises `OSError`."""
    picture = _draw(sweep, folder / CHART_FILE)
    decision = Chapter("Decision", level=2, is_decision=True)
    if any(point.mode == CPU_DEMO for point in sweep.points):
        decision.blocks.append(Paragraph(CPU_DEMO_NOTICE, is_notice=True))
    decision.blocks.append(Bullets.of(sentences(sweep) or ["No value has figures."]))
    chapters = [decision, Chapter("What ran", [Paragraph(_subject(sweep))], level=2)]
    if picture:
        chapters.append(Chapter("Chart", [Gallery([picture])], level=2))
    chapters.append(Chapter("Values", [_table(sweep)], level=2))
    bad = [f"{point.value}: {point.outcome}{f', {point.reason}' if point.reason else ''}"
           for point in sweep.points if point.outcome != OK]  # fmt: skip
    if bad:
        chapters.append(Chapter("Values without figures", [Bullets.of(bad)], level=2))
    how_to_read = [*HOW_TO_READ, ONE_BASELINE if sweep.baseline else OWN_BASELINES]
    chapters.append(Chapter("How to read the figures", [Bullets.of(how_to_read)], level=2))
    document = Document(f"Sweep of {sweep.knob}", chapters)
    for name, page in (
        ("report.md", markdown_report.render(document)),
        ("report.html", html_report.render(document)),
    ):
        writing.write_text_atomic(folder / name, page)


def headline(sweep: Sweep) -> str:
    """Return the chart's message: the highest STP."""
    best = max((point for point in sweep.points if point.stp), key=lambda point: point.stp.mean)
    return (
        f"STP is the highest at {sweep.knob} {best.value}: {best.stp.mean:.2f}, "
        f"n = {best.stp.repeats}"
    )


def sentences(sweep: Sweep) -> list[str]:
    """What may be said of the values: the best for throughput, for each latency job's p99."""
    known = [point for point in sweep.points if point.stp is not None]
    if not known:
        return []
    labels = dict.fromkeys(tail.label for point in known for tail in point.tails)
    tails = [_tail_sentence(sweep.knob, label, known) for label in labels]
    return [_throughput_sentence(sweep.knob, known), *tails]


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
    tails = {point.value: tail.p99_ms for point in known if (tail := point.tail(label))}
    values = sorted(tails, key=lambda value: tails[value].mean)
    lowest, highest = (
        f"{duration(tails[value].mean)} ({tails[value].spread_text(duration)}) at {value}"
        for value in (values[0], values[-1])
    )
    if len(values) == 1:
        return f"p99 latency of {label}: {lowest}."
    return (
        f"p99 latency of {label} was the lowest at {knob} **{values[0]}** in these runs: "
        f"{lowest} against {highest}, the highest."
    )


def _subject(sweep: Sweep) -> str:
    measured = [point for point in sweep.points if point.clients is not None]
    modes = joined(list(dict.fromkeys(mode_name(point.mode or "") for point in measured)))
    unverified = " (mode unverified)" if any(point.is_unverified for point in measured) else ""
    under = f" under {modes}{unverified}" if modes else ""
    baseline = code(sweep.baseline) if sweep.baseline else "of each value's own"
    return (
        f"{len(measured)} of {len(sweep.points)} values measured{under}; baseline {baseline}; "
        f"command {code(shlex.join(sweep.command))}; outcome {sweep.outcome}."
    )


def _table(sweep: Sweep) -> Table:
    labels = list(dict.fromkeys(tail.label for point in sweep.points for tail in point.tails))
    tails = [f"p99 of {label} (times alone)" for label in labels]
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
    return Table([sweep.knob, "outcome", "clients", "STP", "ANTT", *tails, "run"], rows)


def _tail_text(tail: Tail | None) -> str:
    if tail is None:
        return UNKNOWN
    times = "" if tail.slowdown is None else f" ({cells.number(tail.slowdown)})"
    return f"{duration(tail.merged_ms)}{times}"


# --- the chart ------------------------------------------------------------------------------------


def _draw(sweep: Sweep, path: Path) -> Picture | None:
    """STP, mean slowdown and p99 one below the other; `None` where no value has an STP."""
    points = sweep.points
    known = [point for point in points if point.stp is not None]
    if not known:
        return None
    labels = list(dict.fromkeys(t.label for p in known for t in p.tails if t.slowdown is not None))
    mode = charts.style(known[0].mode or "")
    look = (mode["marker"], mode["linestyle"], mode["color"])
    with charts.drawing_rules():
        panels = 3 if labels else 2
        figure, axes = charts.new_figure(0.9 + 1.45 * panels, panels, sharex=True)
        _draw_panel(axes[0], "STP (GPUs' worth)", {None: [point.stp for point in points]}, [look])
        _draw_panel(axes[1], "slowdown (ANTT)", {None: [point.antt for point in points]}, [look])
        for place, point in enumerate(points):
            if point.outcome != OK or point.stp is None:  # where there is no figure, say why
                text = point.outcome if point.outcome != OK else "no baseline"
                axes[0].annotate(text, (place, 0.05), xycoords=("data", "axes fraction"), **_NOTE)
        if labels:
            tails = {label: [point.tail(label) for point in points] for label in labels}
            lines = {label: [tail and tail.times_alone for tail in found]
                     for label, found in tails.items()}  # fmt: skip
            _draw_panel(axes[2], "p99, times alone", lines, _TAIL_LOOKS)
            for found in tails.values():
                for place, tail in enumerate(found):
                    if tail and tail.is_unbounded:
                        axes[2].annotate("∞: failed", (place, 0.95), va="top",
                                         xycoords=("data", "axes fraction"), **_NOTE)  # fmt: skip
            figure.legend(*axes[2].get_legend_handles_labels(), loc="outside upper left", ncols=2,
                          frameon=False)  # fmt: skip
        axes[-1].set_xticks(range(len(points)), [point.value for point in points])
        axes[-1].set_xlim(-0.4, len(points) - 0.6)
        axes[-1].set_xlabel(sweep.knob)
        note = charts.spread_note([point.stp for point in known])
        figure.supxlabel(f"grey: as one after another, as alone; {note}", fontsize=8)
        description = (
            f"STP, mean slowdown and p99 latency against {sweep.knob}; grey lines: 1, as alone."
        )
        return charts.save(figure, path, headline(sweep), description)


def _draw_panel(
    panel: Axes,
    title: str,
    lines: dict[str | None, list[Estimate | None]],
    looks: Sequence[tuple[str, str, str]],
) -> None:
    """Draw lines of a point a value, with a gap where a value has no figure."""
    highest = 1.0
    for number, (label, found) in enumerate(lines.items()):
        marker, line, color = looks[number % len(looks)]
        triples = [(e.mean, e.mean - e.low, e.high - e.mean) if e else (math.nan,) * 3
                   for e in found]  # fmt: skip
        means, below, above = zip(*triples, strict=True)
        panel.errorbar(
            range(len(found)), means, yerr=[below, above], marker=marker, linestyle=line,
            color=color, markeredgecolor="black", capsize=3, label=label,
        )  # fmt: skip
        highest = max([highest, *(estimate.high for estimate in found if estimate)])
    panel.axhline(1, color="0.5", linewidth=1)
    panel.set_ylim(0, 1.1 * highest)
    panel.set_ylabel(title)
    panel.grid(color="0.85")
