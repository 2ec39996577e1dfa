"""GPU utilization and memory of a workload run by hand, from the project's own sampler.

The sampler is a process of its own (``benchmarking/gpu_monitor.py``): sampling from a thread of
the workload would share the interpreter lock with the code that launches work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workloads.common.device import ComputeDevice

MONITOR_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarking" / "gpu_monitor.py"
FIGURES = (
    ("gpu_utilization_percent", "utilization_gpu_percent", "mean"),
    ("gpu_sm_activity_percent", "sm_activity_percent", "mean"),
    ("gpu_memory_used_mib", "memory_used_mib", "max"),
)


class GpuMonitor:
    """Samples the GPU while the ``with`` block runs; does nothing for a workload on the CPU."""

    def __init__(self, device: ComputeDevice | None) -> None:
        """Prepare to sample the GPU that ``device`` is on."""
        self._gpu_uuid = None
        if device is not None and device.is_cuda:
            self._gpu_uuid = device.identity()["gpu_uuid"]
        self._process: subprocess.Popen | None = None
        self._reader: threading.Thread | None = None
        self._begin_seconds = float("inf")
        self._totals = {field: _Total() for _, field, _ in FIGURES}
        self._source: str | None = None

    def __enter__(self) -> GpuMonitor:
        """Start the sampler and wait until it samples, so that its start is in no timing."""
        if self._gpu_uuid is not None:
            self._process = subprocess.Popen(
                (sys.executable, str(MONITOR_SCRIPT), "--gpu", self._gpu_uuid, "--interval", "0.2",
                 "--output", "-", "--leash"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True,
            )  # fmt: skip
            self._process.stdout.readline()
            # Read all the while: a full pipe would stop the sampler.
            self._reader = threading.Thread(
                target=self._read, args=(self._process.stdout,), daemon=True
            )
            self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the sampler."""
        self._end()

    def begin(self) -> None:
        """Count samples from now on."""
        self._begin_seconds = time.monotonic()

    def figures(self) -> dict:
        """End the sampler and return what it saw since ``begin``.

        Returns:
            ``gpu_utilization_percent`` (mean), ``gpu_utilization_source``,
            ``gpu_sm_activity_percent`` (mean), ``gpu_memory_used_mib`` (maximum, whole GPU);
            None where unknown, as all are on the CPU.
        """
        self._end()
        figures: dict = {
            name: getattr(self._totals[field], reduction) for name, field, reduction in FIGURES
        }
        return figures | {"gpu_utilization_source": self._source}

    def _read(self, lines: Iterable[str]) -> None:
        """Add up samples as they come: a server may run for days."""
        for line in lines:
            sample = json.loads(line)
            if sample.get("time_seconds", 0.0) < self._begin_seconds:
                continue
            for field, total in self._totals.items():
                if sample.get(field) is not None:
                    total.add(sample[field])
            self._source = self._source or sample.get("utilization_source")

    def _end(self) -> None:
        """Close the sampler's leash and wait until it has gone; safe to call twice."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.stdin.close()
        self._reader.join()
        process.wait()


class _Total:
    """Mean and maximum of values that are not kept; None without any."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self.max: float | None = None

    def add(self, value: float) -> None:
        self._count += 1
        self._sum += value
        self.max = value if self.max is None else max(self.max, value)

    @property
    def mean(self) -> float | None:
        return self._sum / self._count if self._count else None
