"""A round of the soak (`soak.py`) with real jobs on the first GPU, whose settings stay put."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import ClassVar

from soak import A_CLIENT, DRIVER, MARKER, PROJECT_ROOT, SAMPLER, SIGNALS, SUITE, Round

# The daemon and its server; neither is hit, and both may outlive a driver that was.
MPS_PROGRAMS = "nvidia-cuda-mps-"


class GpuRound(Round):
    """One run of real jobs, one kill, and what has to hold afterwards."""

    # Other rounds, or tests, may be on the card at the same time.
    commands: ClassVar[dict[str, list[str]]] = {
        "run_experiments.sh": ["--modes", "time-slicing,mps", "--mix", "inference",
                               "--workloads", "2", "--repeats", "1", "--quick",
                               "--allow-contention"],
        "benchmarking/benchmark_suite.py": ["--mix", "inference", "--workloads", "1,2", "--quick",
                                            "--allow-contention"],
    }  # fmt: skip
    longest_seconds: ClassVar[dict[str, float]] = {
        "run_experiments.sh": 40.0, "benchmarking/benchmark_suite.py": 22.0,
    }  # fmt: skip

    @classmethod
    def blows(cls, script: str) -> list[tuple[str, signal.Signals]]:
        """Return who may be hit: SIGINT and SIGKILL only for those without work on the card."""
        targets = [SAMPLER, DRIVER if script.endswith(".sh") else SUITE]
        return [*((target, number) for target in targets for number in SIGNALS),
                (A_CLIENT, signal.SIGTERM)]  # fmt: skip

    def prepare(self) -> None:
        """Lay out a copy of the programs and of their environment."""
        for name in ("benchmarking", "workloads", "gpu-configs"):
            shutil.copytree(PROJECT_ROOT / name, self.folder / name,
                            ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        for name in ("run_experiments.sh", "setup_environment.sh", "requirements.txt"):
            shutil.copy(PROJECT_ROOT / name, self.folder)
        self.environment = {
            **os.environ, "GPU_SHARING_STATE_DIR": str(self.folder / "state"),
            "PYTHON": sys.executable, "GPU_SETTINGS_LOCKED": "1", MARKER: str(self.folder),
        }  # fmt: skip

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Every living process of this round; the MPS daemon belongs to the mode."""
        for pid, words in super().processes():
            if MPS_PROGRAMS not in words[0]:
                yield pid, words

    def modes(self) -> dict:
        """Return how the card is set, and whether a daemon of this round is there."""
        query = ["nvidia-smi", "--query-gpu=compute_mode,mig.mode.current", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        daemons = [words[0] for _, words in super().processes() if MPS_PROGRAMS in words[0]]
        return {"card": done.stdout.splitlines()[0], "daemons": daemons}

    def forget_the_dead(self) -> None:
        """Do nothing: the driver does it."""
