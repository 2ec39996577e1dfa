"""One co-run at a time: launched, judged by what was seen of it, written to the run's records."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
)
from benchmarking.hardware.gpu_samples import summarize_samples
from benchmarking.measuring import proofs, stop_reasons
from benchmarking.measuring.baselines import identity_differences
from benchmarking.measuring.client import Client, client_base_environment
from benchmarking.measuring.co_run_records import Reference, client_record, co_run_record
from benchmarking.measuring.event_log import unit_spans
from benchmarking.measuring.launcher import CoRunResult, FinishRule, Launcher, Timeouts
from benchmarking.measuring.progress import Progress
from benchmarking.measuring.sampler import Sampler
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.modes.mps import PARTITION_VARIABLE
from benchmarking.modes.names import MODE_MIG
from benchmarking.modes.sharing_mode import GPU_ANSWERS, GPU_LOST_FIX, SharingMode
from benchmarking.planning.limits import PERCENTAGE_VARIABLE
from benchmarking.planning.plan import PlannedCoRun
from benchmarking.planning.workloads import COMMAND_WORKLOAD
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_CO_RUN, PHASE_NULL, RunWriter
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures, Sample
from benchmarking.suite.resume import EarlierPart
from benchmarking.suite.setup import Setup

# Past what a time service adds to the wall clock, or takes from it, in slewing.
CLOCK_TOLERANCE_SECONDS = 2.0
# Between two samples, past what a busy machine makes of their interval; and what a unit in hand may
# end before or after.
PAUSE_SECONDS, PAUSE_MARGIN = 3.0, 1.0

_Record = TypeVar("_Record", ClientRecord, CoRunRecord)
Measured = tuple[CoRunRecord, list[ClientRecord]]


@dataclass
class Measurement:
    """A run under way: what to do, where to write it, whom to ask and tell, what is measured.

    `earlier` is what a run that goes on has of it already; `round` the one repeat that is to be
    measured now, counted from 1 on, `None` for all. `reference` are the baselines so far, `done`
    the names of what has been run.
    """

    setup: Setup
    writer: RunWriter
    stop: StopSignal
    progress: Progress
    earlier: EarlierPart | None = None
    round: int | None = None
    reference: Reference = field(init=False)
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Make the sampler and the launcher; nothing is started."""
        setup, writer = self.setup, self.writer
        self.reference = Reference(has_own_shares=setup.mode.has_own_shares)
        self.sampler = Sampler(writer.samples_path, writer.monitor_log_path, gpu=setup.gpu_uuid)
        self._launcher = Launcher(
            client_base_environment(os.environ),
            timeouts=Timeouts(timeout=setup.request.timeout_seconds),
            stop_signal=self.stop,
            say=self.progress.say,
        )

    def note(self, text: str | None) -> None:
        """Say something and keep it with the run."""
        text = self.setup.secrets.hide(text)
        if text:
            self.progress.say(text)
        if text and text not in self.writer.manifest.notes:
            self.writer.update_manifest(notes=[*self.writer.manifest.notes, text])

    def describe_environment(self, found: Mapping[str, Any]) -> None:
        """Fill in what is not known of the environment yet."""
        environment = msgspec.structs.asdict(self.writer.manifest.environment)
        unknown = {
            key: value for key, value in found.items()
            if key in environment and value is not None and environment[key] in (None, {})
        }  # fmt: skip
        if unknown:
            self.writer.update_manifest(environment={**environment, **unknown})

    def finished(self, planned: PlannedCoRun) -> Measured | None:
        """Return the records of a co-run that an earlier part of the run has an answer for."""
        return self.earlier.finished(planned.co_run) if self.earlier else None

    def run_one(
        self, planned: PlannedCoRun, rule: FinishRule, *, is_again: bool = False
    ) -> Measured:
        """Run one co-run and write its records; return that of it and those of its clients.

        One that is on record is taken from there, unless it `is_again` to be run.

        Raises `RunEnded` when it did not end well, `SuiteError` when the clients were not what
        they should be: what follows would build on it.
        """
        if self.stop.requested:
            raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
        on_record = None if is_again else self.finished(planned)
        if on_record and self.round is None:
            self.progress.say(f"{planned.co_run} is done already")
        record, clients = on_record or self._measure(planned, rule)
        self.reference.add(record, clients[0])
        _raise_unless_well(record, clients)
        return record, clients

    def _measure(self, planned: PlannedCoRun, rule: FinishRule) -> Measured:
        is_alone = planned.phase in (PHASE_BASELINE, PHASE_NULL)
        mode = self.setup.alone_mode if is_alone else self.setup.mode

        def before_go(clients: list[Client]) -> None:
            self._check_identities(clients, {} if is_alone else self.reference.share)
            mode.observe()

        clock = wall_clock_offset()
        seen = self._launcher.run(planned, self.writer.client_paths, rule, before_go)
        self.done.add(planned.co_run)
        samples = self._samples_of(seen)
        record, clients = self._judge(seen, mode, samples)
        foreign = proofs.foreign_pids_in_window(seen, samples)
        record.warnings += [
            *few_units_warnings(seen, rule), *pause_warnings(seen, samples), *clock_warnings(clock),
            *proofs.contention_warnings(foreign),
        ]  # fmt: skip
        record.is_contended = bool(foreign)
        clients, record = [self._shown(client) for client in clients], self._shown(record)
        for client in clients:
            self.writer.append_record(client)
        self.writer.append_record(record)
        for warning in record.warnings:
            self.progress.say(warning)
        if record.stop_reason is not None:
            why = stop_reasons.describe(record.stop_reason)
            self.progress.say(f"{planned.co_run} does not hold: {why}")
        if seen.refusal is not None:
            raise seen.refusal
        return record, clients

    def _shown(self, record: _Record) -> _Record:
        """Return a record without the secrets that clients may have told."""
        return msgspec.convert(self.setup.secrets.hide(msgspec.to_builtins(record)), type(record))

    def _check_identities(self, clients: list[Client], shares: Mapping[str, ClientRecord]) -> None:
        """Refuse clients on another kind of device, or unlike those of the baseline.

        `shares` are the baselines on shares of the card: in a part of the run that is measured
        later, partitions may have been made anew.
        """
        wanted = "cpu" if self.setup.is_cpu_demo else "cuda"
        for client in clients:
            identity = client.identity or {}
            # A command says nothing of its device: the driver's process lists do.
            is_command = client.planned.workload == COMMAND_WORKLOAD
            if not is_command and identity.get("device") != wanted:
                raise SuiteError(
                    f"{client.name} ran on {identity.get('device')} though a GPU is there: torch "
                    f"{(identity.get('versions') or {}).get('torch')} cannot use it with driver "
                    f"{(self.setup.gpu or {}).get('driver_version')}; install a build of torch "
                    "that fits, or give --device cpu", EXIT_NO_GPU,
                )  # fmt: skip
            job_key = client.planned.job_key
            unlike = [
                *identity_differences(self.reference.whole.get(job_key), identity),
                *identity_differences(shares.get(job_key), identity, ["multiprocessor_count"]),
            ]
            if unlike:
                raise SuiteError(
                    f"{client.name} is unlike its baseline: {'; '.join(unlike)}", EXIT_USAGE
                )
        if self.setup.mode.name != MODE_MIG:
            first = clients[0].identity or {}
            # A client with a part of the multiprocessors is shown no others.
            told = clients[0].planned.environment
            is_limited = PERCENTAGE_VARIABLE in told or PARTITION_VARIABLE in told
            seen = None if is_limited else first.get("multiprocessor_count")
            versions = first.get("versions") or {}
            self.describe_environment({"multiprocessor_count": seen, "versions": versions})

    def _samples_of(self, seen: CoRunResult) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        if seen.window_end_seconds is not None:
            samples = list(self.sampler.samples_past(seen.window_end_seconds))
            self.note(self.sampler.failure)
        for complaint in self.sampler.complaints():
            self.note(complaint)
        return samples

    def _judge(
        self, seen: CoRunResult, mode: SharingMode, samples: list[dict[str, Any]]
    ) -> Measured:
        """Return the records of what was seen of a co-run."""
        planned, reference, request = seen.planned, self.reference, self.setup.request
        gpu = self._gpu_figures(seen, samples)
        gpu_lost, mode_failure = _lost(mode)
        clients = [
            client_record(seen, client, proof, reference.whole.get(client.planned.job_key), gpu)
            for client, proof in zip(
                seen.clients, proofs.judge_clients(mode, seen, samples), strict=True
            )
        ]
        record = co_run_record(
            seen,
            clients,
            gpu,
            mode_failure=mode_failure,
            gpu_lost=gpu_lost,
            reference=reference,
            host_cores=self.setup.cores,
        )
        # The bounds are for jobs that share the GPU.
        is_shared = planned.phase == PHASE_CO_RUN
        record.stop_reason = stop_reasons.stop_reason(
            record,
            seen.clients,
            clients,
            max_slowdown=request.max_slowdown if is_shared else None,
            max_p99_ms=request.slo_ms if is_shared else None,
            gpu_lost=gpu_lost,
        )
        return record, clients

    def _gpu_figures(self, seen: CoRunResult, samples: list[dict[str, Any]]) -> GpuFigures | None:
        start, end = seen.window_start_seconds, seen.window_end_seconds
        if start is None or end is None or not samples:
            return None
        figures = summarize_samples(msgspec.convert(samples, list[Sample]), start, end)
        if self.setup.is_cpu_demo:
            # A GPU that is there but not in use says nothing about this run.
            return GpuFigures(host_cpu_percent=figures.host_cpu_percent)
        return figures


