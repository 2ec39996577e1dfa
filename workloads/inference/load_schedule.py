"""When an open loop intends to send: drawn up front, so that no answer can delay it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def arrival_offsets(rate: float, arrival: str, duration_seconds: float, seed: int) -> np.ndarray:
    """Return the intended send times of an open loop.

    Args:
        rate: Requests a second, on average.
        arrival: ``constant`` (request i at i / rate) or ``poisson`` (independent exponential gaps
            of mean 1 / rate, the first before the first request).
        duration_seconds: Sends are intended before this time only.
        seed: Fixes the gaps.

    Returns:
        Ascending float64 seconds after the start, possibly none.
    """
    import numpy as np

    if arrival == "constant":
        # 0.3 s at 10 a second are three requests, whichever way the product was rounded.
        return np.arange(math.ceil(round(rate * duration_seconds, 9))) / rate
    random = np.random.default_rng(seed)
    # Drawn a chunk at a time until past the end; one chunk nearly always does.
    chunk = int(rate * duration_seconds + 6 * math.sqrt(rate * duration_seconds)) + 16
    offsets = np.cumsum(random.exponential(1.0 / rate, chunk))
    while offsets[-1] < duration_seconds:
        more = offsets[-1] + np.cumsum(random.exponential(1.0 / rate, chunk))
        offsets = np.concatenate((offsets, more))
    return offsets[offsets < duration_seconds]


def split(offsets: np.ndarray, processes: int) -> list[np.ndarray]:
    """Deal the sends out to processes in turn, so that each has its even share at any time."""
    return [offsets[index::processes] for index in range(processes)]
