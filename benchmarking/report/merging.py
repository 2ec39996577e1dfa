"""Which runs stand together: those of one environment, repeats of one row, baselines of a session.

Runs on unlike environments (GPU model, driver, library versions, job size, method; engine and
precision of a workload; calibrated work) never stand in one section. Within one, runs of one mode,
mix and count are repeats of one row when jobs, data, settings, window, code and host are alike too.
How a run ended keeps it out of no row: a count that failed once fails, whatever came of it later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.measuring import baselines
from benchmarking.modes.names import MODE_TIME_SLICING
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_SHARE_BASELINE, pooled
from benchmarking.records.types import ClientRecord, Phase
from benchmarking.report.runs import Alone, MeasuredRun


@dataclass
class Section:
    """Runs on one environment, newest first, and what is known of it."""

    environment: dict[str, Any]
    versions: dict[str, Any]
    engines: dict[str, tuple[Any, Any]]
    carried: dict[str, str]
    runs: list[MeasuredRun] = field(default_factory=list)

    def takes(self, run: MeasuredRun) -> bool:
        """Add the run unless it was taken under other conditions; says whether it was added."""
        found = (
            (self.versions, run.versions),
            (self.engines, run.engines()),
            (self.carried, run.carried()),
        )
        if self.environment != run.environment or not all(_agree(*pair) for pair in found):
            return False
        self.runs.append(run)
        for known, more in found:
            known.update(more)
        return True

    def facts(self) -> dict[str, str]:
        """What sets the section apart from another, as far as it is known, in words."""
        engines = {name: " ".join(map(str, pair)) for name, pair in self.engines.items()}
        named = {
            **{name.replace("_", " "): value for name, value in self.environment.items()},
            **{f"version of {name}": value for name, value in self.versions.items()},
            **{f"engine of {workload}": engine for workload, engine in engines.items()},
            **{f"calibrated {name}": value for name, value in self.carried.items()},
        }
        return {name: str(value) for name, value in named.items() if value is not None}


def differences(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """In what sections differ: a fact with its value in each, `None` where it is not known."""
    facts = [section.facts() for section in sections]
    found = []
    for name in dict.fromkeys(name for known in facts for name in known):
        values = [known.get(name) for known in facts]
        if len({value for value in values if value is not None}) > 1:
            found.append({"fact": name, "values": values})
    return found


def find_sections(runs: Sequence[MeasuredRun]) -> list[Section]:
    """Runs by environment, newest first.

    What a run does not know (one without co-runs has no versions) sets nothing apart. Runs that
    know little come last, so that none of them joins two environments that are unlike.
    """
    sections: list[Section] = []
    newest_first = sorted(runs, key=lambda run: run.age, reverse=True)
    for run in sorted(newest_first, key=lambda run: not run.versions):
        if not any(section.takes(run) for section in sections):
            sections.append(
                Section(run.environment, run.versions, run.engines(), run.carried(), [run])
            )
    for section in sections:
        section.runs.sort(key=lambda run: run.age, reverse=True)
    return sorted(sections, key=lambda section: section.runs[0].age, reverse=True)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in one.keys() & other.keys())


# --- repeats of one row -----------------------------------------------------------------------


def merge(runs: Sequence[MeasuredRun], clients: int) -> tuple[list[MeasuredRun], list[str]]:
    """Choose among runs of one mode and mix, newest first: those to merge, and what is excluded.

    A row starts from the newest run that had the card to itself; without any judged co-run of that
    many clients nothing is chosen.
    """
    what = f"{runs[0].variant}, {runs[0].manifest.mix}, {clients_text(clients)}"
    is_judged = {
        run.name: run.manifest.outcome != "invalid" and bool(run.judged(clients)) for run in runs
    }
    judged = [run for run in runs if is_judged[run.name]]
    if not judged:
        ids = ", ".join(run.name for run in runs)
        return [], [f"{what}: no co-run gave an answer ({ids})"]
    judged.sort(key=lambda run: run.is_contended(clients))
    chosen, excluded = [judged[0]], []
    for run in judged[1:]:
        reason = _mismatch_reason(run, chosen, clients)
        if reason is None:
            chosen.append(run)
        else:
            excluded.append(f"{run.name} ({what}): {reason}")
    excluded += [
        f"{run.name} ({what}): without a judged co-run, in favor of {judged[0].name}"
        for run in runs
        if not is_judged[run.name]
    ]
    return chosen, excluded


def clients_text(clients: int) -> str:
    """`1 client`, `4 clients`."""
    return f"{clients} client{'' if clients == 1 else 's'}"


def _mismatch_reason(run: MeasuredRun, chosen: Sequence[MeasuredRun], clients: int) -> str | None:
    """Why the run's co-runs are no further repeats of the chosen ones'; `None` when they are."""
    newest = chosen[0]
    for other in chosen:
        if _windows(run, clients) & _windows(other, clients):
            return f"a copy of {other.name}"
    if run.is_contended(clients):
        return f"measured beside other people's processes, so it is no repeat of {newest.name}"
    jobs, wanted = (
        [record.job_key for record in one.clients_of(one.judged(clients)[0])]
        for one in (run, newest)
    )
    if jobs != wanted:
        return f"other jobs than the newer {newest.name}"
    data = baselines.data_differences(
        run.manifest.resolved_arguments, newest.manifest.resolved_arguments, jobs
    )
    if data:
        return f"older than {newest.name}: {data[0]}"
    if run.knobs(clients) != newest.knobs(clients):
        return f"other settings of the mode than the newer {newest.name}"
    for what, theirs in _compared(run).items():
        ours = _compared(newest)[what]
        if theirs != ours:
            unlike = " and not ".join("unknown" if one is None else str(one)
                                      for one in (theirs, ours))  # fmt: skip
            return f"older than {newest.name}, {what} {unlike}"
    return None


def _compared(run: MeasuredRun) -> dict[str, Any]:
    """What must be alike in repeats, by what it is called; `None` is unknown."""
    here = run.manifest.environment
    seconds = (run.manifest.request or {}).get("window_seconds")
    return {
        "commit": here.git_commit,
        "host cores": here.host_cores,
        # Elsewhere the length of a slice changes nothing.
        "time slice": here.timeslice if run.mode == MODE_TIME_SLICING else None,
        "window": f"of {seconds:g} s" if isinstance(seconds, (int, float)) else "of whole jobs",
    }


def _windows(run: MeasuredRun, clients: int) -> set[tuple[object, ...]]:
    """What only copies of a co-run share: when the run began, and the co-run's own clock."""
    return {
        (run.manifest.created_at, one.co_run, one.window_start_seconds, one.window_end_seconds)
        for one in run.judged(clients)
    }


