"""From what the launcher saw to the lines of `records.jsonl`: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.hardware import host_limit
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.event_log import jobs_of, last_event, unit_spans, units_in_window
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.metrics import scores
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_SHARE_BASELINE, pooled
from benchmarking.records.types import (
    ClientRecord,
    CoRunRecord,
    Evidence,
    GpuFigures,
    Proof,
    Units,
)
from benchmarking.records.writing import first_of

NEVER_MEASURED = Proof("unverified", [Evidence("it was measured", "no", None)])


@dataclass
class Reference:
    """Baselines by job: on the whole GPU, and on the client's own share where it has one."""

    has_own_shares: bool = False
    whole: dict[str, ClientRecord] = field(default_factory=dict)
    whole_joules: dict[str, float | None] = field(default_factory=dict)
    share: dict[str, ClientRecord] = field(default_factory=dict)
    _repeats: dict[str, dict[str, tuple[CoRunRecord, ClientRecord]]] = field(default_factory=dict)

    def add(self, record: CoRunRecord, client: ClientRecord) -> None:
        """Take in a job alone that ended well; one measured again counts in place of the first."""
        if record.outcome != "ok" or client.status != "ok":
            return
        if record.phase == PHASE_SHARE_BASELINE:
            self.share[client.job_key] = client
        if record.phase != PHASE_BASELINE:
            return
        repeats = self._repeats.setdefault(client.job_key, {})
        repeats.pop(record.co_run, None)
        repeats[record.co_run] = (record, client)
        cards = [one.gpu for one, _ in repeats.values()]
        joules = scores.all_known(gpu.energy_joules if gpu else None for gpu in cards)
        self.whole[client.job_key] = pooled([one for _, one in repeats.values()])
        self.whole_joules[client.job_key] = None if joules is None else sum(joules)

    def repeats_of(self, job_key: str) -> dict[str, ClientRecord]:
        """Return what was measured of a job alone here, by co-run, the newest last."""
        return {name: client for name, (_, client) in self._repeats.get(job_key, {}).items()}


def client_record(
    co_run: CoRunResult,
    client: ClientResult,
    proof: Proof | None,
    baseline: ClientRecord | None,
    gpu: GpuFigures | None,
) -> ClientRecord:
    """Return the record of one client.

    `proof` is `None` for a client that was never measured. A client that ran well but not under the
    mode is `invalid`, one that was stopped early with its co-run `interrupted`. `baseline` is the
    record of the same job alone on the whole GPU; without it, slowdown and normalized progress are
    unknown. `gpu` holds the card's figures in the window, where they are known.
    """
    start, end = co_run.window_start_seconds, co_run.window_end_seconds
    status, reason = client.status, client.reason
    if status == "ok" and proof is not None and proof.verdict == "invalid":
        status, reason = "invalid", proof.reason
    elif status == "ok" and co_run.outcome == "interrupted":
        # It ended well because it was told to, before the co-run was over.
        status, reason = "interrupted", co_run.reason
    units: dict[str, Units] = {}
    latency_ms: dict[str | None, list[float]] = {}
    if start is not None and end is not None:
        units, latency_ms = units_in_window(client.events, start, end)
    progress = None
    if status == "ok":
        reference = baseline.units if baseline else {}
        if co_run.planned.phase == PHASE_BASELINE:  # it is its own
            reference = units
        alone = scores.unit_seconds(reference)
        progress = scores.normalized_progress(units, alone)
    job, loaded, done = (
        last_event(client.events, name) or {} for name in ("job", "loaded", "done")
    )
    record = ClientRecord(
        **_place(co_run),
        client=client.planned.client,
        workload=client.planned.workload,
        label=client.planned.label,
        job_key=client.planned.job_key,
        status=status,
        reason=reason,
        cause=client.cause,
        memory=client.memory,
        proof=proof or NEVER_MEASURED,
        jobs=jobs_of(client.events, start and start - co_run.settle_seconds, end),
        units=units,
        latency_ms=latency_ms.pop(None, None),
        apart_latency_ms={kind: ms for kind, ms in latency_ms.items() if kind} or None,
        figures=job.get("figures") or {},
        identity=client.identity,
        host_cpu_seconds=done.get("host_cpu_seconds"),
        window_host_cpu_fraction=client.window_host_cpu_fraction,
        busiest_thread_cpu_fraction=client.busiest_thread_cpu_fraction,
        cpu_wait_fraction=client.cpu_wait_fraction,
        peak_memory_mib=done.get("peak_memory_mib"),
        startup_seconds=loaded.get("startup_seconds"),
        exit_code=client.exit_code,
        stderr_tail=client.stderr_tail,
        slowdown=1 / progress if progress else None,
        normalized_progress=progress,
    )
    record.host_limited = host_limit.is_host_limited(record, gpu, baseline)
    return record


