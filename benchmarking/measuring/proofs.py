"""Who was on the GPU: whether the clients ran under the mode, and which processes were not ours.

Foreign processes are looked for before a run, when nothing of ours is on the card, and in every
window: what is measured next to them is not the sharing mode's.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.event_log import process_ids
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.modes.names import MODE_CPU_DEMO
from benchmarking.modes.sharing_mode import ProcessLists, SharingMode, own_pids
from benchmarking.planning.workloads import COMMAND_WORKLOAD
from benchmarking.records.types import Proof

# The kernel keeps 15 characters of a name. Clients of the server count, not itself.
MPS_SERVER_PROGRAM = "nvidia-cuda-mps-server"
MPS_SERVER = MPS_SERVER_PROGRAM[:15]


def judge_clients(
    mode: SharingMode, seen: CoRunResult, samples: list[dict[str, Any]]
) -> list[Proof | None]:
    """Judge every client of a co-run that was measured; on the CPU there is nothing to judge."""
    start, end = seen.ready_seconds, seen.window_end_seconds
    if mode.name == MODE_CPU_DEMO:
        start, end = 0.0, 0.0
    if start is None or end is None:
        return [None] * len(seen.clients)
    lists = ProcessLists.from_samples(samples, start, end)
    pids = _pids_of(seen)
    return [
        mode.prove(client.planned.client, _identity_with_processes(client), pids, lists)
        for client in seen.clients
    ]


def foreign_pids_in_window(seen: CoRunResult, samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the pids on the GPU in a co-run's window that are none of its clients'.

    None are named where not one of our own is listed: in a pid namespace of its own a container
    sees the host's pids, and ours among them cannot be told apart.
    """
    start, end = seen.window_start_seconds, seen.window_end_seconds
    if start is None or end is None:
        return []
    listed, own = ProcessLists.from_samples(samples, start, end).all, _pids_of(seen)
    return foreign_pids({"pid": pid} for pid in listed - own) if listed & own else []


def contention_warnings(pids: Sequence[int]) -> list[str]:
    """Return the sentence for the record of a co-run that foreign processes disturbed, if any."""
    if not pids:
        return []
    return [f"the GPU was contended: other processes used it meanwhile, {describe_pids(pids)}"]


def foreign_pids(processes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the pids of NVML's compute processes but for an MPS server's."""
    return sorted({p["pid"] for p in processes if not _is_mps_server(p["pid"])})


def describe_pids(pids: Iterable[int]) -> str:
    """Return processes with name and owner, as far as they can be seen from here."""
    return ", ".join(f"pid {pid} ({_name(pid) or 'name unknown'}{_owner(pid)})" for pid in pids)


def _pids_of(seen: CoRunResult) -> frozenset[int]:
    """Every pid under which a client of a co-run may use the GPU."""
    identities = map(_identity_with_processes, seen.clients)
    return frozenset().union(*map(own_pids, identities))


def _identity_with_processes(client: ClientResult) -> dict[str, Any]:
    """A client's identity, with `processes` for a command: it works by those that it starts."""
    identity = dict(client.identity or {})
    if client.planned.workload == COMMAND_WORKLOAD:
        identity["processes"] = process_ids(client.events)
    return identity


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
