"""What a suite run will do, and whether it can be done: the GPU, the mode, the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.hardware import nvml
from benchmarking.hardware.nvidia_tools import time_slice
from benchmarking.modes.choice import make_mode
from benchmarking.modes.mode_evidence import Evidence
from benchmarking.modes.sharing_mode import ModeNotInForceError, SharingMode
from benchmarking.modes.whole_gpu import time_slicing_warning
from benchmarking.records import run_folder
from benchmarking.records.run_folder import PHASE_BASELINE, Run
from benchmarking.suite import mig_layout, occupancy, pairs
from benchmarking.suite import plan as planning
from benchmarking.suite.mps_knobs import MpsKnobs
from benchmarking.suite.plan import (
    MODE_CPU_DEMO,
    MODE_EXCLUSIVE,
    MODE_MIG,
    MODE_MPS,
    MODE_TIME_SLICING,
    SIZE_CPU,
    SIZE_GUIDE,
    SIZE_QUICK,
    JobOptions,
    Plan,
    PlannedClient,
    PlannedCoRun,
)
from benchmarking.suite.plan_file import PlanFile, plan_clients

PROJECT_ROOT = Path(__file__).resolve().parents[2]

EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_NO_GPU = 0, 1, 2, 3
EXIT_MODE_NOT_IN_FORCE, EXIT_INVALID, EXIT_INTERRUPTED = 4, 5, 130


class SuiteError(Exception):
    """The run cannot be done as asked; the message names the fix."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep the message and the exit code that belongs to it."""
        super().__init__(message)
        self.exit_code = exit_code


class RunEnded(Exception):
    """The run ends early, with an outcome for the manifest and an exit code."""

    def __init__(self, outcome: str, exit_code: int, reason: str | None = None) -> None:
        """Keep what becomes of the run, and why in words."""
        super().__init__(reason or outcome)
        self.outcome = outcome
        self.exit_code = exit_code
        self.reason = reason


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    mode: str = MODE_TIME_SLICING
    mix: str = "mixed"
    counts: tuple[int, ...] = (4,)
    quick: bool = False
    repeats: int = 1
    budget_minutes: float | None = None
    min_seconds: float | None = None
    window_seconds: float | None = None
    timeout_seconds: float = 1800.0
    baseline: str | None = None
    results_dir: Path = Path("results")
    run_id: str | None = None
    gpu: str | None = None
    engine: str | None = None
    precision: str | None = None
    seed: int = 42
    device: str = "auto"
    dataset: str | None = None
    data_dir: str | None = None
    plan_file: PlanFile | None = None
    bisect: bool = False
    until_break: bool = False
    max_slowdown: float | None = None
    slo_ms: float | None = None
    mps_knobs: MpsKnobs = field(default_factory=MpsKnobs)
    mig_layout: tuple[str, ...] = ()
    job_arguments: tuple[str, ...] = ()
    beside_others: bool = False

    @property
    def co_run_prefix(self) -> str:
        """What the names of its co-runs begin with: under other limits they are other co-runs."""
        return f"{self.mix}{self.mps_knobs.name}"

    @property
    def is_pairs(self) -> bool:
        """Whether every job runs beside each other one, two at a time."""
        return self.mix == pairs.MIX and self.plan_file is None

    @property
    def mix_size(self) -> int:
        """How many clients make the whole mix once."""
        if self.is_pairs:
            return pairs.CLIENTS
        return len(self.plan_file.members if self.plan_file else planning.MIXES[self.mix])

    @property
    def has_latency(self) -> bool:
        """Whether some client of the mix has response times."""
        if self.plan_file:
            return self.plan_file.has_latency
        if self.is_pairs:
            return True
        kinds = (planning.WORKLOADS[workload] for workload in planning.MIXES[self.mix])
        return any(kind.has_latency for kind in kinds)


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
    baseline_run: Run | None = None
    timeslice: str | None = None
    is_contended: bool = False

    @property
    def is_cpu_demo(self) -> bool:
        """Whether there is no GPU in use."""
        return self.mode.name == MODE_CPU_DEMO

    @property
    def mps_limits(self) -> dict[str, Any] | None:
        """What MPS clients are limited to, by kind of limit; `None` where nothing is."""
        if self.mode.name != MODE_MPS or self.request.mps_knobs == MpsKnobs():
            return None
        limits = dataclasses.asdict(self.request.mps_knobs)
        return {name: list(values) for name, values in limits.items()}

    def manifest(self, command: list[str]) -> dict[str, Any]:
        """Return the manifest's fields as far as they are known before anything runs."""
        gpu, request = self.gpu or {}, self.request
        return {
            "command": command,
            "mode": request.mode,
            "effective_mode": self.mode.name,
            "mix": request.mix,
            "is_pairs": request.is_pairs,
            "job_size": self.job_size,
            "seed": request.seed,
            "mps_limits": self.mps_limits,
            "mig_layout": list(request.mig_layout) or None,
            "is_contended": self.is_contended,
            "bounds": {"max_slowdown": request.max_slowdown, "max_p99_ms": request.slo_ms},
            "plan_file": request.plan_file.to_dict() if request.plan_file else None,
            "plan": self.plan.to_dict(),
            "environment": {
                "gpu_name": gpu.get("name"),
                "gpu_uuid": gpu.get("uuid"),
                "gpu_memory_mib": gpu.get("memory_total_mib"),
                "multiprocessor_count": None,
                "driver_version": gpu.get("driver_version"),
                "cuda_version": gpu.get("cuda_driver_version"),
                "timeslice": self.timeslice,
                "versions": {},
                "host_cores": self.cores,
                "os": None,
                "git_commit": None,
                "git_dirty": None,
            },
            "mode_evidence": [item.to_dict() for item in self.evidence],
            "baseline_run_id": None,
            "notes": list(self.notes),
        }


