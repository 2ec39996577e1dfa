"""The runs of a results folder, read with suspicion, and what each of them was measured under.

A results folder may come from elsewhere: sizes are bounded (`records.files`), links to files are
not followed, what steers a terminal or breaks a line is taken out of every text, and a number that
nothing measures makes its co-run unreadable.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarking.cli import SuiteError
from benchmarking.measuring import baselines
from benchmarking.metrics.breaking_point import says_something_of_the_load
from benchmarking.modes.names import (
    MODE_CPU_DEMO,
    MODE_MIG,
    MODE_MPS,
    MODE_TIME_SLICING,
)
from benchmarking.planning import limits
from benchmarking.planning.plan import CARRIED_FIGURES
from benchmarking.records import run_folder
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_CO_RUN
from benchmarking.records.types import ClientRecord, CoRunRecord, Manifest, MpsLimits, Phase
from benchmarking.report.foreign import cleaned, cleaned_struct
from benchmarking.report.wording import mode_order

DEFAULT_TIMESLICE = "Default"
# The mix of a job next to each antagonist.
NOISY = "noisy"
# Of a run so many are read; a long ramp has 10,000.
MOST_RECORDS = 50_000

# What of a client's environment changes how the mode treats it; folders of daemons do not, nor
# names of partitions of one size.
_KNOB_PREFIX = "CUDA_MPS_"
_NO_KNOBS = frozenset({
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_SM_PARTITION",
})  # fmt: skip

# By kind (`environment`, `version`, `engine`, `calibrated`) and name.
Conditions = dict[str, dict[str, Any]]
_Record = TypeVar("_Record", ClientRecord, CoRunRecord)


class PlannedClient(msgspec.Struct, kw_only=True):
    """What a report asks of a client in a manifest's plan."""

    label: str = ""
    workload: str = ""
    job_key: str = ""
    command: list[str] = []
    environment: dict[str, str] | None = None

    @property
    def knobs(self) -> dict[str, str]:
        """Settings of the mode that it was given."""
        return {
            name: value
            for name, value in (self.environment or {}).items()
            if name.startswith(_KNOB_PREFIX) and name not in _NO_KNOBS
        }

    @property
    def name(self) -> str:
        """What it is called; an antagonist with what it presses and how much."""
        label = self.label or self.workload
        pressed = pressed_resource(self.job_key)
        return label if pressed is None else f"{label} ({pressed[0]}, duty {pressed[1]:g})"


class PlannedCoRun(msgspec.Struct, kw_only=True):
    """A co-run in a manifest's plan."""

    co_run: str
    clients: list[PlannedClient]


def pressed_resource(job_key: str) -> tuple[str, float] | None:
    """What an antagonist presses and for which share of the time; `None` of other jobs."""
    kind, duty = (re.search(rf"--{flag} (\S+)", job_key) for flag in ("kind", "duty"))
    if not job_key.startswith("antagonist") or kind is None:
        return None
    try:
        return kind.group(1), min(1.0, max(0.0, float(duty.group(1)))) if duty else 1.0
    except ValueError:
        return None


