"""What a load test found: figures, lines of the summary, charts.

Latency counts from the intended send to the end of the answer, service time from the actual send.
They are the same in a closed loop. In an open loop only the first one shows what users feel when
the server stalls: requests that a stall kept from being sent at all have the wait in it.

``requests`` is everywhere the structured array of ``load_generator.RECORD_FIELDS``, one row a
request.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common.results import is_few, summarize_latency_ms, written_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9}
# Timers and wake-ups take tenths of a millisecond; a send that is later than this was held up.
LATE_SEND_SECONDS = 0.001
# A run whose generator held up more sends than this share shows the generator in its p99.
LATE_SHARE_LIMIT_PERCENT = 1.0
BUSY_PROCESS_LIMIT_PERCENT = 90.0
DPI = 120
BINS = 60
BAR_COLOR, LINE_COLOR = "#7fa6c9", "#1f3a57"


def request_figures(requests: np.ndarray, slo_ms: float | None) -> dict[str, object]:
    """Return how many requests there were, how many succeeded, and their latency.

    ``slo_attainment_percent`` is the share of all requests that succeeded within ``slo_ms``.
    """
    total, ok = len(requests), requests["ok"] > 0
    latency_seconds = requests["end"] - requests["intended"]
    figures = {
        "total_requests": total,
        "successful_requests": int(ok.sum()),
        "failed_requests": int(total - ok.sum()),
        "success_rate_percent": 100.0 * float(ok.mean()) if total else None,
        **latency_figures(latency_seconds[ok], int(total - ok.sum()), "latency"),
    }
    if slo_ms is not None:
        met = ok & (latency_seconds <= slo_ms / 1e3)
        figures["slo_attainment_percent"] = 100.0 * float(met.mean()) if total else None
    return figures


def latency_figures(answered_seconds: np.ndarray, failed: int, what: str) -> dict[str, object]:
    """Return ``mean_<what>_ms`` and the like.

    Args:
        answered_seconds: Raw durations of the answered requests, shape (n,).
        failed: How many more failed or timed out. They count as infinitely late in the
            percentiles, so that a server does not look better for dropping what is slow; mean,
            standard deviation, minimum and maximum are of the answered ones.
        what: ``latency`` or ``service``.

    Returns:
        The figures, null where there is none or it is infinite. ``<what>_percentile_requests`` is
        how many requests are in the percentiles, ``infinite_<what>_percentiles`` names those that
        are infinite.
    """
    import numpy as np

    summary = summarize_latency_ms(answered_seconds)
    values = np.concatenate((np.sort(1e3 * answered_seconds), np.full(failed, math.inf)))
    percentiles = {name: percentile(values, rank) for name, rank in PERCENTILES.items()}
    for name, value in percentiles.items():
        summary[f"{name}_ms"] = None if value == math.inf else value
    summary["median_ms"] = summary["p50_ms"]
    order = ("mean", "median", "std", "min", *PERCENTILES, "max")
    return {
        **{f"{name}_{what}_ms": summary[f"{name}_ms"] for name in order},
        f"{what}_percentile_requests": len(values),
        f"infinite_{what}_percentiles": [n for n, v in percentiles.items() if v == math.inf],
    }


def percentile(ascending: Sequence[float], rank: float) -> float | None:
    """Return a percentile of values that may end with infinite ones; None where there are none.

    It interpolates linearly between order statistics, as NumPy does where all are finite.
    """
    if not len(ascending):
        return None
    position = round((len(ascending) - 1) * rank / 100, 9)
    low, high = ascending[math.floor(position)], ascending[math.ceil(position)]
    return float(low if low == high else low + (high - low) * (position % 1))


def open_loop_figures(
    requests: np.ndarray, start_seconds: float, duration_seconds: float
) -> dict[str, object]:
    """Return how well the intended sends were kept, and the service times.

    Returns:
        ``offered_rate`` and ``achieved_rate`` (requests a second, intended and really sent before
        ``start_seconds + duration_seconds``), ``late_sends`` (more than LATE_SEND_SECONDS after
        the intended time, or never), of those ``late_for_connection`` (every connection was busy)
        and ``late_by_generator`` (a free client was too slow), the latter also as a share.
    """
    import numpy as np

    total, ok = len(requests), requests["ok"] > 0
    intended, free, sent = requests["intended"], requests["free"], requests["sent"]
    waited = free > intended + LATE_SEND_SECONDS
    slow = sent > np.maximum(intended, free) + LATE_SEND_SECONDS
    was_sent = ~np.isnan(sent)
    return {
        "offered_rate": total / duration_seconds,
        "achieved_rate": int((sent <= start_seconds + duration_seconds).sum()) / duration_seconds,
        "late_sends": int(total - (sent <= intended + LATE_SEND_SECONDS).sum()),
        "late_for_connection": int(waited.sum()),
        "late_by_generator": int(slow.sum()),
        "late_by_generator_percent": 100.0 * float(slow.mean()) if total else None,
        **latency_figures(
            (requests["end"] - sent)[ok], int((was_sent & ~ok).sum()), "service"
        ),
    }  # fmt: skip


def generator_limit(
    late_by_generator_percent: float | None, busiest_process_percent: float
) -> str | None:
    """Return the sentence that flags a run limited by its generator; None where it was not."""
    reasons = []
    if (late_by_generator_percent or 0.0) > LATE_SHARE_LIMIT_PERCENT:
        reasons.append(
            f"it sent {late_by_generator_percent:.1f} % of the requests more than "
            f"{LATE_SEND_SECONDS * 1e3:g} ms late"
        )
    if busiest_process_percent > BUSY_PROCESS_LIMIT_PERCENT:
        reasons.append(f"its busiest process used {busiest_process_percent:.0f} % of a core")
    if not reasons:
        return None
    return (
        f"the load generator limited this run ({' and '.join(reasons)}), so the figures show the "
        "generator and not the server alone; use more --processes or another machine"
    )


def summary_rows(figures: dict, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return label and text of each figure of a job that was run with the flags ``args``."""
    rows = [
        ("Total requests", f"{figures['total_requests']}"),
        ("Successful / failed",
         f"{figures['successful_requests']} / {figures['failed_requests']}"),
    ]  # fmt: skip
    if figures["total_requests"]:
        rows += [
            ("Success rate", f"{figures['success_rate_percent']:.1f} %"),
            ("Mean latency", f"{_ms(figures, 'latency', 'mean')} (of the answered)"),
            ("Median (P50) latency", _percentiles(figures, "latency", "p50")),
            ("P90 latency", _percentiles(figures, "latency", "p90")),
            ("P95 / P99 latency", _percentiles(figures, "latency", "p95", "p99")),
            ("P99.9 latency", _percentiles(figures, "latency", "p99_9")),
            ("Max latency", f"{_ms(figures, 'latency', 'max')} (of the answered)"),
        ]
        if args.slo_ms is not None:
            attained = f"{figures['slo_attainment_percent']:.2f} % of all requests"
            rows.append((f"Within {args.slo_ms:g} ms", attained))
    rows += [
        ("Queries per second", f"{figures['qps']:.1f}"),
        ("Requests per minute", f"{figures['requests_per_minute']:.0f}"),
    ]
    if args.rate is not None:
        rows += _open_loop_rows(figures)
    rows.append(
        ("Load generator", f"{figures['generator_processes']} processes, "
         f"{figures['generator_cpu_cores']:.2f} cores")
    )  # fmt: skip
    return rows + [(f"Failed: {kind}", str(n)) for kind, n in sorted(figures["errors"].items())]


