"""What runs beside what, decided before anything runs: mixes, job sizes, command lines.

Pure: no process is started and no file is touched. A plan is plain data (`to_dict`), so it is
printed and saved with the run.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_CO_RUN, PHASE_SHARE_BASELINE

MODE_EXCLUSIVE = "exclusive"
MODE_TIME_SLICING = "time-slicing"
MODE_MPS = "mps"
MODE_MIG = "mig"
MODE_CPU_DEMO = "cpu-demo"
MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG, MODE_EXCLUSIVE)

SIZE_GUIDE, SIZE_QUICK, SIZE_CPU = "guide", "quick", "cpu"


@dataclass(frozen=True)
class WorkloadKind:
    """One of the project's workloads: how it is called, its script, its flags by job size.

    `has_latency` says whether durations of its units are response times.
    """

    label: str
    script: str
    arguments: Mapping[str, tuple[str, ...]]
    has_latency: bool = False


# The guide's sizes are each script's defaults, spelled out so that the record shows them. The CPU
# sizes are for two cores: one thread takes about 15 s for a BERT job, 6 s for a ResNet50 job and
# 3 to 6 s for the two others.
WORKLOADS: Mapping[str, WorkloadKind] = {
    "resnet_training": WorkloadKind(
        "ResNet50 training",
        "workloads/training/resnet_training.py",
        {
            SIZE_GUIDE: ("--batch-size", "128", "--epochs", "5"),
            SIZE_QUICK: ("--batch-size", "128", "--epochs", "1", "--train-samples", "12800"),
            SIZE_CPU: ("--stem", "imagenet", "--batch-size", "16", "--epochs", "1",
                       "--train-samples", "320"),
        },
    ),
    "batch_inference": WorkloadKind(
        "Batch inference",
        "workloads/inference/batch_inference.py",
        {
            SIZE_GUIDE: ("--model", "resnet50", "--batch-size", "32", "--num-batches", "100"),
            SIZE_QUICK: ("--model", "resnet50", "--batch-size", "32", "--num-batches", "100"),
            SIZE_CPU: ("--model", "resnet18", "--batch-size", "1", "--num-batches", "60"),
        },
        has_latency=True,
    ),
    "jupyter_simulation": WorkloadKind(
        "Jupyter session",
        "workloads/interactive/jupyter_simulation.py",
        {
            SIZE_GUIDE: ("--num-operations", "11"),
            # The guide's session in an eighth of its time: as much idle, each kind of cell twice.
            SIZE_QUICK: ("--num-operations", "8", "--burst-seconds", "0.4", "--idle-min", "0.25",
                         "--idle-max", "0.625"),
            SIZE_CPU: ("--num-operations", "4", "--burst-seconds", "1", "--idle-min", "0.3",
                       "--idle-max", "0.8", "--matrix-size", "1000", "--matrix-iterations", "20",
                       "--preprocess-iterations", "4", "--train-epochs", "2",
                       "--inference-images", "8"),
        },
        has_latency=True,
    ),
    "bert_training": WorkloadKind(
        "BERT fine-tuning",
        "workloads/training/bert_training.py",
        {
            SIZE_GUIDE: ("--batch-size", "16", "--epochs", "3", "--num-samples", "1000"),
            SIZE_QUICK: ("--batch-size", "16", "--epochs", "1", "--num-samples", "1000"),
            SIZE_CPU: ("--batch-size", "4", "--epochs", "1", "--num-samples", "40",
                       "--max-length", "32", "--held-out-samples", "8"),
        },
    ),
    # A server and its users. What they offer is half of what the server bears alone, measured in
    # the baseline (see CARRIED_FIGURES); --rate fixes it by hand.
    "serving": WorkloadKind(
        "Inference service",
        "workloads/inference/serving_client.py",
        {
            SIZE_GUIDE: ("--model", "resnet50", "--duration", "30"),
            SIZE_QUICK: ("--model", "resnet50", "--duration", "10"),
            SIZE_CPU: ("--model", "resnet18", "--max-batch", "4", "--duration", "5"),
        },
        has_latency=True,
    ),
}  # fmt: skip

# What a client of a plan file is called that runs a command of the user's own.
COMMAND_WORKLOAD = "command"
COMMAND_SCRIPT = "workloads/custom/command_client.py"

# Client i of a co-run runs workload i of its mix, starting over after the last.
MIXES: Mapping[str, tuple[str, ...]] = {
    "mixed": ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training"),
    "training": ("resnet_training",),
    "inference": ("batch_inference",),
    "interactive": ("jupyter_simulation",),
    "serving": ("serving", "resnet_training", "resnet_training", "resnet_training"),
}

# Figures of a job's baseline that become flags of its co-runs: work that is calibrated once,
# alone, and fixed from then on.
CARRIED_FIGURES: Mapping[str, str] = {
    "cell_repeats": "--cell-repeats",
    "request_rate": "--rate",
}


@dataclass(frozen=True)
class JobOptions:
    """Flags of a suite run that its jobs are started with; `None` leaves a workload's default.

    `arguments` go to every workload as they are, and are part of what makes it another job.
    """

    size: str = SIZE_GUIDE
    seed: int = 42
    device: str = "auto"
    engine: str | None = None
    precision: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    slo_ms: float | None = None
    arguments: tuple[str, ...] = ()


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
    phase: str
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

    def command_line_of(self, client: PlannedClient) -> str:
        """Return `command_of` as one line for a shell."""
        return shlex.join(self.command_of(client))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the commands as they are run."""
        return {
            **_fields_without_clients(self),
            "clients": [
                {**dataclasses.asdict(client), "command": list(self.command_of(client))}
                for client in self.clients
            ],
        }


