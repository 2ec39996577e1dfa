"""What a reader must know next to the decision, as data: doubts, the worst case, rules of thumb."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarking.metrics.estimates import estimate
from benchmarking.metrics.number_text import joined
from benchmarking.modes.names import MODE_CPU_DEMO, MODE_MIG, MODE_MPS, MODE_TIME_SLICING
from benchmarking.records import run_folder
from benchmarking.records.writing import is_held
from benchmarking.report import claims, guide
from benchmarking.report.groups import Group, most_compared, plain
from benchmarking.report.merging import clients_text
from benchmarking.report.runs import MeasuredRun, Results, pressed_resource

SHARING_MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG)
YES, NO = "yes", "no"
NOTEBOOKS = ("jupyter_simulation",)
INFERENCE = ("batch_inference", "inference_server", "llm_inference")

Rows = Mapping[int, Mapping[str, Any]]


def expectations(
    concluded: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Whether the guide's overheads and the vendor's rule of thumb hold for these mixes."""
    by_place = {(row["mix"], row["clients"], row["variant"]): row for row in rows}
    found: list[dict[str, Any]] = []
    for one in concluded:
        if not one["is_claim"]:
            continue
        place = {"mix": one["mix"], "clients": one["clients"], "subject": one["subject"]}
        if one["subject"] == claims.WHOLE_CARD:
            for mode in one["modes"]:
                row = by_place[(one["mix"], one["clients"], mode["variant"])]
                found += [{**place, **said} for said in _guides(row)]
        rule = _vendors_rule(one)
        if rule:
            found.append({**place, **rule})
    return found


def _guides(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The guide's overhead of the mode: met where the whole interval lies within its range."""
    found = []
    for expected in guide.MODE_EXPECTATIONS:
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
            "found": value and f"{value['mean']:.1f} %",
            "holds": holds,
        })  # fmt: skip
    return found


def _vendors_rule(one: Mapping[str, Any]) -> dict[str, Any] | None:
    """Time slicing for notebooks and throughput, SM sharing for inference that must be quick."""
    if one["subject"] == claims.WHOLE_CARD:
        what, expected = "throughput", MODE_TIME_SLICING
    elif one["workload"] in NOTEBOOKS:
        what, expected = "notebooks", MODE_TIME_SLICING
    elif one["workload"] in INFERENCE:
        what, expected = "latency-sensitive inference", MODE_MPS
    else:
        return None
    pairs = [
        pair for pair in one["pairs"]
        if MODE_TIME_SLICING in (pair["one"], pair["other"])
        and any(side.startswith(MODE_MPS) for side in (pair["one"], pair["other"]))
    ]  # fmt: skip
    holds, found = _holds(pairs, expected)
    name = "time slicing" if expected == MODE_TIME_SLICING else "SM sharing (MPS)"
    return {
        "source": "vendor",
        "rule": f"{name} for {what}",
        "mode": expected,
        "expected": expected,
        "found": found,
        "holds": holds,
    }


def _holds(pairs: Sequence[Mapping[str, Any]], expected: str) -> tuple[str, str]:
    """Whether the expected mode is surely the better one, and what was found in place of it.

    `pairs` are time slicing against each kind of MPS: MPS has one that is better, time slicing has
    to be better than all of them.
    """
    sure = [pair["better"] for pair in pairs if pair["verdict"] == claims.SURE]
    for_mps = [better for better in sure if better.startswith(MODE_MPS)]
    if for_mps:
        return (YES if expected == MODE_MPS else NO), for_mps[0]
    if sure and len(sure) == len(pairs):
        return (YES if expected == MODE_TIME_SLICING else NO), MODE_TIME_SLICING
    settled = [pair["verdict"] in (claims.SURE, claims.NO_DIFFERENCE) for pair in pairs]
    if pairs and all(settled):
        return NO, claims.NO_DIFFERENCE
    return claims.CANNOT_TELL, pairs[0]["verdict"] if pairs else claims.NOT_MEASURED


