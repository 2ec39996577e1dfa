"""How long a slice of the card is in force, as the driver or the mode script says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from typing import Any

from benchmarking.modes.script_state import read_state
from benchmarking.planning.plan import MODE_TIME_SLICING

QUESTION = ("nvidia-smi", "compute-policy", "-l")
TIMEOUT_SECONDS = 10


def time_slice(gpu: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Return Default, Short, Medium or Long for the GPU with these facts, `None` where unknown.

    What the driver says counts; the script's own record may be older than a reload of the driver.
    """
    # A line of the table for each GPU: `|   0   Timeslice       Default       |`
    row = re.compile(rf"^\|\s+{gpu.get('index')}\s+Timeslice\s+([A-Za-z]+)\b", re.MULTILINE)
    found = row.search(_policies())
    if found:
        return found[1]
    saved = read_state(MODE_TIME_SLICING, str(gpu.get("uuid")), environment).get("timeslice", "")
    return saved if re.fullmatch("[A-Za-z]+", saved) else None


def _policies() -> str:
    try:
        answer = subprocess.run(
            QUESTION, capture_output=True, check=False, encoding="utf-8", errors="replace",
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