@contextlib.contextmanager
def no_mps_folder() -> Iterator[Path]:
    """Give an empty folder in which no MPS daemon answers, for clients that must have none."""
    with tempfile.TemporaryDirectory(prefix="no-mps-") as folder:
        yield Path(folder)


def prepare(
    request: Request, empty_folder: Path, environment: Mapping[str, str], *, require_mode: bool
) -> Setup:
    """Find the GPU, check the mode, lay out the plan.

    With `require_mode` a mode that is not in force is an error (`SuiteError`, code 4); without, it
    is only written among the evidence, as for `--dry-run`.
    """
    if request.slo_ms is not None and not request.has_latency:
        raise SuiteError(
            f"--slo-ms needs jobs with response times, and {request.mix} has none: choose --mix "
            "inference, interactive, mixed or serving, or set latency = true for a command of the "
            "plan",
            EXIT_USAGE,
        )
    gpu, notes = find_gpu(request, environment)
    notes += _notes_on_plan_file(request.plan_file)
    most = max(request.counts)

    def describe() -> Mapping[str, Any] | None:
        return nvml.describe_gpu(gpu["uuid"]) if gpu else None

    def mode_called(name: str) -> SharingMode:
        return make_mode(
            MODE_CPU_DEMO if gpu is None else name, describe, clients=most,
            no_mps_folder=empty_folder, environment=environment, layout=request.mig_layout,
        )  # fmt: skip

    mode, alone_mode = mode_called(request.mode), mode_called(MODE_EXCLUSIVE)
    try:
        evidence = mode.require() if require_mode else mode.check()
    except ModeNotInForceError as error:
        raise SuiteError(str(error), EXIT_MODE_NOT_IN_FORCE) from error
    beside: list[str] = []
    if gpu:
        beside = _notes_on_occupants(gpu["uuid"], may_be=request.beside_others or not require_mode)
    notes += beside
    if gpu and nvml.compute_processes(gpu["uuid"]) is None:
        notes.append("whether other processes are on the GPU could not be asked")
    if gpu and request.mode == MODE_TIME_SLICING:
        warning = time_slicing_warning(most, gpu["uuid"], environment)
        notes += [warning] if warning else []

    baseline_run = _run_called(request.baseline, request.results_dir)
    # A pair's window of seconds has room for small jobs only.
    is_small = request.quick or request.is_pairs
    job_size = SIZE_CPU if gpu is None else SIZE_QUICK if is_small else SIZE_GUIDE
    cores = usable_cores()
    layout, co_runs_of = _lay_out(request, mode, alone_mode, job_size, cores)
    if request.mig_layout and mode.name == MODE_MIG:
        layout, unlike = mig_layout.without_unlike_shares(layout, request.mig_layout)
        notes += [
            f"{label} runs on instances of unlike size: its interference overhead stays unknown"
            for label in unlike
        ]
    return Setup(
        request=request,
        gpu=gpu,
        mode=mode,
        alone_mode=alone_mode,
        plan=layout,
        job_size=job_size,
        cores=cores,
        evidence=evidence,
        notes=notes,
        co_runs_of=co_runs_of,
        baseline_run=baseline_run,
        timeslice=time_slice(gpu) if gpu else None,
        is_contended=bool(beside),
    )


