"""What runs with what, decided before anything runs: jobs, mixes, pairs, command lines.

Every job, mix and pair that there is stands in `workloads`. Pure: no process is started and no file
is touched. A plan is plain data (`to_dict`), so it is printed and saved with the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import PROJECT_ROOT
from benchmarking.modes.names import MODE_CPU_DEMO, MODE_EXCLUSIVE, MODE_MIG, MODE_TIME_SLICING
from benchmarking.planning import limits
from benchmarking.planning.plan_entries import PlanEntry
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import (
    ANTAGONIST,
    COMMAND_SCRIPT,
    COMMAND_WORKLOAD,
    DUTY_STEPS,
    MIXES,
    NOISY_JOBS,
    NOISY_JOBS_QUICK,
    PAIRS_ON_CPU,
    PRESSED,
    PRESSED_QUICK,
    SIZE_CPU,
    WORKLOADS,
)
from benchmarking.records.run_folder import (
    PHASE_BASELINE,
    PHASE_CO_RUN,
    PHASE_NULL,
    PHASE_SHARE_BASELINE,
)
from benchmarking.records.types import Phase

# Figures of a job's baseline that become flags of its co-runs: calibrated parameters, measured
# once, alone, and fixed from then on.
CARRIED_FIGURES: Mapping[str, str] = {
    "cell_repeats": "--cell-repeats",
    "request_rate": "--rate",
}


@dataclass(frozen=True)
class PlannedClient:
    """One client: the command of its job, and what its environment adds.

    `job_key` names the distinct job (same key = same work); engine, precision and device are not
    in it, since they belong to how a job runs and are compared by the clients' identities.
    """

    client: int
    workload: str
    label: str
    job_key: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_arguments(self, arguments: Sequence[str]) -> PlannedClient:
        """Return the same client with more flags (a later flag overrides an earlier one)."""
        return dataclasses.replace(self, command=(*self.command, *arguments))


@dataclass(frozen=True)
class PlannedCoRun:
    """Clients that run together under one mode; a baseline is a co-run of one."""

    co_run: str
    phase: Phase
    mode: str
    repeat: int
    clients: tuple[PlannedClient, ...]

    def command_of(self, client: PlannedClient) -> tuple[str, ...]:
        """Return the client's command as it is run here, and could be typed by hand.

        `--client-index` gives each client a seed of its own: without it, copies of one job pause
        and compute in lockstep. It is the client's number, the same in every mode and repeat, and
        0 where a job runs alone; `job_key` does not hold it, so copies share one baseline.
        """
        index = client.client if self.phase == PHASE_CO_RUN else 0
        return (*client.command, "--client-index", str(index))

    def map_clients(self, change: Callable[[PlannedClient], PlannedClient]) -> PlannedCoRun:
        """Return the co-run with every client replaced by `change(client)`."""
        return dataclasses.replace(self, clients=tuple(map(change, self.clients)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the commands as they are run."""
        clients = [
            {**dataclasses.asdict(client), "command": list(self.command_of(client))}
            for client in self.clients
        ]
        return {"co_run": self.co_run, "phase": self.phase, "mode": self.mode,
                "repeat": self.repeat, "clients": clients}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything that a suite run does: baselines first, then co-runs, in order."""

    baseline: tuple[PlannedCoRun, ...]
    co_runs: tuple[PlannedCoRun, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a baseline is its one client with the co-run's fields."""
        baseline = [run.to_dict() for run in self.baseline]
        for row in baseline:
            row.update(row.pop("clients")[0])
        return {"baseline": baseline, "co_runs": [run.to_dict() for run in self.co_runs]}

    def map_runs(self, change: Callable[[PlannedCoRun], PlannedCoRun]) -> Plan:
        """Return the plan with every co-run and baseline replaced by `change(run)`."""
        return Plan(tuple(map(change, self.baseline)), tuple(map(change, self.co_runs)))

    def map_clients(
        self, change: Callable[[PlannedClient], PlannedClient], *, skip: Collection[str] = ()
    ) -> Plan:
        """Return the plan with every client replaced by `change(client)`.

        Co-runs whose names are in `skip` (those that have been run) stay as they are.
        """
        return self.map_runs(lambda run: run if run.co_run in skip else run.map_clients(change))

    def jobs(self) -> dict[str, PlannedClient]:
        """Return one client of each distinct job, by `job_key`, in order of appearance."""
        runs = (*self.baseline, *self.co_runs)
        return distinct_jobs(client for run in runs for client in run.clients)


def distinct_jobs(clients: Iterable[PlannedClient]) -> dict[str, PlannedClient]:
    """Return the first client of each job, by `job_key`."""
    found: dict[str, PlannedClient] = {}
    for client in clients:
        found.setdefault(client.job_key, client)
    return found


