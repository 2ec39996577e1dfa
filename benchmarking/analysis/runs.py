"""A run as the analysis sees it, and one co-run of it. Views over records; no input or output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarking.metrics import scores
from benchmarking.metrics.breaking_point import says_something_of_the_load
from benchmarking.records import run_folder
from benchmarking.records.types import MpsLimits
from benchmarking.suite import baselines, limits
from benchmarking.suite.plan import CARRIED_FIGURES

Record = Mapping[str, Any]

CPU_DEMO = "cpu-demo"
DEFAULT_TIMESLICE = "Default"
MODE_NAMES = {
    "time-slicing": "time slicing",
    "mps": "MPS",
    "mig": "MIG",
    "exclusive": "exclusive",
    CPU_DEMO: "CPU demo",
}
_MODE_ORDER = tuple(MODE_NAMES)

# What of a client's environment changes how the mode treats it; folders of daemons do not.
_KNOB_PREFIX = "CUDA_MPS_"
_NO_KNOBS = frozenset({"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"})


def mode_name(mode: str, settings: str = "") -> str:
    """The mode as it is written in sentences, with what it was set to: `MPS (even)`."""
    name = MODE_NAMES.get(mode, mode)
    return f"{name} ({settings})" if settings else name


def mode_order(mode: str) -> tuple[int, str]:
    """Sort key of modes: the guide's order, then by name."""
    return (_MODE_ORDER.index(mode) if mode in _MODE_ORDER else len(_MODE_ORDER), mode)


def clients_text(clients: int) -> str:
    """`1 client`, `4 clients`."""
    return f"{clients} client{'' if clients == 1 else 's'}"


@dataclass
class RunView:
    """One run as it was read: its manifest, its records, and what was wrong with its files.

    `run_id` names it in the report: the manifest's run id, or the run's path below the results
    folder where several runs share that id. `experiment` is the folder that it stands in.
    """

    run_id: str
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    experiment: str = ""

    @classmethod
    def of(cls, run: run_folder.Run, name: str) -> RunView:
        """View of a run as the run store read it, under this name: from here on plain data."""
        manifest = msgspec.to_builtins(run.manifest)
        records = msgspec.to_builtins([*run.client_records, *run.co_run_records])
        return cls(name, manifest, records, list(run.warnings), str(run.folder.parent))

    @property
    def mode(self) -> str:
        """The mode that was in force: `cpu-demo` without a GPU, whatever was asked for."""
        return self.manifest.get("effective_mode") or self.manifest.get("mode") or "unknown"

    @property
    def mix(self) -> str:
        """The mix of jobs."""
        return self.manifest.get("mix") or "unknown"

    @property
    def settings(self) -> str:
        """What the mode was set to, in words; empty where it was left as it is.

        Runs of one mode that was set up otherwise are no repeats of each other: each has its row.
        """
        if self.mode == "mps":
            told = limits.describe(self._limits)
            is_from_plan = not told and any(map(_knobs_of, self._planned_clients()))
            return "limits of the plan" if is_from_plan else told
        if self.mode == "mig":
            return ", ".join(self.manifest.get("mig_layout") or ())
        slices = self.environment.get("timeslice") if self.mode == "time-slicing" else None
        return f"{slices.lower()} slices" if slices and slices != DEFAULT_TIMESLICE else ""

    @property
    def mode_name(self) -> str:
        """The mode and its settings as they are written in sentences."""
        return mode_name(self.mode, self.settings)

    @property
    def _limits(self) -> MpsLimits:
        """What MPS clients were limited to."""
        return msgspec.convert(self.manifest.get("mps_limits") or {}, MpsLimits)

    @property
    def is_pairs(self) -> bool:
        """Whether its co-runs are pairs, each a mix of its own."""
        return bool(self.manifest.get("is_pairs"))

    @property
    def is_invalid(self) -> bool:
        """Whether the run as a whole lacks proof of its mode."""
        return self.manifest.get("outcome") == "invalid"

    @property
    def environment(self) -> dict[str, Any]:
        """Card, driver, versions and host, as the manifest has them."""
        return self.manifest.get("environment") or {}

    @property
    def age(self) -> tuple[str, str]:
        """Sort key by time of creation, oldest first."""
        return (self.manifest.get("created_at") or "", self.run_id)

    @property
    def versions(self) -> dict[str, Any]:
        """Versions that count; a run that ended before any client was ready knows none."""
        found = self.environment.get("versions") or {}
        return {name: found[name] for name in baselines.COMPARED_VERSIONS if name in found}

    def clients(self, phase: str, co_run: str | None = None) -> list[dict[str, Any]]:
        """Client records of a phase (`baseline`, `co_run`), of one co-run when it is named."""
        return [
            record
            for record in self.records
            if record.get("record") == "client"
            and record.get("phase") == phase
            and co_run in (None, record.get("co_run"))
        ]

    def co_runs(self, phase: str = run_folder.PHASE_CO_RUN) -> list[dict[str, Any]]:
        """Co-run records of a phase."""
        return [
            record
            for record in self.records
            if record.get("record") == "co_run" and record.get("phase") == phase
        ]

    def judged(self, clients: int) -> list[CoRun]:
        """Co-runs of that many clients that say whether the count works, proved in their mode."""
        found = [CoRun(self, record) for record in self.co_runs() if record["clients"] == clients]
        return [co_run for co_run in found if co_run.is_valid and co_run.is_answer]

    def successful_baselines(self) -> list[dict[str, Any]]:
        """Client records of the jobs alone that may serve as a reference."""
        good = {
            record["co_run"] for record in self.co_runs("baseline") if record["outcome"] == "ok"
        }
        return [
            record
            for record in self.clients("baseline")
            if record["status"] == "ok" and record["co_run"] in good
        ]

    def engines(self) -> dict[str, tuple[Any, Any]]:
        """Engine and precision by workload, as the clients reported them at `ready`."""
        found: dict[str, tuple[Any, Any]] = {}
        for record in self.records:
            identity = record.get("identity") if record.get("record") == "client" else None
            if identity:
                pair = (identity.get("engine"), identity.get("precision"))
                found.setdefault(record["workload"], pair)
        return found

    def carried(self) -> dict[str, str]:
        """Work that was settled alone and then fixed, as the co-runs were given it.

        By flag, job and mix in words; runs that are unlike in one of them had unlike loads.
        """
        found = {}
        for client in self._planned_clients():
            words = client.get("command") or []
            for flag in CARRIED_FIGURES.values():
                if flag in words[:-1]:
                    value = words[len(words) - words[::-1].index(flag)]
                    found[f"{flag} of {client['job_key']} in {self.mix}"] = value
        return found

    def is_contended(self, clients: int) -> bool:
        """Whether other people's processes used the GPU beside the co-runs of that many clients."""
        records = [co_run.record for co_run in self.judged(clients)]
        return any(one.get("is_contended") for one in (self.manifest, *records))

    def planned(self, clients: int) -> list[dict[str, Any]]:
        """The plan's co-runs of that many clients."""
        planned = (self.manifest.get("plan") or {}).get("co_runs") or []
        return [co_run for co_run in planned if len(co_run["clients"]) == clients]

    def _planned_clients(self) -> list[dict[str, Any]]:
        planned = (self.manifest.get("plan") or {}).get("co_runs") or []
        return [client for co_run in planned for client in co_run["clients"]]

    def knobs(self, clients: int) -> list[dict[str, str]]:
        """Settings of the mode that each client was given, by client."""
        first = next(iter(self.planned(clients)), {"clients": []})
        return [_knobs_of(client) for client in first["clients"]]


