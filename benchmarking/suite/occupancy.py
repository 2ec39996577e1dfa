"""Other people's processes on the GPU: what is measured beside them is not the sharing mode's.

They are looked for before a run, when nothing of ours is on the card, and in every window.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.modes.sharing_mode import ProcessLists

# The kernel keeps 15 characters of a name. Clients of the server count, not itself.
MPS_SERVER_PROGRAM = "nvidia-cuda-mps-server"
MPS_SERVER = MPS_SERVER_PROGRAM[:15]


def occupants(processes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the pids of NVML's compute processes but for an MPS server's."""
    return sorted({p["pid"] for p in processes if not _is_mps_server(p["pid"])})


def strangers(
    samples: Sequence[Mapping[str, Any]], start_seconds: float, end_seconds: float,
    own_pids: frozenset[int],
) -> list[int]:  # fmt: skip
    """Return the pids that NVML listed between two times besides `own_pids` and an MPS server's.

    None are named where not one of our own is listed: in a pid namespace of its own a container
    sees the host's pids, and ours among them cannot be told apart.
    """
    listed = ProcessLists.from_samples(samples, start_seconds, end_seconds).all
    if not listed & own_pids:
        return []
    return occupants({"pid": pid} for pid in listed - own_pids)


def warnings(pids: Sequence[int]) -> list[str]:
    """Return the sentence for the record of a co-run that strangers disturbed; none without."""
    if not pids:
        return []
    return [f"the GPU was contended: other processes used it meanwhile, {describe(pids)}"]


def describe(pids: Iterable[int]) -> str:
    """Return processes with name and owner, as far as they can be seen from here."""
    return ", ".join(f"pid {pid} ({_name(pid) or 'name unknown'}{_owner(pid)})" for pid in pids)


def _is_mps_server(pid: int) -> bool:
    """Whether a process is an MPS server: by its program, where that may be looked at."""
    try:
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return _name(pid) == MPS_SERVER
    return Path(program).name == MPS_SERVER_PROGRAM


def _name(pid: int) -> str | None:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    # Anybody chooses the names of their processes: nothing in them shall steer a terminal.
    return "".join(character if character.isprintable() else "?" for character in name)


def _owner(pid: int) -> str:
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
        return "" if uid == os.getuid() else f" of {pwd.getpwuid(uid).pw_name}"
    except (OSError, KeyError):
        return ""
