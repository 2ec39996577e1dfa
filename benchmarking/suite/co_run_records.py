"""From what the launcher saw to the lines of `records.jsonl`: pure functions over plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarking.hardware import host_limit
from benchmarking.metrics import scores
from benchmarking.modes.sharing_mode import INVALID, UNVERIFIED, Evidence, Proof
from benchmarking.records.run_folder import PHASE_BASELINE
from benchmarking.suite.event_log import first_unit_seconds, jobs_of, last_event, units_in_window
from benchmarking.suite.launcher import (
    OUTCOME_INTERRUPTED,
    OUTCOME_INVALID,
    OUTCOME_OK,
    STATUS_INVALID,
    STATUS_OK,
    ClientResult,
    CoRunResult,
)

Record = dict[str, Any]

NEVER_MEASURED = Proof(UNVERIFIED, (Evidence("it was measured", "no", None),))


def client_record(
    co_run: CoRunResult, client: ClientResult, proof: Proof | None, baseline: Record | None
) -> Record:
    """Return the record of one client.

    `proof` is `None` for a client that was never measured. A client that ran well but not under the
    mode is `invalid`, one that was stopped early with its co-run `interrupted`. `baseline` is the
    record of the same job alone on the whole GPU; without it, slowdown and normalized progress are
    unknown.
    """
    start, end = co_run.window_start_seconds, co_run.window_end_seconds
    has_window = start is not None and end is not None
    units, latency_ms = units_in_window(client.events, start, end) if has_window else ({}, None)
    is_invalid = client.status == STATUS_OK and proof is not None and proof.verdict == INVALID
    status = STATUS_INVALID if is_invalid else client.status
    reason = proof.reason if is_invalid else client.reason
    if status == STATUS_OK and co_run.outcome == OUTCOME_INTERRUPTED:
        # It ended well because it was told to, before the co-run was over.
        status, reason = OUTCOME_INTERRUPTED, co_run.reason
    last_job = last_event(client.events, "job") or {}
    loaded = last_event(client.events, "loaded") or {}
    done = last_event(client.events, "done") or {}
    planned = co_run.planned
    # A baseline is its own reference.
    reference = units if planned.phase == PHASE_BASELINE else (baseline or {}).get("units") or {}
    progress = (
        scores.normalized_progress(units, scores.unit_seconds(reference))
        if status == STATUS_OK
        else None
    )
    return {
        "record": "client",
        "phase": planned.phase,
        "co_run": planned.co_run,
        "mode": planned.mode,
        "clients": len(planned.clients),
        "repeat": planned.repeat,
        "client": client.planned.client,
        "workload": client.planned.workload,
        "label": client.planned.label,
        "job_key": client.planned.job_key,
        "status": status,
        "reason": reason,
        "cause": client.cause,
        "memory": client.memory,
        "proof": (proof or NEVER_MEASURED).to_dict(),
        "window_start_seconds": start,
        "window_end_seconds": end,
        "jobs": jobs_of(client.events, start, end),
        "units": units,
        "latency_ms": latency_ms,
        "figures": last_job.get("figures") or {},
        "identity": client.identity,
        "host_cpu_seconds": done.get("host_cpu_seconds"),
        "window_host_cpu_fraction": _fraction(client.window_host_cpu_seconds, start, end),
        "busiest_thread_cpu_fraction": _fraction(client.window_busiest_thread_seconds, start, end),
        "peak_memory_mib": done.get("peak_memory_mib"),
        "startup_seconds": loaded.get("startup_seconds"),
        "exit_code": client.exit_code,
        "stderr_tail": client.stderr_tail,
        "slowdown": 1 / progress if progress else None,
        "normalized_progress": progress,
    }


def _fraction(seconds: float | None, start: float | None, end: float | None) -> float | None:
    if seconds is None or start is None or end is None or end <= start:
        return None
    return seconds / (end - start)


def co_run_record(
    co_run: CoRunResult,
    client_records: list[Record],
    gpu: Record | None,
    *,
    mode_failure: str | None = None,
    gpu_lost: str | None = None,
    baselines: Mapping[str, Record],
    energy_alone_joules: Mapping[str, float | None],
    share_baselines: Mapping[str, Record] | None = None,
    host_cores: int | None = None,
) -> Record:
    """Return the record of one co-run.

    `mode_failure` says that the mode was no longer in force afterwards, `gpu_lost` that the GPU no
    longer answered. A co-run that ran well while one client lacks proof, or either was lost, is
    `invalid`; that of clients which failed has the lost GPU in its reason. Figures against the
    baselines are given for whole co-runs only. `host_cores` is how many cores the clients may use.
    """
    outcome, reason = co_run.outcome, co_run.reason
    unproved = [record for record in client_records if record["status"] == STATUS_INVALID]
    if outcome == OUTCOME_OK and (unproved or gpu_lost or mode_failure):
        outcome = OUTCOME_INVALID
        reason = (
            gpu_lost
            or mode_failure
            or "; ".join(
                f"client {record['client']} ({record['label']}): {record['reason']}"
                for record in unproved
            )
        )
    elif gpu_lost:
        reason = f"{gpu_lost}; {reason}" if reason else gpu_lost
    is_comparable = outcome not in (OUTCOME_INTERRUPTED, OUTCOME_INVALID)
    planned = co_run.planned
    return {
        "record": "co_run",
        "phase": planned.phase,
        "co_run": planned.co_run,
        "mode": planned.mode,
        "clients": len(planned.clients),
        "repeat": planned.repeat,
        "outcome": outcome,
        "reason": reason,
        "window_start_seconds": co_run.window_start_seconds,
        "window_end_seconds": co_run.window_end_seconds,
        "go_skew_ms": co_run.go_skew_ms,
        "start_skew_ms": start_skew_ms(co_run.clients),
        "gpu": gpu,
        "warnings": host_limit.warnings(gpu, client_records, host_cores),
        "summary": scores.summarize_co_run(
            client_records,
            baselines if is_comparable else {},
            gpu,
            energy_alone_joules=energy_alone_joules,
            share_baselines=share_baselines if is_comparable else {},
        ),
    }


def start_skew_ms(clients: Iterable[ClientResult]) -> float | None:
    """Return the time between the first and the last client's first unit, of all clients.

    `None` for fewer than two clients, or when one of them never did a unit.
    """
    starts = [first_unit_seconds(client.events) for client in clients]
    known = [start for start in starts if start is not None]
    if len(starts) < 2 or len(known) < len(starts):
        return None
    return 1000 * (max(known) - min(known))
