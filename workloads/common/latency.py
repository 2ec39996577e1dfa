"""Latency figures, always from raw values (an average of percentiles means nothing)."""

from __future__ import annotations

from collections.abc import Sequence


def summarize_latency_ms(durations_seconds: Sequence[float]) -> dict[str, float | None]:
    """Summarize durations in the guide's terms.

    Args:
        durations_seconds: Raw durations in seconds, one a request or batch.

    Returns:
        ``mean_ms, median_ms, std_ms, min_ms, max_ms, p50_ms, p95_ms, p99_ms`` in milliseconds;
        every value is None where there are no durations. Percentiles interpolate linearly
        between order statistics (NumPy's default), ``std_ms`` is the sample standard deviation
        (n - 1), None for a single value.
    """
    names = ("mean", "median", "std", "min", "max", "p50", "p95", "p99")
    if not len(durations_seconds):
        return {f"{name}_ms": None for name in names}
    import numpy as np

    values = np.asarray(durations_seconds, dtype=np.float64) * 1e3
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    std = values.std(ddof=1) if len(values) > 1 else None
    figures = (values.mean(), p50, std, values.min(), values.max(), p50, p95, p99)
    return {
        f"{name}_ms": None if figure is None else float(figure)
        for name, figure in zip(names, figures, strict=True)
    }


def is_few(responses: int, percentile: float) -> bool:
    """Return whether a percentile of so many responses rests on fewer than five beyond it."""
    return responses < round(500 / (100 - percentile))
