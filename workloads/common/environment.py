"""What a result was produced with: versions, host, source revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "tokenizers", "numpy", "pillow", "httptools",
    "nvidia-ml-py", "triton",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Return versions by package name without importing the packages; None where missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def usable_cores() -> int:
    """Return how many cores this process may use.

    ``os.cpu_count()`` counts the machine; a container's quota (cgroup v2 ``cpu.max``) and an
    affinity mask both lower what a client really gets.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
    return cores


def source_revision() -> tuple[str | None, bool | None]:
    """Return (git commit, whether the tree differs from it); (None, None) outside a checkout."""
    git = ("git", "-C", str(PROJECT_ROOT))
    try:
        commit = subprocess.run(
            (*git, "rev-parse", "HEAD"), capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changes = subprocess.run(
            (*git, "status", "--porcelain", "--untracked-files=no"),
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changes.strip())


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


def clients_on_gpu() -> int:
    """Return how many clients share the GPU, which the suite says in GPU_SHARING_CLIENTS."""
    return max(1, int(os.environ.get("GPU_SHARING_CLIENTS", "1")))
