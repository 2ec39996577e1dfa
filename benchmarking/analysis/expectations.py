"""The Experiments Guide's expected ranges, as data, to stand beside what was measured.

The ranges were written for unspecified GPUs and the guide's full job sizes, each job alone unless
it says otherwise. A value outside a range is a finding to look at, not an error: a recent card is
expected to be far faster than the guide's epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    def compare(self, value: float) -> Verdict:
        """Where a measured value, in `unit`, lies against the range."""
        if value < self.low - self.rounding:
            return "below"
        if value > self.high + self.rounding:
            return "above"
        return "inside"

    @property
    def name(self) -> str:
        """The quantity in words, without its unit: `GPU utilization`."""
        return _NAMES.get(self.quantity, self.quantity.rsplit("_", 1)[0].replace("_", " "))

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
_LOAD = ("Experiment 5: load test, 10 clients", "load_test")
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
    Expectation(*_LOAD, "total_requests", 600, 1200, "requests", _EXPECTED, note="in 60 s"),
    Expectation(*_LOAD, "success_rate_percent", 95, 100, "%", _EXPECTED),
    Expectation(*_LOAD, "mean_latency_ms", 50, 100, "ms", _EXPECTED),
    Expectation(*_LOAD, "p99_latency_ms", 150, 300, "ms", _EXPECTED),
    Expectation(*_LOAD, "requests_per_second", 10, 20, "requests/s", _EXPECTED),
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

SUITE_EXPECTATIONS: tuple[Expectation, ...] = (
    Expectation(_SUITE, "full suite", "duration_minutes", 5, 10, "min", _SUMMARY),
    Expectation(_SUITE, "full suite", "utilization_gpu_percent", 70, 90, "%", _SUMMARY),
    Expectation(_SUITE, "full suite", "memory_used_gb", 6, 8, "GB", _SUMMARY),
)


def for_workload(workload: str, batch_size: int | None = None) -> list[Expectation]:
    """Ranges of a workload; those that hold for one batch size only where it is `batch_size`."""
    return [
        expectation
        for expectation in WORKLOAD_EXPECTATIONS
        if expectation.subject == workload and expectation.batch_size in (None, batch_size)
    ]


def for_mode(mode: str) -> list[Expectation]:
    """Ranges of a sharing mode: success rate, overhead, GPU utilization."""
    return [expectation for expectation in MODE_EXPECTATIONS if expectation.subject == mode]
