"""The Experiments Guide's expected ranges, as data, next to what was measured.

The ranges were written for unspecified GPUs and the guide's full job sizes, each job alone unless
it says otherwise. A value outside a range is a finding to look at, not an error: a recent card is
expected to be far faster than the guide's epochs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarking.metrics import scores
from benchmarking.records.types import ClientRecord, GpuFigures

Verdict = Literal["inside", "below", "above"]


@dataclass(frozen=True)
class Expectation:
    """One expected range.

    `subject` is the workload's or the mode's name in records; `quantity` the figure's name with
    its unit; `low` and `high` are in `unit`, both inclusive. `where` names the guide's section.
    `batch_size` limits the range to that batch size. `rounding` is how far a value may lie outside
    and still read as the guide's whole number. `note` says what the guide's words mean here.
    """

    experiment: str
    subject: str
    quantity: str
    low: float
    high: float
    unit: str
    where: str
    batch_size: int | None = None
    rounding: float = 0.0
    note: str = ""

    def verdict(self, value: float) -> Verdict:
        """Where a value, in `unit`, lies against the range."""
        if value < self.low - self.rounding:
            return "below"
        return "above" if value > self.high + self.rounding else "inside"

    def check(self, value: float, situation: str) -> dict[str, Any]:
        """A measured value, in `unit`, next to the range."""
        name = _NAMES.get(self.quantity, self.quantity.rsplit("_", 1)[0].replace("_", " "))
        return {
            "expectation": dataclasses.asdict(self) | {"name": name},
            "value": value,
            "verdict": self.verdict(value),
            "situation": situation,
        }

    @property
    def range_text(self) -> str:
        """The range as the guide writes it: `60-120 s`, or `100 %` for a single value."""
        if self.low == self.high:
            return f"{self.low:g} {self.unit}"
        return f"{self.low:g}-{self.high:g} {self.unit}"


# Where the words are not simply the quantity's name without its unit.
_NAMES = {
    "utilization_gpu_percent": "GPU utilization",
    "idle_utilization_gpu_percent": "GPU utilization when idle",
    "memory_used_gb": "GPU memory used",
    "samples_per_second": "throughput",
    "requests_per_second": "throughput",
    "total_requests": "requests sent",
    "epoch_seconds": "time of an epoch",
    "job_seconds": "time of a job",
    "session_seconds": "session time",
    "active_seconds": "GPU active time",
    "active_percent": "GPU active share",
    "idle_seconds": "idle time",
    "idle_percent": "idle share",
}

_RESNET = ("Experiment 1: ResNet50 training", "resnet_training")
_BERT = ("Experiment 2: BERT fine-tuning", "bert_training")
_BATCH = ("Experiment 3: batch inference", "batch_inference")
_SERVER = ("Experiment 4: inference server", "inference_server")
_JUPYTER = ("Experiment 6: interactive session", "jupyter_simulation")
_SUITE = "Experiment 7: benchmark suite"

_ALONE = "Expected Performance (Single GPU, No Sharing)"
_EXPECTED = "Expected Performance"
_SUMMARY = "Performance Expectations Summary"
_MODES = "Expected Results"

_MIG_OVERHEAD = (
    'the guide\'s "0 % (isolated)" is interference overhead: each job beside the others, '
    "against the same job alone on its own instance"
)

WORKLOAD_EXPECTATIONS: tuple[Expectation, ...] = (
    Expectation(*_RESNET, "epoch_seconds", 60, 120, "s", _ALONE),
    Expectation(*_RESNET, "utilization_gpu_percent", 85, 95, "%", _ALONE),
    Expectation(*_RESNET, "memory_used_gb", 4, 6, "GB", _ALONE),
    Expectation(*_RESNET, "test_accuracy_percent", 70, 85, "%", _ALONE, note="after 5 epochs"),
    Expectation(*_BERT, "epoch_seconds", 30, 60, "s", _ALONE),
    Expectation(*_BERT, "utilization_gpu_percent", 70, 85, "%", _ALONE),
    Expectation(*_BERT, "memory_used_gb", 6, 8, "GB", _ALONE),
    Expectation(*_BERT, "train_accuracy_percent", 95, 100, "%", _ALONE),
    Expectation(*_BATCH, "mean_latency_ms", 5, 10, "ms", _EXPECTED, batch_size=1),
    Expectation(*_BATCH, "samples_per_second", 100, 200, "samples/s", _EXPECTED, batch_size=1),
    Expectation(*_BATCH, "mean_latency_ms", 30, 50, "ms", _EXPECTED, batch_size=32),
    Expectation(*_BATCH, "samples_per_second", 600, 1000, "samples/s", _EXPECTED, batch_size=32),
    Expectation(*_BATCH, "mean_latency_ms", 60, 100, "ms", _EXPECTED, batch_size=64),
    Expectation(*_BATCH, "samples_per_second", 800, 1200, "samples/s", _EXPECTED, batch_size=64),
    Expectation(*_BATCH, "job_seconds", 10, 30, "s", _SUMMARY, note="100 batches"),
    Expectation(*_BATCH, "utilization_gpu_percent", 80, 95, "%", _SUMMARY),
    Expectation(*_BATCH, "memory_used_gb", 2, 4, "GB", _SUMMARY),
    Expectation(*_SERVER, "mean_latency_ms", 20, 50, "ms", _EXPECTED, note="a single request"),
    Expectation(*_SERVER, "requests_per_second", 20, 50, "requests/s", _EXPECTED),
    Expectation(*_SERVER, "utilization_gpu_percent", 30, 60, "%", _EXPECTED),
    Expectation(*_SERVER, "idle_utilization_gpu_percent", 5, 20, "%", _SUMMARY),
    Expectation(*_SERVER, "memory_used_gb", 2, 3, "GB", _SUMMARY),
    Expectation(*_JUPYTER, "session_seconds", 60, 120, "s", _EXPECTED),
    Expectation(*_JUPYTER, "active_seconds", 30, 50, "s", _EXPECTED),
    Expectation(*_JUPYTER, "active_percent", 40, 60, "%", _EXPECTED),
    Expectation(*_JUPYTER, "idle_seconds", 20, 40, "s", _EXPECTED),
    Expectation(*_JUPYTER, "idle_percent", 30, 50, "%", _EXPECTED),
    Expectation(*_JUPYTER, "utilization_gpu_percent", 40, 60, "%", _EXPECTED),
    Expectation(*_JUPYTER, "memory_used_gb", 2, 4, "GB", _SUMMARY),
)

MODE_EXPECTATIONS: tuple[Expectation, ...] = (
    Expectation(_SUITE, "time-slicing", "success_rate_percent", 90, 100, "%", _MODES),
    Expectation(_SUITE, "time-slicing", "overhead_percent", 10, 30, "%", _MODES),
    Expectation(_SUITE, "time-slicing", "utilization_gpu_percent", 80, 95, "%", _MODES),
    Expectation(_SUITE, "mps", "success_rate_percent", 95, 100, "%", _MODES),
    Expectation(_SUITE, "mps", "overhead_percent", 5, 15, "%", _MODES),
    Expectation(_SUITE, "mps", "utilization_gpu_percent", 85, 95, "%", _MODES),
    Expectation(_SUITE, "mig", "success_rate_percent", 100, 100, "%", _MODES),
    Expectation(
        _SUITE, "mig", "interference_overhead_percent", 0, 0, "%", _MODES,
        rounding=0.5, note=_MIG_OVERHEAD,
    ),
    Expectation(
        _SUITE, "mig", "utilization_gpu_percent", 60, 70, "%", _MODES, note="per instance"
    ),
)  # fmt: skip

# Names of the guide's quantities in a workload's figures, where they are not the quantity's own.
_FIGURE_NAMES: Mapping[str, str] = {
    "epoch_seconds": "mean_epoch_seconds",
    "test_accuracy_percent": "final_test_accuracy_percent",
    "train_accuracy_percent": "final_train_accuracy_percent",
    "requests_per_second": "qps",
    "active_seconds": "gpu_active_seconds",
}


def workload_checks(
    good: Sequence[ClientRecord], latencies_ms: Sequence[float], situation: str
) -> list[dict[str, Any]]:
    """What the last of a client's good records tells, next to its workload's ranges."""
    if not good:
        return []
    batch_size = (good[-1].identity or {}).get("batch_size")
    ranges = [
        expected
        for expected in WORKLOAD_EXPECTATIONS
        if expected.subject == good[-1].workload and expected.batch_size in (None, batch_size)
    ]
    return checks(ranges, _measured_quantities(good[-1], latencies_ms), situation)


def card_checks(workload: str, gpu: GpuFigures) -> list[dict[str, Any]]:
    """Utilization and memory of the whole card while one job had it to itself."""
    memory_mib = gpu.memory_used_mib_max
    measured = {
        "utilization_gpu_percent": gpu.utilization_gpu_percent,
        "memory_used_gb": None if memory_mib is None else memory_mib * 2**20 / 1e9,
    }
    ranges = [expected for expected in WORKLOAD_EXPECTATIONS if expected.subject == workload]
    return checks([one for one in ranges if one.batch_size is None], measured, "alone")


def checks(
    ranges: Iterable[Expectation], measured: Mapping[str, float | None], situation: str
) -> list[dict[str, Any]]:
    """The quantities that were measured next to their ranges."""
    return [
        expected.check(value, situation)
        for expected in ranges
        if (value := measured.get(expected.quantity)) is not None
    ]


def mean_job_seconds(record: ClientRecord) -> float | None:
    """Mean wall time of the client's whole jobs in the window."""
    return scores.mean(job.duration_seconds for job in record.jobs if job.in_window)


def _measured_quantities(record: ClientRecord, latencies_ms: Sequence[float]) -> dict[str, float]:
    """The guide's quantities that a client record tells; latency comes from the raw values."""
    found: dict[str, float] = {}
    for quantity in {expected.quantity for expected in WORKLOAD_EXPECTATIONS}:
        for name in (quantity, _FIGURE_NAMES.get(quantity, quantity)):
            value = record.figures.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(quantity, float(value))
    if latencies_ms:
        found["mean_latency_ms"] = statistics.fmean(latencies_ms)
        p99_ms = scores.latency_percentile(latencies_ms, scores.TAIL_PERCENT)
        found |= {} if p99_ms is None else {"p99_latency_ms": p99_ms}
    job_seconds = mean_job_seconds(record)
    if job_seconds is not None:
        found["job_seconds"] = job_seconds
    return found