def worst_slowdowns(groups: Sequence[Group], rows: Rows) -> list[dict[str, Any]]:
    """The job that suffered most under each mode, and who caused it where that can be told.

    Neighbors of one kind are the cause; of several it is the one that slowed the job most where
    the two were measured as a pair under the same mode.
    """
    compared = [group for together in most_compared(groups) for group in together]
    by_neighbor: dict[tuple[str, str], dict[str, float]] = {}
    for group in (group for group in groups if group.clients == 2):
        for row, other in zip(rows[id(group)]["client_rows"],
                              reversed(rows[id(group)]["client_rows"]), strict=True):  # fmt: skip
            if row["slowdown"] and not row["invalid"]:
                neighbors = by_neighbor.setdefault((group.first.variant, row["label"]), {})
                neighbors[other["label"]] = row["slowdown"]["mean"]
    found = []
    for group in compared:
        known = [row for row in rows[id(group)]["client_rows"]
                 if row["slowdown"] and not row["service"]]  # fmt: skip
        if not known:
            continue
        worst = max(known, key=lambda row: row["slowdown"]["mean"])
        next_to = [client.label for client in group.co_runs[0].clients
                   if client.client != worst["client"]]  # fmt: skip
        tried = by_neighbor.get((group.first.variant, worst["label"]), {})
        neighbors = {*next_to}
        caused_by = None
        if len(neighbors) == 1:
            caused_by = next_to[0]
        elif neighbors and neighbors <= tried.keys():
            caused_by = max(neighbors, key=tried.__getitem__)
        found.append({
            **group.kind,
            "label": worst["label"],
            "slowdown": worst["slowdown"],
            "invalid": worst["invalid"],
            "caused_by": caused_by,
            "source": caused_by and ("pairs" if len(neighbors) > 1 else "only neighbor"),
            "next_to": next_to,
        })  # fmt: skip
    return sorted(found, key=lambda one: one["slowdown"]["mean"], reverse=True)


def not_measured(
    groups: Sequence[Group], results: Results, *, is_cpu_demo: bool
) -> list[dict[str, str]]:
    """The sharing modes that no figure stands for, and why."""
    measured = {group.first.mode for group in groups}
    phases = {phase["name"]: phase for phase in results.phases}
    found = []
    for mode in (mode for mode in SHARING_MODES if mode not in measured):
        reason = "no run of it in this folder"
        if is_cpu_demo:
            reason = "no GPU was used"
        elif mode in phases:
            reason = phases[mode]["reason"] or "no co-run of it gave an answer"
        found.append({"mode": mode, "reason": reason})
    return found


