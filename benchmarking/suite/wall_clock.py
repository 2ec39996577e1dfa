"""Whether the wall clock was set while something ran; figures never come from it."""

from __future__ import annotations

import time

# Past what a time service adds or takes in slewing.
TOLERANCE_SECONDS = 2.0


class WallClock:
    """Remembers how far the wall clock is from the monotonic one, to tell that it was set."""

    def __init__(self) -> None:
        """Compare the two now."""
        self._offset_seconds = _offset_seconds()

    def warnings(self) -> list[str]:
        """Say, in one sentence or none, by how much it was set since."""
        seconds = _offset_seconds() - self._offset_seconds
        if abs(seconds) <= TOLERANCE_SECONDS:
            return []
        said = f"the clock was set by {seconds:+.0f} s meanwhile"
        return [f"{said}; figures come from the monotonic clock"]


def _offset_seconds() -> float:
    return time.time() - time.monotonic()
