"""GPU utilization and memory of a workload run by hand, from the project's own sampler.

The sampler is a process of its own (``benchmarking/gpu_monitor.py``): sampling from a thread of
the workload would share the interpreter lock with the code that launches work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
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
        self._lines: list[str] = []

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
                target=self._lines.extend, args=(self._process.stdout,), daemon=True
            )
            self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the sampler."""
        self._end()

    def figures(self, start_seconds: float, end_seconds: float) -> dict:
        """End the sampler and return what it saw in a span of CLOCK_MONOTONIC.

        Returns:
            ``gpu_utilization_percent`` (mean), ``gpu_utilization_source``,
            ``gpu_sm_activity_percent`` (mean), ``gpu_memory_used_mib`` (maximum, whole GPU);
            None where unknown. Empty on the CPU.
        """
        if self._gpu_uuid is None:
            return {}
        self._end()
        records = [json.loads(line) for line in self._lines if line.endswith("}\n")]
        samples = [
            record
            for record in records
            if record.get("record") == "sample"
            and start_seconds <= record["time_seconds"] <= end_seconds
        ]
        figures: dict = {}
        for name, field, reduction in FIGURES:
            values = [s[field] for s in samples if s.get(field) is not None]
            mean_or_max = max if reduction == "max" else lambda v: sum(v) / len(v)
            figures[name] = mean_or_max(values) if values else None
        sources = [s["utilization_source"] for s in samples if s.get("utilization_source")]
        figures["gpu_utilization_source"] = sources[0] if sources else None
        return figures

    def _end(self) -> None:
        """Close the sampler's leash and wait until it has gone; safe to call twice."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.stdin.close()
        self._reader.join()
        process.wait()