@dataclass
class MeasuredRun:
    """One run: its manifest, its records, and what was wrong with its files.

    `name` is its run id, or its path below the results folder where several share that id.
    """

    name: str
    folder: Path
    manifest: Manifest
    client_records: list[ClientRecord]
    co_run_records: list[CoRunRecord]
    problems: list[str] = field(default_factory=list)
    is_one_layout_of_several: bool = False

    @property
    def mode(self) -> str:
        """The mode in force: `cpu-demo` without a GPU, whatever was asked for."""
        return self.manifest.effective_mode

    @functools.cached_property
    def _setting(self) -> tuple[str, str]:
        """What the mode was set to, in words and as flags have it; empty where it was not set."""
        if self.mode == MODE_TIME_SLICING:
            slices = self.manifest.environment.timeslice or DEFAULT_TIMESLICE
            is_usual = slices == DEFAULT_TIMESLICE
            return ("", "") if is_usual else (f"{slices.lower()} slices", slices.lower())
        if self.mode == MODE_MIG:
            layout = self.manifest.mig_layout or []
            return ", ".join(layout), ",".join(layout)
        if self.mode != MODE_MPS:
            return "", ""
        told = self._limits
        parts = (limits.shares_of(told), told.memory_limits, told.priorities)
        flag = ",".join("/".join(values) for values in parts if values)
        is_planned = any(client.knobs for co_run in self._planned for client in co_run.clients)
        if not flag and is_planned:
            return "limits of the plan", "plan"
        return limits.describe(told), flag

    @property
    def _limits(self) -> MpsLimits:
        return self.manifest.mps_limits or MpsLimits()

    @property
    def has_own_shares(self) -> bool:
        """Whether its clients had a part of the card each, on which every job also ran alone."""
        return self.mode == MODE_MIG or (self.mode == MODE_MPS and bool(self._limits.partitions))

    @property
    def settings(self) -> str:
        """What the mode was set to, in words; empty where it was left as it is."""
        return self._setting[0]

    @property
    def variant(self) -> str:
        """Mode and limits in one name, as flags have it: `mps`, `mps:even`, `mps:50/25`."""
        flag = self._setting[1]
        is_named = flag and (self.mode != MODE_MIG or self.is_one_layout_of_several)
        return f"{self.mode}:{flag}" if is_named else self.mode

    @property
    def kind(self) -> dict[str, str]:
        """The mode in three ways."""
        return {"mode": self.mode, "settings": self.settings, "variant": self.variant}

    @property
    def order(self) -> tuple[int, str]:
        """Sort key of modes: the guide's order, then by settings."""
        return (mode_order(self.mode), self.settings)

    @property
    def age(self) -> tuple[str, str]:
        """Sort key by time of creation, oldest first."""
        return (self.manifest.created_at, self.name)

    @functools.cached_property
    def windows(self) -> set[tuple[object, ...]]:
        """What only copies of its co-runs share: their own clock."""
        return {
            (one.co_run, one.window_start_seconds, one.window_end_seconds)
            for one in self.co_run_records
            if one.window_start_seconds is not None
        }

    @functools.cached_property
    def conditions(self) -> Conditions:
        """What must be alike for figures to be compared, as far as it is known.

        The same rule decides which baselines may be reused. A run that ended before any client was
        ready knows no versions. On the CPU the host is the device, so its cores count too.
        """
        here, is_cpu_demo = self.manifest.environment, self.mode == MODE_CPU_DEMO
        versions = [name for name in baselines.COMPARED_VERSIONS if name in here.versions]
        engines: dict[str, tuple[Any, Any]] = {}
        for record in self.client_records:
            if record.identity:
                pair = (record.identity.get("engine"), record.identity.get("precision"))
                engines.setdefault(record.workload, pair)
        return {
            "environment": {
                **{name: getattr(here, name) for name in baselines.COMPARED_FIELDS},
                "job_size": self.manifest.job_size,
                "is_cpu_demo": is_cpu_demo,
                "host_cores": here.host_cores if is_cpu_demo else None,
                "method": self.manifest.method,
            },
            "version": {name: here.versions[name] for name in versions},
            "engine": engines,
            "calibrated": self._calibrated(),
        }

    def _calibrated(self) -> dict[str, str]:
        """Work that was calibrated alone and then fixed, by flag, job and mix."""
        found = {}
        for client in (client for co_run in self._planned for client in co_run.clients):
            command = client.command
            for flag in CARRIED_FIGURES.values():
                if flag in command[:-1]:
                    value = command[len(command) - command[::-1].index(flag)]
                    found[f"{flag} of {client.job_key} in {self.manifest.mix}"] = value
        return found

    def co_runs(self, phase: Phase = PHASE_CO_RUN) -> list[CoRunRecord]:
        """Co-run records of a phase."""
        return [record for record in self.co_run_records if record.phase == phase]

    def clients_of(self, co_run: CoRunRecord) -> list[ClientRecord]:
        """Client records of a co-run, in client order."""
        return self._by_co_run.get(co_run.co_run, [])

    @functools.cached_property
    def _by_co_run(self) -> dict[str, list[ClientRecord]]:
        found: dict[str, list[ClientRecord]] = {}
        for record in sorted(self.client_records, key=lambda record: record.client):
            found.setdefault(record.co_run, []).append(record)
        return found

    def judged(self, clients: int) -> list[CoRunRecord]:
        """Co-runs of that many clients that say whether the count works, proved in their mode."""
        return [
            one
            for one in self.co_runs()
            if one.clients == clients and self.is_valid(one)
            and says_something_of_the_load(one.outcome, one.stop_reason)
        ]  # fmt: skip

    def is_valid(self, co_run: CoRunRecord) -> bool:
        """Whether no client was found outside the mode that the co-run is named after."""
        verdicts = {record.proof.verdict for record in self.clients_of(co_run)}
        return co_run.outcome != "invalid" and "invalid" not in verdicts

    def good_alone(self, phase: Phase = PHASE_BASELINE) -> list[tuple[CoRunRecord, ClientRecord]]:
        """The records of the jobs alone that may serve as a reference."""
        good = {one.co_run: one for one in self.co_runs(phase) if one.outcome == "ok"}
        return [
            (good[one.co_run], one)
            for one in self.client_records
            if one.status == "ok" and one.co_run in good
        ]

    def is_contended(self, clients: int) -> bool:
        """Whether other people's processes used the GPU at the time."""
        return self.manifest.is_contended or any(one.is_contended for one in self.judged(clients))

    @functools.cached_property
    def _planned(self) -> list[PlannedCoRun]:
        """The plan's co-runs; none of a plan that is no plan."""
        try:
            return msgspec.convert(self.manifest.plan.get("co_runs") or [], list[PlannedCoRun])
        except msgspec.ValidationError:
            return []

    def planned(self, clients: int) -> list[PlannedCoRun]:
        """The plan's co-runs of that many clients."""
        return [co_run for co_run in self._planned if len(co_run.clients) == clients]

    @property
    def is_matrix(self) -> bool:
        """Whether it, or the run that it is a part of, holds each job next to each other one."""
        return self.manifest.is_pairs and not self.manifest.mix.startswith(NOISY)

    def by_jobs(self) -> list[MeasuredRun]:
        """Split a run whose co-runs of one count are of unlike jobs: each pair is its own mix.

        The parts hold no baselines; those are found by the run's name.
        """
        if not self.manifest.is_pairs and self.manifest.mix != NOISY:
            return [self]
        pairs: dict[tuple[str, ...], list[PlannedCoRun]] = {}
        for planned in self._planned:
            pairs.setdefault(tuple(client.name for client in planned.clients), []).append(planned)
        return [self._only(jobs, planned) for jobs, planned in pairs.items()]

    def _only(self, jobs: tuple[str, ...], planned: list[PlannedCoRun]) -> MeasuredRun:
        names = dict.fromkeys(co_run.co_run for co_run in planned)
        mix = f"{self.manifest.mix}: {' beside '.join(jobs)}"
        plan = {"co_runs": msgspec.to_builtins(planned)}
        co_runs = {record.co_run: record for record in self.co_runs()}
        return replace(
            self,
            manifest=msgspec.structs.replace(self.manifest, mix=mix, plan=plan),
            client_records=[one for name in names for one in self._by_co_run.get(name, [])],
            co_run_records=[co_runs[name] for name in names if name in co_runs],
        )