def _place(co_run: CoRunResult) -> dict[str, Any]:
    """What the records of a co-run and of its clients have in common."""
    planned = co_run.planned
    return {
        "phase": planned.phase,
        "co_run": planned.co_run,
        "mode": planned.mode,
        "clients": len(planned.clients),
        "repeat": planned.repeat,
        "window_start_seconds": co_run.window_start_seconds,
        "window_end_seconds": co_run.window_end_seconds,
    }


def co_run_record(
    co_run: CoRunResult,
    clients: Sequence[ClientRecord],
    gpu: GpuFigures | None,
    *,
    mode_failure: str | None = None,
    gpu_lost: str | None = None,
    reference: Reference,
    host_cores: int | None = None,
) -> CoRunRecord:
    """Return the record of one co-run.

    `mode_failure` says that the mode was no longer in force afterwards, `gpu_lost` that the GPU no
    longer answered. A co-run that ran well while one client lacks proof, or either was lost, is
    `invalid`; that of clients which failed has the lost GPU in its reason. Figures against the
    baselines of `reference` are given for whole co-runs only; a baseline is its own reference.
    `host_cores` is how many cores the clients may use.
    """
    outcome, reason = co_run.outcome, co_run.reason
    unproved = [client for client in clients if client.status == "invalid"]
    if outcome == "ok" and (unproved or gpu_lost or mode_failure):
        outcome = "invalid"
        whys = [f"client {one.client} ({one.label}): {one.reason}" for one in unproved]
        reason = gpu_lost or mode_failure or first_of(whys)
    elif gpu_lost:
        reason = f"{gpu_lost}; {reason}" if reason else gpu_lost
    baselines, joules = dict(reference.whole), dict(reference.whole_joules)
    share = reference.share if reference.has_own_shares else None
    if co_run.planned.phase == PHASE_BASELINE and clients[0].status == "ok":
        baselines[clients[0].job_key] = clients[0]
        joules[clients[0].job_key] = gpu.energy_joules if gpu else None
    if outcome in ("interrupted", "invalid"):
        baselines, share = {}, None
    summary = scores.summarize_co_run(
        clients, baselines, gpu, energy_alone_joules=joules, share_baselines=share
    )
    return CoRunRecord(
        **_place(co_run),
        outcome=outcome,
        reason=reason,
        settle_seconds=co_run.settle_seconds,
        go_skew_ms=co_run.go_skew_ms,
        start_skew_ms=start_skew_ms(co_run.clients),
        gpu=gpu,
        warnings=host_limit.warnings(gpu, clients, host_cores),
        summary=summary,
    )


def start_skew_ms(clients: Sequence[ClientResult]) -> float | None:
    """Return the time between the first and the last client's first unit, of all clients.

    `None` for fewer than two clients, or when one of them never did a unit.
    """
    spans = [[at for _, at, _ in unit_spans(one.events)] for one in clients]
    starts = [min(times) for times in spans if times]
    if len(starts) < max(2, len(clients)):
        return None
    return 1000 * (max(starts) - min(starts))
