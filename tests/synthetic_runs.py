"""Made-up runs in the recorded format, for tests of the analysis.

Nothing here was measured: the numbers are chosen so that the right answer is known.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import recorded_rows

GPU = {
    "gpu_name": "Synthetic GPU (made-up numbers)",
    "gpu_uuid": "GPU-00000000-0000-0000-0000-000000000000",
    "gpu_memory_mib": 81559,
    "multiprocessor_count": 132,
    "driver_version": "580.00",
    "cuda_version": "13.0",
    "versions": {"python": "3.12.0", "torch": "2.11.0", "torchvision": "0.26.0"},
    "host_cores": 16,
    "os": "Linux",
    "git_commit": "0000000",
    "git_dirty": False,
}
NO_GPU = GPU | dict.fromkeys(
    ("gpu_name", "gpu_uuid", "gpu_memory_mib", "multiprocessor_count", "driver_version",
     "cuda_version")
)  # fmt: skip

PROOF = {"check": "pid among the mode's processes", "found": "4242", "ok": True}

# workload, label, unit kind, seconds of a unit alone, units of one job, latency?, batch size
JOBS = {
    "resnet_training": ("ResNet50 training", "train_step", 0.011, 390, False, 128),
    "batch_inference": ("Batch inference", "batch", 0.003, 2000, True, 32),
    "jupyter_simulation": ("Interactive session", "matrix", 0.5, 11, True, None),
    "bert_training": ("BERT fine-tuning", "train_step", 0.010, 189, False, 16),
}
MIXES = {
    "mixed": ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training"),
    "training": ("resnet_training",),
    "inference": ("batch_inference",),
}
FIGURES = {
    "resnet_training": {"epoch_seconds": 4.4, "test_accuracy_percent": 81.0},
    "bert_training": {"epoch_seconds": 0.6, "train_accuracy_percent": 100.0},
    "batch_inference": {"samples_per_second": 10000.0},
    "jupyter_simulation": {"session_seconds": 80.0, "active_seconds": 40.0, "idle_seconds": 40.0},
}


def client_record(
    workload: str, times_slower: float, *, phase: str, co_run: str, start: float,
    rng: random.Random, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A client that did one job's units from `start`, that many times slower than alone."""
    label, kind, alone, count, is_latency, batch_size = JOBS[workload]
    seconds = alone * times_slower * count
    unit_ms = 1000 * alone * times_slower
    latencies = [round(unit_ms * rng.uniform(0.9, 1.1), 3) for _ in range(min(count, 200))]
    job = {"index": 0, "start_seconds": start, "end_seconds": start + seconds,
           "duration_seconds": seconds, "in_window": True}  # fmt: skip
    changes = {
        "phase": phase, "workload": workload, "label": label, "job_key": workload,
        "proof": {"verdict": "verified", "evidence": [PROOF]},
        "window_start_seconds": start, "window_end_seconds": start + seconds, "jobs": [job],
        "units": {kind: {"count": count, "seconds": seconds, "latency": is_latency}},
        "latency_ms": latencies if is_latency else None, "figures": FIGURES[workload],
        "identity": {"pid": 4242, "device": "cuda", "engine": "graph", "precision": "bf16",
                     "batch_size": batch_size, "multiprocessor_count": 132},
        "host_cpu_seconds": seconds / 10, "peak_memory_mib": 3000, "startup_seconds": 9.0,
    } | more  # fmt: skip
    return recorded_rows.client(co_run, changes.pop("client", 0), **changes)


