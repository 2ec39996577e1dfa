"""The charts of a load test as PNG: latency histogram, queries a second over time.

The message is in the title; shades differ in luminance and lines in style, so both can be read in
grey. matplotlib is imported when a chart is drawn, with the Agg backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
BINS = 60
TIMELINE_BINS = 60
BAR_COLOR = "#7fa6c9"
LINE_COLOR = "#1f3a57"
PERCENTILES = ((50, "-"), (99, "--"), (99.9, ":"))


def draw_latency_histogram(path: Path, latency_ms: np.ndarray) -> None:
    """Draw how the latencies of successful requests spread, both axes logarithmic.

    Args:
        path: The PNG to write.
        latency_ms: Raw latencies in milliseconds, at least one.
    """
    import numpy as np

    figure, axes = _new_figure()
    low, high = float(latency_ms.min()), float(latency_ms.max())
    edges = np.geomspace(low * 0.98, high * 1.02, BINS + 1)
    axes.hist(latency_ms, bins=edges, color=BAR_COLOR, edgecolor=LINE_COLOR, linewidth=0.4)
    values = np.percentile(latency_ms, [rank for rank, _ in PERCENTILES])
    for (rank, style), value in zip(PERCENTILES, values, strict=True):
        axes.axvline(
            value, color="black", linestyle=style, linewidth=1.4, label=f"p{rank:g}: {value:.3g} ms"
        )
    axes.set(xscale="log", yscale="log", xlabel="Latency (ms)", ylabel="Requests")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _plain_ticks(axes, (low, high))
    axes.legend(frameon=False)
    _title(
        axes,
        f"Half of {len(latency_ms):,} requests took {values[0]:.3g} ms or less, "
        f"99 % took {values[1]:.3g} ms or less",
    )
    _save(figure, path)


def draw_qps_timeline(
    path: Path,
    ended_seconds: np.ndarray,
    ok: np.ndarray,
    duration_seconds: float,
    offered_rate: float | None,
) -> None:
    """Draw the answers a second over the run, and the failures where there are any.

    Args:
        path: The PNG to write.
        ended_seconds: Seconds from the start to each request's end, at least one.
        ok: Whether each succeeded, same length.
        duration_seconds: How long requests were sent for.
        offered_rate: Intended requests a second of an open loop, else None.
    """
    import numpy as np

    figure, axes = _new_figure()
    length = max(duration_seconds, float(ended_seconds.max()))
    bins = max(1, min(TIMELINE_BINS, round(length / 0.5)))
    edges = np.linspace(0.0, length, bins + 1)
    width = length / bins
    succeeded = np.histogram(ended_seconds[ok], edges)[0] / width
    failed = np.histogram(ended_seconds[~ok], edges)[0] / width
    axes.stairs(succeeded, edges, color=LINE_COLOR, linewidth=1.6, label="answered")
    axes.stairs(succeeded, edges, color=BAR_COLOR, fill=True, alpha=0.5)
    if failed.any():
        axes.stairs(failed, edges, color="black", linestyle="--", linewidth=1.4, label="failed")
    if offered_rate is not None:
        axes.axhline(offered_rate, color="black", linestyle=":", linewidth=1.4, label="offered")
    axes.set(xlabel="Time since the start (s)", ylabel="Requests a second", xlim=(0, length))
    axes.set_ylim(0, 1.25 * max(succeeded.max(), failed.max(), offered_rate or 0.0))
    axes.yaxis.set_major_formatter("{x:,.4g}")
    axes.legend(frameon=False, loc="upper right", ncols=3)
    text = f"{ok.sum() / length:,.0f} requests a second answered on average"
    if bins > 1:
        text += f", {succeeded.min():,.0f} to {succeeded.max():,.0f} in steps of {width:.2g} s"
    _title(axes, text)
    _save(figure, path)


def _new_figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return figure, axes


def _plain_ticks(axes: Axes, extent: tuple[float, float]) -> None:
    """Write 20 ms as 20 and not as 2 x 10^1; label 1-2-5 steps where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = (1.0, 2.0, 5.0) if extent[1] < 100 * extent[0] else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
