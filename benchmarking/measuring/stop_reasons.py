"""Why a co-run failed its criteria: which client, of what, and who was only taken along by it.

The kinds:

    oom            a client ran out of memory
    diverged       a training's loss became NaN or infinite
    not_finite     a model's outputs were NaN or infinite
    damaged_file   a file that a client read was truncated or altered
    unreadable_image  an image of its dataset could not be decoded
    crash          a client failed by itself, in another way
    lost_neighbor  a client lost the GPU through another one: under MPS a fault in one process ends
                   the others' work too
    killed         somebody else ended a client (the host's out-of-memory killer, an operator)
    timeout        a client was not ready, done or gone in time
    gpu_lost       the GPU no longer answered afterwards, whatever became of the clients
    refused        the clients were not what they should be, nothing was measured
    slowdown, p99  nothing failed, but a bound that was asked for was passed
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.event_log import last_event
from benchmarking.metrics.breaking_point import breaking_point
from benchmarking.modes.names import MODE_MPS
from benchmarking.records.types import ClientRecord, CoRunRecord

GPU_LOST = "gpu_lost"

# The likeliest cause first: what else failed with it is its consequence.
TOLD_KINDS = ("diverged", "not_finite", "damaged_file", "unreadable_image")
KINDS_BY_CAUSE = ("oom", *TOLD_KINDS, "crash", "killed", "timeout", "lost_neighbor")
TEXTS = {
    **dict.fromkeys(TOLD_KINDS, "{who}: {detail}"),
    "crash": "{who} crashed: {detail}",
    "lost_neighbor": "{who} lost the GPU through another process: {detail}",
    "killed": "{who} was killed from outside: {detail}",
    "timeout": "{who}: time limit: {detail}",
}

# CUDA's words for errors 806 and 810, which come to the clients that did nothing.
_LOST_TEXT = re.compile(
    r"MPS client has been terminated|MPS_CLIENT_TERMINATED|MpsClientTerminated|"
    r"call between the MPS server and the MPS client failed|MPS_RPC_FAILURE|MpsRpcFailure",
    re.IGNORECASE,
)

# How a client begins its sentence; `describe` has said so by then.
_OUT_OF_MEMORY = re.compile(r"^out of (GPU |host )?memory: ")


def stop_reason(
    co_run: CoRunRecord,
    results: Sequence[ClientResult],
    clients: Sequence[ClientRecord],
    *,
    max_slowdown: float | None = None,
    max_p99_ms: float | None = None,
    gpu_lost: str | None = None,
) -> dict[str, Any] | None:
    """Return why a co-run broke, `None` for one that met its criteria, was interrupted or unproved.

    `gpu_lost` says in words that the GPU no longer answered. `results` are what the launcher saw of
    the clients, `clients` their records in the same order. The answer has `kind`, `client` and
    `label` (`None` for a bound), `detail` in words, and `lost_neighbors`, the numbers of those that
    were taken along.
    """
    if gpu_lost and co_run.outcome != "interrupted":
        return _reason(GPU_LOST, gpu_lost)
    if co_run.outcome in ("failed", "timeout"):
        return _failure(co_run, results, clients)
    bound = breaking_point([co_run], clients, max_slowdown=max_slowdown, max_p99_ms=max_p99_ms)
    return _reason(bound["criterion"], bound["detail"]) if bound["criterion"] else None


def describe(reason: Mapping[str, Any]) -> str:
    """Return the reason as half a sentence for a terminal."""
    kind, detail = reason["kind"], reason["detail"]
    who = f"client {reason['client']} ({reason['label']})"
    if kind == "oom":
        said = f": {_OUT_OF_MEMORY.sub('', detail)}" if detail else ""
        text = f"{who} ran out of memory{said}"
    else:
        text = TEXTS.get(kind, "{detail}").format(who=who, detail=detail)
    lost = reason["lost_neighbors"] if kind != "lost_neighbor" else []
    return text + (f"; it took along client {', '.join(map(str, lost))}" if lost else "")


def _failure(
    co_run: CoRunRecord, results: Sequence[ClientResult], clients: Sequence[ClientRecord]
) -> dict[str, Any]:
    # A client without proof did not fail: it was hardly there when another one ended the window.
    failed = [client for client in clients if client.status not in ("ok", "invalid")]
    if not failed or all(client.reason == co_run.reason for client in failed):
        return _reason("refused", co_run.reason)
    seconds = {
        result.planned.client: (last_event(result.events, "error") or {}).get("time_seconds")
        for result in results
    }
    first_seconds = min((value for value in seconds.values() if value is not None), default=None)
    kinds = {one.client: _kind(one, seconds[one.client], first_seconds) for one in failed}
    cause = min(failed, key=lambda client: KINDS_BY_CAUSE.index(kinds[client.client]))
    lost = [client for client, kind in kinds.items() if kind == "lost_neighbor"]
    return _reason(kinds[cause.client], cause.reason, cause, lost)


def _kind(client: ClientRecord, seconds: float | None, first_seconds: float | None) -> str:
    """What became of one client.

    CUDA tells every client of an MPS server of a fault, often in the words of the one that caused
    it, so under MPS whoever fails after another counts as taken along.
    """
    if client.status == "failed" and client.cause in TOLD_KINDS:
        return client.cause
    if client.status in ("oom", "killed", "timeout"):
        return client.status
    said = "\n".join([str(client.reason), *client.stderr_tail])
    came_later = seconds is not None and first_seconds is not None and seconds > first_seconds
    is_lost = _LOST_TEXT.search(said) or (client.mode == MODE_MPS and came_later)
    return "lost_neighbor" if is_lost else "crash"


def _reason(
    kind: str, detail: str | None, cause: ClientRecord | None = None, lost: Sequence[int] = ()
) -> dict[str, Any]:
    return {
        "kind": kind,
        "client": cause.client if cause else None,
        "label": cause.label if cause else None,
        "detail": detail,
        "lost_neighbors": list(lost),
    }