def _lost(mode: SharingMode) -> tuple[str | None, str | None]:
    """Say whether the GPU no longer answers, or else whether the mode is no longer in force."""
    lost = next((item for item in mode.check() if item.ok is False), None)
    if lost is None:
        return None, None
    if lost.check == GPU_ANSWERS:
        return f"the GPU was lost, the driver no longer answers for it: {GPU_LOST_FIX}", None
    return None, f"{lost.check}: {lost.found}"


def _raise_unless_well(record: CoRunRecord, clients: list[ClientRecord]) -> None:
    outcome, what = record.outcome, f"{record.co_run}: {record.reason}"
    if outcome == "ok":
        return
    if outcome == "interrupted":
        raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
    # What follows a lost GPU would only meet the same.
    is_lost = (record.stop_reason or {}).get("kind") == stop_reasons.GPU_LOST
    if outcome == "invalid":
        raise RunEnded("invalid", EXIT_NO_GPU if is_lost else EXIT_INVALID, what)
    said = next(
        (client.stderr_tail[-1] for client in clients
         if client.status != "ok" and client.stderr_tail and not is_lost
         and str(client.reason) not in client.stderr_tail[-1]), None,
    )  # fmt: skip
    no_gpu = is_lost or any(client.exit_code == EXIT_NO_GPU for client in clients)
    reason = f"{what} ({said})" if said else what
    raise RunEnded("failed", EXIT_NO_GPU if no_gpu else EXIT_FAILED, reason)


