"""The comparison for programs: the rows of `comparison.csv` and the text of `comparison.json`.

Schema history:
    1  first version.
    2  a group names several runs (`run_ids`, `gpu_uuids`); joules a job, SLO attainment, noise.
    3  `interference`: runs of pairs stand there, and no longer among the groups.
    4  `settings` beside `mode`: rows of one mode and mix can differ in nothing but these. Besides:
       fairness, energy ratio, interference and mechanism overhead have their spread and raw values;
       p95 and p99 are null under 100 responses, and where too many requests were missed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from benchmarking.analysis.comparison import Comparison, Section
from benchmarking.analysis.groups import Group
from benchmarking.metrics.estimates import Estimate

SCHEMA_VERSION = 4

_FLAT_FIGURES = (
    "stp_per_multiprocessor",
    "success_rate_percent",
    "average_duration_seconds",
    "total_gpu_time_seconds",
    "throughput_clients",
)
_FLAT_ESTIMATES = (
    "stp",
    "antt",
    "overhead_percent",
    "interference_overhead_percent",
    "mechanism_overhead_percent",
    "fairness",
    "energy_ratio",
    "joules_per_job",
)


def flat_rows(compared: Comparison) -> list[dict[str, Any]]:
    """One flat dict for each mode, mix and count of clients: the rows of `comparison.csv`."""
    return [
        _flat_row(index, section, group)
        for index, section in enumerate(compared.sections, start=1)
        for group in section.groups
    ]


def _flat_row(index: int, section: Section, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {
        "section": index,
        "gpu_name": section.environment.get("gpu_name"),
        "driver_version": section.environment.get("driver_version"),
        "job_size": section.environment.get("job_size"),
        "run_id": " ".join(group.run_ids),
        "gpu_uuid": " ".join(group.gpu_uuids),
        "mode": group.mode,
        "settings": group.settings,
        "mix": group.mix,
        "clients": group.clients,
        "repeats": len(group.co_runs),
        "outcome": group.outcome,
        "unverified": group.is_unverified,
    }
    for name in _FLAT_ESTIMATES:
        found: Estimate | None = getattr(group, name)
        for part in ("mean", "low", "high"):
            row[f"{name}_{part}"] = getattr(found, part) if found else None
    row |= {name: getattr(group, name) for name in _FLAT_FIGURES}
    row |= {name: value for name, value in group.gpu.items() if name != "throttle_reasons"}
    row["throttle_reasons"] = " ".join(group.gpu["throttle_reasons"])
    return row


def json_text(compared: Comparison) -> str:
    """Everything that was compared, as JSON with a schema version; runs by their id."""
    value = {
        "schema_version": SCHEMA_VERSION,
        "sections": [_section(section) for section in compared.sections],
        "phases": compared.phases,
        "problems": compared.problems,
        **({"refusals": compared.refusals} if compared.refusals else {}),
    }
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same plain data with `None` for what is infinite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "cpu_demo": section.is_cpu_demo,
        "environment": section.environment,
        "versions": section.versions,
        "engines": section.engines,
        "run_ids": [run.run_id for run in section.runs],
        "claims": [dataclasses.asdict(claim) for claim in section.claims],
        "groups": [_group(group) for group in section.groups],
        "ramps": [
            {
                "mode": ramp.mode,
                "settings": ramp.groups[0].settings,
                "mix": ramp.mix,
                "clients": [group.clients for group in ramp.groups],
                "bounds": dict(ramp.bounds),
                "breaking_point": ramp.breaking_point,
                "saturation_clients": ramp.saturation_clients,
                "sufficient_clients": ramp.sufficient_clients,
            }
            for ramp in section.ramps
        ],
        "interference": [
            {
                "mode": matrix.mode,
                "settings": matrix.settings,
                "mix": matrix.mix,
                "latency_jobs": sorted(matrix.latency_jobs),
                "cells": [dataclasses.asdict(cell) for cell in matrix.every_cell()],
            }
            for matrix in section.matrices
        ],
        "same_twice": [
            {
                "mode": pair.group.mode,
                "settings": pair.group.settings,
                "mix": pair.group.mix,
                "clients": pair.group.clients,
                "figure": pair.figure,
                "label": pair.label or None,
                "by_run": pair.by_run,
                "difference_percent": pair.percent,
            }
            for pair in section.same_twice
        ],
        "alone": [dataclasses.asdict(row) for row in section.alone],
        "left_out": section.left_out,
        "doubts": section.doubts,
    }


def _group(group: Group) -> dict[str, Any]:
    without = {"runs", "co_runs", "client_rows", "checks", "gpu"}
    value = {
        item.name: _plain(getattr(group, item.name))
        for item in dataclasses.fields(group)
        if item.name not in without
    }
    return value | {
        "run_ids": list(group.run_ids),
        "gpu_uuids": group.gpu_uuids,
        "co_runs": [f"{co_run.run.run_id}/{co_run.name}" for co_run in group.co_runs],
        "gpu": group.gpu,
        "client_rows": [dataclasses.asdict(row) for row in group.client_rows],
        "checks": [dataclasses.asdict(check) for check in group.checks],
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
