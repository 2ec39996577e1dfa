"""The inference server as a process of another program: started, told when to warm up, ended.

It is driven as the benchmark suite drives any client (workloads/common/client.py): events in a
file, commands on its standard input. End-of-file there means stop, so it never outlives us.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from workloads.common.errors import (
    EXIT_OUT_OF_MEMORY,
    DamagedFileError,
    GpuUnavailableError,
    JobFailedError,
    NotFiniteError,
    OutOfGpuMemoryError,
    UsageError,
)

SERVER = Path(__file__).with_name("inference_server.py")
POLL_SECONDS = 0.05
# A stop drains what has arrived. A process that is killed with kernels in flight can harm the other
# clients of an MPS server, so that comes last; all together stay under the suite's own patience.
STOP_SECONDS = 35.0
TERMINATE_SECONDS = 15.0


class HeldServer:
    """One server process on a free port of this machine alone."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it with ``arguments``; it begins to load."""
        self._folder = tempfile.TemporaryDirectory(prefix="inference-server-")
        events = Path(self._folder.name) / "events.jsonl"
        events.touch()
        self._lines = events.open("rb")
        self._rest = b""
        self._events: dict[str, dict] = {}
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we end it in order.
        self._process = subprocess.Popen(
            (sys.executable, str(SERVER), *arguments, "--host", "127.0.0.1", "--port", "0",
             "--events", str(events), "--hold"),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def peak_memory_mib(self) -> float | None:
        """The most GPU memory that it took, once it has stopped; None where nobody knows."""
        return self._events.get("done", {}).get("peak_memory_mib")

    def wait_until_loaded(self) -> None:
        """Block until the model is on the device.

        Raises:
            UsageError, GpuUnavailableError, OutOfGpuMemoryError, JobFailedError: It ended first.
        """
        self._wait_for("loaded")

    def warm_up(self) -> dict:
        """Let it tune and capture; return its identity, ``port`` included, when it answers.

        Raises:
            UsageError, GpuUnavailableError, OutOfGpuMemoryError, JobFailedError: It ended first.
        """
        self._say("warm")
        return self._wait_for("ready")["identity"]

    def go(self) -> None:
        """Begin its one job, which lasts until ``stop``."""
        self._say("go")

    def require_alive(self) -> None:
        """Raise what ended it, if it has ended.

        Raises:
            UsageError, GpuUnavailableError, OutOfGpuMemoryError, JobFailedError: It has ended.
        """
        if self._process.poll() is None:
            return
        self._read_events()
        error = self._events.get("error", {})
        code = self._process.returncode
        said = error.get("message") or f"it ended with exit code {code}; look above for its message"
        said = f"the inference server: {said}"
        if code == EXIT_OUT_OF_MEMORY:
            raise OutOfGpuMemoryError(said, error.get("memory"))
        kinds = (UsageError, GpuUnavailableError, NotFiniteError, DamagedFileError)
        for kind in kinds:
            if code == kind.exit_code:
                raise kind(said)
        raise JobFailedError(said)

    def stop(self) -> None:
        """Let it answer what has arrived and end; may be called twice."""
        # Also when it has ended by itself, or somebody interrupts the wait.
        try:
            self._say("stop")
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._end()
        finally:
            if not self._lines.closed:
                self._read_events()
                self._lines.close()
                self._folder.cleanup()

    def _end(self) -> None:
        for number, seconds in ((None, STOP_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
            if number is not None:
                self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                return
        self._process.kill()
        self._process.wait()

    def _say(self, command: str) -> None:
        """Send a command; that it may have ended already is found where its events are read."""
        if self._process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()

    def _wait_for(self, event: str) -> dict:
        while event not in self._events:
            self._read_events()
            if event in self._events:
                break
            self.require_alive()
            time.sleep(POLL_SECONDS)
        return self._events[event]

    def _read_events(self) -> None:
        """Keep the last event of each name; units are what we measure ourselves."""
        *lines, self._rest = (self._rest + self._lines.read()).split(b"\n")
        for line in lines:
            if not line.startswith(b'{"event": "units"'):
                event = json.loads(line)
                self._events[event["event"]] = event
