"""What the runs of a results folder say together: sections by environment, each with its rows.

Runs on unlike environments (GPU model, driver, library versions, job size; engine and precision of
a workload; work that was calibrated alone) never stand in one section. No input or output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.analysis import noise
from benchmarking.analysis.clients import ClientRow, alone_rows
from benchmarking.analysis.groups import Group, build_group
from benchmarking.analysis.interference import InterferenceMatrix, find_matrices
from benchmarking.analysis.merging import merge
from benchmarking.analysis.ramps import Ramp, find_ramps
from benchmarking.analysis.runs import CPU_DEMO, RunView, mode_order
from benchmarking.suite import baselines


@dataclass(frozen=True)
class Claim:
    """A sentence of the decision, with the runs that its numbers come from."""

    text: str
    run_ids: tuple[str, ...]


@dataclass
class Section:
    """Runs on one environment, compared with each other."""

    environment: dict[str, Any]
    versions: dict[str, Any]
    engines: dict[str, tuple[Any, Any]]
    carried: dict[str, str]
    runs: list[RunView]
    groups: list[Group] = field(default_factory=list)
    ramps: list[Ramp] = field(default_factory=list)
    matrices: list[InterferenceMatrix] = field(default_factory=list)
    same_twice: list[noise.SameTwice] = field(default_factory=list)
    alone: list[ClientRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def is_cpu_demo(self) -> bool:
        """Whether no GPU was there: then nothing here speaks of GPU sharing modes."""
        return self.environment["is_cpu_demo"]

    @property
    def compared_runs(self) -> list[RunView]:
        """Runs that some figure comes from: the scorecard's in its order, then those of pairs."""
        of_pairs = {run_id for matrix in self.matrices for run_id in matrix.run_ids}
        compared = [run for group in self.groups for run in group.runs]
        compared += [run for run in self.runs if run.run_id in of_pairs]
        return list({run.run_id: run for run in compared}.values())

    @property
    def mixes(self) -> list[str]:
        """The mixes of the compared groups."""
        return list(dict.fromkeys(group.mix for group in self.groups))

    def most_compared(self, mix: str) -> list[Group]:
        """Groups of the mix at one count of clients, where the modes can be compared best.

        That is the count with the most modes that have an STP, the largest such count.
        """
        by_clients: dict[int, list[Group]] = {}
        for group in self.groups:
            if group.mix == mix:
                by_clients.setdefault(group.clients, []).append(group)
        return max(
            by_clients.items(),
            key=lambda item: (sum(group.stp is not None for group in item[1]), item[0]),
        )[1]

    @property
    def facts(self) -> dict[str, str]:
        """What sets the section apart from another, as far as it is known, in words."""
        named = {name.replace("_", " "): value for name, value in self.environment.items()}
        named |= {f"version of {name}": value for name, value in self.versions.items()}
        for workload, engine in self.engines.items():
            named[f"engine of {workload}"] = " ".join(str(part) for part in engine)
        named |= {f"calibrated {name}": value for name, value in self.carried.items()}
        return {name: str(value) for name, value in named.items() if value is not None}

    @property
    def title(self) -> str:
        """GPU, driver and job size in a few words."""
        environment = self.environment
        if self.is_cpu_demo:
            return f"CPU demonstration (job size {environment['job_size']})"
        return (
            f"{environment['gpu_name']}, driver {environment['driver_version']}, "
            f"job size {environment['job_size']}"
        )


@dataclass
class Comparison:
    """Everything that the report says, in one object."""

    sections: list[Section]
    phases: list[dict[str, Any]]
    problems: list[str]
    refusals: list[dict[str, Any]] = field(default_factory=list)

    def differences(self) -> list[str]:
        """In what the sections' environments differ, a line a fact: `driver version: ...`."""
        facts = [section.facts for section in self.sections]
        lines = []
        for name in dict.fromkeys(name for section in facts for name in section):
            values = {n: section[name] for n, section in enumerate(facts, 1) if name in section}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{value} in section {n}" for n, value in values.items())
                fix = "; give all runs one `--baseline` to compare them"
                lines.append(f"{name}: {listed}{fix if name.startswith('calibrated ') else ''}")
        return lines


def compare(
    runs: Sequence[RunView],
    phases: Sequence[dict[str, Any]] = (),
    problems: Sequence[str] = (),
    *,
    refusals: Sequence[dict[str, Any]] = (),
    references: Sequence[RunView] = (),
    slo_ms: float | None = None,
) -> Comparison:
    """Compare runs: sections by environment, a row for each combination of mode, mix and clients.

    `phases` are the lines of the unattended run's phase log, `problems` what was wrong with files
    outside the runs, `refusals` what was refused before it had a run. `references` are runs that
    only lend their baselines. `slo_ms` bounds the responses of latency jobs; without it the bound
    that a run was given holds.
    """
    sections = _sections(runs)
    for section in sections:
        _fill_groups(section, [*runs, *references], slo_ms)
        _fill_matrices(section, [*runs, *references])
        section.same_twice = noise.same_twice(section.groups)
        section.ramps = find_ramps(section.groups, section.same_twice)
        section.same_twice += [pair for matrix in section.matrices for pair in matrix.same_twice]
        lenders = [_baseline_run(run, [*runs, *references]) for run in section.runs]
        borrowed = [run for run in lenders if run is not None]
        section.alone = alone_rows([*section.runs, *borrowed], slo_ms)
    file_problems = [f"{run.run_id}: {problem}" for run in runs for problem in run.problems]
    return Comparison(sections, list(phases), [*problems, *file_problems], list(refusals))