# --- reading ----------------------------------------------------------------------------------


@dataclass
class Results:
    """What a results folder holds; `references` only lend their baselines."""

    runs: list[MeasuredRun]
    references: list[MeasuredRun] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_results(results_dir: Path) -> Results:
    """Read every run at or below the folder; of one run's folder those beside it lend baselines.

    Raises `SuiteError` when the folder is missing or holds no run.
    """
    if not os.path.isdir(results_dir):
        raise SuiteError(
            f"{results_dir} is not a folder: give the one that holds the runs by --results-dir"
        )
    manifests = sorted(results_dir.rglob(run_folder.MANIFEST_FILE))
    runs, problems = _read_all([path.parent for path in manifests])
    refusals, bad_refusals = run_folder.read_refusals(results_dir)
    phases, bad_phases = run_folder.read_phases(results_dir)
    results = Results(
        runs=_named_by_path(results_dir, sorted(runs, key=lambda run: run.age)),
        phases=cleaned(msgspec.to_builtins(phases)),
        refusals=cleaned(msgspec.to_builtins(refusals)),
        problems=cleaned([*problems, *bad_phases, *bad_refusals]),
    )
    if not runs:
        refused = (f"refused: {one['sentence']}" for one in reversed(results.refusals))
        skipped = (f"{one['name']}: {one['reason']}" for one in results.phases if one["reason"])
        said = next(iter([*results.problems, *refused, *skipped]), "")
        raise SuiteError(
            f"no run in {results_dir}{f' ({said})' if said else ''}: make one with "
            "benchmarking/benchmark_suite.py first"
        )
    if [run.folder for run in runs] == [results_dir]:
        beside = [path.parent for path in results_dir.resolve().parent.glob("*/manifest.json")]
        others = [one for one in beside if one != results_dir.resolve() and not one.is_symlink()]
        results.references, _ = _read_all(others)
    return results


