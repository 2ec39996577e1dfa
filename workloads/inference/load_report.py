"""What a load test found: figures, lines of the summary, charts.

Latency counts from the intended send to the end of the answer, service time from the actual send.
They are the same in a closed loop. In an open loop only the first one shows what users feel when
the server stalls: requests that a stall kept from being sent at all have the wait in it.

``requests`` is everywhere the structured array of ``load_generator.RECORD_FIELDS``, one row a
request.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.common.files import written_whole
from workloads.common.results import is_few, summarize_latency_ms

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from workloads.inference.load_generator import Measured

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9}
# Timers and wake-ups take tenths of a millisecond; a send that is later than this was held up.
LATE_SEND_SECONDS = 0.001
# A run whose generator held up more sends than this share shows the generator in its p99.
LATE_SHARE_LIMIT_PERCENT = 1.0
BUSY_PROCESS_LIMIT_PERCENT = 90.0
DPI = 120
BINS = 60
BARS: dict[str, Any] = {"facecolor": "#7fa6c9", "edgecolor": "#1f3a57"}
LINES: dict[str, Any] = {"color": "black", "linewidth": 1.4}


def load_figures(
    measured: Measured, start_seconds: float, duration_seconds: float, slo_ms: float | None,
    is_open_loop: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return every figure of a run that sent from ``start_seconds`` on for a while.

    ``slo_attainment_percent`` is the share of all requests that succeeded within ``slo_ms``.
    """
    import numpy as np

    requests, cpu_seconds = measured.requests, measured.cpu_seconds
    ends = requests["end"] - start_seconds
    elapsed_seconds = float(max(duration_seconds, ends.max(initial=0.0)))
    total, ok = len(requests), requests["failure"] == ""
    succeeded = int(ok.sum())
    latency_seconds = np.where(ok, requests["end"] - requests["intended"], math.inf)
    # What is answered after the sending counts by its share before: waiting for one that hangs is
    # no lower rate of all others.
    sent, took = requests["sent"] - start_seconds, requests["end"] - requests["sent"]
    shares = np.clip(((duration_seconds - sent) / took)[ok], 0.0, 1.0)
    qps = float(shares.sum()) / duration_seconds
    figures: dict[str, Any] = {
        "total_requests": total,
        "successful_requests": succeeded,
        "failed_requests": total - succeeded,
        "success_rate_percent": _share_percent(ok),
        "errors": dict(Counter(requests["failure"][~ok].tolist())),
        **latency_figures(latency_seconds, "latency"),
    }
    if slo_ms is not None:
        figures["slo_attainment_percent"] = _share_percent(latency_seconds <= slo_ms / 1e3)
    if is_open_loop:
        figures |= open_loop_figures(requests, start_seconds, duration_seconds)
    # Waiting for the last answers is no work of the generator's.
    sending_seconds = float(np.nanmax(sent, initial=duration_seconds))
    busiest_percent = 100.0 * max(cpu_seconds) / sending_seconds
    limit = generator_limit(figures.get("late_by_generator_percent"), busiest_percent)
    return figures | {
        # Of successful requests: a refused connection fails in no time and is no throughput.
        "qps": qps,
        "requests_per_minute": 60.0 * qps,
        "elapsed_seconds": elapsed_seconds,
        "connections_opened": measured.connections_opened,
        "generator_processes": len(cpu_seconds),
        "generator_cpu_cores": sum(cpu_seconds) / sending_seconds,
        "generator_busiest_process_percent": busiest_percent,
        "generator_limited": limit is not None,
        "generator_limited_reason": limit,
    }


def _share_percent(chosen: np.ndarray) -> float | None:
    return 100.0 * float(chosen.mean()) if len(chosen) else None