def planned_client(
    client: int, workload: str, request: Request, size: str, arguments: Sequence[str] = ()
) -> PlannedClient:
    """Return client number `client` running `workload` in a job size, as it was asked for.

    `arguments` come last on the command line, so they override what job size and request say.
    """
    kind = WORKLOADS[workload]
    arguments = (*request.job_arguments, *arguments)
    job = [*kind.arguments[size], "--seed", str(request.seed)]
    if workload == "resnet_training":
        folder = str(Path(request.data_dir).resolve()) if request.data_dir else None
        job += _flags(dataset=request.dataset, data_dir=folder)
    device = "cpu" if size == SIZE_CPU else "cuda"
    how = _flags(device=device, engine=request.engine, precision=request.precision)
    if workload == "serving" and request.slo_ms is not None:
        # Which requests are late enough to be given up, not what is offered.
        how += _flags(slo_ms=f"{request.slo_ms:g}")
    return PlannedClient(
        client=client,
        workload=workload,
        label=kind.label,
        job_key=request.secrets.name(_job_key(workload, *job, *arguments)),
        command=(sys.executable, str(PROJECT_ROOT / kind.script), *job, *how, *arguments),
    )


def _job_key(*words: str) -> str:
    """Return what names a job, as it can be recorded: in a path that is no UTF-8 stands a `?`."""
    return shlex.join(words).encode(errors="replace").decode()


def _flags(**values: str | None) -> list[str]:
    given = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [part for flag, value in given if value is not None for part in (flag, value)]


def clients_of(request: Request, count: int, size: str) -> tuple[PlannedClient, ...]:
    """Return `count` clients of a mix or a plan file: in order, starting over after the last."""
    if request.plan_file is None:
        workloads = itertools.cycle(MIXES[request.mix])
        return tuple(planned_client(i, next(workloads), request, size) for i in range(count))
    entries = itertools.cycle(request.plan_file.members)
    return tuple(_own_client(i, next(entries), request, size) for i in range(count))


def _own_client(client: int, entry: PlanEntry, request: Request, size: str) -> PlannedClient:
    if entry.workload is not None:
        made = planned_client(client, entry.workload, request, size, entry.arguments)
    else:
        job = ["--command", str(entry.command), "--working-directory", entry.working_directory]
        job += ["--shell"] if entry.shell else []
        job += ["--latency"] if entry.latency else []
        key = _job_key(COMMAND_WORKLOAD, *job)
        command = (sys.executable, str(PROJECT_ROOT / COMMAND_SCRIPT), *job)
        made = PlannedClient(client, COMMAND_WORKLOAD, entry.label, key, command)
    # What is in the environment can be part of the work; who may read a model is not.
    variables = [
        name if name in entry.inherit else f"{name}={value}"
        for name, value in entry.environment.items()
    ]
    key = f"{made.job_key} {shlex.join(variables)}" if variables else made.job_key
    knobs = {name.removeprefix("mps_"): value for name, value in entry.knobs.items()}
    return dataclasses.replace(
        made,
        label=entry.label,
        job_key=request.secrets.name(key),
        environment={**entry.environment, **limits.variables(**knobs)},
    )


def co_runs_of(
    request: Request, mode: str, size: str, counts: Iterable[int]
) -> tuple[PlannedCoRun, ...]:
    """Lay out every count and repeat, called `<name>-<n>-r<repeat>`."""
    return tuple(
        PlannedCoRun(
            f"{request.co_run_prefix}-{n}-r{repeat}", PHASE_CO_RUN, mode, repeat,
            clients_of(request, n, size),
        )
        for n in counts
        for repeat in range(request.repeats)
    )  # fmt: skip


def _name_in_pair(client: PlannedClient) -> str:
    """The workload; of an antagonist what it presses, and for how many percent of the time."""
    if client.workload != ANTAGONIST:
        return client.workload
    words = client.job_key.split()
    kind, duty = (words[words.index(flag) + 1] for flag in ("--kind", "--duty"))
    return kind if float(duty) == 1 else f"{kind}-{100 * float(duty):.0f}"


def pairs_of(request: Request, size: str) -> list[tuple[PlannedClient, PlannedClient]]:
    """Return each job of the mixed mix with each other one and itself, or with each antagonist.

    On the CPU there are fewer jobs, and no bus to press.
    """
    is_cpu = size == SIZE_CPU
    if request.is_pairs:
        workloads = PAIRS_ON_CPU if is_cpu else MIXES["mixed"]
        return [
            (planned_client(0, one, request, size), planned_client(1, other, request, size))
            for one, other in itertools.combinations_with_replacement(workloads, 2)
        ]
    jobs = PAIRS_ON_CPU if is_cpu else NOISY_JOBS_QUICK if request.quick else NOISY_JOBS
    kinds = PRESSED_QUICK if is_cpu or request.quick else PRESSED
    neighbors = [(job, kind, "1") for job in jobs for kind in kinds]
    neighbors += [("llm_inference", "hbm", duty) for duty in DUTY_STEPS if request.duty_steps]
    return [
        (planned_client(0, job, request, size),
         planned_client(1, ANTAGONIST, request, size, ("--kind", kind, "--duty", duty)))
        for job, kind, duty in neighbors
    ]  # fmt: skip


