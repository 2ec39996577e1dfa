"""What each client of an MPS server can be limited to: multiprocessors, memory, rank.

All of it is in the client's own environment, so nothing of the card or the daemon changes. The
percentage limits, it does not reserve; CUDA shows it as the client's multiprocessor count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PERCENTAGE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
MEMORY_VARIABLE = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
PRIORITY_VARIABLE = "CUDA_MPS_CLIENT_PRIORITY"

EVEN = "even"
PRIORITIES = {"normal": "0", "below-normal": "1"}

_MEMORY = re.compile(r"[1-9][0-9]*[MG]")


def percentage(text: str) -> str:
    """Return a percentage over 0 and up to 100 as it was written, or raise `ValueError`.

    The daemon passes over a value out of range in silence, so it is checked here.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise ValueError(f"{text!r} is not a percentage over 0 and up to 100")
    return text


def memory_limit(text: str) -> str:
    """Return a limit such as `8G` or `512M`, or raise `ValueError`."""
    if not _MEMORY.fullmatch(text):
        raise ValueError(f"{text!r} is not a size in mebibytes or gibibytes, such as 512M or 8G")
    return text


def priority(text: str) -> str:
    """Return a rank that MPS knows, or raise `ValueError`."""
    if text not in PRIORITIES:
        raise ValueError(f"{text!r} is not one of {', '.join(PRIORITIES)}")
    return text


def variables(
    percentage: str | None = None, memory_limit: str | None = None, priority: str | None = None
) -> dict[str, str]:
    """Return the environment of one client with these limits."""
    values = {
        PERCENTAGE_VARIABLE: percentage,
        # A client is shown one device only, and that is number 0.
        MEMORY_VARIABLE: f"0={memory_limit}" if memory_limit else None,
        PRIORITY_VARIABLE: PRIORITIES[priority] if priority else None,
    }
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class MpsKnobs:
    """Limits for the clients of a run: client i gets value i, starting over after the last.

    `percentages` may be `("even",)`: 100 divided by the number of clients.
    """

    percentages: tuple[str, ...] = ()
    memory_limits: tuple[str, ...] = ()
    priorities: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[str]]) -> MpsKnobs:
        """Build the limits from their fields as plain data; JSON makes lists of tuples."""
        return cls(**{name: tuple(value) for name, value in values.items()})

    @property
    def name(self) -> str:
        """What tells co-runs with these limits from others; empty without any."""
        parts = {"mps": self.percentages, "mem": self.memory_limits, "rank": self.priorities}
        return "".join(f"-{'-'.join([word, *values])}" for word, values in parts.items() if values)

    @property
    def description(self) -> str:
        """The limits as they stand behind the mode's name: `even`, `50/25 %, 8G of memory`."""
        shares = "/".join(self.percentages)
        parts = [
            shares if shares in ("", EVEN) else f"{shares} %",
            f"{'/'.join(self.memory_limits)} of memory" if self.memory_limits else "",
            f"priority {'/'.join(self.priorities)}" if self.priorities else "",
        ]
        return ", ".join(part for part in parts if part)

    def environment(self, client: int, clients: int) -> dict[str, str]:
        """Return what client number `client` of `clients` gets."""
        share = _turn(self.percentages, client)
        return variables(
            f"{100 / clients:g}" if share == EVEN else share,
            _turn(self.memory_limits, client),
            _turn(self.priorities, client),
        )


def _turn(values: Sequence[str], client: int) -> str | None:
    return values[client % len(values)] if values else None
