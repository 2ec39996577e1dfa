"""What a suite run will do, and whether it can be done: the GPU, the mode, the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarking import PROJECT_VERSION
from benchmarking.cli import EXIT_MODE_NOT_IN_FORCE, EXIT_USAGE, SuiteError
from benchmarking.hardware import nvml
from benchmarking.hardware.nvidia_tools import time_slice
from benchmarking.measuring.card import find_gpu, look_for_foreign_processes, usable_cores
from benchmarking.modes.choice import make_mode
from benchmarking.modes.names import (
    MODE_CPU_DEMO,
    MODE_EXCLUSIVE,
    MODE_MIG,
    MODE_MPS,
    MODE_MPS_PARTITIONS,
    MODE_TIME_SLICING,
)
from benchmarking.modes.sharing_mode import SharingMode
from benchmarking.modes.whole_gpu import time_slicing_warning
from benchmarking.planning import limits
from benchmarking.planning import plan as planning
from benchmarking.planning.job_lines import JOBS_PLAN
from benchmarking.planning.plan import Plan, PlannedClient, PlannedCoRun
from benchmarking.planning.plan_file import PlanFile
from benchmarking.planning.redaction import Secrets
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_CPU, SIZE_GUIDE, SIZE_QUICK
from benchmarking.records import run_folder
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_NULL, Run
from benchmarking.records.types import METHOD, Evidence, MpsLimits


@dataclass(frozen=True)
class Setup:
    """What will be done, and on what; `gpu` is `None` for the CPU demonstration.

    `co_runs_of` lays out the co-runs of a count that the plan does not have yet. `timeslice` is the
    length of the card's slices where it is known; `is_contended` says that others use the card.
    """

    request: Request
    gpu: Mapping[str, Any] | None
    mode: SharingMode
    alone_mode: SharingMode
    plan: Plan
    job_size: str
    cores: int
    evidence: list[Evidence]
    notes: list[str]
    co_runs_of: Callable[[int], tuple[PlannedCoRun, ...]]
    secrets: Secrets
    baseline_run: Run | None = None
    timeslice: str | None = None
    is_contended: bool = False

    @property
    def is_cpu_demo(self) -> bool:
        """Whether there is no GPU in use."""
        return self.mode.name == MODE_CPU_DEMO

    @property
    def gpu_uuid(self) -> str | None:
        """The GPU by name, `None` on the CPU."""
        return self.gpu["uuid"] if self.gpu else None

    def environment(self) -> dict[str, Any]:
        """Return what is known of the environment; what else there is, the jobs will tell."""
        gpu = self.gpu or {}
        return {
            "gpu_name": gpu.get("name"),
            "gpu_uuid": gpu.get("uuid"),
            "gpu_memory_mib": gpu.get("memory_total_mib"),
            "driver_version": gpu.get("driver_version"),
            "cuda_version": gpu.get("cuda_driver_version"),
            "timeslice": self.timeslice,
            "host_cores": self.cores,
            "project_version": PROJECT_VERSION,
        }

    def manifest(self, command: Sequence[str]) -> dict[str, Any]:
        """Return the manifest's fields as far as they are known before anything runs."""
        request = self.request
        is_limited = self.mode.name == MODE_MPS and request.mps_limits != MpsLimits()
        manifest = {
            "command": list(command),
            "mode": request.mode,
            "effective_mode": self.mode.name,
            "mix": request.mix,
            "is_pairs": request.is_pairs,
            "job_size": self.job_size,
            "method": METHOD,
            "session": request.session,
            "seed": request.seed,
            "mps_limits": msgspec.to_builtins(request.mps_limits) if is_limited else None,
            "mig_layout": list(request.mig_layout) or None,
            "is_contended": self.is_contended,
            "bounds": {"max_slowdown": request.max_slowdown, "max_p99_ms": request.slo_ms},
            "plan_file": request.plan_file.to_dict() if request.plan_file else None,
            "plan": self.plan.to_dict(),
            "environment": self.environment(),
            "mode_evidence": msgspec.to_builtins(self.evidence),
            "baseline_run_id": None,
            "notes": list(self.notes),
        }
        return self.secrets.hide(manifest)


@contextlib.contextmanager
def prepared(request: Request, *, require_mode: bool = True) -> Iterator[Setup]:
    """Find the GPU, check the mode, lay out the plan; give all that while clients may run.

    With `require_mode` a mode that is not in force is an error (`SuiteError`, code 4); without, it
    is only written among the evidence, as for `--dry-run`.
    """
    # An empty folder, in which no MPS daemon answers, for clients that must have none.
    with tempfile.TemporaryDirectory(prefix="no-mps-") as folder:
        yield _prepare(request, Path(folder), require_mode=require_mode)


