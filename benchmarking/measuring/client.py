"""One client of a co-run: its process, what it says, and what became of it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from benchmarking.measuring import event_log
from benchmarking.measuring.event_log import Event, private_opener
from benchmarking.planning.plan import PlannedClient
from benchmarking.planning.workloads import COMMAND_WORKLOAD
from benchmarking.records.run_folder import ClientPaths
from benchmarking.records.types import ClientStatus, CoRunStatus, FailureCause
from benchmarking.records.writing import one_line

EXIT_OUT_OF_MEMORY = 12
# What a client's exit code alone tells, where its event log does not.
CAUSE_OF_EXIT_CODE: dict[int | None, FailureCause] = {
    EXIT_OUT_OF_MEMORY: "out_of_memory", 34: "not_finite", 65: "damaged_file",
}  # fmt: skip
CAUSES = get_args(FailureCause)
# Would bind the threads of all clients to the same cores.
PINNING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# Keeps Python from importing modules that lie where a process happens to run.
SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"


@dataclass(eq=False)
class ClientResult:
    """What became of one client.

    `reason` says in words why `status` is not ok, `cause` in the word of the client contract, where
    it has one; `memory` is the memory snapshot of when memory ran out. `window_host_cpu_fraction`
    is how many cores it and its child processes used in the window, `busiest_thread_cpu_fraction`
    what the one thread of theirs took that used most, `cpu_wait_fraction` the part of the window
    that the one waited for a core that waited longest.
    """

    planned: PlannedClient
    status: ClientStatus = "ok"
    reason: str | None = None
    events: list[Event] = field(default_factory=list)
    identity: dict[str, Any] | None = None
    exit_code: int | None = None
    stderr_tail: list[str] = field(default_factory=list)
    window_host_cpu_fraction: float | None = None
    busiest_thread_cpu_fraction: float | None = None
    cpu_wait_fraction: float | None = None
    cause: FailureCause | None = None
    memory: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """How messages call this client."""
        return f"client {self.planned.client} ({self.planned.label})"


@dataclass(eq=False)
class Client(ClientResult):
    """A client process, whose result grows while it runs and is settled when it has ended.

    `failure` is the status and the reason of one that cannot be measured. `units` and `whole_jobs`
    are those that have ended, and lie whole, in the window that opens at `window_start_seconds`.
    """

    paths: ClientPaths = field(kw_only=True)
    process: subprocess.Popen[bytes] | None = None
    is_loaded: bool = False
    has_said_done: bool = False
    job_seconds: list[float] = field(default_factory=list)
    window_start_seconds: float = math.inf
    whole_jobs: int = 0
    units: int = 0
    failure: tuple[ClientStatus, str] | None = None
    was_told_to_stop: bool = False
    exited_prematurely: bool = False
    timed_out: str | None = None  # what it did not do within which limit
    was_signaled: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether the client cannot go on, or left before it was told to."""
        return self.failure is not None or self.exited_prematurely

    @property
    def pid(self) -> int | None:
        """The process that was started; a client may name another one in its identity."""
        return self.process.pid if self.process else None

    def start(self, command: Sequence[str], base_environment: Mapping[str, str]) -> None:
        """Start `command` with its own session, stdin control channel and output files."""
        self._follower = event_log.LineFollower(self.paths.events)
        environment = dict(base_environment)
        if self.planned.workload == COMMAND_WORKLOAD and SAFE_PATH_VARIABLE not in os.environ:
            # The user's own program may import what lies where it runs.
            environment.pop(SAFE_PATH_VARIABLE, None)
        with (
            open(self.paths.events, "wb", opener=private_opener),
            open(self.paths.stdout, "wb", opener=private_opener) as stdout,
            open(self.paths.stderr, "wb", opener=private_opener) as stderr,
        ):
            try:
                self.process = subprocess.Popen(
                    [*command, "--events", str(self.paths.events), "--hold"], bufsize=0,
                    env={**environment, **self.planned.environment}, stdin=subprocess.PIPE,
                    stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.failure = ("failed", f"cannot start {command[0]}: {error.strerror}")

    def poll(self) -> None:
        """Take in new events and whether the process has ended."""
        if self.process is None:
            return
        # The exit is asked for first: whatever was written before it is then read below.
        if self.exit_code is None:
            self.exit_code = self.process.poll()
            self.exited_prematurely = self.exit_code is not None and not self.was_told_to_stop
        try:
            lines = self._follower.poll()
        except OSError as error:
            reason = f"its event log cannot be read ({error.strerror})"
            self.failure = self.failure or ("failed", reason)
            return
        for event in map(event_log.parse_event, lines):
            self.events.append(event)
            match event["event"]:
                case "loaded":
                    self.is_loaded = True
                case "ready":
                    self.identity = dict(event.get("identity") or {})
                case "job":
                    self.job_seconds.append(event["end_seconds"] - event["start_seconds"])
                    self.whole_jobs += event["start_seconds"] >= self.window_start_seconds
                case "units":
                    spans = event_log.unit_spans([event])
                    self.units += sum(
                        at + seconds > self.window_start_seconds for _, at, seconds in spans
                    )
                case "error":
                    said = str(event.get("message") or "reported an error").splitlines()
                    message = "\n".join(map(one_line, said))
                    self.failure = (event.get("status") or "failed", message)
                case "done":
                    self.has_said_done = True

    def send(self, command: str) -> float:
        """Write one command and return when; a client that is gone is left to poll.

        `stop` is the last: the end-of-file after it means stop to a client that missed it.
        """
        self.was_told_to_stop = command == "stop"
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{command}\n".encode())
            if self.was_told_to_stop:
                self.process.stdin.close()
        return time.monotonic()

    def settle(self, outcome: CoRunStatus) -> None:
        """Say what became of the client, once it has ended with its co-run."""
        self.stderr_tail = event_log.tail_of(self.paths.stderr) if self.process else []
        self.status, self.reason = self._status(outcome)
        error = event_log.last_event(self.events, "error") or {}
        self.memory = error.get("memory")
        if self.status in ("failed", "oom"):
            # The client's word if it is one of the contract's, else what its exit code stands for.
            told = error.get("cause")
            self.cause = told if told in CAUSES else CAUSE_OF_EXIT_CODE.get(self.exit_code)

    def _status(self, outcome: CoRunStatus) -> tuple[ClientStatus, str | None]:
        """Status and why, the surest sign first."""
        code = self.exit_code
        if self.failure is not None:
            return self.failure
        if code == EXIT_OUT_OF_MEMORY:
            return "oom", "out of memory"
        if self.timed_out:
            return "timeout", self.timed_out
        if self.was_signaled:
            if outcome == "interrupted":
                return "killed", "did not stop when the run was interrupted"
            return "timeout", "did not stop when told to"
        if code is not None and code < 0:
            names = {one.value: one.name for one in signal.Signals}
            name = names.get(-code, f"signal {-code}")
            is_from_outside = name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
            hint = " (the host may have run out of memory)" if name == "SIGKILL" else ""
            return ("killed" if is_from_outside else "failed"), f"ended by {name}{hint}"
        if code != 0:
            return "failed", f"exit code {code}"
        if not self.has_said_done:
            return "failed", "exit code 0, but it never said `done`"
        if self.exited_prematurely:
            return "failed", "exited prematurely"
        return "ok", None


def client_base_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of this process without what would decide a client's sharing mode.

    Inherited `CUDA_MPS_*` could attach a client to somebody's daemon, `CUDA_VISIBLE_DEVICES` could
    give it another GPU than the one that is watched. Nor are clients bound to cores, unless a plan
    says so.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith("CUDA_MPS_")
        and name not in ("CUDA_VISIBLE_DEVICES", *PINNING_VARIABLES)
    }
    return {**kept, SAFE_PATH_VARIABLE: "1"}
