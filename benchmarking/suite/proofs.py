"""Whether the clients of a co-run really ran under the mode, by what was seen of all of them."""

from __future__ import annotations

from typing import Any

from benchmarking.modes.sharing_mode import ProcessLists, Proof, SharingMode, own_pids
from benchmarking.suite import occupancy
from benchmarking.suite.event_log import process_ids
from benchmarking.suite.launcher import ClientResult, CoRunResult
from benchmarking.suite.plan import COMMAND_WORKLOAD, MODE_CPU_DEMO


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


def strangers_beside(seen: CoRunResult, samples: list[dict[str, Any]]) -> list[int]:
    """Return the pids on the GPU in a co-run's window that are none of its clients'."""
    start, end = seen.window_start_seconds, seen.window_end_seconds
    if start is None or end is None:
        return []
    return occupancy.strangers(samples, start, end, _pids_of(seen))


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