def _prepare(request: Request, empty_folder: Path, *, require_mode: bool) -> Setup:
    if request.slo_ms is not None and not request.has_latency:
        raise SuiteError(
            f"--slo-ms needs jobs with response times, and {request.mix} has none: choose --mix "
            "inference, interactive, mixed, serving or llm, or set latency = true for a command of "
            "the plan",
            EXIT_USAGE,
        )
    gpu, notes = find_gpu(request, os.environ)
    notes += _notes_on_plan_file(request.plan_file)
    most = max(request.counts)

    def describe() -> Mapping[str, Any] | None:
        return nvml.describe_gpu(gpu["uuid"]) if gpu else None

    def mode_called(name: str) -> SharingMode:
        return make_mode(
            MODE_CPU_DEMO if gpu is None else name, describe, clients=most,
            no_mps_folder=empty_folder, environment=os.environ, layout=request.mig_layout,
        )  # fmt: skip

    variant = MODE_MPS_PARTITIONS if request.mps_limits.partitions else request.mode
    mode, alone_mode = mode_called(variant), mode_called(MODE_EXCLUSIVE)
    evidence = mode.require() if require_mode else mode.check()
    has_limits = request.mps_limits.percentages or request.mps_limits.memory_limits
    if gpu and mode.name == MODE_MPS and has_limits:
        _refuse_limits_before_volta(gpu)
    is_contended = False
    if gpu:
        allowed = request.allow_contention or not require_mode
        is_contended, found = look_for_foreign_processes(gpu["uuid"], allowed=allowed)
        notes += found
        if request.mode == MODE_TIME_SLICING:
            warning = time_slicing_warning(most, gpu["uuid"], os.environ)
            notes += [warning] if warning else []
    # A pair's window of seconds has room for small jobs only.
    is_small = request.quick or request.is_paired
    job_size = SIZE_CPU if gpu is None else SIZE_QUICK if is_small else SIZE_GUIDE
    cores = usable_cores()

    def equipped(run: PlannedCoRun) -> PlannedCoRun:
        under = alone_mode if run.phase in (PHASE_BASELINE, PHASE_NULL) else mode
        return run.map_clients(
            lambda client: dataclasses.replace(
                client,
                environment=_environment_of(client, under, request, cores, len(run.clients)),
            )
        )

    def co_runs_of(count: int) -> tuple[PlannedCoRun, ...]:
        added = planning.co_runs_of(request, mode.name, job_size, (count,))
        return tuple(map(equipped, added))

    plan = planning.build_plan(
        request, mode.name, job_size, has_own_shares=mode.has_own_shares
    ).map_runs(equipped)
    if request.mig_layout and mode.name == MODE_MIG:
        plan, unlike = planning.without_unlike_shares(plan, request.mig_layout)
        notes += [
            f"{label} runs on instances of unlike size: its interference overhead stays unknown"
            for label in unlike
        ]
    baseline_run = None
    if request.baseline is not None:
        folder = run_folder.resolve_run(request.baseline, request.results_dir)
        baseline_run = run_folder.read_run(folder)
    return Setup(
        request=request,
        gpu=gpu,
        mode=mode,
        alone_mode=alone_mode,
        plan=plan,
        job_size=job_size,
        cores=cores,
        evidence=evidence,
        notes=notes,
        co_runs_of=co_runs_of,
        secrets=request.secrets,
        baseline_run=baseline_run,
        timeslice=time_slice(gpu) if gpu else None,
        is_contended=is_contended,
    )


def _refuse_limits_before_volta(gpu: Mapping[str, Any]) -> None:
    """Raise `SuiteError` for a GPU on which MPS passes over limits, as its manual has it."""
    capability = gpu["compute_capability"]
    if capability is not None and float(capability) < 7:
        raise SuiteError(
            f"MPS passes over limits of its clients on {gpu['name']} (compute capability "
            f"{capability}): it has them since Volta, 7.0; leave them out", EXIT_MODE_NOT_IN_FORCE,
        )  # fmt: skip


def _environment_of(
    client: PlannedClient, under: SharingMode, request: Request, cores: int, clients: int
) -> dict[str, str]:
    """What a client's environment adds: its share of the host, its plan's, its mode's."""
    is_mps = under.name == MODE_MPS
    # Limits of an MPS client are for MPS alone.
    own = {
        name: value
        for name, value in client.environment.items()
        if is_mps or not name.startswith("CUDA_MPS_")
    }
    return {
        **planning.shared_host_environment(cores, clients),
        **own,
        **under.client_environment(client.client),
        **(limits.limits_of_client(request.mps_limits, client.client, clients) if is_mps else {}),
    }


def _notes_on_plan_file(plan_file: PlanFile | None) -> list[str]:
    if plan_file is None:
        return []
    is_file = plan_file.path != JOBS_PLAN
    notes = [f"plan file {plan_file.path}"] if is_file else []
    if any(entry.command for entry in plan_file.entries):
        notes.append("a command has to end by itself, and its start-up is part of each run: use "
                     "runs that are long next to it")  # fmt: skip
    return notes