def noisy(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each job next to a neighbor that presses one resource: from which duty on a slice is better.

    Under MIG the neighbor's duty changes little; where time slicing's or MPS's slowdown passes that
    of the slice lies the break-even, interpolated between the measured duties (at 0 it is 1).
    """
    felt: dict[tuple[str, str], dict[str, dict[float, Any]]] = {}
    for group in groups:
        pressed = [pressed_resource(client.job_key) for client in group.co_runs[0].clients]
        if group.clients != 2 or pressed.count(None) != 1:
            continue
        kind, duty = next(one for one in pressed if one is not None)
        members = group.members(group.co_runs[0].clients[pressed.index(None)].client)
        slowdown = estimate(one.slowdown(client) for one, client in members if one.is_ok)
        by_mode = felt.setdefault((members[0][1].label, kind), {})
        by_mode.setdefault(group.first.variant, {})[duty] = slowdown
    return [
        {
            "label": label,
            "kind": kind,
            "points": [
                {"variant": variant, "duty": duty, "slowdown": plain(slowdown)}
                for variant, by_duty in by_mode.items()
                for duty, slowdown in sorted(by_duty.items())
            ],
            "break_even": [
                {"variant": variant} | _break_even(by_duty, by_mode.get(MODE_MIG))
                for variant, by_duty in by_mode.items()
                if variant != MODE_MIG
            ],
        }
        for (label, kind), by_mode in felt.items()
    ]


def _break_even(
    by_duty: Mapping[float, Any], on_a_slice: Mapping[float, Any] | None
) -> dict[str, Any]:
    known = [found.mean for found in (on_a_slice or {}).values() if found]
    if not known:
        return {"duty": None, "reason": "not measured: no MIG"}
    limit = statistics.fmean(known)
    points = {0.0: 1.0} | {duty: found.mean for duty, found in by_duty.items() if found}
    before, reached = 0.0, points[0.0]
    if reached >= limit:
        return {"duty": 0.0, "reason": None}
    for duty, slowdown in sorted(points.items()):
        if slowdown >= limit:
            share = (limit - reached) / (slowdown - reached)
            return {"duty": before + share * (duty - before), "reason": None}
        before, reached = duty, slowdown
    return {"duty": None, "reason": f"a slice is never better up to duty {before:g}"}


# --- doubts -----------------------------------------------------------------------------------


def doubts(runs: Sequence[MeasuredRun], groups: Sequence[Group], rows: Rows) -> list[str]:
    """Signs that a figure may mislead, a sentence each, with the run or the co-run in front."""
    found = [doubt for run in runs for doubt in _run_doubts(run)]
    for group in groups:
        where = f"{joined(group.run_ids)}, {clients_text(group.clients)}"
        found += [f"{where}: {doubt}" for doubt in _group_doubts(group, rows[id(group)])]
    return found


def _run_doubts(run: MeasuredRun) -> list[str]:
    found = []
    outcome = run.manifest.outcome
    if outcome == "invalid":
        found.append(f"{run.name}: the run is invalid, none of its co-runs is compared")
    elif outcome == "running":
        is_alive = is_held(run.folder)
        cut = "the run was cut off (benchmark_suite.py --resume goes on with it)"
        found.append(f"{run.name}: {'the run is still going on' if is_alive else cut}")
    elif outcome != "complete":
        found.append(f"{run.name}: the run's outcome is {outcome}")
    for record in run.co_runs():
        where = f"{run.name}, {record.co_run}"
        if not run.is_valid(record):
            reason = record.reason or "a client was not proved to run under the mode"
            found.append(f"{where}: invalid, {reason}")
        elif record.outcome == "interrupted":
            found.append(f"{where}: interrupted, so it is in no figure")
        elif record.outcome != "ok":
            found.append(f"{where}: {record.outcome}, {record.reason or 'no reason recorded'}")
    if run.manifest.is_pairs:  # no group says these for it
        warnings = {warning for record in run.co_runs() for warning in record.warnings}
        found += [f"{run.name}: {warning}" for warning in sorted(warnings)]
    found += [
        f"{run.name}: {record.label} alone ended {record.status} "
        f"({record.reason or 'no reason recorded'}); without it STP and overhead are unknown"
        for record in run.client_records
        if record.phase == run_folder.PHASE_BASELINE and record.status != "ok"
    ]
    return found


def _group_doubts(group: Group, row: Mapping[str, Any]) -> list[str]:
    found = [f"{one['label']}: {one['invalid']}" for one in row["client_rows"] if one["invalid"]]
    if row["is_unverified"] and group.first.mode != MODE_CPU_DEMO:
        found.append("unverified, the clients could not be matched with the driver's lists")
    # Of services alone nobody asks for throughput.
    if row["stp"] is None and row["outcome"] == "ok" and row["throughput_clients"] != 0:
        found.append("no baseline for every job, so STP and overhead are unknown")
    here = [run.manifest.environment for run in group.runs]
    if len(here) > 1:
        cards = row["gpu_uuids"]
        on = f" on {len(cards)} cards of one model ({joined(cards)})" if len(cards) > 1 else ""
        found.append(f"merged from {len(here)} runs{on}")
        if any(one.git_dirty for one in here):
            found.append("some of these runs were taken with uncommitted changes, which may differ")
        if here[0].git_commit is None:
            found.append("the commit of these runs is unknown, and may differ")
        if here[0].host_cores is None:
            found.append("the number of host cores of these runs is unknown, and may differ")
    if group.clients > 1 and group.first.mode != MODE_CPU_DEMO and not group.is_guarded:
        found.append("drift not guarded: its repeats were not rounds, one next to the other modes'")
    if any(run.is_contended(group.clients) for run in group.runs):
        found.append("measured beside other people's processes: the figures hold beside them only")
    found += sorted({warning for one in group.co_runs for warning in one.record.warnings})
    reasons = [frozenset((one.record.gpu and one.record.gpu.throttle_reasons) or ())
               for one in group.co_runs]  # fmt: skip
    if len({*reasons}) > 1:
        found.append("its rounds had other throttle reasons than each other")
    if row["gpu"]["throttle_reasons"]:
        found.append(f"clocks were limited ({', '.join(row['gpu']['throttle_reasons'])})")
    return found
