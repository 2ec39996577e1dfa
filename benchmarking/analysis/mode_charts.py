"""Charts of the modes beside each other at one mix and count: throughput, slowdown, p99 latency."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarking.analysis import charts, decision
from benchmarking.analysis.clients import ClientRow, copies_by_label, worst_copy
from benchmarking.analysis.document import Picture
from benchmarking.analysis.groups import Group
from benchmarking.analysis.noise import SameTwice
from benchmarking.analysis.runs import CPU_DEMO
from benchmarking.metrics.estimates import Estimate
from benchmarking.metrics.number_text import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABEL_CHARACTERS = 18
_BAR_INCHES = 0.3


@dataclass(frozen=True)
class _Bar:
    """One bar: what it belongs to, its mode, its figure, and how that is written."""

    category: str
    mode: str
    mode_name: str
    found: Estimate
    text: str


def throughput(
    groups: Sequence[Group], same_twice: Sequence[SameTwice], path: Path
) -> Picture | None:
    """STP of the modes; `None` when no mode has one."""
    known = [group for group in groups if group.stp is not None]
    if not known:
        return None
    bars = [
        _Bar(group.mode_name, group.mode, group.mode_name, group.stp, f"{group.stp.mean:.2f}")
        for group in known
    ]
    listed = ", ".join(f"{group.mode_name} {group.stp.mean:.2f}" for group in known)
    return _draw(
        bars, path, "STP (GPUs' worth of work; higher is better)", "one job after another",
        f"{_throughput_message(known, same_twice)} ({known[0].subject})",
        f"Bars of STP for {known[0].subject}: {listed}.",
    )  # fmt: skip


def _throughput_message(known: Sequence[Group], same_twice: Sequence[SameTwice]) -> str:
    ordered = decision.by_throughput(known) or list(known)
    best = ordered[0]
    if best.mode == CPU_DEMO:
        return f"CPU demonstration, no GPU mode in force: STP {best.stp.mean:.2f}"
    if len(ordered) == 1:
        once = " (n = 1)" if best.stp.repeats == 1 else ""
        return f"{best.mode_name} delivers STP {best.stp.mean:.2f}{once}"
    return decision.throughput_headline(ordered, same_twice)


def slowdown(groups: Sequence[Group], path: Path) -> Picture | None:
    """Each job's slowdown under each mode; `None` without a slowdown."""
    bars = [
        _Bar(label, group.mode, group.mode_name, found, f"{found.mean:.1f}")
        for group in groups
        for label, found in _by_job(group)
    ]
    if not bars:
        return None
    worst = max(bars, key=lambda bar: bar.found.mean)
    return _draw(
        bars, path, "slowdown (times slower than alone; lower is better)", "alone",
        f"Slowdowns reach {worst.found.mean:.1f} times: {worst.category} under "
        f"{worst.mode_name} ({groups[0].subject})",
        f"Bars of each job's slowdown by mode, {groups[0].subject}.",
    )  # fmt: skip


def _by_job(group: Group) -> list[tuple[str, Estimate]]:
    """Each job's slowdown; of copies of one job the one that was slowed most."""
    return [
        (name, row.slowdown)
        for name, row in _worst(group, lambda row: row.slowdown and row.slowdown.mean)
    ]


def _worst(
    group: Group, figure: Callable[[ClientRow], float | None]
) -> list[tuple[str, ClientRow]]:
    """The worst copy of each job that has the figure, with its name in a chart."""
    found = []
    for label, copies in copies_by_label(group.client_rows).items():
        row = worst_copy(copies, figure)
        if row is not None:
            of = f", the worst of {len(copies)}" if len(copies) > 1 else ""
            found.append((f"{label}{of}", row))
    return found


def tail(groups: Sequence[Group], path: Path) -> Picture | None:
    """p99 of each latency job over its p99 alone; `None` where no job has both.

    A p99 among the requests that were missed is infinite: it has no bar, and the message is its.
    """
    found = [
        (name, group, row, row.tail_slowdown[99])
        for group in groups
        for name, row in _worst(group, lambda row: row.tail_slowdown[99])
    ]
    bars = [
        _Bar(
            name, group.mode, group.mode_name, Estimate(times, times, times, (times,)),
            f"{times:.1f} ({duration(row.latency['p99'])})",
        )
        for name, group, row, times in found
        if math.isfinite(times)
    ]  # fmt: skip
    if not bars:
        return None
    name, group, row, times = max(found, key=lambda one: one[-1])
    message = (
        f"p99 latency grows up to {times:.1f} times: {name} under {group.mode_name}"
        if math.isfinite(times)
        else f"{name} under {group.mode_name} has no p99: {row.missed_percent:.1f} % of its "
        "requests were missed"
    )
    return _draw(
        bars, path, "p99 latency (times that alone; lower is better)", "alone",
        f"{message} ({groups[0].subject})",
        f"Bars of p99 latency over p99 latency alone by job and mode, {groups[0].subject}; raw "
        "latencies of all repeats together.",
        note="over the raw latencies of all repeats",
    )  # fmt: skip


def _draw(
    bars: Sequence[_Bar], path: Path, label: str, reference: str, message: str, description: str,
    note: str | None = None,
) -> Picture:  # fmt: skip
    """Horizontal bars by category, a style a mode, with a dashed line at 1, the `reference`."""
    categories = list(dict.fromkeys(bar.category for bar in bars))
    modes = list(dict.fromkeys((bar.mode, bar.mode_name) for bar in bars))
    looks = charts.styles(modes)
    is_split = len(categories) > 1 or categories[0] != modes[0][1]
    places: list[float] = []
    by_category: dict[str, list[float]] = {}
    for bar in sorted(bars, key=lambda bar: categories.index(bar.category)):
        gap = 0.0 if by_category.get(bar.category) else 0.5
        places.append((places[-1] + 1 if places else 0) + (gap if is_split and places else 0))
        by_category.setdefault(bar.category, []).append(places[-1])
    highest = max(1.0, *(bar.found.high for bar in bars))
    with charts.drawing_rules():
        figure, (panel,) = charts.new_figure(1.15 + _BAR_INCHES * (places[-1] + 1))
        ordered = sorted(bars, key=lambda bar: categories.index(bar.category))
        for place, bar in zip(places, ordered, strict=True):
            look = looks[bar.mode_name]
            panel.barh(
                place, bar.found.mean, 0.86, xerr=charts.error_bar(bar.found),
                color=look["color"], hatch=look["hatch"], edgecolor="black", linewidth=0.8,
                capsize=3,
            )  # fmt: skip
            # In a column of their own: beside its bar, a value near 1 would lie on the dashed line.
            panel.annotate(
                bar.text, (1, place), xycoords=("axes fraction", "data"), ha="right",
                va="center", fontweight="bold",
            )  # fmt: skip
        panel.axvline(1, color="black", linestyle="--", linewidth=1)
        panel.set_yticks(
            [sum(by_category[name]) / len(by_category[name]) for name in categories],
            [textwrap.fill(name, _LABEL_CHARACTERS) for name in categories],
        )
        panel.invert_yaxis()
        panel.set_xlim(0, highest * (1.1 + 0.022 * max(len(bar.text) for bar in bars)))
        panel.set_xlabel(label)
        panel.grid(axis="x", color="0.85")
        if set(categories) != {name for _, name in modes}:
            _legend(figure, modes)
        note = note or charts.spread_note([bar.found for bar in bars])
        figure.supxlabel(f"dashed: {reference}; {note}", fontsize=8)
        return charts.save(figure, path, message, description)


def _legend(figure: Figure, modes: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor="black", label=name)
        for name, look in charts.styles(modes).items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