@dataclass(frozen=True)
class Plan:
    """Everything that a suite run does: baselines first, then co-runs, in order."""

    baseline: tuple[PlannedCoRun, ...]
    co_runs: tuple[PlannedCoRun, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a baseline is its one client with the co-run's fields."""
        return {
            "baseline": [
                {**_fields_without_clients(run), **run.to_dict()["clients"][0]}
                for run in self.baseline
            ],
            "co_runs": [run.to_dict() for run in self.co_runs],
        }

    def map_clients(
        self,
        change: Callable[[PlannedClient], PlannedClient],
        *,
        skip: Collection[str] = (),
    ) -> Plan:
        """Return the plan with every client replaced by `change(client)`.

        Co-runs whose names are in `skip` (those that have been run) stay as they are.
        """

        def changed(runs: tuple[PlannedCoRun, ...]) -> tuple[PlannedCoRun, ...]:
            return tuple(
                run
                if run.co_run in skip
                else dataclasses.replace(run, clients=tuple(map(change, run.clients)))
                for run in runs
            )

        return Plan(changed(self.baseline), changed(self.co_runs))

    def with_environments(
        self, environment_of: Callable[[PlannedCoRun], Callable[[PlannedClient], Mapping[str, str]]]
    ) -> Plan:
        """Return the plan with `environment_of(co_run)(client)` as every client's environment."""

        def equipped(run: PlannedCoRun) -> PlannedCoRun:
            of_client = environment_of(run)
            clients = (
                dataclasses.replace(client, environment=dict(of_client(client)))
                for client in run.clients
            )
            return dataclasses.replace(run, clients=tuple(clients))

        return Plan(tuple(map(equipped, self.baseline)), tuple(map(equipped, self.co_runs)))

    def jobs(self) -> dict[str, PlannedClient]:
        """Return one client of each distinct job, by `job_key`, in order of appearance."""
        clients = (client for run in (*self.baseline, *self.co_runs) for client in run.clients)
        found: dict[str, PlannedClient] = {}
        for client in clients:
            found.setdefault(client.job_key, client)
        return found


def _fields_without_clients(run: PlannedCoRun) -> dict[str, Any]:
    return {"co_run": run.co_run, "phase": run.phase, "mode": run.mode, "repeat": run.repeat}


def planned_client(
    client: int,
    workload: str,
    options: JobOptions,
    *,
    python: str,
    root: str,
    arguments: Sequence[str] = (),
) -> PlannedClient:
    """Return client number `client` running `workload`; `root` is the project's folder.

    `arguments` come last on the command line, so they override what job size and options say.
    """
    kind = WORKLOADS[workload]
    arguments = (*options.arguments, *arguments)
    job = [*kind.arguments[options.size], "--seed", str(options.seed)]
    if workload == "resnet_training":
        job += _flags(dataset=options.dataset, data_dir=options.data_dir)
    how = _flags(device=options.device, engine=options.engine, precision=options.precision)
    if workload == "serving" and options.slo_ms is not None:
        # Which requests are late enough to be given up, not what is offered.
        how += _flags(slo_ms=f"{options.slo_ms:g}")
    return PlannedClient(
        client=client,
        workload=workload,
        label=kind.label,
        job_key=shlex.join([workload, *job, *arguments]),
        command=(python, f"{root}/{kind.script}", *job, *how, *arguments),
    )


def _flags(**values: str | None) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [part for flag, value in pairs if value is not None for part in (flag, value)]


def mix_clients(
    mix: str, count: int, options: JobOptions, *, python: str, root: str
) -> tuple[PlannedClient, ...]:
    """Return `count` clients of a mix: its workloads in order, starting over after the last."""
    workloads = MIXES[mix]
    return tuple(
        planned_client(i, workloads[i % len(workloads)], options, python=python, root=root)
        for i in range(count)
    )


def build_plan(
    mode: str,
    clients_of: Callable[[int], Sequence[PlannedClient]],
    *,
    name: str,
    counts: Sequence[int],
    repeats: int = 1,
    whole_gpu_baseline: bool = True,
    share_baseline: bool = False,
    baseline_mode: str = MODE_EXCLUSIVE,
) -> Plan:
    """Lay out a suite run.

    `clients_of(n)` gives the clients of a co-run of n. Each distinct job of the largest count gets
    one baseline on the whole GPU and, with `share_baseline`, one on the share of the first client
    that runs it. `mode` "exclusive" has baselines only. Co-runs are called `<name>-<n>-r<repeat>`,
    baselines `baseline-<workload>` (`share-<workload>`).
    """
    everyone = list(clients_of(max(counts)))
    alone: list[PlannedCoRun] = []
    if whole_gpu_baseline:
        alone += _alone(everyone, "baseline", PHASE_BASELINE, baseline_mode)
    if share_baseline:
        alone += _alone(everyone, "share", PHASE_SHARE_BASELINE, mode)
    co_runs = () if mode == MODE_EXCLUSIVE else tuple(
        PlannedCoRun(f"{name}-{n}-r{repeat}", PHASE_CO_RUN, mode, repeat, tuple(clients_of(n)))
        for n in counts
        for repeat in range(repeats)
    )  # fmt: skip
    return Plan(tuple(alone), co_runs)


def _alone(
    clients: Sequence[PlannedClient], prefix: str, phase: str, mode: str
) -> list[PlannedCoRun]:
    """One co-run of one for each distinct job; the client keeps its number, hence its share."""
    distinct: dict[str, PlannedClient] = {}
    for client in clients:
        distinct.setdefault(client.job_key, client)
    runs: list[PlannedCoRun] = []
    for client in distinct.values():
        same = sum(run.clients[0].workload == client.workload for run in runs)
        name = f"{prefix}-{client.workload}" + (f"-{same + 1}" if same else "")
        runs.append(PlannedCoRun(name, phase, mode, 0, (client,)))
    return runs


def host_threads(cores: int, clients: int) -> int:
    """Threads a client may use: its fair share of the host, so that none starves another."""
    return max(1, cores // clients)


def shared_host_environment(cores: int, clients: int) -> dict[str, str]:
    """Environment that gives each of `clients` its share of `cores` and tells it of the others.

    A client takes its share of the GPU's memory by GPU_SHARING_CLIENTS. Idle OpenMP threads spin by
    default; four clients of two threads on two cores took twice the time of four clients of one.
    """
    threads = str(host_threads(cores, clients))
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