def _lay_out(
    request: Request, mode: SharingMode, alone_mode: SharingMode, job_size: str, cores: int
) -> tuple[Plan, Callable[[int], tuple[PlannedCoRun, ...]]]:
    """Build the plan with every client's environment in it, and what lays out further counts."""
    is_mig = mode.name == MODE_MIG
    options = JobOptions(
        size=job_size,
        seed=request.seed,
        device="cpu" if mode.name == MODE_CPU_DEMO else "cuda",
        engine=request.engine,
        precision=request.precision,
        dataset=request.dataset,
        data_dir=str(Path(request.data_dir).resolve()) if request.data_dir else None,
        slo_ms=request.slo_ms,
        arguments=request.job_arguments,
    )

    where = {"python": sys.executable, "root": str(PROJECT_ROOT)}
    plan_mode = MODE_EXCLUSIVE if request.mode == MODE_EXCLUSIVE else mode.name

    def clients_of(count: int) -> tuple[PlannedClient, ...]:
        if request.plan_file is not None:
            return plan_clients(request.plan_file, count, options, **where)
        return planning.mix_clients(request.mix, count, options, **where)

    def planned(counts: Sequence[int], **baselines: bool) -> Plan:
        asked = {"name": request.co_run_prefix, "repeats": request.repeats,
                 "baseline_mode": alone_mode.name, **baselines}  # fmt: skip
        if request.is_pairs:
            workloads = pairs.pair_workloads(job_size)
            layout = pairs.pairs_plan(plan_mode, workloads, options, **asked, **where)
        else:
            layout = planning.build_plan(plan_mode, clients_of, counts=counts, **asked)
        return layout.with_environments(environment_of)

    def environment_of(run: PlannedCoRun) -> Callable[[PlannedClient], dict[str, str]]:
        under = alone_mode if run.phase == PHASE_BASELINE else mode
        threads = planning.shared_host_environment(cores, len(run.clients))
        limits = request.mps_knobs if under.name == MODE_MPS else MpsKnobs()
        return lambda client: {
            **threads,
            **_own_variables(client, under),
            **under.client_environment(client.client),
            **limits.environment(client.client, len(run.clients)),
        }

    def co_runs_of(count: int) -> tuple[PlannedCoRun, ...]:
        return planned((count,), whole_gpu_baseline=False).co_runs

    whole = request.baseline is None and not is_mig
    return planned(request.counts, whole_gpu_baseline=whole, share_baseline=is_mig), co_runs_of


def _own_variables(client: PlannedClient, under: SharingMode) -> dict[str, str]:
    """What the plan file gives a client; limits of an MPS client are for MPS alone."""
    return {
        name: value
        for name, value in client.environment.items()
        if under.name == MODE_MPS or not name.startswith("CUDA_MPS_")
    }


