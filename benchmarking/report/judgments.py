"""What a reader must know next to the decision, as data: rules of thumb, the worst case, doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.modes.names import MODE_CPU_DEMO, MODE_MIG, MODE_MPS, MODE_TIME_SLICING
from benchmarking.records import run_folder
from benchmarking.records.writing import is_held
from benchmarking.report import claims, guide
from benchmarking.report.groups import Group, most_compared
from benchmarking.report.runs import MeasuredRun, Results
from benchmarking.report.wording import clients_text, listed, number

SHARING_MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG)
YES, NO = "yes", "no"
# What the vendor's rule of thumb speaks of, by workload, and the mode that it names for it: time
# slicing for notebooks and throughput, SM sharing for inference that must be quick.
RULES: Mapping[str | None, tuple[str, str]] = {
    None: ("throughput", MODE_TIME_SLICING),
    "jupyter_simulation": ("notebooks", MODE_TIME_SLICING),
    **dict.fromkeys(
        ("batch_inference", "inference_server", "llm_inference"),
        ("latency-sensitive inference", MODE_MPS),
    ),
}
RULE_MODES = {MODE_TIME_SLICING: "time slicing", MODE_MPS: "SM sharing (MPS)"}


def expectations(
    concluded: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> list[dict[str, Any]]:
    """Whether the guide's overheads and the vendor's rule of thumb hold for these mixes."""
    rows = {(one.mix, one.clients, one.first.variant): one.row for one in groups}
    found: list[dict[str, Any]] = []
    for one in concluded:
        if not one["is_claim"]:
            continue
        said = []
        if one["subject"] == claims.WHOLE_CARD:
            for mode in one["modes"]:
                said += _guides(rows[one["mix"], one["clients"], mode["variant"]])
        if one["workload"] in RULES:
            said.append(_vendors(one["pairs"], *RULES[one["workload"]]))
        found += [
            {"mix": one["mix"], "clients": one["clients"], "subject": one["subject"], **rule}
            for rule in said
        ]
    return found


def _guides(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The guide's overhead of the mode: met where the whole interval lies within its range."""
    found = []
    for expected in guide.EXPECTATIONS:
        if expected.subject != row["mode"] or "overhead" not in expected.quantity:
            continue
        value = row[expected.quantity]
        holds = claims.CANNOT_TELL
        if value and value["is_interval"]:
            ends = {expected.verdict(value["low"]), expected.verdict(value["high"])}
            if len(ends) == 1:
                holds = YES if ends == {"inside"} else NO
        what = expected.quantity.removesuffix("_percent").replace("_", " ")
        found.append({
            "source": "guide",
            "rule": f"{what} under {row['variant']}",
            "mode": row["variant"],
            "expected": expected.range_text,
            "found": value and number(value["mean"], 1, "%"),
            "holds": holds,
        })  # fmt: skip
    return found


def _vendors(pairs: Sequence[Mapping[str, Any]], what: str, expected: str) -> dict[str, Any]:
    """Whether the mode that the rule names is surely the better one, and what was found instead.

    MPS has to have one kind that is better than time slicing, time slicing has to be better than
    every kind of MPS.
    """
    pairs = [
        pair for pair in pairs
        if MODE_TIME_SLICING in (pair["one"], pair["other"])
        and any(side.startswith(MODE_MPS) for side in (pair["one"], pair["other"]))
    ]  # fmt: skip
    sure = [pair["better"] for pair in pairs if pair["verdict"] == claims.SURE]
    for_mps = [better for better in sure if better.startswith(MODE_MPS)]
    is_settled = all(pair["verdict"] in (claims.SURE, claims.NO_DIFFERENCE) for pair in pairs)
    if for_mps:
        found, holds = for_mps[0], YES if expected == MODE_MPS else NO
    elif sure and len(sure) == len(pairs):
        found, holds = MODE_TIME_SLICING, YES if expected == MODE_TIME_SLICING else NO
    elif pairs and is_settled:
        found, holds = claims.NO_DIFFERENCE, NO
    else:
        found, holds = pairs[0]["verdict"] if pairs else claims.NOT_MEASURED, claims.CANNOT_TELL
    rule = f"{RULE_MODES[expected]} for {what}"
    return {"source": "vendor", "rule": rule, "mode": expected, "expected": expected,
            "found": found, "holds": holds}  # fmt: skip


