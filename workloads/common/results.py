"""Result files, and what stands in them beside a job's own figures."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from workloads.common.errors import CannotWriteError, UsageError

if TYPE_CHECKING:
    from workloads.common.device import ComputeDevice

SCHEMA_VERSION = 1
PROJECT_ROOT = Path(__file__).resolve().parents[2]
RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "tokenizers", "numpy", "pillow", "flask", "gunicorn",
    "gevent", "aiohttp", "nvidia-ml-py", "triton",
)  # fmt: skip
LATENCY_KEYS = (
    "mean_ms", "median_ms", "std_ms", "min_ms", "max_ms", "p50_ms", "p95_ms", "p99_ms",
)  # fmt: skip
MONITOR_SCRIPT = PROJECT_ROOT / "benchmarking" / "gpu_monitor.py"
# Means over the run, and the fields of a sample that they are taken of.
MONITOR_MEANS = {
    "gpu_utilization_percent": "utilization_gpu_percent",
    "gpu_sm_activity_percent": "sm_activity_percent",
}


# --- files ----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of what is kept between runs, made where it is missing.

    Raises:
        UsageError: There is none that this user may write.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative path is to be ignored (XDG Base Directory Specification).
        folder = Path(base) if base.startswith("/") else Path.home() / ".cache"
        folder = folder / "gpu-sharing-bench"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    # Without HOME and without an account there is no home folder: RuntimeError.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"there is no cache folder to write to ({why}); set XDG_CACHE_HOME to a folder that "
            "you may write"
        ) from error
    return folder


@contextmanager
def written_whole(path: Path, mode: str = "b", **how: Any) -> Iterator[IO]:
    """Give a file to write to, which takes the place of ``path`` once the block has ended well.

    A reader sees the old file or the whole new one, and after a failure nothing is left behind.
    The folder is made where there is none. ``mode`` is ``b`` for bytes or ``t`` for text, both of
    which can be read back inside the block; ``how`` are further arguments of ``open``.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file is renamed within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open(f"x+{mode}", **how) as file:
            yield file
            file.flush()
            # A rename can reach the disk before the content does.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make sure that ``folder`` exists and takes new files.

    Raises:
        UsageError: It does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder} ({error.strerror}); name a writable folder with "
            "--results-dir"
        ) from error


def write_result(results_dir: Path, name: str, payload: dict) -> Path:
    """Write one result file ``<name>_<local time>_<pid>.json`` and return its path.

    Raises:
        CannotWriteError: The disk is full, or the folder is shut or gone by now.
    """
    path = results_dir / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}.json"
    content = {"schema_version": SCHEMA_VERSION, "workload": name, **payload}
    try:
        with written_whole(path, "t") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise CannotWriteError(path, error) from error
    return path


# --- what a result was produced with --------------------------------------------------------------


def package_versions() -> dict[str, str | None]:
    """Return versions by package name without importing the packages; None where missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


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
    from workloads.common.device import usable_cores

    commit, dirty = source_revision()
    return {
        "versions": package_versions(),
        "host_cores": usable_cores(),
        "os": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


# --- figures --------------------------------------------------------------------------------------


def summarize_latency_ms(durations_seconds: Sequence[float]) -> dict[str, float | None]:
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
        self._sums: defaultdict[str, float] = defaultdict(float)
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
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None and stdout is not None  # since they are pipes
            self._stdin = stdin
            stdout.readline()
            # Read all the while: a full pipe would stop the sampler.
            self._reader = threading.Thread(target=self._read, args=(stdout,), daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the sampler's standard input and wait until it has gone."""
        if self._gpu_uuid is not None:
            self._stdin.close()
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

    def _read(self, lines: IO[str]) -> None:
        figures = self._figures
        for sample in map(json.loads, lines):
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
