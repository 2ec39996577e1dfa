"""STP and mean slowdown against the count of clients, every mode of one mix on one sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarking.analysis import charts
from benchmarking.analysis.document import Picture
from benchmarking.analysis.ramps import Ramp
from benchmarking.analysis.runs import clients_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scaling(ramps: Sequence[Ramp], path: Path) -> Picture | None:
    """The chart of one mix's ramps; `None` when no ramp has a count with an STP."""
    known = [ramp for ramp in ramps if any(group.stp for group in ramp.groups)]
    if not known:
        return None
    with charts.drawing_rules():
        figure, (upper, lower) = charts.new_figure(5.6, panels=2, sharex=True)
        looks = charts.styles((ramp.mode, ramp.mode_name) for ramp in known)
        for ramp in known:
            _draw_lines(upper, ramp, "stp", looks[ramp.mode_name])
            _draw_lines(lower, ramp, "antt", looks[ramp.mode_name])
        _mark_breaking_points(upper, known)
        counts = sorted({group.clients for ramp in known for group in ramp.groups})
        upper.axhline(1, color="0.5", linewidth=1, label="one job after another")
        lower.plot(counts, counts, color="0.5", linewidth=1)
        for panel, name, label, reference in (
            (upper, "stp", "STP (GPUs' worth of work)", 1),
            (lower, "antt", "mean slowdown (times alone)", counts[-1]),
        ):
            found = [getattr(group, name) for ramp in known for group in ramp.groups]
            highest = max([reference, *(one.high for one in found if one is not None)])
            panel.set_ylim(0, 1.08 * highest)
            panel.set_xticks(counts)
            panel.set_ylabel(label)
            panel.grid(color="0.85")
        estimates = [group.stp for ramp in known for group in ramp.groups if group.stp]
        lower.set_xlabel(f"clients at the same time ({charts.spread_note(estimates)})")
        handles, labels = upper.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
        return charts.save(
            figure, path, f"{_message(known)} (copies of the {known[0].mix} mix)",
            f"Lines of STP and mean slowdown against the count of clients ({known[0].mix}).",
        )  # fmt: skip


def _draw_lines(panel: Axes, ramp: Ramp, name: str, look: Mapping[str, str]) -> None:
    groups = [group for group in ramp.groups if getattr(group, name) is not None]
    found = [getattr(group, name) for group in groups]
    panel.errorbar(
        [group.clients for group in groups],
        [estimate.mean for estimate in found],
        yerr=[
            [estimate.mean - estimate.low for estimate in found],
            [estimate.high - estimate.mean for estimate in found],
        ],
        color=look["color"], marker=look["marker"], linestyle=look["linestyle"],
        markeredgecolor="black", capsize=3, label=ramp.mode_name,
    )  # fmt: skip


def _mark_breaking_points(panel: Axes, ramps: Sequence[Ramp]) -> None:
    """A line at each count that broke; the reasons over the panel, a row each, ending there."""
    broken = [ramp for ramp in ramps if ramp.breaking_point["clients"] is not None]
    for row, ramp in enumerate(broken):
        clients = ramp.breaking_point["clients"]
        panel.axvline(clients, color="0.3", linestyle=":", linewidth=1.5)
        panel.annotate(
            f"{ramp.mode_name} breaks at {clients}: {ramp.breaking_point['criterion']}",
            (clients, 1), xycoords=("data", "axes fraction"), xytext=(3, 3 + 11 * row),
            textcoords="offset points", ha="right", va="bottom", fontsize=8,
        )  # fmt: skip


def _message(ramps: Sequence[Ramp]) -> str:
    """The highest STP of all; where a mode breaks stands in the chart."""
    best = max(
        (group for ramp in ramps for group in ramp.groups if group.stp),
        key=lambda group: group.stp.mean,
    )
    return (
        f"STP is the highest with {clients_text(best.clients)} under {best.mode_name}: "
        f"{best.stp.mean:.2f}, n = {best.stp.repeats}"
    )