def run(
    run_id: str,
    mode: str,
    slowdowns: dict[int, list[float]],
    *,
    mix: str = "mixed",
    gpu: bool = True,
    created_at: str = "2026-01-01T00:00:00+00:00",
    seed: int = 42,
    **manifest: Any,
) -> dict[str, Any]:
    """A run whose every client is slowed as told: `{clients: [slowdown in each repeat]}`.

    Returns `{"manifest", "records", "samples"}`, from which `write` makes a folder.
    """
    rng = random.Random(seed)
    workloads = MIXES[mix]
    records: list[dict[str, Any]] = []
    clock = 1000.0
    for workload in dict.fromkeys(workloads):
        name = f"alone-{workload}"
        record = client_record(
            workload, 1.0, phase="baseline", co_run=name, start=clock, rng=rng,
            mode="exclusive", clients=1,
        )  # fmt: skip
        records += [record, co_run_record(name, [record], "exclusive", "baseline", 0, gpu)]
        clock += 8
    for clients, repeats in slowdowns.items():
        for repeat, slowdown in enumerate(repeats):
            name = f"{mix}-{clients}-r{repeat}"
            members = [
                client_record(
                    workloads[index % len(workloads)], slowdown, phase="co_run", co_run=name,
                    start=clock, rng=rng, mode=mode, clients=clients, client=index, repeat=repeat,
                    slowdown=slowdown, normalized_progress=1 / slowdown,
                )
                for index in range(clients)
            ]  # fmt: skip
            records += [*members, co_run_record(name, members, mode, "co_run", repeat, gpu)]
            clock += 5 * slowdown + 2
    for record in records:
        if not gpu and record["record"] == "client":
            record["proof"] = {"verdict": "not_applicable", "evidence": []}
            record["identity"] |= {"device": "cpu", "engine": "eager", "precision": "fp32"}
    return {
        "manifest": {
            "schema_version": 3, "run_id": run_id, "created_at": created_at,
            "command": ["benchmark_suite.py", "--mode", mode, "--mix", mix],
            "mode": mode, "effective_mode": mode if gpu else "cpu-demo", "mix": mix,
            "job_size": "guide" if gpu else "cpu", "seed": 42,
            "plan": {"baseline": [], "co_runs": []},
            "environment": GPU if gpu else NO_GPU,
            "mode_evidence": [{"check": "MIG mode", "found": "Disabled", "ok": True}],
            "baseline_run_id": None, "notes": [], "resumptions": [], "finished_at": created_at,
            "outcome": "complete",
        } | manifest,
        "records": records,
        "samples": _samples(clock, rng, gpu),
    }  # fmt: skip


def co_run_record(
    name: str, members: list[dict[str, Any]], mode: str, phase: str, repeat: int, gpu: bool
) -> dict[str, Any]:
    """The record of a co-run of these clients."""
    progress = [1 / (member["slowdown"] or 1.0) for member in members]
    stp = sum(progress)
    antt = sum(1 / each for each in progress) / len(progress)
    durations = [member["jobs"][0]["duration_seconds"] for member in members]
    card = {
        "utilization_gpu_percent": 95.0, "utilization_source": "nvml", "sm_activity_percent": 70.0,
        "sm_occupancy_percent": 30.0, "tensor_activity_percent": 20.0,
        "dram_activity_percent": 40.0, "memory_used_mib_max": 5000 * len(members),
        "power_draw_watts": 500.0, "energy_joules": 5000.0, "sm_clock_mhz": 1900,
    }  # fmt: skip
    summary = {
        "clients": len(members), "throughput_clients": len(members), "stp": stp, "antt": antt,
        "overhead_percent": 100 * (1 / stp - 1),
        "interference_overhead_percent": None if mode == "mig" else 100 * (antt - 1),
        "fairness": 1.0, "energy_ratio": 0.8 if gpu else None, "success_rate_percent": 100.0,
        "average_duration_seconds": sum(durations) / len(durations),
        "total_gpu_time_seconds": sum(durations),
    }  # fmt: skip
    return recorded_rows.co_run(
        name, phase, mode=mode, clients=len(members), repeat=repeat, go_skew_ms=0.4,
        window_start_seconds=members[0]["window_start_seconds"],
        window_end_seconds=max(member["window_end_seconds"] for member in members),
        gpu=(card if gpu else dict.fromkeys(card))
        | {"throttle_reasons": [], "host_cpu_percent": 40.0 if gpu else 99.0},
        summary=summary,
    )  # fmt: skip


def _samples(end: float, rng: random.Random, gpu: bool) -> list[dict[str, Any]]:
    times = [1000.0 + step for step in range(int(end - 1000))]
    return [
        {
            "record": "sample", "time_seconds": time,
            "wall_time": "2026-01-01T00:00:00+00:00", "gpu_index": 0,
            "gpu_uuid": GPU["gpu_uuid"] if gpu else None,
            "utilization_gpu_percent": 100 if gpu else None,
            "utilization_source": "nvml" if gpu else None,
            "sm_activity_percent": round(rng.uniform(60, 85), 1) if gpu else None,
            "memory_used_mib": 12000 if gpu else None,
            "host_cpu_percent": round(rng.uniform(30, 50) if gpu else rng.uniform(90, 100), 1),
        }
        for time in times
    ]  # fmt: skip


def write(folder: Path, made: dict[str, Any]) -> Path:
    """Write a made-up run below `folder`; returns the run's folder."""
    target = folder / made["manifest"]["run_id"]
    target.mkdir(parents=True)
    (target / "manifest.json").write_text(json.dumps(made["manifest"], indent=1) + "\n")
    for name, rows in (("records", made["records"]), ("gpu_samples", made["samples"])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{name}.jsonl").write_text(lines)
    return target