def _read_all(folders: Sequence[Path]) -> tuple[list[MeasuredRun], list[str]]:
    """Read the runs that can be read, and say of the others why not.

    A copy of another would count what was measured twice; the one that went on holds most.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except run_folder.RunStoreError as error:
            problems.append(str(error))
    kept: dict[tuple[str, str], list[MeasuredRun]] = {}
    for run in sorted(runs, key=lambda one: -len(one.windows)):
        of_its_name = kept.setdefault((run.manifest.run_id, run.manifest.created_at), [])
        alike = (one for one in of_its_name if run.windows & one.windows)
        original = next((one for one in alike if one.conditions == run.conditions), None)
        if original is None:
            of_its_name.append(run)
        else:
            problems.append(f"{run.folder} left out: a copy of {original.folder}")
    return [run for same in kept.values() for run in same], problems


def read_run(folder: Path) -> MeasuredRun:
    """Read one run; raises `RunStoreError` when there is no manifest to be read."""
    run = run_folder.read_run(folder)
    if len(run.client_records) + len(run.co_run_records) > MOST_RECORDS:
        raise run_folder.RunStoreError(f"{folder} holds more than {MOST_RECORDS} records, skipped")
    unreadable: dict[str, str] = {}
    try:
        manifest = cleaned_struct(run.manifest)
    except ValueError as error:
        raise run_folder.RunStoreError(f"{folder}: its manifest holds {error}") from error
    clients = _cleaned_records(run.client_records, unreadable)
    co_runs = _cleaned_records(run.co_run_records, unreadable)
    for record in clients:
        record.label = record.label or record.workload
        (record.latency_ms or []).sort()  # each percentile sorts again, which then takes no time
    problems = [*run.warnings, *(f"{name} excluded: it holds {why}"
                                 for name, why in unreadable.items())]  # fmt: skip
    return MeasuredRun(
        name=manifest.run_id,
        folder=folder,
        manifest=manifest,
        client_records=[one for one in clients if one.co_run not in unreadable],
        co_run_records=[one for one in co_runs if one.co_run not in unreadable],
        problems=[f"{manifest.run_id}: {cleaned(problem)}" for problem in problems],
    )


def read_samples(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the GPU samples of a run, in order, and warnings about lines that are none."""
    samples, warnings = run_folder.read_samples(folder)
    return cleaned(msgspec.to_builtins(samples)), cleaned(warnings)


def _cleaned_records(records: Sequence[_Record], unreadable: dict[str, str]) -> list[_Record]:
    """The records that may be read; of the others the co-run is noted, and why."""
    kept = []
    for record in records:
        try:
            kept.append(cleaned_struct(record))
        except ValueError as error:
            unreadable[cleaned(record.co_run)] = str(error)
    return kept


def _named_by_path(results_dir: Path, runs: list[MeasuredRun]) -> list[MeasuredRun]:
    """Runs by run id; those that share one, as experiments do, by their path below the folder."""
    times = Counter(run.name for run in runs)
    paths = [cleaned(run.folder.relative_to(results_dir).as_posix()) for run in runs]
    names = [
        run.name if times[run.name] == 1 else path for run, path in zip(runs, paths, strict=True)
    ]
    if len(set(names)) < len(runs):  # a renamed folder bears another run's id
        names = paths
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