def _knobs_of(client: Record) -> dict[str, str]:
    return {
        name: value
        for name, value in (client.get("environment") or {}).items()
        if name.startswith(_KNOB_PREFIX) and name not in _NO_KNOBS
    }


@dataclass(frozen=True)
class CoRun:
    """One co-run of a run: its record, and those of its clients."""

    run: RunView
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The co-run's name inside its run: `mixed-4-r0`."""
        return self.record["co_run"]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """Client records, in client order."""
        found = self.run.clients(self.record["phase"], self.name)
        return sorted(found, key=lambda record: record["client"])

    @property
    def is_ok(self) -> bool:
        """Whether every client did its work to the end."""
        return self.record["outcome"] == "ok"

    @property
    def is_answer(self) -> bool:
        """Whether it says that its clients work together, or that they do not."""
        return says_something_of_the_load(self.record["outcome"], self.record.get("stop_reason"))

    @property
    def is_valid(self) -> bool:
        """Whether no client was found outside the mode that the co-run is named after."""
        verdicts = {(record.get("proof") or {}).get("verdict") for record in self.clients}
        return self.record["outcome"] != "invalid" and "invalid" not in verdicts

    @property
    def is_unverified(self) -> bool:
        """Whether some client's membership in the mode could not be checked."""
        verdicts = {(record.get("proof") or {}).get("verdict") for record in self.clients}
        return "unverified" in verdicts

    @property
    def window(self) -> tuple[float | None, float | None]:
        """Start and end of the contended window, in seconds of the monotonic clock."""
        return self.record.get("window_start_seconds"), self.record.get("window_end_seconds")

    def summary(self, name: str) -> Any:
        """A figure of the co-run's summary."""
        return (self.record.get("summary") or {}).get(name)


# --- what the metrics take, out of records -------------------------------------------------------


def failed_requests(client: Record) -> int:
    """Requests in the window that failed or timed out."""
    return ((client.get("units") or {}).get(scores.FAILED_REQUEST) or {}).get("count", 0)


def latency_ms(client: Record, percent: float) -> float | None:
    """The percentile of one client's requests."""
    return scores.latency_percentile(client.get("latency_ms"), percent, failed_requests(client))


def whole_jobs(client: Record) -> list[Record]:
    """The client's jobs that lie whole in the window."""
    return [job for job in client.get("jobs") or [] if job["in_window"]]


def mean_job_seconds(client: Record) -> float | None:
    """Mean wall time of the client's whole jobs in the window."""
    return scores.mean(job["duration_seconds"] for job in whole_jobs(client))


def window_seconds(client: Record) -> float | None:
    """Length of the window."""
    start, end = client["window_start_seconds"], client["window_end_seconds"]
    return None if start is None or end is None else end - start


def joules_per_job(gpu: Record | None, clients: Sequence[Record]) -> float | None:
    """The card's joules a job, where all clients run the same one."""
    if len({client["job_key"] for client in clients}) != 1:
        return None
    jobs = (
        scores.jobs_in_window(
            [(job["start_seconds"], job["end_seconds"]) for job in whole_jobs(client)],
            window_seconds(client),
        )
        for client in clients
    )
    return scores.joules_per_job((gpu or {}).get("energy_joules"), jobs)
