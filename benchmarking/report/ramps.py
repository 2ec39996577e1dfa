"""Counts of clients and pairs of jobs as data: where a ramp breaks, who harms whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarking.metrics.breaking_point import breaking_point, saturation_count, sufficient_count
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.modes.names import MODE_MIG
from benchmarking.report.groups import Group, mean_slowdown, plain
from benchmarking.report.rows import client_row
from benchmarking.report.runs import MeasuredRun, pressed_resource
from benchmarking.report.wording import NO_SLICE

MISSING = "not measured"
# A matrix of more jobs than these is read by nobody.
MOST_JOBS = 50


def find_ramps(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every mode and mix that was measured at several counts of clients, copies of one another.

    One client that did not fit has no further count. One and four clients of a mix of four jobs are
    other jobs.
    """
    by_kind: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        keys = [client.job_key for client in group.members]
        unit = math.gcd(*map(keys.count, keys))
        # The jobs' shares in lowest terms.
        shares = frozenset((key, keys.count(key) // unit) for key in keys)
        by_kind.setdefault((group.first.mode, group.first.settings, group.mix, shares), []).append(
            group
        )
    found = [_ramp(sorted(members, key=lambda one: one.clients)) for members in by_kind.values()]
    return [one for one in found
            if len(one["clients"]) > 1 or one["breaking_point"]["clients"] == 1]  # fmt: skip


def _ramp(groups: Sequence[Group]) -> dict[str, Any]:
    co_runs, clients = [], []
    for one in (co_run for group in groups for co_run in group.co_runs):
        co_runs.append(msgspec.structs.replace(one.record, co_run=one.name))
        clients += [msgspec.structs.replace(client, co_run=one.name) for client in one.clients]
    bounds = _bounds(groups)
    point = breaking_point(co_runs, clients, **bounds)
    for record in co_runs:  # the run itself saw more than the records hold
        if record.stop_reason and record.clients == point["clients"]:
            kind, detail = (str(record.stop_reason.get(name)) for name in ("kind", "detail"))
            point |= {"criterion": kind.replace("_", " "), "detail": detail}
            break
    stp = {one.clients: one.row["stp"] for one in groups
           if one.row["outcome"] == "ok" and one.row["stp"]}  # fmt: skip
    means = {one.clients: stp[one.clients]["mean"] if one.clients in stp else None
             for one in groups}  # fmt: skip
    best = max(stp, key=lambda count: stp[count]["mean"], default=None)
    # Of those alone that were not shown to lie under the best one.
    near = {count: means[count] for count in stp if best and not _is_under(stp[count], stp[best])}
    return {
        **groups[0].first.kind,
        "mix": groups[0].mix,
        "clients": [group.clients for group in groups],
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "breaking_point": point,
        "fits": point["last_good_clients"],
        "saturation_clients": saturation_count(means),
        "sufficient_clients": sufficient_count(near),
    }


def _is_under(found: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether both intervals lie apart."""
    return found["is_interval"] and best["is_interval"] and found["high"] < best["low"]


def _bounds(groups: Sequence[Group]) -> dict[str, float | None]:
    """The bounds of the newest run that was given any."""
    runs = sorted((run for group in groups for run in group.runs), key=lambda run: run.age)
    given = [msgspec.structs.asdict(run.manifest.bounds) for run in reversed(runs)]
    return next((one for one in given if any(value is not None for value in one.values())), {})


# --- pairs ------------------------------------------------------------------------------------


def interference(groups: Sequence[Group], runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """What each job felt next to each other one, by mode; a job next to itself pools both."""
    measured: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for group in (group for group in groups if group.pair and group.first.is_matrix):
        key = (group.mix.split(": ")[0], group.first.mode, group.first.settings)
        measured.setdefault(key, {}).update(_cells(group))
    matrices: dict[tuple[str, str, str], list[MeasuredRun]] = {}
    for run in (run for run in runs if run.is_matrix):
        key = (run.manifest.mix, run.mode, run.settings)
        if key in measured:
            matrices.setdefault(key, []).append(run)
    found = []
    for key in sorted(matrices, key=lambda key: (key[0], matrices[key][0].order)):
        members, cells = matrices[key], measured[key]
        jobs = list(dict.fromkeys(
            client.label for run in members for planned in run.planned(2)
            for client in planned.clients
        ))  # fmt: skip
        shown = jobs[:MOST_JOBS]
        latency_jobs = {one.label for run in members for one in run.client_records
                        if one.latency_ms}  # fmt: skip
        found.append({
            **members[0].kind,
            "mix": key[0],
            "latency_jobs": sorted(latency_jobs.intersection(jobs)),
            "jobs_in_all": len(jobs),
            "cells": [cells.get((job, beside)) or _cell(job, beside, MISSING)
                      for job in shown for beside in shown],
        })  # fmt: skip
    return found


def _cell(job: str, beside: str, outcome: str, **figures: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("slowdown", "p99_ms", "tail_slowdown", "stp"))
    known = {"responses": 0, "is_unverified": False, "run_ids": []}
    return {"job": job, "beside": beside, "outcome": outcome, **unknown, **known, **figures}


def _cells(group: Group) -> dict[tuple[str, str], dict[str, Any]]:
    """Both directions of one pair; one cell for a job next to itself."""
    first, second = (client.label for client in group.members)
    if first == second:
        return {(first, first): _direction(group, first, second, (0, 1))}
    return {
        (first, second): _direction(group, first, second, (0,)),
        (second, first): _direction(group, second, first, (1,)),
    }


def _direction(group: Group, job: str, beside: str, places: Sequence[int]) -> dict[str, Any]:
    """What `job` felt; `places` are the numbers of the clients that run it."""
    if group.broken:  # one that failed once has no figure, whatever its other repeats gave
        return _cell(job, beside, group.broken.outcome, run_ids=group.run_ids)
    copies = [(one, [one.clients[place] for place in places]) for one in group.co_runs]
    row = client_row([(one, client) for one, clients in copies for client in clients],
                     "beside another", None)  # fmt: skip
    invalid = group.row["client_rows"][places[0]]["invalid"]
    if invalid:
        return _cell(job, beside, invalid, run_ids=group.run_ids)
    alone = group.co_runs[0].alone.get(row["job_key"])
    tail = row["tail_slowdown"]["99"]
    return _cell(
        job,
        beside,
        "ok",
        slowdown=plain(estimate(mean_slowdown(clients) for _, clients in copies)),
        p99_ms=None if tail is None else row["latency"]["p99"],
        tail_slowdown=tail,
        responses=min(row["responses"], len((alone and alone.pooled.latency_ms) or ())),
        stp=group.row["stp"],
        is_unverified=any(one.is_unverified for one in group.co_runs),
        run_ids=group.run_ids,
    )


# --- noisy neighbors --------------------------------------------------------------------------


def noisy(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each job next to a neighbor that presses one resource: from which duty on a slice is better.

    Under MIG the neighbor's duty changes little; where time slicing's or MPS's slowdown passes that
    of the slice lies the break-even, interpolated between the measured duties (at 0 it is 1).
    """
    felt: dict[tuple[str, str], dict[str, tuple[MeasuredRun, dict[float, Estimate | None]]]] = {}
    for group in groups:
        pressed = [pressed_resource(client.job_key) for client in group.members]
        if group.clients != 2 or pressed.count(None) != 1:
            continue
        kind, duty = next(one for one in pressed if one is not None)
        victim = group.row["client_rows"][pressed.index(None)]
        members = group.of_client(victim["client"])
        by_mode = felt.setdefault((victim["label"], kind), {})
        is_void = group.broken or victim["invalid"]
        by_mode.setdefault(group.first.variant, (group.first, {}))[1][duty] = (
            None if is_void else estimate(client.slowdown for _, client in members)
        )
    return [
        {
            "label": label,
            "kind": kind,
            "points": [
                {"variant": variant, "mode": run.mode, "settings": run.settings, "duty": duty,
                 "slowdown": plain(slowdown)}
                for variant, (run, by_duty) in by_mode.items()
                for duty, slowdown in sorted(by_duty.items())
            ],
            "break_even": [
                {"variant": variant, **_break_even(by_duty, _best_slice(by_mode.values()))}
                for variant, (run, by_duty) in by_mode.items()
                if run.mode != MODE_MIG
            ],
        }
        for (label, kind), by_mode in felt.items()
    ]  # fmt: skip


def _best_slice(
    measured: Iterable[tuple[MeasuredRun, Mapping[float, Estimate | None]]],
) -> float | None:
    """The slowdown on a slice, whatever the neighbor's duty; of several layouts the best one's."""
    slices = ([found.mean for found in by_duty.values() if found]
              for run, by_duty in measured if run.mode == MODE_MIG)  # fmt: skip
    return min((statistics.fmean(known) for known in slices if known), default=None)


def _break_even(by_duty: Mapping[float, Estimate | None], limit: float | None) -> dict[str, Any]:
    if limit is None:
        return {"duty": None, "reason": NO_SLICE}
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
