"""What every test shares: where the project is, and which tests need a real GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT_ROOT))


def has_nvidia_gpu() -> bool:
    """Whether a driver on this machine answers and lists at least one GPU."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return False
    listing = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none: the count of passed tests stays honest."""
    if has_nvidia_gpu():
        return
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        config.hook.pytest_deselected(items=gpu_items)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
