"""Who ran when in one co-run, and under it how much of the GPU worked."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.analysis import charts
from benchmarking.analysis.document import Picture
from benchmarking.analysis.runs import CoRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sample = Mapping[str, Any]

# What is drawn, best first: how much of the GPU worked says more than that some of it did.
_ACTIVITY_SOURCES = (
    ("sm_activity_percent", "SM activity (NVML GPM)"),
    ("utilization_gpu_percent", "GPU utilization"),
    ("host_cpu_percent", "Host CPU"),
)
_MARGIN_SECONDS = 2.0
_MOST_BARS = 60  # jobs that are shorter than a sixtieth of the window would make one grey block


def timeline(co_run: CoRun, samples: Sequence[Sample], path: Path) -> Picture | None:
    """Jobs by client over the samples' activity; `None` without a window.

    Of a co-run without any sample of activity only the jobs are drawn.
    """
    start, end = co_run.window
    if start is None or end is None or end <= start:
        return None
    near = [
        sample
        for sample in samples
        if start - _MARGIN_SECONDS <= sample["time_seconds"] <= end + _MARGIN_SECONDS
    ]
    source = activity_source(near)
    clients = co_run.clients
    with charts.drawing_rules():
        height = 0.9 + 0.34 * len(clients) + (1.5 if source else 0)
        ratios = [0.34 * len(clients) + 0.1, 1.5] if source else [1]
        figure, panels = charts.new_figure(
            height, panels=len(ratios), sharex=True, height_ratios=ratios
        )
        _draw_jobs(panels[0], clients, start, end)
        if source:
            _draw_activity(panels[1], near, source[0], start)
            panels[1].set_title(f"{source[1]} (%)", loc="left", fontsize=9)
        for panel in panels:
            panel.axvline(0, color="black", linewidth=0.8)
            panel.axvline(end - start, color="black", linewidth=0.8)
        panels[-1].set_xlabel("time since all clients were let go (s)")
        return charts.save(
            figure, path,
            f"{_message(near, source, start, end)} ({co_run.run.mode_name}, {co_run.name})",
            f"Jobs of each client over time in co-run {co_run.name} of run {co_run.run.run_id}"
            + (f", and {source[1]} in percent." if source else "."),
        )  # fmt: skip


def activity_source(samples: Sequence[Sample]) -> tuple[str, str] | None:
    """The best activity that the samples carry, and its name with where it comes from."""
    for key, name in _ACTIVITY_SOURCES:
        if any(sample.get(key) is not None for sample in samples):
            if key == "utilization_gpu_percent":
                origins = {sample.get("utilization_source") for sample in samples} - {None}
                name += f" ({', '.join(sorted(origins)) or 'source unknown'})"
            return key, name
    return None


def _draw_jobs(panel: Axes, clients: Sequence[Mapping[str, Any]], start: float, end: float) -> None:
    """A row a client: whole jobs in alternating shades, the one that the end cut in white."""
    for row, client in enumerate(clients):
        jobs = [job for job in client.get("jobs") or [] if job.get("in_window")]
        if len(jobs) > _MOST_BARS:
            _draw_bar(panel, row, jobs[0]["start_seconds"] - start,
                      jobs[-1]["end_seconds"] - start, "0.7")  # fmt: skip
        else:
            for index, job in enumerate(jobs):
                _draw_bar(panel, row, job["start_seconds"] - start, job["end_seconds"] - start,
                          "0.7" if index % 2 else "0.5")  # fmt: skip
        done = jobs[-1]["end_seconds"] if jobs else start
        if client["status"] == "ok" and done < end:  # a client starts over until it is told to stop
            _draw_bar(panel, row, done - start, end - start, "white")
        count = f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}"
        if client["status"] != "ok":
            count += f"\n{client['status']}"
        panel.annotate(
            count, (1, row), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", ha="left", va="center", fontsize=8,
        )  # fmt: skip
    labels = [f"{client['client']}: {client.get('label') or client['workload']}"
              for client in clients]  # fmt: skip
    panel.set_yticks(range(len(clients)), [textwrap.shorten(name, 24) for name in labels])
    panel.set_ylim(len(clients) - 0.5, -0.5)


def _draw_bar(panel: Axes, row: int, begin: float, end: float, color: str) -> None:
    panel.barh(
        row, end - begin, 0.62, left=begin, color=color, edgecolor="black", linewidth=0.5
    )  # fmt: skip


def _draw_activity(panel: Axes, samples: Sequence[Sample], key: str, start: float) -> None:
    """A line a device: a MIG instance's samples are apart from its neighbor's."""
    by_device: dict[str, list[Sample]] = {}
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


def _message(
    samples: Sequence[Sample], source: tuple[str, str] | None, start: float, end: float
) -> str:
    if source is None:
        return "Who ran when; nothing was sampled"
    key, name = source
    inside = [
        sample[key]
        for sample in samples
        if sample.get(key) is not None and start <= sample["time_seconds"] <= end
    ]
    if not inside:
        return f"Who ran when; {name} was not sampled in the window"
    return f"{name} averages {sum(inside) / len(inside):.0f} % while the clients run together"
