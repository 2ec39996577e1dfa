"""Waiting for what other processes do, with an end that fails the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 60.0, poll_seconds: float = 0.02
) -> None:
    """Return as soon as the condition holds; fail with `what` did not happen after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"within {seconds:g} s never: {what}"
        time.sleep(poll_seconds)


def limit(seconds: float) -> float:
    """Return the bound of what takes less on an idle machine: more, where others use it as well."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie, which has ended but was not waited for yet."""
    try:
        # The name, in parentheses, may hold anything; the state is the first word behind it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
