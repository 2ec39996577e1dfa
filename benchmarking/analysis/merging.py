"""Which runs' co-runs stand in one row of the scorecard, and why others are left out.

Repeats taken in several calls count as repeats of one row when the section already says that GPU
model, driver, versions, engines, precisions and calibrated work are alike, and besides jobs, data,
the mode's settings, the window, the code and the host are. Each row starts from the newest run that
had the card to itself; one beside other people's processes is a repeat of nothing. How a run ended
keeps it out of no row: a count that failed once does not hold, whatever came of it later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarking.analysis.runs import RunView, clients_text
from benchmarking.suite import baselines


def merge(runs: Sequence[RunView], clients: int) -> tuple[list[RunView], list[str]]:
    """Choose among runs of one mode and mix, newest first: those to merge, and what is left out.

    Without any judged co-run of that many clients nothing is chosen.
    """
    what = f"{runs[0].mode_name}, {runs[0].mix}, {clients_text(clients)}"
    judged: list[RunView] = []
    others: list[RunView] = []
    for run in runs:
        (judged if not run.is_invalid and run.judged(clients) else others).append(run)
    if not judged:
        ids = ", ".join(run.run_id for run in runs)
        return [], [f"{what}: no co-run gave an answer ({ids})"]
    judged.sort(key=lambda run: run.is_contended(clients))
    chosen = [judged[0]]
    left_out = []
    for run in judged[1:]:
        reason = _why_apart(run, chosen, clients)
        if reason is None:
            chosen.append(run)
        else:
            left_out.append(f"{run.run_id} ({what}): {reason}")
    reason = f"without a judged co-run, in favor of {judged[0].run_id}"
    return chosen, left_out + [f"{run.run_id} ({what}): {reason}" for run in others]


def _why_apart(run: RunView, chosen: Sequence[RunView], clients: int) -> str | None:
    """Why the run's co-runs are no further repeats of the chosen ones'; `None` when they are."""
    newest = chosen[0]
    for other in chosen:
        if _windows(run, clients) & _windows(other, clients):
            return f"a copy of {other.run_id}"
    if run.is_contended(clients):
        return f"measured beside other people's processes, so it is no repeat of {newest.run_id}"
    jobs = [_job_keys(one, clients) for one in (run, newest)]
    if jobs[0] != jobs[1]:
        return f"other jobs than the newer {newest.run_id}"
    data = baselines.data_differences(
        *(one.manifest.get("resolved_arguments") for one in (run, newest)), jobs[0]
    )
    if data:
        return f"older than {newest.run_id}: {data[0]}"
    if run.knobs(clients) != newest.knobs(clients):
        return f"other settings of the mode than the newer {newest.run_id}"
    for words, theirs, ours in _compared(run, newest):
        if theirs != ours:
            unlike = " and not ".join("unknown" if one is None else str(one)
                                      for one in (theirs, ours))  # fmt: skip
            return f"older than {newest.run_id}, {words} {unlike}"
    return None


def _compared(run: RunView, newest: RunView) -> list[tuple[str, Any, Any]]:
    """What must be alike in two runs, in words, with its value in each; `None` is unknown."""
    fields = [("commit", "git_commit"), ("host cores", "host_cores")]
    # Elsewhere the length of a slice changes nothing.
    fields += [("time slice", "timeslice")] if run.mode == "time-slicing" else []
    found = [(words, *(one.environment.get(name) for one in (run, newest)))
             for words, name in fields]  # fmt: skip
    return [*found, ("window", *map(_window_asked_for, (run, newest)))]


def _window_asked_for(run: RunView) -> str:
    seconds = (run.manifest.get("request") or {}).get("window_seconds")
    return "of whole jobs" if seconds is None else f"of {seconds:g} s"


def _windows(run: RunView, clients: int) -> set[tuple[object, ...]]:
    """What only copies of a co-run share: when the run began, and the co-run's own clock."""
    created_at = run.manifest.get("created_at")
    return {(created_at, co_run.name, *co_run.window) for co_run in run.judged(clients)}


def _job_keys(run: RunView, clients: int) -> list[str]:
    return [record.get("job_key", "") for record in run.judged(clients)[0].clients]
