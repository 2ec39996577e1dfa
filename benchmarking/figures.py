"""The report's charts as PNG: one message a chart, said in its title; readable in grey.

Modes differ by hatch, marker and line style as well as by color. matplotlib is imported by the
functions that draw, with the Agg backend: no display is needed and `--help` stays fast.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking import comparison, decision
from benchmarking.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_TITLE_CHARACTERS_PER_INCH = 9.5
_LABEL_WIDTH = 0.032  # of a timeline: what `n=10` takes, with some air

# Luminance differs too, so that the order of the shades survives a grey print.
_STYLES: Mapping[str, Mapping[str, str]] = {
    "time-slicing": {"color": "#23527c", "hatch": "", "marker": "o", "linestyle": "-"},
    "mps": {"color": "#e08e45", "hatch": "//", "marker": "s", "linestyle": "--"},
    "mig": {"color": "#a9cf8d", "hatch": "xx", "marker": "^", "linestyle": ":"},
    "exclusive": {"color": "#dddddd", "hatch": "--", "marker": "v", "linestyle": "-."},
    "cpu-demo": {"color": "#8c8c8c", "hatch": "..", "marker": "D", "linestyle": "-."},
}
_OTHER_STYLE = {"color": "#b07aa1", "hatch": "\\\\", "marker": "P", "linestyle": "-."}

# What a timeline shows, best first: how much of the GPU worked says more than that some of it did.
_ACTIVITY_SOURCES = (
    ("sm_activity_percent", "SM activity (NVML GPM)"),
    ("utilization_gpu_percent", "GPU utilization"),
    ("host_cpu_percent", "Host CPU"),
)


@dataclass(frozen=True)
class Chart:
    """A chart that was drawn: its file, its message, what it shows for who cannot see it."""

    path: Path
    message: str
    description: str


def _style(mode: str) -> Mapping[str, str]:
    return _STYLES.get(mode, _OTHER_STYLE)


def _new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `panels` side by side, in inches, on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path, message: str, subject: str, description: str) -> Chart:
    """Put the message over the chart, what it is about under that, and write the PNG."""
    width = int(figure.get_figwidth() * _TITLE_CHARACTERS_PER_INCH)
    title = f"{textwrap.fill(message, width)}\n{textwrap.fill(subject, width)}"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.savefig(path)
    return Chart(path, f"{message} ({subject})", description)


def _error_bar(found: Estimate) -> list[list[float]] | None:
    """Distances below and above the mean, as matplotlib wants them; `None` for a single repeat."""
    if found.repeats < 2:
        return None
    return [[found.mean - found.low], [found.high - found.mean]]


# --- mode comparison ------------------------------------------------------------------------


def mode_comparison(groups: Sequence[comparison.Group], path: Path) -> Chart | None:
    """STP and ANTT of the modes at one mix and count; `None` when no mode has an STP."""
    known = [group for group in groups if group.stp is not None and group.antt is not None]
    if not known:
        return None
    figure, (left, right) = _new_figure(10, 1.7 + 0.75 * len(known), panels=2)
    for panel, name, label in (
        (left, "stp", "STP (GPUs' worth of work; higher is better)"),
        (right, "antt", "ANTT (times slower than alone; lower is better)"),
    ):
        for row, group in enumerate(known):
            found = getattr(group, name)
            style = _style(group.mode)
            panel.barh(
                row, found.mean, 0.62, xerr=_error_bar(found), color=style["color"],
                hatch=style["hatch"], edgecolor="black", linewidth=0.8, capsize=4,
            )  # fmt: skip
            # In a column of their own: beside its bar, a value near 1 would lie on the dashed line.
            panel.annotate(
                f"{found.mean:.2f}", (1, row), xycoords=("axes fraction", "data"),
                ha="right", va="center", fontweight="bold",
            )  # fmt: skip
        panel.axvline(1, color="black", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(known)), [group.mode_name for group in known])
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.set_xlim(0, max(1.0, *(getattr(group, name).high for group in known)) * 1.2)
        panel.grid(axis="x", color="0.85")
    right.set_yticklabels([])
    figure.supxlabel(
        _spread_note([group.stp for group in known])
        + "; dashed line: one job after another (left), as fast as alone (right)",
        fontsize=8,
    )
    listed = ", ".join(f"{group.mode_name} {group.stp.mean:.2f}" for group in known)
    return _save(
        figure, path, _comparison_message(known), known[0].subject,
        f"Bars of STP and ANTT for {known[0].subject}. STP: {listed}.",
    )  # fmt: skip


def _spread_note(found: Sequence[Estimate]) -> str:
    """What the whiskers are."""
    repeats = sorted({estimate.repeats for estimate in found})
    counts = "/".join(str(count) for count in repeats)
    if repeats[-1] < 2:
        return "no whiskers: one co-run each"
    if repeats[0] >= 3:
        return f"whiskers: 95 % interval of n = {counts} repeats"
    return f"whiskers: range (n = 2) or 95 % interval (n >= 3); n = {counts}"


def _comparison_message(known: Sequence[comparison.Group]) -> str:
    ordered = sorted(known, key=lambda group: group.stp.mean, reverse=True)
    best, others = ordered[0], ordered[1:]
    if best.mode == comparison.CPU_DEMO:
        return f"CPU demonstration, no GPU mode in force: STP {best.stp.mean:.2f}"
    if not others:
        once = " (n = 1)" if best.stp.repeats == 1 else ""
        return f"{best.mode_name} delivers STP {best.stp.mean:.2f}{once}"
    return decision.throughput_headline(ordered)


# --- utilization timeline -------------------------------------------------------------------


def utilization_timeline(
    run: comparison.RunView, samples: Sequence[Mapping[str, Any]], path: Path
) -> Chart | None:
    """GPU activity (or the host CPU's, without a GPU) over a run, its windows marked.

    `samples` are the sampler's lines. `None` when no sample carries any activity.
    """
    source = _activity_source(samples)
    windows = [
        record
        for phase in ("baseline", "co_run")
        for record in run.co_runs(phase)
        if record.get("window_start_seconds") is not None
        and record.get("window_end_seconds") is not None
    ]
    if source is None:
        return None
    key, name = source
    points = [sample for sample in samples if sample.get(key) is not None]
    start = min(sample["time_seconds"] for sample in points)
    figure, (panel,) = _new_figure(10, 3.8)
    styles = itertools.cycle(("-", "--", ":", "-."))
    by_device: dict[str, list[Mapping[str, Any]]] = {}
    for sample in points:
        by_device.setdefault(str(sample.get("gpu_uuid")), []).append(sample)
    for (device, series), linestyle in zip(by_device.items(), styles, strict=False):
        panel.plot(
            [sample["time_seconds"] - start for sample in series],
            [sample[key] for sample in series],
            color="black", linewidth=0.9, linestyle=linestyle,
            label=device[:12] if len(by_device) > 1 else None,
        )  # fmt: skip
    _mark_windows(panel, windows, start)
    panel.set_ylim(0, 112)
    panel.set_yticks(range(0, 101, 20))
    panel.margins(x=0.01)
    panel.set_xlabel("time since the first sample (s)")
    panel.set_ylabel(f"{name} (%)")
    panel.grid(axis="y", color="0.85")
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=4)
    return _save(
        figure, path, _timeline_message(points, windows, key, name),
        f"{comparison.MODE_NAMES.get(run.mode, run.mode)}, {run.mix}",
        f"{name} in percent over the time of run {run.run_id}; shaded: measured windows.",
    )  # fmt: skip


def _activity_source(samples: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The best activity that the samples carry, and its name with where it comes from."""
    for key, name in _ACTIVITY_SOURCES:
        if any(sample.get(key) is not None for sample in samples):
            if key == "utilization_gpu_percent":
                origins = {sample.get("utilization_source") for sample in samples} - {None}
                name += f" ({', '.join(sorted(origins)) or 'source unknown'})"
            return key, name
    return None


def _mark_windows(panel: Axes, windows: Sequence[Mapping[str, Any]], start: float) -> None:
    """Shade alone and together differently, and write the count of clients over co-runs.

    Of windows too close for two labels of one row, only the first is labeled.
    """
    named: set[str] = set()
    left, right = panel.get_xlim()
    last_label = -math.inf
    for window in windows:
        alone = window["phase"] == "baseline"
        name = "one job alone" if alone else "n clients together"
        begin, end = window["window_start_seconds"] - start, window["window_end_seconds"] - start
        panel.axvspan(
            begin, end, facecolor="0.93" if alone else "#f4cfa6", hatch="..." if alone else None,
            edgecolor="0.75", linewidth=0.5, zorder=0, label=None if name in named else name,
        )  # fmt: skip
        named.add(name)
        center = (begin + end) / 2
        if not alone and center - last_label > _LABEL_WIDTH * (right - left):
            panel.annotate(f"n={window['clients']}", (center, 104), ha="center", fontsize=8)
            last_label = center


def _timeline_message(
    points: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
) -> str:
    together = [window for window in windows if window["phase"] == "co_run"]
    inside = [
        point[key]
        for point in points
        if any(
            window["window_start_seconds"] <= point["time_seconds"] <= window["window_end_seconds"]
            for window in together
        )
    ]
    if not inside:
        return f"{name} over the run; no co-run window was sampled"
    mean = sum(inside) / len(inside)
    return f"{name} averages {mean:.0f} % while the clients run together"


# --- slowdown per workload ------------------------------------------------------------------


def slowdown_per_workload(groups: Sequence[comparison.Group], path: Path) -> Chart | None:
    """Each client's slowdown under each mode at one mix and count; `None` without a slowdown."""
    known = [g for g in groups if any(row.slowdown is not None for row in g.client_rows)]
    if not known:
        return None
    labels = {row.client: row.label for group in known for row in group.client_rows}
    clients = sorted(labels)
    figure, (panel,) = _new_figure(max(7.0, 1.6 + 1.5 * len(clients)), 4.4)
    width = 0.8 / len(known)
    highest = 1.0
    for position, group in enumerate(known):
        style = _style(group.mode)
        for row in group.client_rows:
            if row.slowdown is None:
                continue
            x = clients.index(row.client) + (position - (len(known) - 1) / 2) * width
            panel.bar(
                x, row.slowdown.mean, width * 0.92, yerr=_error_bar(row.slowdown),
                color=style["color"], hatch=style["hatch"], edgecolor="black", linewidth=0.8,
                capsize=3, label=group.mode_name if row is group.client_rows[0] else None,
            )  # fmt: skip
            panel.annotate(
                f"{row.slowdown.mean:.1f}", (x, row.slowdown.high), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
            highest = max(highest, row.slowdown.high)
    panel.axhline(1, color="black", linestyle="--", linewidth=1)
    panel.annotate("alone", (1, 1), xycoords=("axes fraction", "data"), xytext=(3, 0),
                   textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    panel.set_ylim(0, highest * 1.15)
    panel.set_xticks(
        range(len(clients)),
        [textwrap.fill(f"{client}: {labels[client]}", 16) for client in clients],
    )
    panel.set_ylabel("slowdown (times slower than alone)")
    panel.grid(axis="y", color="0.85")
    panel.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=len(known), frameon=False)
    note = _spread_note([row.slowdown for g in known for row in g.client_rows if row.slowdown])
    figure.supxlabel(note, fontsize=8)
    worst_group, worst = max(
        ((group, row) for group in known for row in group.client_rows if row.slowdown),
        key=lambda pair: pair[1].slowdown.mean,
    )
    return _save(
        figure, path,
        f"Slowdowns reach {worst.slowdown.mean:.1f} times: {worst.label} under "
        f"{worst_group.mode_name}",
        worst_group.subject,
        f"Bars of each client's slowdown by mode, {worst_group.subject}; {note}",
    )  # fmt: skip


# --- stress scaling -------------------------------------------------------------------------


def stress_scaling(ramps: Sequence[comparison.Ramp], path: Path) -> Chart | None:
    """STP and slowdown against the count of clients, for the modes of one mix.

    `None` when no ramp has a count with an STP.
    """
    known = [ramp for ramp in ramps if any(group.stp for group in ramp.groups)]
    if not known:
        return None
    figure, (left, right) = _new_figure(10, 4.2, panels=2)
    for ramp in known:
        style = _style(ramp.mode)
        for panel, name in ((left, "stp"), (right, "antt")):
            groups = [group for group in ramp.groups if getattr(group, name) is not None]
            found = [getattr(group, name) for group in groups]
            panel.errorbar(
                [group.clients for group in groups],
                [estimate.mean for estimate in found],
                yerr=[
                    [estimate.mean - estimate.low for estimate in found],
                    [estimate.high - estimate.mean for estimate in found],
                ],
                color=style["color"], marker=style["marker"], linestyle=style["linestyle"],
                markeredgecolor="black", capsize=3,
                label=comparison.MODE_NAMES.get(ramp.mode, ramp.mode),
            )  # fmt: skip
    _mark_breaking_points(left, known)
    counts = sorted({group.clients for ramp in known for group in ramp.groups})
    left.axhline(1, color="0.5", linewidth=1, label="one job after another")
    right.plot(counts, counts, color="0.5", linewidth=1)
    for panel, name, label in (
        (left, "stp", "STP (GPUs' worth of work)"),
        (right, "antt", "ANTT (times slower than alone)"),
    ):
        panel.set_xticks(counts)
        panel.set_xlabel("clients at the same time")
        panel.set_ylabel(label)
        found = [getattr(group, name) for ramp in known for group in ramp.groups]
        reference = 1 if panel is left else counts[-1]
        highest = max(reference, *(estimate.high for estimate in found if estimate is not None))
        panel.set_ylim(0, 1.08 * highest)
        panel.grid(color="0.85")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=len(labels))
    estimates = [group.stp for ramp in known for group in ramp.groups if group.stp is not None]
    left.set_title(_spread_note(estimates), fontsize=8, loc="left")
    return _save(
        figure, path, _scaling_message(known), f"copies of the {known[0].mix} mix",
        f"Lines of STP and mean slowdown against the count of clients ({known[0].mix}).",
    )  # fmt: skip


def _mark_breaking_points(panel: Axes, ramps: Sequence[comparison.Ramp]) -> None:
    """A line at each count that broke, its reason at the foot, where no curve is."""
    broken: dict[int, list[str]] = {}
    for ramp in ramps:
        name = comparison.MODE_NAMES.get(ramp.mode, ramp.mode)
        if ramp.breaking_point["clients"] is not None:
            reasons = broken.setdefault(ramp.breaking_point["clients"], [])
            reasons.append(f"{name} breaks: {ramp.breaking_point['criterion']}")
    for clients, reasons in broken.items():
        panel.axvline(clients, color="0.3", linestyle=":", linewidth=1.5)
        panel.annotate(
            "\n".join(reasons), (clients, 0), rotation=90, xycoords=("data", "axes fraction"),
            xytext=(-4, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )  # fmt: skip


def _scaling_message(ramps: Sequence[comparison.Ramp]) -> str:
    parts = []
    for ramp in ramps:
        best = max((g for g in ramp.groups if g.stp), key=lambda group: group.stp.mean)
        broken = ramp.breaking_point["clients"]
        end = (
            f"breaks at {broken}"
            if broken is not None
            else f"holds to {ramp.breaking_point['highest_clients_tried']} clients"
        )
        name = comparison.MODE_NAMES.get(ramp.mode, ramp.mode)
        parts.append(
            f"{name} peaks at STP {best.stp.mean:.2f} with "
            f"{comparison.clients_text(best.clients)} and {end}"
        )
    message = "; ".join(parts)
    return f"{message[0].upper()}{message[1:]}"
