"""Which runs stand together: those of one environment, repeats of one row, baselines of a session.

Runs on unlike environments (GPU model, driver, library versions, job size, method; engine and
precision of a workload; calibrated work) never stand in one section. Within one, runs of one mode,
mix and count are repeats of one row when jobs, data, settings, window, code and host are alike too.
How a run ended keeps it out of no row: a count that failed once fails, whatever came of it later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.measuring import baselines
from benchmarking.metrics import scores
from benchmarking.modes.names import MODE_TIME_SLICING
from benchmarking.records.run_folder import PHASE_SHARE_BASELINE
from benchmarking.records.types import ClientRecord, Phase
from benchmarking.report.groups import Alone, Baselines
from benchmarking.report.runs import Conditions, MeasuredRun
from benchmarking.report.wording import clients_text

# What is written before the name of a condition, by kind.
_WORDS = {
    "environment": "",
    "version": "version of ",
    "engine": "engine of ",
    "calibrated": "calibrated ",
}


@dataclass
class Section:
    """Runs under the same conditions, newest first, and all that is known of these."""

    conditions: Conditions
    runs: list[MeasuredRun]


def find_sections(runs: Sequence[MeasuredRun]) -> list[Section]:
    """Runs by environment, newest first.

    What a run does not know (one without co-runs has no versions) sets nothing apart. Runs that
    know little come last, so that none of them joins two environments that are unlike.
    """
    sections: list[Section] = []
    newest_first = sorted(runs, key=lambda run: run.age, reverse=True)
    for run in sorted(newest_first, key=lambda run: not run.conditions["version"]):
        alike = (one for one in sections if _agree(one.conditions, run.conditions))
        section = next(alike, None)
        if section is None:
            section = Section({kind: {} for kind in _WORDS}, [])
            sections.append(section)
        section.runs.append(run)
        for kind, known in section.conditions.items():
            known.update(run.conditions[kind])
    for section in sections:
        section.runs.sort(key=lambda run: run.age, reverse=True)
    return sorted(sections, key=lambda section: section.runs[0].age, reverse=True)


def _agree(one: Conditions, other: Conditions, kinds: Sequence[str] = tuple(_WORDS)) -> bool:
    return all(
        one[kind][name] == other[kind][name]
        for kind in kinds
        for name in one[kind].keys() & other[kind].keys()
    )


def differences(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """In what sections differ: a fact with its value in each, `None` where it is not known."""
    facts: dict[str, list[str | None]] = {}
    for number, section in enumerate(sections):
        for kind, known in section.conditions.items():
            for name, value in known.items():
                shown = name.replace("_", " ") if kind == "environment" else _WORDS[kind] + name
                text = " ".join(map(str, value)) if kind == "engine" else str(value)
                values = facts.setdefault(shown, [None] * len(sections))
                values[number] = None if value is None else text
    return [
        {"fact": fact, "values": values}
        for fact, values in facts.items()
        if len({value for value in values if value is not None}) > 1
    ]


# --- repeats of one row -----------------------------------------------------------------------


def merge(runs: Sequence[MeasuredRun], clients: int) -> tuple[list[MeasuredRun], list[str]]:
    """Choose among runs of one mode and mix, newest first: those to merge, and what is excluded.

    A row starts from the newest run that had the card to itself; without any judged co-run of that
    many clients nothing is chosen.
    """
    what = f"{runs[0].variant}, {runs[0].manifest.mix}, {clients_text(clients)}"
    judged = [run for run in runs if run.manifest.outcome != "invalid" and run.judged(clients)]
    if not judged:
        ids = ", ".join(run.name for run in runs)
        return [], [f"{what}: no co-run gave an answer ({ids})"]
    others = [run for run in runs if all(run is not one for one in judged)]
    judged.sort(key=lambda run: run.is_contended(clients))
    chosen, excluded = [judged[0]], []
    for run in judged[1:]:
        reason = _mismatch_reason(run, chosen[0], clients)
        if reason is None:
            chosen.append(run)
        else:
            excluded.append(f"{run.name} ({what}): {reason}")
    excluded += [
        f"{run.name} ({what}): without a judged co-run, in favor of {judged[0].name}"
        for run in others
    ]
    return chosen, excluded


def _mismatch_reason(run: MeasuredRun, newest: MeasuredRun, clients: int) -> str | None:
    """Why the run's co-runs are no further repeats of the newest's; `None` when they are."""
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
    theirs, ours = (
        [client.knobs for co_run in one.planned(clients)[:1] for client in co_run.clients]
        for one in (run, newest)
    )
    if theirs != ours:
        return f"other settings of the mode than the newer {newest.name}"
    before, now = _compared(run), _compared(newest)
    for what in before:
        if before[what] != now[what]:
            unlike = f"{before[what] or 'unknown'} and not {now[what] or 'unknown'}"
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


# --- the jobs alone ---------------------------------------------------------------------------


def alone_of(run: MeasuredRun, every_run: Sequence[MeasuredRun], phase: Phase) -> Baselines:
    """Baselines of a run: pooled over its session, else its own before those that it reused.

    With `share_baseline` those of its own instances.
    """
    members = [next(other for other in every_run if other.name == run.name)]
    borrowed = None
    if phase != PHASE_SHARE_BASELINE:
        borrowed = baseline_run(run, every_run)
        members = [*_session(run, every_run), *members]
    is_member = borrowed is None or borrowed.name in {member.name for member in members}
    found: dict[str, Alone] = {}
    for source in [members] if borrowed is None or is_member else [[borrowed], members]:
        repeats: dict[str, list[ClientRecord]] = {}
        joules: dict[str, list[float | None]] = {}
        for co_run, record in (pair for member in source for pair in member.good_alone(phase)):
            repeats.setdefault(record.job_key, []).append(record)
            energy = co_run.gpu.energy_joules if co_run.gpu else None
            joules.setdefault(record.job_key, []).append(energy)
        for job_key, records in repeats.items():
            known = scores.all_known(joules[job_key])
            found[job_key] = Alone(records, math.fsum(known) if known else None)
    return found


def _session(run: MeasuredRun, every_run: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """The other runs of its session."""
    return [
        other
        for other in every_run
        if other.name != run.name
        and run.manifest.session
        and other.manifest.session == run.manifest.session
        and other.folder.parent == run.folder.parent
    ]


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
        and _agree(other.conditions, run.conditions, ("environment", "version", "engine"))
    ]
    return max(beside or earlier, key=lambda other: other.age, default=None)