def _notes_on_occupants(gpu_uuid: str, *, may_be: bool) -> list[str]:
    """Look who is on the GPU before a client of ours is, and raise `SuiteError` or note it."""
    pids = occupancy.occupants(nvml.compute_processes(gpu_uuid) or [])
    if not pids:
        return []
    found = f"other processes are on the GPU: {occupancy.in_words(pids)}"
    if not may_be:
        raise SuiteError(
            f"{found}; wait until they have ended, choose another card with --gpu, or measure "
            "beside them with --beside-others", EXIT_MODE_NOT_IN_FORCE,
        )  # fmt: skip
    return [f"{found}: the GPU is contended, figures hold beside them only"]


def _notes_on_plan_file(plan_file: PlanFile | None) -> list[str]:
    if plan_file is None:
        return []
    notes = [f"plan file {plan_file.path}"]
    if any(entry.command for entry in plan_file.entries):
        notes.append("a command's start-up is part of its runs: use runs that are long beside it")
    return notes


def find_gpu(
    request: Request, environment: Mapping[str, str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the facts of the GPU to use and notes; `None` only where there is no GPU to use.

    Raises `SuiteError`: code 2 for a `--gpu` that does not exist, code 3 where a GPU is there or
    was asked for but cannot be used.
    """
    if request.device == "cpu":
        return None, ["--device cpu: CPU demonstration, whatever mode was asked for"]
    try:
        selector = request.gpu or nvml.visible_gpu(environment)
        gpu = nvml.open_gpu(selector)
    except nvml.GpuHiddenError as error:
        if request.device == "auto":
            return None, [f"{error}: CPU demonstration"]
        raise SuiteError(
            f"--device cuda, but {error}: unset it, or name a GPU by --gpu", EXIT_NO_GPU
        ) from error
    except nvml.GpuNotFoundError as error:
        code = EXIT_USAGE if nvml.unavailable_reason() is None else EXIT_NO_GPU
        raise SuiteError(str(error), code) from error
    except nvml.GpuUnusableError as error:
        raise SuiteError(
            f"{error}; --device cpu gives the CPU demonstration", EXIT_NO_GPU
        ) from error
    if gpu is not None:
        facts = gpu.describe()
        if facts["uuid"] is None:
            raise SuiteError(
                "the driver does not tell the GPU's UUID, so no job can be sent to it: look for "
                "Xid in the kernel's log, and restart", EXIT_NO_GPU,
            )  # fmt: skip
        if str(facts["uuid"]).startswith("MIG-"):
            raise SuiteError(
                f"{selector} is a MIG instance: name the card with --gpu, each client gets an "
                "instance of it", EXIT_USAGE,
            )  # fmt: skip
        return facts, nvml.lost_gpus()
    reason = nvml.unavailable_reason()
    if _nvidia_smi_lists_a_gpu():
        raise SuiteError(
            f"nvidia-smi lists a GPU but it cannot be asked: {reason} "
            "(pip install -r requirements.txt, or --device cpu for the CPU demonstration)",
            EXIT_NO_GPU,
        )
    if request.device == "cuda":
        raise SuiteError(
            f"--device cuda, but there is no GPU: {reason} (leave --device away for the CPU "
            "demonstration)", EXIT_NO_GPU,
        )  # fmt: skip
    return None, [f"no GPU here ({reason}): CPU demonstration, whatever mode was asked for"]


def _nvidia_smi_lists_a_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listing = subprocess.run(
        [program, "-L"], stdin=subprocess.DEVNULL, capture_output=True, check=False,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    # A damaged or lost GPU changes the exit status and adds a line; the others are listed.
    return re.search(r"^GPU \d+: .*\(UUID: ", listing.stdout, re.MULTILINE) is not None


def _run_called(reference: str | None, results_dir: Path) -> Run | None:
    if reference is None:
        return None
    return run_folder.read_run(run_folder.resolve_run(reference, results_dir))


def usable_cores() -> int:
    """Return how many cores this process may use: affinity, and a container's quota if lower."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
