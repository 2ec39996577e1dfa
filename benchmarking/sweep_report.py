"""The report of a sweep: what each value gave, which one delivers the most work, the chart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking.metrics.number_text import duration
from benchmarking.modes.names import MODE_CPU_DEMO
from benchmarking.records import run_folder, writing
from benchmarking.report import claims, drawing, render
from benchmarking.report.comparison import compare
from benchmarking.report.export import finite
from benchmarking.report.foreign import cleaned
from benchmarking.report.runs import Results, read_run
from benchmarking.report.tables import Table
from benchmarking.report.wording import UNKNOWN, clients_text, mode_name, number, spread

Record = Mapping[str, Any]

SCHEMA_VERSION = 1
CHART_FILE = "sweep.png"
OK, INTERRUPTED, NOT_RUN = "ok", "interrupted", "not run"
NO_ROW = "none of its co-runs can be ranked (pairs of jobs are compared by analyze_results.py)"

# Looks of the latency jobs in the chart: they differ by marker and line as well as by shade.
TAIL_LOOKS = [
    {"marker": marker, "linestyle": line, "color": color}
    for marker, line, color in (
        ("o", "-", "0.1"), ("s", "--", "0.45"), ("^", ":", "0.3"), ("D", "-.", "0.6"),
    )
]  # fmt: skip


# --- what each value gave -------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One value of the knob: how its run ended, and its figures where it ended well.

    `tails` are the p99 response times of the latency jobs, of copies the worst one's: `label`,
    `p99_ms` (estimate, `None` where it is infinite), `merged_ms` (of all raw values together) and
    `slowdown` (the same over p99 alone). A job with too few responses has none.
    """

    value: str
    outcome: str
    run_id: str | None = None
    reason: str | None = None
    clients: int | None = None
    mode: str | None = None
    is_unverified: bool = False
    stp: Record | None = None
    antt: Record | None = None
    tails: Sequence[Record] = ()

    def tail(self, label: str) -> Record | None:
        """Return the p99 of the latency job called `label`."""
        return next((tail for tail in self.tails if tail["label"] == label), None)


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
        return Point(value, "failed", reason=cleaned(reason))
    run = read_run(folder)
    comparison, _ = compare(Results([run], [read_run(baseline)] if baseline else []))
    groups = [group for section in comparison["sections"] for group in section["groups"]]
    outcome = run.manifest.outcome
    if outcome != "complete":
        return Point(value, outcome, run.name, reason)
    if not groups:
        return Point(value, "failed", run.name, reason or NO_ROW)
    group = groups[-1]
    by_label: dict[str, list[Record]] = {}
    outcome = "invalid" if group["invalid"] else group["outcome"]
    for tail in map(tail_of, group["client_rows"] if outcome == OK else ()):
        if tail is not None:
            by_label.setdefault(tail["label"], []).append(tail)
    return Point(
        value=value,
        outcome=outcome,
        run_id=run.name,
        reason=group["reason"] or group["invalid"],
        clients=group["clients"],
        mode=group["mode"],
        is_unverified=group["is_unverified"],
        stp=group["stp"],
        antt=group["antt"],
        tails=[max(copies, key=lambda tail: tail["merged_ms"]) for copies in by_label.values()],
    )


def tail_of(row: Record) -> Record | None:
    """The p99 of one client; infinite where so many requests were missed."""
    none_answered = math.inf if row["missed"] else None
    merged_ms = row["latency"]["p99"] if row["latency"] else none_answered
    if merged_ms is None:
        return None
    slowdown = row["tail_slowdown"]["99"]
    return {"label": row["label"], "p99_ms": row["p99_ms"], "merged_ms": merged_ms,
            "slowdown": slowdown}  # fmt: skip


# --- the report -----------------------------------------------------------------------------------


def write(sweep: Sweep, folder: Path) -> None:
    """Draw the chart and write `report.html` and `report.md`; raises `OSError`."""
    picture = draw(sweep)
    if picture:
        writing.write_bytes_atomic(folder / picture.file_name, picture.png)
    values = {"found": content(sweep), "pictures": [picture] if picture else []}
    for name, kind in (("report.md", "md"), ("report.html", "html")):
        page = render.render_page(kind, "sweep.j2", f"Sweep of {sweep.knob}", values)
        writing.write_text_atomic(folder / name, page)


def terminal_text(sweep: Sweep, width: int) -> str:
    """The headline and the table of all values, no wider than `width` columns."""
    made = content(sweep)
    say = render.sentences()
    notice = [say.cpu_notice] if made["is_cpu_demo"] else []
    return render.on_terminal([*notice, say.sweep_headline(made), made["table"]], width)