def latency_figures(seconds: np.ndarray, what: str) -> dict[str, object]:
    """Return ``mean_<what>_ms`` and the like, null where there is none or it is infinite.

    ``seconds``, of shape (n,), are infinite for failed and timed-out requests, so that a server
    does not look better for dropping what is slow: these count in the percentiles alone.
    ``<what>_percentile_requests`` is how many requests are in the percentiles,
    ``infinite_<what>_percentiles`` names those that are infinite.
    """
    import numpy as np

    ascending = np.sort(1e3 * seconds)
    figures = summarize_latency_ms(seconds[np.isfinite(seconds)])
    infinite = []
    for name, rank in PERCENTILES.items():
        value = percentile(ascending, rank)
        if value == math.inf:
            infinite.append(name)
        figures[f"{name}_ms"] = None if value == math.inf else value
    figures["median_ms"] = figures["p50_ms"]
    order = ("mean", "median", "std", "min", *PERCENTILES, "max")
    return {
        **{f"{name}_{what}_ms": figures[f"{name}_ms"] for name in order},
        f"{what}_percentile_requests": len(ascending),
        f"infinite_{what}_percentiles": infinite,
    }


def percentile(ascending: np.ndarray, rank: float) -> float | None:
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

    ``offered_rate`` and ``achieved_rate`` are requests a second, intended and really sent before
    the end; ``late_sends`` came more than LATE_SEND_SECONDS after the intended time, or never, of
    those ``late_for_connection`` since every connection was busy and ``late_by_generator`` since a
    free client was too slow.
    """
    import numpy as np

    intended, free, sent = requests["intended"], requests["free"], requests["sent"]
    slow = sent > np.maximum(intended, free) + LATE_SEND_SECONDS
    on_time = sent <= intended + LATE_SEND_SECONDS
    service_seconds = np.where(requests["failure"] == "", requests["end"] - sent, math.inf)
    return {
        "offered_rate": len(requests) / duration_seconds,
        "achieved_rate": int((sent <= start_seconds + duration_seconds).sum()) / duration_seconds,
        "late_sends": int((~on_time).sum()),
        "late_for_connection": int((free > intended + LATE_SEND_SECONDS).sum()),
        "late_by_generator": int(slow.sum()),
        "late_by_generator_percent": _share_percent(slow),
        **latency_figures(service_seconds[~np.isnan(sent)], "service"),
    }


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


def summary_rows(figures: dict, slo_ms: float | None) -> list[tuple[str, str]]:
    """Return label and text of each of a run's ``load_figures``."""

    def ms(what: str, name: str) -> str:
        value = figures[f"{name}_{what}_ms"]
        if name in figures[f"infinite_{what}_percentiles"]:
            return "infinite"
        return "none" if value is None else f"{value:.1f} ms"

    def percentiles(what: str, *names: str) -> str:
        count = figures[f"{what}_percentile_requests"]
        marked = [
            ms(what, name) + (" (few)" if is_few(count, PERCENTILES[name]) else "")
            for name in names
        ]
        return f"{' / '.join(marked)}, n = {count}"

    rows = [("Total requests", "{total_requests}"),
            ("Successful / failed", "{successful_requests} / {failed_requests}")]  # fmt: skip
    if figures["total_requests"]:
        rows += [
            ("Success rate", "{success_rate_percent:.1f} %"),
            ("Mean latency", f"{ms('latency', 'mean')} (of the answered)"),
            ("Median (P50) latency", percentiles("latency", "p50")),
            ("P90 latency", percentiles("latency", "p90")),
            ("P95 / P99 latency", percentiles("latency", "p95", "p99")),
            ("P99.9 latency", percentiles("latency", "p99_9")),
            ("Max latency", f"{ms('latency', 'max')} (of the answered)"),
        ]
        if slo_ms is not None:
            rows.append((f"Within {slo_ms:g} ms", "{slo_attainment_percent:.2f} % of all requests"))
    rows += [
        ("Queries per second", "{qps:.1f}"),
        ("Requests per minute", "{requests_per_minute:.0f}"),
    ]
    if "offered_rate" in figures:
        rows += [
            ("Offered / achieved rate",
             "{offered_rate:.1f} / {achieved_rate:.1f} requests a second"),
            ("Late sends", "{late_sends} ({late_for_connection} for want of a connection, "
             "{late_by_generator} by the generator)"),
            ("P50 / P99 from the actual send", percentiles("service", "p50", "p99")),
        ]  # fmt: skip
    several = "es" if figures["generator_processes"] > 1 else ""
    generator = f"{{generator_processes}} process{several}, {{generator_cpu_cores:.2f}} cores"
    rows.append(("Load generator", generator))
    filled = [(label, text.format_map(figures)) for label, text in rows]
    return filled + [(f"Failed: {kind}", str(n)) for kind, n in sorted(figures["errors"].items())]


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
    rows["ok"] = requests["failure"] == ""
    with written_whole(path) as file:
        np.save(file, rows)