def environment_of(run: RunView) -> dict[str, Any]:
    """What must be alike for figures to be compared; versions, engine and precision apart.

    The same rule decides which baselines may be reused. On the CPU the host is the device, so its
    cores count too.
    """
    alike = {name: run.environment.get(name) for name in baselines.COMPARED_FIELDS}
    alike["job_size"] = run.manifest.get("job_size")
    alike["is_cpu_demo"] = run.mode == CPU_DEMO
    alike["host_cores"] = run.environment.get("host_cores") if run.mode == CPU_DEMO else None
    return alike


def _sections(runs: Sequence[RunView]) -> list[Section]:
    """Runs by environment, newest first.

    Another version of a library, a workload with another engine or precision, or a load that was
    calibrated anew (repeats of a notebook's cells, the rate offered to a service), opens another
    section. What a run does not know (one without co-runs has no versions, one of another mix
    other workloads) sets nothing apart. Runs that know little come last, so that none of them
    joins two environments that are unlike.
    """
    sections: list[Section] = []
    newest_first = sorted(runs, key=lambda run: run.age, reverse=True)
    for run in sorted(newest_first, key=lambda run: not run.versions):
        environment, versions, engines = environment_of(run), run.versions, run.engines()
        carried = run.carried()
        for section in sections:
            if (
                section.environment == environment
                and _agree(section.versions, versions)
                and _agree(section.engines, engines)
                and _agree(section.carried, carried)
            ):
                section.runs.append(run)
                section.versions |= versions
                section.engines |= engines
                section.carried |= carried
                break
        else:
            sections.append(Section(environment, versions, engines, carried, [run]))
    for section in sections:
        section.runs.sort(key=lambda run: run.age, reverse=True)
    return sorted(sections, key=lambda section: section.runs[0].age, reverse=True)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def _fill_groups(section: Section, every_run: Sequence[RunView], slo_ms: float | None) -> None:
    """A group for each combination of mode, settings, mix and clients, and what is left out."""
    candidates: dict[tuple[str, str, str, int], list[RunView]] = {}
    for run in section.runs:  # newest first
        if run.is_pairs:
            continue
        for clients in {record["clients"] for record in run.co_runs()}:
            key = (run.mode, run.settings, run.mix, clients)
            candidates.setdefault(key, []).append(run)
    for (*_, clients), runs in candidates.items():
        chosen, left_out = merge(runs, clients)
        section.left_out += left_out
        if chosen:
            bound = slo_ms or (chosen[0].manifest.get("bounds") or {}).get("max_p99_ms")
            alone = _baselines(chosen[0], every_run)
            lenders = [_baseline_run(run, every_run) or run for run in chosen]
            ids = [lender.run_id for lender in lenders]
            section.groups.append(build_group(chosen, clients, alone, bound, ids))
    section.groups.sort(
        key=lambda group: (group.mix, group.clients, mode_order(group.mode), group.settings)
    )


def _fill_matrices(section: Section, every_run: Sequence[RunView]) -> None:
    """What each job felt beside each other one, by mode."""
    section.matrices, left_out = find_matrices(section.runs, lambda run: _baselines(run, every_run))
    section.left_out += left_out


def _baselines(run: RunView, every_run: Sequence[RunView]) -> dict[str, dict[str, Any]]:
    """Baseline client records by job, the run's own or those of the run that it reused."""
    source = _baseline_run(run, every_run)
    borrowed = source.successful_baselines() if source else []
    return {record["job_key"]: record for record in [*borrowed, *run.successful_baselines()]}


def _baseline_run(run: RunView, every_run: Sequence[RunView]) -> RunView | None:
    """The run that this one took its baselines from.

    Experiments name their runs alike, so the one in the same folder comes first; else it is the
    newest of that id that was there before, on a like environment.
    """
    wanted = run.manifest.get("baseline_run_id")
    named = [other for other in every_run if wanted and other.manifest["run_id"] == wanted]
    beside = [other for other in named if other.experiment == run.experiment]
    earlier = [
        other
        for other in named
        if other.age[0] <= run.age[0]
        and environment_of(other) == environment_of(run)
        and _agree(other.versions, run.versions)
        and _agree(other.engines(), run.engines())
    ]
    return max(beside or earlier, key=lambda other: other.age, default=None)