# --- the jobs alone ---------------------------------------------------------------------------


def alone_of(
    run: MeasuredRun, every_run: Sequence[MeasuredRun], phase: Phase = PHASE_BASELINE
) -> Alone:
    """Baselines of a run: pooled over its session, else its own before those that it reused.

    With `share_baseline` those of its own instances.
    """
    session = [
        other
        for other in every_run
        if other.name != run.name
        and run.manifest.session
        and other.manifest.session == run.manifest.session
        and other.folder.parent == run.folder.parent
    ]
    borrowed = baseline_run(run, every_run) if phase != PHASE_SHARE_BASELINE else None
    whole = next(other for other in every_run if other.name == run.name)
    members = [*session, whole] if phase != PHASE_SHARE_BASELINE else [whole]
    is_member = borrowed is not None and borrowed.name in {member.name for member in members}
    sources = [members] if borrowed is None or is_member else [[borrowed], members]
    alone = Alone()
    for source in sources:
        repeats: dict[str, list[ClientRecord]] = {}
        joules: dict[str, list[float | None]] = {}
        for member in source:
            energy = {
                one.co_run: one.gpu and one.gpu.energy_joules for one in member.co_runs(phase)
            }
            for record in member.good_alone(phase):
                repeats.setdefault(record.job_key, []).append(record)
                joules.setdefault(record.job_key, []).append(energy[record.co_run])
        alone.repeats |= repeats
        alone.pooled |= {job_key: pooled(records) for job_key, records in repeats.items()}
        alone.energy_joules |= {
            job_key: None if None in values else math.fsum(values)
            for job_key, values in joules.items()
        }
    return alone


def baseline_run(run: MeasuredRun, every_run: Sequence[MeasuredRun]) -> MeasuredRun | None:
    """The run that this one took its baselines from.

    Experiments name their runs alike, so the one in the same folder comes first; else it is the
    newest of that id that was there before, on a like environment.
    """
    wanted = run.manifest.baseline_run_id
    named = [other for other in every_run if wanted and other.manifest.run_id == wanted]
    beside = [other for other in named if other.folder.parent == run.folder.parent]
    earlier = [
        other
        for other in named
        if other.age[0] <= run.age[0]
        and other.environment == run.environment
        and _agree(other.versions, run.versions)
        and _agree(other.engines(), run.engines())
    ]
    return max(beside or earlier, key=lambda other: other.age, default=None)
