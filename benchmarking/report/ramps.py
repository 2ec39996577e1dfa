"""Counts of clients and pairs of jobs as data: where a ramp breaks, who harms whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from benchmarking.metrics.breaking_point import breaking_point, saturation_count, sufficient_count
from benchmarking.metrics.estimates import estimate
from benchmarking.report.groups import Group, kind_of, mean_slowdown, plain
from benchmarking.report.rows import client_row
from benchmarking.report.runs import MeasuredRun

MISSING = "not measured"
# A matrix of more jobs than these is read by nobody.
MOST_JOBS = 50


def find_ramps(groups: Sequence[Group], rows: Mapping[int, Mapping[str, Any]]) -> list[dict]:
    """Every mode and mix that was measured at several counts of clients, copies of one another.

    One and four clients of a mix of four jobs are other jobs.
    """
    by_kind: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        run = group.first
        key = (run.mode, run.settings, run.manifest.mix, group.proportions())
        by_kind.setdefault(key, []).append(group)
    found = (sorted(members, key=lambda one: one.clients) for members in by_kind.values())
    return [_ramp(members, rows) for members in found if len(members) > 1]


def _ramp(groups: Sequence[Group], rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    co_runs, clients = [], []
    for one in (co_run for group in groups for co_run in group.co_runs):
        name = f"{one.run.name}/{one.record.co_run}"  # two runs may name a co-run alike
        co_runs.append(msgspec.structs.replace(one.record, co_run=name))
        clients += [
            msgspec.structs.replace(client, co_run=name, slowdown=one.slowdown(client))
            for client in one.clients
        ]
    bounds = _bounds(groups)
    point = breaking_point(co_runs, clients, **bounds)
    for record in co_runs:  # the run itself saw more than the records hold
        if record.stop_reason and record.clients == point["clients"]:
            kind, detail = (str(record.stop_reason.get(name)) for name in ("kind", "detail"))
            point |= {"criterion": kind.replace("_", " "), "detail": detail}
            break
    stp = {
        group.clients: row["stp"]
        for group, row in ((group, rows[id(group)]) for group in groups)
        if row["stp"] and row["outcome"] == "ok"
    }
    best = max(stp.values(), key=lambda found: found["mean"], default=None)
    means = {group.clients: stp[group.clients]["mean"] if group.clients in stp else None
             for group in groups}  # fmt: skip
    near = {count: None if _is_under(found, best) else found["mean"]
            for count, found in stp.items()}  # fmt: skip
    return {
        **kind_of(groups[0].first),
        "mix": groups[0].first.manifest.mix,
        "clients": [group.clients for group in groups],
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "breaking_point": point,
        "fits": point["last_good_clients"],
        "saturation_clients": saturation_count(means),
        "sufficient_clients": sufficient_count(near),
    }


def _is_under(found: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether a count's STP was shown to lie under the best one: both intervals lie apart."""
    return found["is_interval"] and best["is_interval"] and found["high"] < best["low"]


def _bounds(groups: Sequence[Group]) -> dict[str, float | None]:
    """The bounds of the newest run that was given any."""
    runs = sorted((run for group in groups for run in group.runs), key=lambda run: run.age)
    given = [msgspec.structs.asdict(run.manifest.bounds) for run in reversed(runs)]
    return next((one for one in given if any(value is not None for value in one.values())), {})


# --- pairs ------------------------------------------------------------------------------------


def interference(groups: Sequence[Group], runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """What each job felt next to each other one, by mode; a job next to itself pools both."""
    matrices: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in (run for run in runs if run.is_matrix):
        matrix = matrices.setdefault(
            (run.mode, run.settings, run.manifest.mix),
            {
                **kind_of(run),
                "order": run.mode_order,
                "mix": run.manifest.mix,
                "jobs": {},
                "latency_jobs": set(),
                "of": {},
            },
        )
        for client in (client for planned in run.planned(2) for client in planned.clients):
            matrix["jobs"].setdefault(client.label)
        matrix["latency_jobs"] |= {one.label for one in run.client_records if one.latency_ms}
    for group in (group for group in groups if group.first.is_matrix):
        run = group.first
        mix = run.manifest.mix.split(": ")[0]
        cells = matrices[(run.mode, run.settings, mix)]["of"]
        cells |= {(cell["job"], cell["beside"]): cell for cell in _cells(group)}
    return [
        {
            **{name: matrix[name] for name in ("mode", "settings", "variant", "mix")},
            "latency_jobs": sorted(matrix["latency_jobs"] & matrix["jobs"].keys()),
            "jobs_in_all": len(matrix["jobs"]),
            "cells": [
                matrix["of"].get((job, beside)) or _cell(job, beside, MISSING)
                for job in [*matrix["jobs"]][:MOST_JOBS]
                for beside in [*matrix["jobs"]][:MOST_JOBS]
            ],
        }
        for matrix in sorted(matrices.values(), key=lambda one: (one["mix"], one["order"]))
        if matrix["of"]
    ]


def _cell(job: str, beside: str, outcome: str, **figures: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("slowdown", "p99_ms", "tail_slowdown", "stp"))
    known = {"responses": 0, "is_unverified": False, "run_ids": []}
    return {"job": job, "beside": beside, "outcome": outcome, **unknown, **known, **figures}


def _cells(group: Group) -> list[dict[str, Any]]:
    """Both directions of one pair; one cell for a job next to itself."""
    first, second = (client.label for client in group.co_runs[0].clients)
    if first == second:
        return [_direction(group, first, second, (0, 1))]
    return [_direction(group, first, second, (0,)), _direction(group, second, first, (1,))]


def _direction(group: Group, job: str, beside: str, places: Sequence[int]) -> dict[str, Any]:
    """What `job` felt; `places` are the numbers of the clients that run it."""
    outcome = next((one.record.outcome for one in group.co_runs if not one.is_ok), "ok")
    run_ids = group.run_ids
    if outcome != "ok":  # one that failed once has no figure, whatever its other repeats gave
        return _cell(job, beside, outcome, run_ids=run_ids)
    members = [(one, one.clients[place]) for one in group.co_runs for place in places]
    row = client_row(members, "beside another", None)
    alone = group.co_runs[0].alone.pooled.get(row["job_key"])
    tail = row["tail_slowdown"]["99"]
    felt = (mean_slowdown(one, [one.clients[place] for place in places]) for one in group.co_runs)
    return _cell(
        job,
        beside,
        outcome,
        slowdown=plain(estimate(felt)),
        p99_ms=None if tail is None else row["latency"]["p99"],
        tail_slowdown=tail,
        responses=min(row["responses"], len((alone and alone.latency_ms) or ())),
        stp=plain(estimate(one.summary.stp for one in group.co_runs)),
        is_unverified=any(one.is_unverified for one in group.co_runs),
        run_ids=run_ids,
    )
