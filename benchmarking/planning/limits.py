"""What each client of a shared card gets: limits of an MPS client, an instance of a MIG layout.

Pure. An MPS client's limits are in its own environment, so nothing of the card or the daemon
changes; the percentage limits, it does not reserve, and CUDA shows it as the client's
multiprocessor count. Static partitions are made beforehand, by `gpu-configs/enable_mps.sh
--static-partitions N`, MIG instances by `gpu-configs/setup_mig.sh LAYOUT`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a driver asks for these checks before there are packages
    from benchmarking.records.types import MpsLimits

PERCENTAGE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
MEMORY_VARIABLE = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
PRIORITY_VARIABLE = "CUDA_MPS_CLIENT_PRIORITY"

# 100 divided by the number of clients
EVEN = "even"
PARTITIONS = "partitions"
PRIORITIES = {"normal": "0", "below-normal": "1"}
PROFILE = r"[1-9]g\.[1-9][0-9]*gb(?:[+-][a-z.]+)*"

_PERCENTAGE = re.compile(r"(?=[0-9.]*[1-9])[0-9]{1,2}(\.[0-9]+)?|100(\.0+)?")
_MEMORY = re.compile(r"[1-9][0-9]*[MG]")


# --- limits of MPS clients --------------------------------------------------------------------


def percentage(text: str) -> str:
    """Return a percentage over 0 and up to 100 as it was written, or raise `ValueError`.

    The daemon passes over a value out of range in silence, so it is checked here.
    """
    if not _PERCENTAGE.fullmatch(text):
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


def limits_of_client(limits: MpsLimits, client: int, clients: int) -> dict[str, str]:
    """Return the environment of client number `client` of `clients`.

    Client i gets value i of each limit, starting over after the last.
    """

    def turn(values: Sequence[str]) -> str | None:
        return values[client % len(values)] if values else None

    share = turn(limits.percentages)
    return variables(
        f"{100 / clients:g}" if share == EVEN else share,
        turn(limits.memory_limits),
        turn(limits.priorities),
    )


def shares_of(limits: MpsLimits) -> tuple[str, ...]:
    """The clients' shares of the multiprocessors, in the words of `--modes mps:...`."""
    return (PARTITIONS,) if limits.partitions else limits.percentages


def co_run_suffix(limits: MpsLimits) -> str:
    """What tells co-runs with these limits from others, as `-mps-50-25`; empty without any."""
    parts = {"mps": shares_of(limits), "mem": limits.memory_limits, "rank": limits.priorities}
    return "".join(f"-{'-'.join([word, *values])}" for word, values in parts.items() if values)


def describe(limits: MpsLimits) -> str:
    """The limits as they stand behind the mode's name: `even`, `50/25 %, 8G of memory`."""
    shares = "/".join(limits.percentages)
    parts = [
        f"static {PARTITIONS}" if limits.partitions else "",
        shares if shares in ("", EVEN) else f"{shares} %",
        f"{'/'.join(limits.memory_limits)} of memory" if limits.memory_limits else "",
        f"priority {'/'.join(limits.priorities)}" if limits.priorities else "",
    ]
    return ", ".join(part for part in parts if part)


# --- MIG layouts: `2g.20gb,1g.10gb,1g.10gb` -----------------------------------------------------


def profile(text: str) -> str:
    """Return a MIG profile's name as it was written, or raise `ValueError`."""
    if not re.fullmatch(PROFILE, text):
        raise ValueError(f"{text!r} is no MIG profile; one is written like 1g.10gb")
    return text
