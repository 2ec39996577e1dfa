"""Whole lines of `records.jsonl` to change for a test, and what was recorded as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from benchmarking.records import run_folder

ROW = {"mode": "mps", "clients": 1, "repeat": 0, "reason": None,
       "window_start_seconds": 1.0, "window_end_seconds": 2.0}  # fmt: skip


def client(co_run: str, number: int, **changes: object) -> dict:
    record = {
        "record": "client", "phase": "co_run", "co_run": co_run, **ROW, "client": number,
        "workload": "batch_inference", "label": "Batch inference", "job_key": "job",
        "status": "ok", "proof": {"verdict": "unverified", "evidence": []}, "jobs": [],
        "units": {"batch": {"count": 2, "seconds": 0.5, "latency": True}},
        "latency_ms": [250.0, 250.0], "figures": {}, "identity": None, "host_cpu_seconds": None,
        "window_host_cpu_fraction": None, "busiest_thread_cpu_fraction": None,
        "peak_memory_mib": None, "startup_seconds": None, "exit_code": 0, "stderr_tail": [],
        "slowdown": None, "normalized_progress": None,
    }  # fmt: skip
    return {**record, **changes}


def co_run(name: str, phase: str = "baseline", outcome: str = "ok", **changes: object) -> dict:
    record = {
        "record": "co_run", "phase": phase, "co_run": name, **ROW, "outcome": outcome,
        "go_skew_ms": None, "start_skew_ms": None, "gpu": None, "warnings": [],
        "summary": {"stp": None, "antt": None},
    }  # fmt: skip
    return {**record, **changes}


def plain(value: Any) -> Any:
    """Structs as they stand in a file."""
    return json.loads(msgspec.json.encode(value))


def read_plain(folder: Path) -> SimpleNamespace:
    """A run as it is read, its records as plain data."""
    run = run_folder.read_run(folder)
    return SimpleNamespace(
        folder=run.folder,
        run_id=run.run_id,
        manifest=plain(run.manifest),
        client_records=plain(run.client_records),
        co_run_records=plain(run.co_run_records),
        warnings=run.warnings,
        clients_of=lambda co_run: plain(run.clients_of(co_run)),
        baselines=lambda: plain(run.baselines()),
    )
