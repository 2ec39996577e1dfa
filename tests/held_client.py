"""A workload held by its standard input, as the suite holds it, for tests of the contract."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from conftest import PROJECT_ROOT


class HeldClient:
    """One workload process under ``--events --hold``; ends with the ``with`` block."""

    def __init__(self, tmp_path: Path, script: str, *arguments: str) -> None:
        self.events_path = tmp_path / "client.events.jsonl"
        self.process = subprocess.Popen(
            (sys.executable, str(PROJECT_ROOT / script), *arguments,
             "--events", str(self.events_path), "--hold"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> HeldClient:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def events(self, name: str | None = None) -> list[dict]:
        """Return the events so far, all or those called ``name``."""
        if not self.events_path.exists():
            return []
        lines = self.events_path.read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if name in (None, event["event"])]

    def wait_for(self, name: str, count: int = 1, timeout_seconds: float = 120) -> list[dict]:
        """Wait until ``count`` events called ``name`` are there and return them."""
        deadline = time.monotonic() + timeout_seconds
        while len(found := self.events(name)) < count:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline, f"no {name} within {timeout_seconds} s"
            time.sleep(0.05)
        return found

    def say(self, command: str) -> None:
        """Send one command on standard input."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def start_working(self) -> dict:
        """Bring the client to work and return the identity it reported."""
        self.wait_for("loaded")
        self.say("warm")
        identity = self.wait_for("ready")[0]["identity"]
        self.say("go")
        return identity

    def exit_code(self, timeout_seconds: float = 60) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout_seconds)