def draw_charts(
    histogram: Path, timeline: Path, requests: np.ndarray, figures: dict, start_seconds: float,
    offered_rate: float | None,
) -> None:  # fmt: skip
    """Draw the latency histogram and the answers a second over the run as PNG files.

    At least one of ``requests`` succeeded; ``figures`` are their ``load_figures``;
    ``offered_rate`` is that of an open loop, in requests a second.
    """
    # Nothing that is inherited counts: not the backend of the notebook whose shell this is, nor
    # its owner's settings.
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["MATPLOTLIBRC"] = os.devnull
    import matplotlib
    from matplotlib.figure import Figure

    ok = requests["failure"] == ""
    latency_ms = 1e3 * (requests["end"] - requests["intended"])[ok]
    ended_seconds = requests["end"] - start_seconds
    for path, draw, values in (
        (histogram, _draw_latency_histogram, (latency_ms, figures)),
        (timeline, _draw_qps_timeline,
         (ended_seconds, ok, figures, offered_rate)),
    ):  # fmt: skip
        with matplotlib.rc_context(matplotlib.rcParamsDefault), written_whole(path) as file:
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_title(draw(axes, *values), loc="left", fontsize=11, pad=24)
            # Above the axes: inside them it would lie over bars and percentiles.
            axes.legend(
                frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=4, fontsize=9
            )
            figure.savefig(file, format="png", dpi=DPI)


def _draw_latency_histogram(axes: Axes, latency_ms: np.ndarray, figures: dict) -> str:
    """Draw how the latencies of answered requests spread, both axes logarithmic; return a title."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    edges = np.geomspace(latency_ms.min() * 0.98, latency_ms.max() * 1.02, BINS + 1)
    axes.hist(latency_ms, bins=edges.tolist(), label="answered", linewidth=0.4, **BARS)
    for name, style in (("p50", "-"), ("p99", "--"), ("p99_9", ":")):
        value = figures[f"{name}_latency_ms"]
        if value is not None:
            text = f"{name.replace('_', '.')}: {value:.3g} ms"
            axes.axvline(value, linestyle=style, label=text, **LINES)
    axes.set(xscale="log", yscale="log", xlabel="Latency (ms)", ylabel="Requests")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    # 20 ms as 20 and not as 2 x 10^1.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return f"{len(latency_ms):,} of {figures['total_requests']:,} requests were answered"


def _draw_qps_timeline(
    axes: Axes, ended_seconds: np.ndarray, ok: np.ndarray, figures: dict, offered_rate: float | None
) -> str:
    """Draw the answers a second over the run, and any failures; return a title."""
    import numpy as np

    length_seconds = figures["elapsed_seconds"]
    bins = max(1, min(BINS, round(length_seconds / 0.5)))
    edges = np.linspace(0.0, length_seconds, bins + 1)
    answered, failed = (
        np.histogram(ended_seconds[chosen], edges)[0] * bins / length_seconds
        for chosen in (ok, ~ok)
    )
    axes.stairs(answered, edges, fill=True, label="answered", **BARS)
    if failed.any():
        axes.stairs(failed, edges, linestyle="--", label="failed", **LINES)
    if offered_rate is not None:
        axes.axhline(offered_rate, linestyle=":", label="offered", **LINES)
    axes.set(xlabel="Time since the start (s)", ylabel="Requests a second")
    axes.set_xlim(0, length_seconds)
    axes.set_ylim(0, 1.25 * max(answered.max(), failed.max(), offered_rate or 0.0))
    axes.yaxis.set_major_formatter("{x:,.4g}")
    return f"{figures['qps']:,.0f} requests a second answered on average"
