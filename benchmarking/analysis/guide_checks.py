"""Measured values beside the guide's expected ranges."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis import expectations
from benchmarking.analysis.runs import mean_job_seconds
from benchmarking.metrics import scores

Record = Mapping[str, Any]

# Names under which a workload's figures give a quantity of the guide, the first that is there wins.
_FIGURE_NAMES: Mapping[str, tuple[str, ...]] = {
    "epoch_seconds": ("epoch_seconds", "mean_epoch_seconds", "epoch_duration_seconds"),
    "test_accuracy_percent": ("test_accuracy_percent", "final_test_accuracy_percent"),
    "train_accuracy_percent": ("train_accuracy_percent", "final_train_accuracy_percent"),
    "samples_per_second": ("samples_per_second", "throughput_samples_per_second"),
    "mean_latency_ms": ("mean_latency_ms", "latency_mean_ms"),
    "p99_latency_ms": ("p99_latency_ms", "latency_p99_ms", "p99_ms"),
    "requests_per_second": ("requests_per_second", "qps"),
    "total_requests": ("total_requests",),
    "success_rate_percent": ("success_rate_percent",),
    "session_seconds": ("session_seconds", "total_session_seconds"),
    "active_seconds": ("active_seconds", "gpu_active_seconds"),
    "active_percent": ("active_percent", "gpu_active_percent"),
    "idle_seconds": ("idle_seconds", "total_idle_seconds"),
    "idle_percent": ("idle_percent",),
}


@dataclass(frozen=True)
class Check:
    """A measured value beside the guide's range."""

    expectation: expectations.Expectation
    value: float
    verdict: str
    situation: str


def measured_quantities(record: Record, latencies_ms: Sequence[float]) -> dict[str, float]:
    """The guide's quantities that a client record tells, by the names of `expectations`.

    Latency comes from the raw values, throughput at a fixed batch size from the same.
    """
    figures = record.get("figures") or {}
    found: dict[str, float] = {}
    for quantity, names in _FIGURE_NAMES.items():
        value = next((figures[name] for name in names if figures.get(name) is not None), None)
        if isinstance(value, (list, tuple)):
            known = [item for item in value if item is not None]
            value = statistics.fmean(known) if known else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[quantity] = float(value)
    if latencies_ms:
        found["mean_latency_ms"] = statistics.fmean(latencies_ms)
        p99_ms = scores.latency_percentile(latencies_ms, scores.TAIL_PERCENT)
        found |= {} if p99_ms is None else {"p99_latency_ms": p99_ms}
    job_seconds = mean_job_seconds(record)
    if job_seconds is not None:
        found["job_seconds"] = job_seconds
    return found


def workload_checks(
    good: Sequence[Record], latencies_ms: Sequence[float], situation: str
) -> list[Check]:
    """What the last of a client's good records tells, beside its workload's ranges."""
    if not good:
        return []
    record = good[-1]
    batch_size = (record.get("identity") or {}).get("batch_size")
    ranges = expectations.for_workload(record["workload"], batch_size)
    return _checks(ranges, measured_quantities(record, latencies_ms), situation)


def card_checks(workload: str, gpu: Record) -> list[Check]:
    """Utilization and memory of the whole card while one job had it to itself."""
    memory_mib = gpu.get("memory_used_mib_max")
    measured = {
        "utilization_gpu_percent": gpu.get("utilization_gpu_percent"),
        "memory_used_gb": None if memory_mib is None else memory_mib * 2**20 / 1e9,
    }
    return _checks(expectations.for_workload(workload), measured, "alone")


def mode_checks(mode: str, measured: Mapping[str, float | None], situation: str) -> list[Check]:
    """A mode's success rate, overheads and utilization beside the guide's ranges of the mode."""
    return _checks(expectations.for_mode(mode), measured, situation)


def _checks(
    ranges: Iterable[expectations.Expectation],
    measured: Mapping[str, float | None],
    situation: str,
) -> list[Check]:
    return [
        Check(expected, value, expected.compare(value), situation)
        for expected in ranges
        for value in [measured.get(expected.quantity)]
        if value is not None
    ]
