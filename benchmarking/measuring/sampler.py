"""The sampler of a suite run: `gpu_monitor.py` as a subprocess that is read while it samples."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarking.measuring.event_log import LineFollower, private_opener, tail_of

MONITOR_SCRIPT = Path(__file__).resolve().parents[1] / "gpu_monitor.py"
READY_TIMEOUT_SECONDS = 20.0
END_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 0.02


class Sampler:
    """Runs the sampler from entering to leaving the `with` block.

    The suite goes on without it: when it does not start, stands still or ends early, `failure`
    says why, and the figures that it would have given are unknown.
    """

    def __init__(self, output: Path, log: Path, *, gpu: str | None = None) -> None:
        """Sample the GPU called `gpu` (the first one, or only the host where there is none)."""
        self._output, self._log = output, log
        self._gpu = ["--gpu", gpu] if gpu else []
        self._samples: list[dict[str, Any]] = []
        self._is_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self.failure: str | None = None

    def __enter__(self) -> Sampler:
        """Start sampling and wait until the first sample is about to follow."""
        command = [sys.executable, str(MONITOR_SCRIPT), "--output", str(self._output), "--leash"]
        try:
            with (
                open(self._output, "ab", opener=private_opener) as output,
                open(self._log, "ab", opener=private_opener) as log,
            ):
                # A run that goes on appends to the samples of its first part.
                self._samples_follower = LineFollower(self._output, past=output.tell())
                self._log_follower = LineFollower(self._log, past=log.tell())
                self._process = subprocess.Popen(
                    [*command, *self._gpu], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.failure = f"the sampler did not start: {error}"
            return self
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while not self._is_ready and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._read()
        if not self._is_ready:
            self._fail("the sampler did not start")
        return self

    def __exit__(self, *exception: object) -> None:
        """End the sampler by its standard input, harder if it does not listen."""
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
        """Return the samples from the last call's last one on, and wait for one after `seconds`.

        `seconds` is on CLOCK_MONOTONIC: figures of a window need a reading at its far edge. Older
        ones are not kept: a day's would fill gigabytes, and be gone through after every co-run.
        """
        if self._process is None:
            return []
        deadline = max(time.monotonic(), seconds) + 2.0
        self._read()
        while not self._samples or self._samples[-1]["time_seconds"] < seconds:
            if time.monotonic() >= deadline:
                self._fail("the sampler stood still")
                break
            if self._process.poll() is not None:
                self._fail("the sampler ended early")
                break
            time.sleep(POLL_SECONDS)
            self._read()
        taken, self._samples = self._samples, self._samples[-1:]
        return taken

    def complaints(self) -> list[str]:
        """Return what it said of NVML since the last call: which function fails, and how."""
        lines = self._log_follower.poll() if self._process else []
        said = (line.decode(errors="replace").strip() for line in lines)
        return [line for line in said if line.startswith("gpu_monitor: nvml")]

    def _read(self) -> None:
        for line in self._samples_follower.poll():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # truncated: a sample less, or no ready sampler, which is said
            match value:
                case {"record": "monitor"}:
                    self._is_ready = True
                case {"record": "sample", "time_seconds": float()}:
                    self._samples.append(value)

    def _fail(self, what: str) -> None:
        said = [line for line in tail_of(self._log) if line.strip()]
        self.failure = f"{what}: {said[-1] if said else 'it said nothing'}"