def content(sweep: Sweep) -> dict[str, Any]:
    """What the sentences and the table of a sweep are filled with."""
    points = {point.value: point for point in sweep.points}
    known = {point.value: point.stp for point in sweep.points if point.stp is not None}
    ranked = sorted(known, key=lambda value: known[value]["mean"], reverse=True)
    figure = claims.Figure({value: stp["values"] for value, stp in known.items()}, True)
    (pairs,) = claims.judge([figure])
    verdict: str | None = None
    tied: Sequence[str] = ()
    if len(ranked) > 1:
        verdict, tied = claims.verdict_of(ranked[0], ranked[1:], pairs)
    measured = [point for point in sweep.points if point.clients is not None]
    with_figures = [points[value] for value in known]
    return {
        "sweep": sweep,
        "best": points[ranked[0]] if ranked else None,
        "lowest": points[ranked[-1]] if len(ranked) > 1 else None,
        "verdict": verdict,
        "tied": tied,
        "rounds": min((len(stp["values"]) for stp in known.values()), default=0),
        "tails": {label: ordered_tails(label, with_figures) for label in labels_of(with_figures)},
        "measured": measured,
        "modes": list(dict.fromkeys(mode_name(point.mode or "") for point in measured)),
        "is_unverified": any(point.is_unverified for point in measured),
        "is_cpu_demo": any(point.mode == MODE_CPU_DEMO for point in measured),
        "failed": [
            f"{point.value}: {point.outcome}" + (f" ({point.reason})" if point.reason else "")
            for point in sweep.points
            if point.outcome != OK
        ],
        "table": table(sweep),
    }


def labels_of(points: Sequence[Point]) -> list[str]:
    """The latency jobs that some value has a p99 of."""
    return list(dict.fromkeys(tail["label"] for point in points for tail in point.tails))


def ordered_tails(label: str, points: Sequence[Point]) -> list[tuple[str, float]]:
    """The values with the job's p99 in ms, the lowest first."""
    found = [(point.value, point.tail(label)) for point in points]
    known = [(value, tail["merged_ms"]) for value, tail in found if tail]
    return sorted(known, key=lambda one: one[1])


def table(sweep: Sweep) -> Table:
    """A row a value."""
    labels = labels_of(sweep.points)
    rows = [
        [
            point.value,
            spread(point.stp),
            spread(point.antt),
            *(tail_text(point.tail(label)) for label in labels),
            point.outcome,
            UNKNOWN if point.clients is None else clients_text(point.clients),
            point.run_id or UNKNOWN,
        ]
        for point in sweep.points
    ]
    tails = [f"p99 of {label} (times alone)" for label in labels]
    header = [sweep.knob, "work delivered", "slowdown (ANTT)", *tails, "outcome", "clients", "run"]
    return Table(header, rows)


def tail_text(tail: Record | None) -> str:
    """A p99 with what it is over the one alone."""
    if tail is None:
        return UNKNOWN
    times = "" if tail["slowdown"] is None else f" ({number(tail['slowdown'])})"
    return f"{duration(tail['merged_ms'])}{times}"


def draw(sweep: Sweep) -> drawing.Picture | None:
    """Work delivered, mean slowdown and p99 below each other; `None` without a figure."""
    points = sweep.points
    places = range(len(points))
    mode = next((point.mode for point in points if point.mode), "")
    look = drawing.styles([(mode, "mode")])["mode"]
    panels = {
        "work delivered": [drawing.Line("", places, [point.stp for point in points], look)],
        "slowdown (ANTT)": [drawing.Line("", places, [point.antt for point in points], look)],
        "p99, times alone": [
            drawing.Line(
                label,
                places,
                [times_alone(point.tail(label)) for point in points],
                TAIL_LOOKS[number % len(TAIL_LOOKS)],
            )
            for number, label in enumerate(labels_of(points))
        ],
    }
    notes = [
        (place, point.outcome if point.outcome != OK else "no baseline")
        for place, point in enumerate(points)
        if point.stp is None
    ]
    return drawing.draw_lines(
        {title: lines for title, lines in panels.items() if lines}, places,
        [point.value for point in points], sweep.knob, CHART_FILE,
        f"What each value of {sweep.knob} gave", notes=notes,
    )  # fmt: skip


def times_alone(tail: Record | None) -> Record | None:
    """The p99 over the one alone with its spread; `None` where that is infinite or not known."""
    if tail is None or tail["p99_ms"] is None or tail["slowdown"] is None:
        return None
    scale = tail["slowdown"] / tail["merged_ms"]
    parts = {part: scale * tail["p99_ms"][part] for part in ("mean", "low", "high")}
    return {**tail["p99_ms"], **parts}
