"""Result files, and what stands in them beside a job's own figures."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common.device import ComputeDevice, package_versions, usable_cores
from workloads.common.errors import CannotWriteError
from workloads.common.files import written_whole

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
PROJECT_ROOT = Path(__file__).resolve().parents[2]
LATENCY_KEYS = (
    "mean_ms", "median_ms", "std_ms", "min_ms", "max_ms", "p50_ms", "p95_ms", "p99_ms",
)  # fmt: skip
MONITOR_SCRIPT = PROJECT_ROOT / "benchmarking" / "gpu_monitor.py"
# Means over the run, and the fields of a sample that they are taken of.
MONITOR_MEANS = {
    "gpu_utilization_percent": "utilization_gpu_percent",
    "gpu_sm_activity_percent": "sm_activity_percent",
}


@functools.cache
def stem_of(name: str) -> str:
    """Return what the names of this process's result files begin with, ``name`` and when."""
    return f"{name}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"


def write_result(results_dir: Path, name: str, payload: dict) -> Path:
    """Write one result file ``<name>_<local time>_<pid>.json`` and return its path.

    Raises:
        CannotWriteError: The disk is full, or the folder is shut or gone by now.
    """
    path = results_dir / f"{stem_of(name)}.json"
    content = {"schema_version": SCHEMA_VERSION, "workload": name, **payload}
    try:
        with written_whole(path, "t") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise CannotWriteError(path, error) from error
    return path


# --- what a result was produced with --------------------------------------------------------------


def source_revision() -> tuple[str | None, bool | None]:
    """Return (git commit, whether the tree differs from it); (None, None) outside a checkout."""
    # The project may lie, unpacked, inside of another repository.
    if not (PROJECT_ROOT / ".git").exists():
        return None, None
    # GIT_DIR and its like, which hooks and editors leave behind, name another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        described = subprocess.run(
            ("git", "-C", str(PROJECT_ROOT), "describe", "--always", "--abbrev=40", "--exclude=*",
             "--dirty"),
            env=environment, capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit, _, dirty = described.strip().partition("-")
    return commit, bool(dirty)


def describe_environment() -> dict:
    """Return the environment as recorded in every result file and run manifest."""
    commit, dirty = source_revision()
    return {
        "versions": package_versions(),
        "host_cores": usable_cores(),
        "os": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


# --- figures --------------------------------------------------------------------------------------


def summarize_latency_ms(
    durations_seconds: Sequence[float] | np.ndarray,
) -> dict[str, float | None]:
    """Summarize raw durations in the guide's terms (an average of percentiles means nothing).

    Returns:
        ``LATENCY_KEYS`` in milliseconds, all None where there are no durations. Percentiles
        interpolate linearly between order statistics (NumPy's default), ``std_ms`` is the sample
        standard deviation (n - 1), None for a single value.
    """
    if not len(durations_seconds):
        return dict.fromkeys(LATENCY_KEYS)
    import numpy as np

    values = np.asarray(durations_seconds, dtype=np.float64) * 1e3
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    figures = (float(values.mean()), p50, std, float(values.min()), float(values.max()))
    return dict(zip(LATENCY_KEYS, (*figures, p50, p95, p99), strict=True))


class GpuMonitor:
    """Samples the GPU while the ``with`` block runs; does nothing for a workload on the CPU.

    The sampler is a process of its own: a thread of the workload would share the interpreter lock
    with the code that launches work. Sums are kept, not samples: a server may run for days.
    """

    def __init__(self, device: ComputeDevice | None) -> None:
        self._gpu_uuid = device.identity()["gpu_uuid"] if device else None
        self._begin_seconds = float("inf")
        self._counts: Counter[str] = Counter()
        self._sums = dict.fromkeys(MONITOR_MEANS, 0.0)
        self._figures: dict = {"gpu_memory_used_mib": None, "gpu_utilization_source": None}

    def __enter__(self) -> GpuMonitor:
        """Start the sampler and wait until it samples, so that its start is in no timing."""
        if self._gpu_uuid is not None:
            self._process = subprocess.Popen(
                (sys.executable, str(MONITOR_SCRIPT), "--gpu", self._gpu_uuid, "--interval", "0.2",
                 "--output", "-", "--leash"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True,
            )  # fmt: skip
            next(self._process.stdout or iter(()), None)
            # Read all the while: a full pipe would stop the sampler.
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the sampler's standard input and wait until it has gone."""
        if self._gpu_uuid is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._reader.join()
            self._process.wait()

    def begin(self) -> None:
        """Count samples from now on."""
        self._begin_seconds = time.monotonic()

    def figures(self) -> dict:
        """Return means of utilization and SM activity, and the most memory in use on the whole GPU.

        They are of the samples between ``begin`` and the block's end; None where unknown.
        """
        means = {
            name: self._sums[name] / self._counts[name] if self._counts[name] else None
            for name in MONITOR_MEANS
        }
        return means | self._figures

    def _read(self) -> None:
        figures = self._figures
        for sample in map(json.loads, self._process.stdout or ()):
            if sample.get("time_seconds", 0.0) < self._begin_seconds:
                continue
            for name, field in MONITOR_MEANS.items():
                if sample.get(field) is not None:
                    self._counts[name] += 1
                    self._sums[name] += sample[field]
            used_mib = (figures["gpu_memory_used_mib"], sample.get("memory_used_mib"))
            figures["gpu_memory_used_mib"] = max(
                (mib for mib in used_mib if mib is not None), default=None
            )
            if figures["gpu_utilization_source"] is None:
                figures["gpu_utilization_source"] = sample.get("utilization_source")


def is_few(responses: int, percentile: float) -> bool:
    """Return whether a percentile of so many responses rests on fewer than five beyond it."""
    return responses < round(500 / (100 - percentile))


def few_percentiles(responses: int) -> list[str]:
    """Return which of the guide's percentiles (p50, p95, p99) rest on too few responses."""
    return [f"p{percentile}" for percentile in (50, 95, 99) if is_few(responses, percentile)]


def sample_note(responses: int) -> str:
    """Return how many responses percentiles rest on, for people: ``(n = 120, few for p99)``."""
    few = ", ".join(few_percentiles(responses))
    return f"(n = {responses}{f', few for {few}' if few else ''})"