def _open_loop_rows(figures: dict) -> list[tuple[str, str]]:
    return [
        ("Offered / achieved rate",
         f"{figures['offered_rate']:.1f} / {figures['achieved_rate']:.1f} requests a second"),
        ("Late sends", f"{figures['late_sends']} ({figures['late_for_connection']} for want of a "
         f"connection, {figures['late_by_generator']} by the generator)"),
        ("P50 / P99 from the actual send", _percentiles(figures, "service", "p50", "p99")),
    ]  # fmt: skip


def _ms(figures: dict, what: str, name: str) -> str:
    if name in figures[f"infinite_{what}_percentiles"]:
        return "infinite"
    value = figures[f"{name}_{what}_ms"]
    return "none" if value is None else f"{value:.1f} ms"


def _percentiles(figures: dict, what: str, *names: str) -> str:
    count = figures[f"{what}_percentile_requests"]
    marks = {name: " (few)" if is_few(count, PERCENTILES[name]) else "" for name in names}
    return " / ".join(_ms(figures, what, name) + marks[name] for name in names) + f", n = {count}"


def save_raw(path: Path, requests: np.ndarray, start_seconds: float) -> None:
    """Write every request as one row of a structured NumPy array, for ``numpy.load``.

    The fields are ``intended_seconds`` (float64, after ``start_seconds``), ``latency_ms`` and
    ``service_ms`` (float32, to the end of the answer or the failure; the latter NaN where nothing
    was sent) and ``ok``.
    """
    import numpy as np

    fields = [("intended_seconds", "f8"), ("latency_ms", "f4"), ("service_ms", "f4"), ("ok", "?")]
    rows = np.empty(len(requests), dtype=fields)
    rows["intended_seconds"] = requests["intended"] - start_seconds
    rows["latency_ms"] = 1e3 * (requests["end"] - requests["intended"])
    rows["service_ms"] = 1e3 * (requests["end"] - requests["sent"])
    rows["ok"] = requests["ok"] > 0
    with written_whole(path) as file:
        np.save(file, rows)


