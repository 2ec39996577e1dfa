"""The sampler beside a suite run: `gpu_monitor.py` as a subprocess on a leash, read meanwhile."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarking.suite.event_log import LineFollower

MONITOR_SCRIPT = Path(__file__).resolve().parents[1] / "gpu_monitor.py"
READY_TIMEOUT_SECONDS = 20.0
END_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 0.02


class Sampler:
    """Runs the sampler from entering to leaving the `with` block.

    The suite goes on without it: when it does not start or ends early, `failure` says why, and
    the figures that it would have given are unknown.
    """

    def __init__(self, output: Path, log: Path, *, gpu: str | None = None) -> None:
        """Sample the GPU called `gpu` (the first one, or only the host where there is none)."""
        self._log = log
        self._command = [
            sys.executable, str(MONITOR_SCRIPT), "--output", str(output), "--leash",
            *(["--gpu", gpu] if gpu else []),
        ]  # fmt: skip
        # A run that goes on appends to the samples of its first part.
        self._follower = LineFollower(output, past=output.stat().st_size if output.exists() else 0)
        self._words = LineFollower(log, past=log.stat().st_size if log.exists() else 0)
        self._samples: list[dict[str, Any]] = []
        self._is_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self.failure: str | None = None

    def __enter__(self) -> Sampler:
        """Start sampling and wait until the first sample is about to follow."""
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.failure = f"the sampler did not start: {error}"
            return self
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while not self._is_ready and self._is_running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._read()
        if not self._is_ready:
            self._complain("the sampler did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the sampler by its leash, harder if it does not listen."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        for end_harder in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(END_TIMEOUT_SECONDS)
                return
            except subprocess.TimeoutExpired:
                end_harder()
        self._process.wait()

    @property
    def pid(self) -> int | None:
        """The sampler's process, `None` when it did not start."""
        return self._process.pid if self._process else None

    def samples_past(self, seconds: float) -> Sequence[dict[str, Any]]:
        """Return all samples so far, having waited a moment for one taken after `seconds`.

        `seconds` is on CLOCK_MONOTONIC: figures of a window need a reading at its far edge.
        """
        deadline = max(time.monotonic(), seconds) + 2.0
        self._read()
        while self._last_seconds() < seconds and time.monotonic() < deadline:
            if not self._is_running():
                self._complain("the sampler ended early")
                break
            time.sleep(POLL_SECONDS)
            self._read()
        return self._samples

    def complaints(self) -> list[str]:
        """Return what it said of NVML since the last call: which function fails, and how."""
        said = (line.decode(errors="replace").strip() for line in self._words.poll())
        return [line for line in said if line.startswith("gpu_monitor: nvml")]

    def _last_seconds(self) -> float:
        return self._samples[-1]["time_seconds"] if self._samples else float("-inf")

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _read(self) -> None:
        for line in self._follower.poll():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # torn: a sample less, or no ready sampler, which is said
            if value.get("record") == "monitor":
                self._is_ready = True
            elif value.get("record") == "sample":
                self._samples.append(value)

    def _complain(self, what: str) -> None:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        why = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        self.failure = f"{what}: {why}"