def wall_clock_offset() -> float:
    """Return how far the wall clock is from the monotonic one: it changes when it is set."""
    return time.time() - time.monotonic()


def few_units_warnings(seen: CoRunResult, rule: FinishRule) -> list[str]:
    """Name the clients whose window ended at its longest, before they had the units asked for."""
    opening, end = seen.window_start_seconds, seen.window_end_seconds
    if rule.window_seconds is None or seen.outcome != "ok" or opening is None or end is None:
        return []
    units = {
        client.name: sum(opening < at + s <= end for _, at, s in unit_spans(client.events))
        for client in seen.clients
    }
    return [
        f"{name} finished {count} units of work in the window, fewer than {rule.min_units}: its "
        "figures are rough, a longer --window makes them better"
        for name, count in units.items()
        if count < rule.min_units
    ]


def pause_warnings(seen: CoRunResult, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say, in one sentence or none, how long all stood still in the window, suspended together.

    That is, between two samples, and with no client's unit of work finished meanwhile.
    """
    opening, end = seen.window_start_seconds, seen.window_end_seconds
    if opening is None or end is None:
        return []
    ends = [at + s for client in seen.clients for _, at, s in unit_spans(client.events)]
    times = [sample["time_seconds"] for sample in samples]
    pauses = [
        min(later, end) - max(earlier, opening)
        for earlier, later in itertools.pairwise(times)
        if later - earlier > PAUSE_SECONDS
        and not any(earlier + PAUSE_MARGIN < at < later - PAUSE_MARGIN for at in ends)
    ]
    seconds = max(pauses, default=0.0)
    if seconds < PAUSE_MARGIN:
        return []
    return [
        f"jobs and sampler stood still for {seconds:.0f} s in the window, as where a scheduler or "
        "a virtual machine suspends them: the figures count that time, so measure again"
    ]


def clock_warnings(offset: float) -> list[str]:
    """Say, in one sentence or none, by how much the wall clock was set since it had an `offset`."""
    seconds = wall_clock_offset() - offset
    if abs(seconds) <= CLOCK_TOLERANCE_SECONDS:
        return []
    said = f"the clock was set by {seconds:+.0f} s meanwhile"
    return [f"{said}; figures come from the monotonic clock"]
