"""Every figure of the reports.

Bars and the rows of the first table come from the same entries of the comparison, so they agree.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL
from benchmarking.records.types import ClientRecord
from benchmarking.report.drawing import (
    Line,
    Picture,
    draw_legend,
    draw_lines,
    drawing_rules,
    error_bar,
    known,
    new_figure,
    save,
    spread_note,
    styles,
    wrapped,
)
from benchmarking.report.groups import CoRun
from benchmarking.report.tables import each
from benchmarking.report.wording import (
    clients_text,
    figure_text,
    group_name,
    number,
    subject_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Charts = Mapping[str, Sequence[Picture]]

# --- which charts a section gets ------------------------------------------------------------------

# Past that many, rounds of a count look alike and make the report long: the first stands for them;
# of a long ramp the first counts alone are drawn.
MOST_TIMELINES, MOST_COUNTS = 6, 20


def draw(
    comparison: Record, co_runs: Mapping[str, CoRun], samples_of: Callable[[Path], Sequence[Record]]
) -> list[Charts]:
    """Draw the charts of every section: `compared`, `pairs`, `timelines`.

    `co_runs` are the comparison's, by name; `samples_of(folder)` gives the GPU samples of a run.
    """
    sections = comparison["sections"]
    return [
        draw_section(section, co_runs, samples_of, f"section{place}-" if len(sections) > 1 else "")
        for place, section in enumerate(sections, start=1)
    ]


def draw_section(
    section: Record, co_runs: Mapping[str, CoRun],
    samples_of: Callable[[Path], Sequence[Record]], prefix: str,
) -> Charts:  # fmt: skip
    """Draw a section's charts; files' names begin with `prefix`."""
    taken: set[str] = set()

    def file_name(name: str) -> str:
        safe = re.sub(r"[^\w.-]+", "-", f"{prefix}{name}")[:200].encode()[:200]
        base = safe.decode(errors="ignore").strip("-")
        # Names that differ in signs alone, or in their ends, get a number.
        numbered = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        stem = next(name for name in numbered if name not in taken)
        taken.add(stem)
        return f"{stem}.png"

    matrices = section["interference"]
    drawn: dict[str, list[Picture | None]] = {"compared": [], "pairs": [], "timelines": []}
    for mix, count in dict.fromkeys((one["mix"], one["clients"]) for one in section["conclusions"]):
        found = [one for one in section["conclusions"]
                 if (one["mix"], one["clients"]) == (mix, count)]  # fmt: skip
        drawn["compared"] += [
            draw_bars(figure, found, file_name(f"{about.file}-{mix}-{count}"))
            for figure, about in BARS.items()
        ]
    for mix in dict.fromkeys(ramp["mix"] for ramp in section["ramps"]):
        drawn["compared"].append(draw_ramps(section, mix, file_name(f"scaling-{mix}")))
    for one in matrices:
        drawn["pairs"] += [
            draw_heat_map(one, matrices, figure, file_name(f"{kind}-{one['variant']}-{one['mix']}"))
            for figure, kind in (("slowdown", "slowdowns"), ("tail_slowdown", "tails"))
        ]
    for one in (co_runs[name] for name in shown_timelines(section)):
        name = file_name(f"timeline-{one.run.name}-{one.record.co_run}")
        drawn["timelines"].append(draw_timeline(one, samples_of(one.run.folder), name))
    return {kind: [one for one in pictures if one] for kind, pictures in drawn.items()}


def shown_timelines(section: Record) -> list[str]:
    """The names of the co-runs to draw: all, or one of each group."""
    every = [group["co_runs"] for group in section["groups"]]
    is_all = sum(map(len, every)) <= MOST_TIMELINES
    return [name for co_runs in every[:MOST_COUNTS] for name in co_runs[: None if is_all else 1]]


# --- bars: modes next to each other ---------------------------------------------------------------


class BarChart(NamedTuple):
    """Of one figure: the file's name, what the bars show, the axis, what 1 is.

    Where 1 is nothing the axis is logarithmic.
    """

    file: str
    caption: str
    axis: str
    reference: str


BARS = {
    "work": BarChart(
        "throughput", "Work delivered", "seconds of alone-work a second (higher is better)",
        "one job after another",
    ),
    "slowdown": BarChart(
        "slowdown", "How much slower each job ran", "times as long as alone (lower is better)",
        "alone",
    ),
    "tail_ms": BarChart(
        "tail", "Response times", "response time, logarithmic (lower is better)", ""
    ),
}  # fmt: skip


def draw_bars(figure: str, conclusions: Sequence[Record], file_name: str) -> Picture | None:
    """Horizontal bars by category, a style a mode, with a dashed line at 1.

    A category is a subject; of the whole card the modes themselves are the categories. An infinite
    figure has no bar, but its text. `None` without any finite one.
    """
    about = BARS[figure]
    bars = []
    for mode in each([one for one in conclusions if one["figure"] == figure], "modes"):
        if mode["estimate"]:
            tail = f", p{mode['of']['percent']:g}" if figure == "tail_ms" else ""
            name = group_name(mode)
            category = name if figure == "work" else subject_text(mode["of"]) + tail
            bars.append((category, name, figure_text(mode["of"], mode["estimate"]), mode))
    found = [mode["estimate"] for *_, mode in bars]
    highest = max((known(one, "high") for one in found), default=0.0)
    if not highest:
        return None
    looks = styles((mode["mode"], name) for _, name, _, mode in bars)
    is_split = list(dict.fromkeys(category for category, *_ in bars)) != list(looks)
    places: dict[str, list[float]] = {}
    place = 0.0
    with drawing_rules():
        labels = {category: wrapped(category) for category, *_ in bars}
        # Where a category has few bars, a label of three lines is what needs the room.
        lines = max(label.count("\n") + 1 for label in labels.values())
        needed = max(0.27 * len(bars), 0.135 * lines * len(labels))
        chart, (panel,) = new_figure([needed + 0.12 * len(labels) * is_split], 0.9)
        for category, name, text, mode in bars:
            place += 0.45 if is_split and places and category not in places else 0.0
            places.setdefault(category, []).append(place)
            look = looks[name]
            panel.barh(
                place, known(mode["estimate"], "mean"), 0.86, xerr=error_bar(mode["estimate"]),
                color=look["color"], hatch=look["hatch"], edgecolor="black", linewidth=0.8,
                capsize=3,
            )  # fmt: skip
            # In a column of their own: next to its bar a value near 1 would lie on the dashed line.
            panel.annotate(
                text, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center",
                fontweight="bold",
            )  # fmt: skip
            place += 1
        panel.set_yticks([sum(ones) / len(ones) for ones in places.values()], labels.values())
        panel.invert_yaxis()
        room = 1.1 + 0.03 * max(len(text) for _, _, text, _ in bars)
        note = spread_note(found)
        if about.reference:
            panel.axvline(1, color="black", linestyle="--", linewidth=1)
            panel.set_xlim(0, max(1.0, highest) * room)
            note = f"dashed: {about.reference}; {note}"
        else:
            lowest = min(filter(None, (known(one, "low") for one in found)), default=highest)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(
                lambda ms, _: f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:g} s"
            )
            panel.xaxis.set_minor_formatter(lambda *_: "")
            panel.set_xlim(lowest / 4, highest * (4 * highest / lowest) ** (room - 1))
        panel.set_xlabel(about.axis)
        panel.grid(axis="x", color="0.85")
        if is_split:
            draw_legend(chart, looks)
        chart.supxlabel(note, fontsize=8)
        shown = dict.fromkeys(f"{category}, {name} {text}" for category, name, text, _ in bars)
        description = f"Bars, {about.axis}: {'; '.join(shown)}."
        mix, count = conclusions[0]["mix"], clients_text(conclusions[0]["clients"])
        return save(chart, file_name, f"{about.caption}: {mix}, {count}", description, mix)


# --- lines: figures against the number of clients -------------------------------------------------


def draw_ramps(section: Record, mix: str, file_name: str) -> Picture | None:
    """Work delivered and mean slowdown against the number of clients; `None` without figures."""
    ramps = [(group_name(one), one) for one in section["ramps"] if one["mix"] == mix]
    groups = {(one["variant"], one["clients"]): one
              for one in section["groups"] if one["mix"] == mix}  # fmt: skip
    looks = styles((ramp["mode"], name) for name, ramp in ramps)

    def lines(figure: str) -> list[Line]:
        return [
            Line(
                name,
                ramp["clients"],
                [groups.get((ramp["variant"], count), {}).get(figure) for count in ramp["clients"]],
                looks[name],
            )
            for name, ramp in ramps
        ]

    counts = sorted({count for _, ramp in ramps for count in ramp["clients"]})
    broken = [(ramp["breaking_point"]["clients"], name) for name, ramp in ramps]
    return draw_lines(
        {"work delivered": lines("stp"), "times as long\nas alone (mean)": lines("antt")},
        counts, list(map(str, counts)), "clients at the same time", file_name,
        f"Work and slowdown by number of clients: copies of {mix}", mix=mix,
        marks=[(count, f"{name} breaks at {count}") for count, name in broken if count is not None],
    )  # fmt: skip


# --- pairs: who slows whom ------------------------------------------------------------------------

# From here on of the color scale white on a cell is as easy to read as black, or easier.
DARK = 0.7


def draw_heat_map(
    matrix: Record, every: Sequence[Record], figure: str, file_name: str
) -> Picture | None:
    """A row a job that suffers, a column a job next to it; darker is worse, 1 is white.

    `figure` is `slowdown` or `tail_slowdown`; `every` are the matrices that the reader sees next to
    this one, for one scale of shades. `None` where no cell has the figure.
    """

    def value(cell: Record) -> float | None:
        found = cell[figure]
        return found["mean"] if isinstance(found, Mapping) else found

    cells = {(cell["job"], cell["beside"]): cell for cell in matrix["cells"]}
    columns = list(dict.fromkeys(job for job, _ in cells))
    rows = [job for job in columns if any(value(cells[job, other]) for other in columns)]
    if not rows:
        return None
    finite = [value(cell) or 0.0 for one in every for cell in one["cells"]]
    highest = max([2.0, *(found for found in finite if math.isfinite(found))])
    what, label = {
        "slowdown": ("How much slower each job ran", "times as long as alone"),
        "tail_slowdown": ("Response times", "p99, times that alone"),
    }[figure]
    with drawing_rules():
        chart, (panel,) = new_figure([0.5 * len(rows)], 0.9)
        shades = [
            [min(value(cells[row, column]) or math.nan, highest) for column in columns]
            for row in rows
        ]
        # One hue whose lightness falls evenly: the order of the cells survives a grey print. As
        # shapes and not as a picture, which an SVG inside a page would have to embed.
        panel.pcolormesh(
            range(len(columns) + 1), range(len(rows) + 1), shades, cmap="Blues", vmin=1,
            vmax=highest, edgecolors="0.6", linewidth=0.8,
        )  # fmt: skip
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                found = value(cells[row, column])
                is_dark = found is not None and (found - 1) / (highest - 1) > DARK
                panel.annotate(
                    why_missing(cells[row, column], figure) if found is None else number(found),
                    (x + 0.5, y + 0.5), ha="center", va="center",
                    color="white" if is_dark else "black",
                    fontweight="normal" if found is None else "bold",
                    style="italic" if found is None else "normal",
                )  # fmt: skip
        panel.invert_yaxis()
        across = [wrapped(name, len(columns)) for name in columns]
        panel.set_xticks([place + 0.5 for place in range(len(across))], across)
        panel.set_yticks([place + 0.5 for place in range(len(rows))], map(wrapped, rows))
        panel.set_xlabel("next to")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8)
        chart.supxlabel(f"{label}; darker is worse", fontsize=8)
        name = group_name(matrix)
        return save(
            chart, file_name, f"{what} two at a time, {name}",
            f"Heat map, {label}, under {name}; rows suffer, columns stand next to them.",
        )  # fmt: skip


def why_missing(cell: Record, figure: str) -> str:
    """Why a cell has no figure, in a word or two."""
    if cell["outcome"] != "ok":
        return cell["outcome"]
    is_few = figure == "tail_slowdown" and cell["responses"] < FEWEST_FOR_A_TAIL
    return f"n = {cell['responses']}" if is_few else "unknown"


# --- timelines: who ran when ----------------------------------------------------------------------

# What is drawn, best first: how much of the GPU worked says more than that some of it did.
ACTIVITY_SOURCES = (
    ("sm_activity_percent", "SM activity (NVML GPM)"),
    ("utilization_gpu_percent", "GPU utilization"),
    ("host_cpu_percent", "Host CPU"),
)
MARGIN_SECONDS = 2.0
MOST_BARS = 60  # jobs that are shorter than a sixtieth of the window would make one grey block


def draw_timeline(co_run: CoRun, samples: Sequence[Record], file_name: str) -> Picture | None:
    """Jobs by client over the activity of the GPU; `None` without a window.

    Without a sample of activity only the jobs are drawn.
    """
    start, end = co_run.record.window_start_seconds, co_run.record.window_end_seconds
    if start is None or end is None or end <= start:
        return None
    near = [
        sample
        for sample in samples
        if start - MARGIN_SECONDS <= sample["time_seconds"] <= end + MARGIN_SECONDS
    ]
    source = activity_source(near)
    heights = [0.3 * len(co_run.clients) + 0.1, *([1.3] if source else [])]
    name, shown = f"{co_run.run.name}, {co_run.record.co_run}", ""
    with drawing_rules():
        figure, panels = new_figure(heights, 0.8)
        draw_jobs(panels[0], co_run.clients, start, end)
        if source:
            draw_activity(panels[1], near, source[0], start)
            panels[1].set_title(f"{source[1]} (%)", loc="left", fontsize=9)
            shown = f", and {source[1]} in percent"
        for panel in panels:
            panel.axvline(0, color="black", linewidth=0.8)
            panel.axvline(end - start, color="black", linewidth=0.8)
        panels[-1].set_xlabel("time since all clients were let go (s)")
        return save(
            figure, file_name, f"{group_name(co_run.run.kind)}: {name}",
            f"Jobs of each client over time in {name}{shown}.",
        )  # fmt: skip


def activity_source(samples: Sequence[Record]) -> tuple[str, str] | None:
    """The best activity that the samples carry, and its name with where it comes from."""
    for key, name in ACTIVITY_SOURCES:
        if any(sample.get(key) is not None for sample in samples):
            told = {sample.get("utilization_source") or "" for sample in samples}
            origins = ", ".join(sorted(filter(None, told)))
            is_nvml = key == "utilization_gpu_percent"
            return key, f"{name} ({origins})" if is_nvml and origins else name
    return None


def draw_jobs(panel: Axes, clients: Sequence[ClientRecord], start: float, end: float) -> None:
    """A row a client: whole jobs in alternating shades, the one that the end cut in white."""

    def draw_bar(row: int, begin: float, end: float, color: str) -> None:
        panel.barh(
            row, end - begin, 0.62, left=begin - start, color=color, edgecolor="black",
            linewidth=0.5,
        )  # fmt: skip

    for row, client in enumerate(clients):
        jobs = [(job.start_seconds, job.end_seconds) for job in client.jobs if job.in_window]
        if len(jobs) > MOST_BARS:
            draw_bar(row, jobs[0][0], jobs[-1][1], "0.7")
        else:
            for index, (begin, until) in enumerate(jobs):
                draw_bar(row, begin, until, "0.7" if index % 2 else "0.5")
        done = jobs[-1][1] if jobs else start
        is_ok = client.status == "ok"
        if is_ok and done < end:  # a client starts over until it is told to stop
            draw_bar(row, done, end, "white")
        count = f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}"
        count += "" if is_ok else f"\n{client.status}"
        panel.annotate(
            count, (1, row), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", ha="left", va="center", fontsize=8,
        )  # fmt: skip
    names = [textwrap.shorten(f"{client.client}: {client.label}", 22) for client in clients]
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)


def draw_activity(panel: Axes, samples: Sequence[Record], key: str, start: float) -> None:
    """A line a device: a MIG instance's samples are apart from its neighbor's."""
    by_device: dict[str, list[Record]] = {}
    for sample in samples:
        if sample.get(key) is not None:
            by_device.setdefault(str(sample.get("gpu_uuid")), []).append(sample)
    for index, series in enumerate(by_device.values()):
        panel.plot(
            [sample["time_seconds"] - start for sample in series],
            [sample[key] for sample in series],
            color="black", linewidth=0.9, linestyle=("-", "--", ":", "-.")[index % 4],
        )  # fmt: skip
    panel.set_ylim(0, 105)
    panel.set_yticks(range(0, 101, 25))
    panel.grid(axis="y", color="0.85")
