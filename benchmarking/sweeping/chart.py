"""STP, mean slowdown and p99 against the knob's values, one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarking.analysis import charts
from benchmarking.analysis.document import Picture
from benchmarking.metrics.estimates import Estimate
from benchmarking.sweeping.points import OK, Point, Tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Looks for the latency jobs: they differ by marker and line as well as by shade.
_TAIL_LOOKS = (("o", "-", "0.1"), ("s", "--", "0.45"), ("^", ":", "0.3"), ("D", "-.", "0.6"))


def draw(points: Sequence[Point], knob: str, message: str, path: Path) -> Picture | None:
    """The chart of a sweep; `None` where no value has an STP."""
    known = [point for point in points if point.stp is not None]
    if not known:
        return None
    labels = list(dict.fromkeys(t.label for p in known for t in p.tails if t.slowdown is not None))
    panels = 3 if labels else 2
    with charts.drawing_rules():
        figure, axes = charts.new_figure(0.9 + 1.45 * panels, panels, sharex=True)
        look = charts.style(known[0].mode or "")
        for panel, name, label in (
            (axes[0], "stp", "STP (GPUs' worth)"),
            (axes[1], "antt", "slowdown (ANTT)"),
        ):
            found = [getattr(point, name) for point in points]
            _line(panel, found, look["marker"], look["linestyle"], look["color"], None)
            panel.axhline(1, color="0.5", linewidth=1)
            _scale(panel, label, [estimate.high for estimate in found if estimate])
        if labels:
            _draw_tails(axes[2], points, labels)
            handles, names = axes[2].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False)
        _mark_failures(axes[0], points)
        axes[-1].set_xticks(range(len(points)), [point.value for point in points])
        axes[-1].set_xlim(-0.4, len(points) - 0.6)
        note = charts.spread_note([point.stp for point in known])
        axes[-1].set_xlabel(knob)
        figure.supxlabel(f"grey: as one after another, as alone; {note}", fontsize=8)
        return charts.save(
            figure, path, message,
            f"STP, mean slowdown and p99 latency against {knob}; grey lines: 1, as alone.",
        )  # fmt: skip


def _line(
    panel: Axes,
    found: Sequence[Estimate | None],
    marker: str,
    line: str,
    color: str,
    label: str | None,
) -> None:
    """A point a value; the line has a gap where a value has no figure."""
    triples = [(e.mean, e.mean - e.low, e.high - e.mean) if e else (math.nan,) * 3 for e in found]
    means, below, above = zip(*triples, strict=True)
    panel.errorbar(
        range(len(found)), means, yerr=[below, above],
        marker=marker, linestyle=line, color=color, markeredgecolor="black", capsize=3,
        label=label,
    )  # fmt: skip


def _draw_tails(panel: Axes, points: Sequence[Point], labels: Sequence[str]) -> None:
    """p99 over p99 alone, so that jobs of milliseconds and of seconds fit one panel."""
    highest = [1.0]
    for number, label in enumerate(labels):
        found = [_times_alone(point, label) for point in points]
        marker, line, color = _TAIL_LOOKS[number % len(_TAIL_LOOKS)]
        _line(panel, found, marker, line, color, label)
        highest += [estimate.high for estimate in found if estimate]
        for place, point in enumerate(points):
            if _is_unbounded(point.tail(label)):
                panel.annotate(
                    "∞: missed", (place, 0.95), xycoords=("data", "axes fraction"), ha="center",
                    va="top", style="italic", fontsize=8,
                )  # fmt: skip
    panel.axhline(1, color="0.5", linewidth=1)
    _scale(panel, "p99, times alone", highest)


def _times_alone(point: Point, label: str) -> Estimate | None:
    """The repeats' p99 over p99 alone; `None`, a gap, where too many requests were missed."""
    tail = point.tail(label)
    if tail is None or tail.slowdown is None or _is_unbounded(tail):
        return None
    scale = tail.slowdown / tail.merged_ms
    found = tail.p99_ms
    mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
    return Estimate(mean, low, high, found.values, found.is_interval)


def _is_unbounded(tail: Tail | None) -> bool:
    """Whether so many requests were missed that their p99 is infinite."""
    return tail is not None and math.inf in (tail.merged_ms, tail.p99_ms.mean)


def _scale(panel: Axes, label: str, highs: Sequence[float]) -> None:
    panel.set_ylim(0, 1.1 * max([1.0, *highs]))
    panel.set_ylabel(label)
    panel.grid(color="0.85")


def _mark_failures(panel: Axes, points: Sequence[Point]) -> None:
    """Where a value has no figure, the chart says why."""
    for place, point in enumerate(points):
        if point.outcome != OK or point.stp is None:
            text = point.outcome if point.outcome != OK else "no baseline"
            panel.annotate(
                text, (place, 0.05), xycoords=("data", "axes fraction"), ha="center",
                style="italic", fontsize=8,
            )  # fmt: skip