def draw_charts(
    histogram: Path, timeline: Path, requests: np.ndarray, figures: dict, start_seconds: float,
    duration_seconds: float, offered_rate: float | None,
) -> None:  # fmt: skip
    """Draw the latency histogram and the answers a second over the run as PNG files.

    At least one of ``requests`` succeeded; ``figures`` are their ``request_figures``;
    ``offered_rate`` is that of an open loop, in requests a second.
    """
    # Nothing that is inherited counts: not the backend of the notebook whose shell this is, nor
    # its owner's settings.
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["MATPLOTLIBRC"] = os.devnull
    import matplotlib

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        ok = requests["ok"] > 0
        latency_ms = 1e3 * (requests["end"] - requests["intended"])[ok]
        _draw_latency_histogram(histogram, latency_ms, figures)
        ended_seconds = requests["end"] - start_seconds
        _draw_qps_timeline(timeline, ended_seconds, ok, duration_seconds, offered_rate)


def _draw_latency_histogram(path: Path, latency_ms: np.ndarray, figures: dict) -> None:
    """Draw how the latencies of answered requests spread, both axes logarithmic."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = _new_axes()
    low, high = float(latency_ms.min()), float(latency_ms.max())
    edges = np.geomspace(low * 0.98, high * 1.02, BINS + 1)
    axes.hist(latency_ms, bins=edges, color=BAR_COLOR, edgecolor=LINE_COLOR, linewidth=0.4)
    for name, label, style in (("p50", "p50", "-"), ("p99", "p99", "--"), ("p99_9", "p99.9", ":")):
        value = figures[f"{name}_latency_ms"]
        if value is not None:
            text = f"{label}: {value:.3g} ms"
            axes.axvline(value, color="black", linestyle=style, linewidth=1.4, label=text)
    axes.set(xscale="log", yscale="log", xlabel="Latency (ms)", ylabel="Requests")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    # 20 ms as 20 and not as 2 x 10^1; 1-2-5 steps where the range is short.
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    answered = f"{len(latency_ms):,} of {figures['total_requests']:,} requests were answered"
    finite = [
        f", {share} of all within {figures[name]:.3g} ms"
        for share, name in (("99 %", "p99_latency_ms"), ("half", "p50_latency_ms"))
        if figures[name] is not None
    ]
    _save(axes, answered + "".join(finite[:1]), path)


def _draw_qps_timeline(
    path: Path, ended_seconds: np.ndarray, ok: np.ndarray, duration_seconds: float,
    offered_rate: float | None,
) -> None:  # fmt: skip
    """Draw the answers a second over the run, and the failures where there are any."""
    import numpy as np

    axes = _new_axes()
    length = max(duration_seconds, float(ended_seconds.max()))
    bins = max(1, min(BINS, round(length / 0.5)))
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
    _save(axes, text, path)


def _new_axes() -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    return axes


def _save(axes: Axes, title: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    with written_whole(path) as file:
        axes.figure.savefig(file, format="png", dpi=DPI)
