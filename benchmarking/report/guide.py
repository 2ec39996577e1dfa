"""The Experiments Guide's expected ranges (`guide.csv`), next to what was measured.

The ranges were written for unspecified GPUs and the guide's full job sizes, each job alone unless
it says otherwise. A value outside a range is a finding to look at, not an error: a recent card is
expected to be far faster than the guide's epochs.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarking.metrics import scores
from benchmarking.records.types import ClientRecord, GpuFigures

Verdict = Literal["inside", "below", "above"]


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """One expected range.

    `subject` is the workload's or the mode's name in records; `quantity` the figure's name with
    its unit; `low` and `high` are in `unit`, both inclusive. `where` names the guide's section.
    `batch_size` limits the range to that batch size. `rounding` is how far a value may lie outside
    and still read as the guide's whole number. `note` says what the guide's words mean here, `name`
    is what the quantity is called.
    """

    experiment: str
    subject: str
    quantity: str
    low: int
    high: int
    unit: str
    where: str
    batch_size: int | None = None
    rounding: float = 0.0
    note: str = ""
    name: str

    def verdict(self, value: float) -> Verdict:
        """Where a value, in `unit`, lies against the range."""
        if value < self.low - self.rounding:
            return "below"
        return "above" if value > self.high + self.rounding else "inside"

    @property
    def range_text(self) -> str:
        """The range as the guide writes it: `60-120 s`, or `100 %` for a single value."""
        ends = dict.fromkeys((self.low, self.high))
        return f"{'-'.join(map(str, ends))} {self.unit}"


def _read() -> list[Expectation]:
    with Path(__file__).with_name("guide.csv").open(encoding="utf-8", newline="") as stream:
        rows = [
            {name: cell for name, cell in row.items() if cell} for row in csv.DictReader(stream)
        ]
    return msgspec.convert(rows, list[Expectation], strict=False)


EXPECTATIONS = _read()
# What a workload calls the guide's quantities in its figures, where it is another name.
_FIGURE_NAMES = {
    "epoch_seconds": "mean_epoch_seconds",
    "test_accuracy_percent": "final_test_accuracy_percent",
    "train_accuracy_percent": "final_train_accuracy_percent",
    "requests_per_second": "qps",
    "active_seconds": "gpu_active_seconds",
}


def checks(
    subject: str,
    measured: Mapping[str, float | None],
    situation: str,
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """The quantities of a workload or a mode that were measured, next to their ranges."""
    return [
        {
            "expectation": msgspec.structs.asdict(expected),
            "value": value,
            "verdict": expected.verdict(value),
            "situation": situation,
        }
        for expected in EXPECTATIONS
        if expected.subject == subject and expected.batch_size in (None, batch_size)
        and (value := measured.get(expected.quantity)) is not None
    ]  # fmt: skip


def workload_checks(
    good: Sequence[ClientRecord], latencies_ms: Sequence[float], situation: str
) -> list[dict[str, Any]]:
    """What the last of a client's good records tells; latency comes from the raw values."""
    if not good:
        return []
    record, found = good[-1], {}
    for quantity in {expected.quantity for expected in EXPECTATIONS}:
        value = figure_of(record, quantity)
        value = figure_of(record, _FIGURE_NAMES.get(quantity, "")) if value is None else value
        found[quantity] = None if value is None else float(value)
    if latencies_ms:
        found["mean_latency_ms"] = statistics.fmean(latencies_ms)
    found["job_seconds"] = mean_job_seconds(record) or found["job_seconds"]
    batch_size = (record.identity or {}).get("batch_size")
    return checks(record.workload, found, situation, batch_size)


def card_checks(workload: str, gpu: GpuFigures) -> list[dict[str, Any]]:
    """Utilization and memory of the whole card while one job had it to itself."""
    memory_mib = gpu.memory_used_mib_max
    measured = {
        "utilization_gpu_percent": gpu.utilization_gpu_percent,
        "memory_used_gb": None if memory_mib is None else memory_mib * 2**20 / 1e9,
    }
    return checks(workload, measured, "alone")


def mode_checks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the scorecard; one client alone shares nothing, so no range applies to it."""
    if row["clients"] < 2:
        return []
    measured = {
        "success_rate_percent": row["success_rate_percent"],
        "utilization_gpu_percent": row["gpu"]["utilization_gpu_percent"],
        **{name: row[name] and row[name]["mean"]
           for name in ("overhead_percent", "interference_overhead_percent")},
    }  # fmt: skip
    return checks(row["mode"], measured, f"{row['mix']}, {row['clients']} clients")


def mean_job_seconds(record: ClientRecord) -> float | None:
    """Mean wall time of the client's whole jobs in the window."""
    return scores.mean(job.duration_seconds for job in record.jobs if job.in_window)


def figure_of(client: ClientRecord, name: str) -> float | None:
    """A number among what a client told of itself."""
    value = client.figures.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