def worst_slowdowns(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The job that suffered most under each mode, and who caused it where that can be told.

    Neighbors of one kind are the cause; of several it is the one that slowed the job most where
    the two were measured as a pair under the same mode.
    """
    by_pair: dict[tuple[str, str, str], float] = {}
    for group in (group for group in groups if group.clients == 2 and not group.broken):
        rows = group.row["client_rows"]
        for row, other in zip(rows, reversed(rows), strict=True):
            if row["slowdown"] and not row["invalid"]:
                pair = (group.first.variant, row["label"], other["label"])
                by_pair[pair] = row["slowdown"]["mean"]
    found = []
    for group in (group for together in most_compared(groups) for group in together):
        known = [row for row in group.row["client_rows"]
                 if row["slowdown"] and not row["service"] and not row["invalid"]]  # fmt: skip
        if not known or group.broken:
            continue
        worst = max(known, key=lambda row: row["slowdown"]["mean"])
        next_to = [one.label for one in group.members if one.client != worst["client"]]
        pairs = {other: by_pair.get((group.first.variant, worst["label"], other))
                 for other in next_to}  # fmt: skip
        tried = {other: felt for other, felt in pairs.items() if felt is not None}
        caused_by = source = None
        if len(pairs) == 1:
            caused_by, source = next_to[0], "only neighbor"
        elif pairs and tried.keys() == pairs.keys():
            caused_by, source = max(tried, key=tried.__getitem__), "pairs"
        found.append({
            **group.kind,
            "label": worst["label"],
            "slowdown": worst["slowdown"],
            "invalid": worst["invalid"],
            "caused_by": caused_by,
            "source": source,
            "next_to": next_to,
        })  # fmt: skip
    return sorted(found, key=lambda one: one["slowdown"]["mean"], reverse=True)


def not_measured(
    groups: Sequence[Group], runs: Sequence[MeasuredRun], results: Results, *, is_cpu_demo: bool
) -> list[dict[str, str]]:
    """The sharing modes that no figure stands for, and why."""
    measured = {group.first.mode for group in groups}
    reasons = {run.mode: "its runs are of another environment" for run in results.runs}
    reasons |= {
        run.mode: "no co-run of it can be compared (see the notes on the data)" for run in runs
    }
    reasons |= {one["name"]: one["reason"] for one in results.phases if one["reason"]}
    return [
        {
            "mode": mode,
            "reason": "no GPU was used" if is_cpu_demo
            else reasons.get(mode, "no run of it in this folder"),
        }
        for mode in SHARING_MODES
        if mode not in measured
    ]  # fmt: skip


# --- doubts -----------------------------------------------------------------------------------


def doubts(runs: Sequence[MeasuredRun], groups: Sequence[Group]) -> list[str]:
    """Signs that a figure may mislead, a sentence each, with the run or the co-run in front."""
    found = [f"{run.name}{doubt}" for run in runs for doubt in _run_doubts(run)]
    for group in groups:
        where = f"{listed(group.run_ids)}, {clients_text(group.clients)}"
        found += [f"{where}: {doubt}" for doubt in _group_doubts(group)]
    return found


def _run_doubts(run: MeasuredRun) -> list[str]:
    found = []
    outcome = run.manifest.outcome
    if outcome == "running" and is_held(run.folder):
        found.append(": the run is still going on")
    elif outcome != "complete":
        said = {
            "invalid": "the run is invalid, none of its co-runs is compared",
            "running": "the run was cut off (benchmark_suite.py --resume goes on with it)",
        }
        otherwise = f"the run's outcome is {outcome}"
        found.append(f": {said.get(outcome, otherwise)}")
    for record in run.co_runs():
        if not run.is_valid(record):
            reason = record.reason or "a client was not proved to run under the mode"
            found.append(f", {record.co_run}: invalid, {reason}")
        elif record.outcome == "interrupted":
            found.append(f", {record.co_run}: interrupted, so it is in no figure")
        elif record.outcome != "ok":
            reason = record.reason or "no reason recorded"
            found.append(f", {record.co_run}: {record.outcome}, {reason}")
    if run.manifest.is_pairs:  # no group says these for it
        warnings = {warning for record in run.co_runs() for warning in record.warnings}
        found += [f": {warning}" for warning in sorted(warnings)]
    found += [
        f": {record.label} alone ended {record.status} "
        f"({record.reason or 'no reason recorded'}); without it STP and overhead are unknown"
        for record in run.client_records
        if record.phase == run_folder.PHASE_BASELINE and record.status != "ok"
    ]
    return found


def _group_doubts(group: Group) -> list[str]:
    row, is_gpu = group.row, group.first.mode != MODE_CPU_DEMO
    found = [f"{one['label']}: {one['invalid']}" for one in row["client_rows"] if one["invalid"]]
    if row["is_unverified"] and is_gpu:
        found.append("unverified, the clients could not be matched with the driver's lists")
    # Of services alone nobody asks for throughput.
    is_whole = row["outcome"] == "ok" and not row["invalid"]
    if row["stp"] is None and is_whole and row["throughput_clients"] != 0:
        idle = (
            f"{listed(group.idle)} finished no unit of work in the window" if group.idle else None
        )
        found.append(f"{idle or 'no baseline for every job'}, so STP and overhead are unknown")
    here = [run.manifest.environment for run in group.runs]
    if len(here) > 1:
        cards = row["gpu_uuids"]
        on = f" on {len(cards)} cards of one model ({listed(cards)})" if len(cards) > 1 else ""
        found.append(f"merged from {len(here)} runs{on}")
        if any(one.git_dirty for one in here):
            found.append("some of these runs were taken with uncommitted changes, which may differ")
        if here[0].git_commit is None:
            found.append("the commit of these runs is unknown, and may differ")
        if here[0].host_cores is None:
            found.append("the number of host cores of these runs is unknown, and may differ")
    if group.clients > 1 and is_gpu and not group.is_guarded:
        found.append("drift not guarded: its repeats were not rounds, one next to the other modes'")
    if any(run.is_contended(group.clients) for run in group.runs):
        found.append("measured beside other people's processes: the figures hold beside them only")
    found += sorted({warning for one in group.co_runs for warning in one.record.warnings})
    if len({frozenset(one.gpu.throttle_reasons or ()) for one in group.co_runs}) > 1:
        found.append("its rounds had other throttle reasons than each other")
    if row["gpu"]["throttle_reasons"]:
        found.append(f"clocks were limited ({', '.join(row['gpu']['throttle_reasons'])})")
    return found