def baselines_of(
    clients: Iterable[PlannedClient], phase: Phase, mode: str, repeats: int = 1
) -> tuple[PlannedCoRun, ...]:
    """Lay out each distinct job alone, called `baseline-<workload>` or `share-<workload>`.

    On a share of the GPU that is the share of the first client that runs the job. Of several
    repeats each has its number in its name, and all jobs come once before the first repeat.
    """
    prefix = "share" if phase == PHASE_SHARE_BASELINE else "baseline"
    once: list[PlannedCoRun] = []
    for client in distinct_jobs(clients).values():
        same = sum(run.clients[0].workload == client.workload for run in once)
        name = f"{prefix}-{client.workload}" + (f"-{same + 1}" if same else "")
        once.append(PlannedCoRun(name, phase, mode, 0, (client,)))
    if repeats == 1:
        return tuple(once)
    return tuple(
        dataclasses.replace(run, co_run=f"{run.co_run}-r{repeat}", repeat=repeat)
        for repeat in range(repeats)
        for run in once
    )


def build_plan(request: Request, mode: str, size: str, *, has_own_shares: bool = False) -> Plan:
    """Lay out what was asked for under a mode that can be had: jobs alone, then co-runs.

    Each distinct job runs alone on the whole GPU, unless that is another run's baseline or MIG has
    divided it, and where clients have shares of their own, on that of its first client. Of pairs,
    `<name>-<one>-<other>-r<repeat>`, all come once before the first repeat. The null is one client
    under time slicing, what a baseline is under another name (the first training, or else the
    first client): its distance from its baseline is the method's own error.
    """
    if request.is_paired:
        pairs = pairs_of(request, size)
        # Number 0 each, as every job alone runs on the first client's share.
        clients = [dataclasses.replace(one, client=0) for pair in pairs for one in pair]
        co_runs = tuple(
            PlannedCoRun(
                f"{request.co_run_prefix}-{_name_in_pair(one)}-{_name_in_pair(other)}-r{repeat}",
                PHASE_CO_RUN, mode, repeat, (one, other),
            )
            for repeat in range(request.repeats)
            for one, other in pairs
        )  # fmt: skip
    else:
        clients = list(clients_of(request, max(request.counts), size))
        co_runs = co_runs_of(request, mode, size, request.counts)
    is_alone, is_cpu = request.mode == MODE_EXCLUSIVE, size == SIZE_CPU
    repeats = request.repeats if is_alone else 1
    alone: tuple[PlannedCoRun, ...] = ()
    if request.baseline is None and mode != MODE_MIG:
        alone_mode = MODE_CPU_DEMO if is_cpu else MODE_EXCLUSIVE
        alone += baselines_of(clients, PHASE_BASELINE, alone_mode, repeats)
    if request.null:
        null_mode = MODE_CPU_DEMO if is_cpu else MODE_TIME_SLICING
        trainings = [client for client in clients if client.workload.endswith("_training")]
        for repeat in range(repeats):
            members = ((trainings or clients)[0],)
            alone += (PlannedCoRun(f"null-r{repeat}", PHASE_NULL, null_mode, repeat, members),)
        alone = tuple(sorted(alone, key=lambda run: run.repeat))
    if has_own_shares:
        alone += baselines_of(clients, PHASE_SHARE_BASELINE, mode)
    return Plan(alone, () if is_alone else co_runs)


def without_unlike_shares(plan: Plan, layout: Sequence[str]) -> tuple[Plan, list[str]]:
    """Leave out the baselines on one's own instance of jobs that run on instances of unlike size.

    Returns the plan, and the labels of these jobs: one instance's time alone says nothing of
    another's, so their interference stays unknown.
    """
    profiles: dict[str, set[str]] = {}
    for run in plan.co_runs:
        for client in run.clients:
            profiles.setdefault(client.job_key, set()).add(layout[client.client])
    unlike = {job_key for job_key, names in profiles.items() if len(names) > 1}
    kept = tuple(
        run
        for run in plan.baseline
        if run.phase != PHASE_SHARE_BASELINE or run.clients[0].job_key not in unlike
    )
    labels = [client.label for job_key, client in plan.jobs().items() if job_key in unlike]
    return Plan(kept, plan.co_runs), labels


def shared_host_environment(cores: int, clients: int) -> dict[str, str]:
    """Environment that gives each of `clients` its share of `cores` and tells it of the others.

    A client takes its share of the GPU's memory by GPU_SHARING_CLIENTS. Idle OpenMP threads spin by
    default; four clients of two threads on two cores took twice the time of four clients of one.
    """
    threads = str(max(1, cores // clients))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
        "GPU_SHARING_CLIENTS": str(clients),
    }


def carried_arguments(figures: Mapping[str, Any] | None) -> list[str]:
    """Flags that a job's baseline hands to its co-runs, from the figures of its last whole job."""
    values = ((flag, (figures or {}).get(name)) for name, flag in CARRIED_FIGURES.items())
    return [part for flag, value in values if value is not None for part in (flag, str(value))]
