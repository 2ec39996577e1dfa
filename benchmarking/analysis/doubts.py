"""Signs that a figure may mislead: invalid, unverified, failed, interrupted, merged, limited."""

from __future__ import annotations

from pathlib import Path

from benchmarking.analysis.comparison import Section
from benchmarking.analysis.groups import Group
from benchmarking.analysis.runs import CoRun, RunView, clients_text
from benchmarking.metrics.number_text import joined
from benchmarking.records import run_folder


def find_doubts(section: Section) -> list[str]:
    """The doubts of a section, a sentence each, with the run or the co-run in front."""
    found = [doubt for run in section.runs for doubt in _run_doubts(run)]
    for group in section.groups:
        where = f"{joined(group.run_ids)}, {clients_text(group.clients)}"
        found += [f"{where}: {doubt}" for doubt in _group_doubts(group, section.is_cpu_demo)]
    return found


def _run_doubts(run: RunView) -> list[str]:
    found = []
    outcome = run.manifest.get("outcome")
    if run.is_invalid:
        found.append(f"{run.run_id}: the run is invalid, none of its co-runs is compared")
    elif outcome == "running":
        found.append(f"{run.run_id}: {_why_running(run)}")
    elif outcome in ("interrupted", "failed"):
        found.append(f"{run.run_id}: the run's outcome is {outcome}")
    for record in run.co_runs():
        co_run = CoRun(run, record)
        where = f"{run.run_id}, {co_run.name}"
        if not co_run.is_valid:
            reason = record.get("reason") or "a client was not proved to run under the mode"
            found.append(f"{where}: invalid, {reason}")
        elif record["outcome"] == "interrupted":
            found.append(f"{where}: interrupted, so it is in no figure")
        elif not co_run.is_ok:
            reason = record.get("reason") or "no reason recorded"
            found.append(f"{where}: {record['outcome']}, {reason}")
    if run.is_pairs:  # no group says these for it
        found += [f"{run.run_id}: {warning}" for warning in _pair_warnings(run)]
    for record in run.clients("baseline"):
        if record["status"] != "ok":
            found.append(
                f"{run.run_id}: {record.get('label')} alone ended {record['status']} "
                f"({record.get('reason') or 'no reason recorded'}); without it STP and overhead "
                "are unknown"
            )
    return found


def _why_running(run: RunView) -> str:
    """A run that was killed had no time to say so."""
    if run_folder.is_held(Path(run.experiment) / run.manifest["run_id"]):
        return "the run is still going on"
    return "the run was cut off (benchmark_suite.py --resume goes on with it)"


def _pair_warnings(run: RunView) -> list[str]:
    """What the co-runs of pairs warn of, each once."""
    records = run.co_runs()
    return sorted({warning for record in records for warning in record.get("warnings") or []})


def _group_doubts(group: Group, is_cpu_demo: bool) -> list[str]:
    found = []
    if group.is_unverified and not is_cpu_demo:
        found.append("unverified, the clients could not be matched with the driver's lists")
    # Of services alone nobody asks for throughput.
    if group.stp is None and group.outcome == "ok" and group.throughput_clients != 0:
        found.append("no baseline for every job, so STP and overhead are unknown")
    if len(group.runs) > 1:
        cards = len(group.gpu_uuids)
        on = f" on {cards} cards of one model ({joined(group.gpu_uuids)})" if cards > 1 else ""
        found.append(f"merged from {len(group.runs)} runs{on}")
    if any(run.environment.get("git_dirty") for run in group.runs) and len(group.runs) > 1:
        found.append("some of these runs were taken with uncommitted changes, which may differ")
    for name, words in (("git_commit", "commit"), ("host_cores", "number of host cores")):
        if len(group.runs) > 1 and group.runs[0].environment.get(name) is None:
            found.append(f"the {words} of these runs is unknown, and may differ")
    if any(run.is_contended(group.clients) for run in group.runs):
        found.append("measured beside other people's processes: the figures hold beside them only")
    found += sorted({w for co_run in group.co_runs for w in co_run.record.get("warnings") or []})
    if group.gpu["throttle_reasons"]:
        found.append(f"clocks were limited ({', '.join(group.gpu['throttle_reasons'])})")
    return found
