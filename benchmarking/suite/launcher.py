"""Runs the clients of one co-run: start, warm up one at a time, go together, stop, leave nothing.

Each client is a process in a session of its own, with standard input as its leash: the commands
`warm`, `go` and `stop`, and end-of-file when this process dies. What clients say comes from their
event files (see `event_log`). A baseline is a co-run of one.

A client is never killed with work in flight if it can be helped: first `stop`, then SIGTERM, and
SIGKILL only after another grace, since killing an MPS client hard may harm its neighbors.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarking.hardware.host_cpu import CpuReading, read_process_trees
from benchmarking.records.run_folder import ClientPaths
from benchmarking.suite.event_log import Event, LineFollower, last_event, parse_event
from benchmarking.suite.plan import PlannedClient, PlannedCoRun

EXIT_OUT_OF_MEMORY = 12
# What a client's exit code alone tells, where its event log does not.
CAUSE_OF_EXIT_CODE = {EXIT_OUT_OF_MEMORY: "out_of_memory", 34: "not_finite", 65: "damaged_file"}
CAUSES = frozenset((*CAUSE_OF_EXIT_CODE.values(), "diverged", "unreadable_image"))
STDERR_TAIL_LINES = 20

STATUS_OK, STATUS_FAILED, STATUS_OOM = "ok", "failed", "oom"
STATUS_TIMEOUT, STATUS_KILLED, STATUS_INVALID = "timeout", "killed", "invalid"

OUTCOME_OK, OUTCOME_FAILED, OUTCOME_TIMEOUT = "ok", "failed", "timeout"
OUTCOME_INTERRUPTED, OUTCOME_INVALID = "interrupted", "invalid"


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a question, so that cleaning up is never cut short.

    `count` says how often somebody asked; from the second time on waiting politely ends. A Ctrl-C
    that comes from the terminal and once more from the script that started this program is one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ONE_REQUEST_SECONDS = 1.0

    def __init__(self) -> None:
        """Start with nobody having asked."""
        self.count = 0
        self._last_seconds = -math.inf

    @property
    def requested(self) -> bool:
        """Whether somebody asked this run to end."""
        return self.count > 0

    def request(self) -> None:
        """Ask the run to end, as a signal does."""
        now = time.monotonic()
        if now - self._last_seconds >= self.ONE_REQUEST_SECONDS:
            self.count += 1
            self._last_seconds = now

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopSignal]:
        """Catch the signals inside the block; outside they do what they did before."""
        previous = {number: signal.getsignal(number) for number in self.SIGNALS}

        def handle(number: int, frame: FrameType | None) -> None:
            self.request()

        for number in self.SIGNALS:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


# A killed process ends when the kernel gets to it: in the driver, or on a busy machine, later.
KILLED_SECONDS = 10.0


@dataclass(frozen=True)
class Timeouts:
    """How long the launcher waits, in seconds.

    `timeout` bounds start to ready, and go to the end of the window; `stop` is the time to finish
    the step in hand; `terminate` is the time between SIGTERM and SIGKILL.
    """

    timeout: float = 1800.0
    stop: float = 60.0
    terminate: float = 30.0
    poll: float = 0.02


@dataclass(frozen=True)
class FinishRule:
    """When the window may end: every client has done this much.

    Without `window_seconds`: at least `min_seconds` since go and, for every client, `min_jobs`
    whole jobs, or one that took `long_job_seconds`. With it: that many seconds and `min_units`
    units for every client, whole jobs or not.
    """

    min_seconds: float
    min_jobs: int = 1
    long_job_seconds: float = 0.0
    window_seconds: float | None = None
    min_units: int = 10
    # Whether a client that fails is left behind, instead of ending the window.
    tolerates_failures: bool = False

    def is_done(self, client: Client) -> bool:
        """Whether this client has done enough, the elapsed time apart."""
        if self.window_seconds is not None:
            return client.units >= self.min_units
        long_enough = any(seconds >= self.long_job_seconds for seconds in client.job_seconds)
        return len(client.job_seconds) >= (1 if long_enough else self.min_jobs)

    @property
    def seconds(self) -> float:
        """Least length of the window."""
        return self.min_seconds if self.window_seconds is None else self.window_seconds


class Client:
    """One client process and what is known of it so far."""

    def __init__(self, planned: PlannedClient, paths: ClientPaths) -> None:
        """Prepare a client; nothing is started yet."""
        self.planned = planned
        self.paths = paths
        self.events: list[Event] = []
        self.is_loaded = False
        self.identity: dict[str, Any] | None = None
        self.job_seconds: list[float] = []
        self.units = 0
        self.error: Event | None = None
        self.exit_code: int | None = None
        self.stop_sent = False
        self.ended_early = False
        self.timed_out = False
        self.terminated = False
        self.start_failure: str | None = None
        self.refusal: str | None = None
        self._follower = LineFollower(paths.events)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """How messages call this client."""
        return f"client {self.planned.client} ({self.planned.label})"

    @property
    def has_ended(self) -> bool:
        """Whether there is no process (any more)."""
        return self._process is None or self.exit_code is not None

    @property
    def has_failed(self) -> bool:
        """Whether the client cannot go on, or left before it was told to."""
        return self.error is not None or self.start_failure is not None or self.ended_early

    @property
    def pid(self) -> int | None:
        """The process that was started; a client may name another one in its identity."""
        return self._process.pid if self._process else None

    def start(self, command: Sequence[str], base_environment: Mapping[str, str]) -> None:
        """Start `command` with its own session, stdin control channel and output files."""
        command = [*command, "--events", str(self.paths.events), "--hold"]
        environment = {**base_environment, **self.planned.environment}
        with self.paths.stdout.open("wb") as stdout, self.paths.stderr.open("wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.start_failure = f"cannot start {command[0]}: {error.strerror}"

    def poll(self) -> None:
        """Take in new events and whether the process has ended."""
        # The exit is asked for first: whatever was written before it is then read below.
        if self._process is not None and self.exit_code is None:
            self.exit_code = self._process.poll()
            self.ended_early = self.exit_code is not None and not self.stop_sent
        try:
            lines = self._follower.poll()
        except OSError as error:
            # To be found out once: everything that is to end this client looks here again.
            message = f"its event log cannot be read ({error.strerror})"
            self.error = self.error or {"event": "error", "status": "failed", "message": message}
            return
        for event in map(parse_event, lines):
            self.events.append(event)
            match event["event"]:
                case "loaded":
                    self.is_loaded = True
                case "ready":
                    self.identity = dict(event.get("identity") or {})
                case "job":
                    self.job_seconds.append(event["end_seconds"] - event["start_seconds"])
                case "units":
                    self.units += len(event["start_seconds"])
                case "error":
                    self.error = event

    def send(self, command: str) -> float:
        """Write one command to the leash and return when; a client that is gone is left to poll."""
        if command == "stop":
            self.stop_sent = True
        with contextlib.suppress(BrokenPipeError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(f"{command}\n".encode())
                self._process.stdin.flush()
        return time.monotonic()

    def close_stdin(self) -> None:
        """Close the leash: end-of-file means stop even to a client that missed the command."""
        with contextlib.suppress(BrokenPipeError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def signal_process(self, number: signal.Signals) -> None:
        """Signal the client itself, if it still runs."""
        if not self.has_ended and self._process is not None:
            self._process.send_signal(number)

    def signal_group(self, number: int) -> bool:
        """Signal everything in the client's session; return whether anything is left there."""
        if self._process is None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True)
class ClientResult:
    """What became of one client.

    `reason` says in words why `status` is not ok, `cause` in the word of the client contract, where
    it has one; `memory` is who held what when memory ran out. `window_host_cpu_seconds` is the
    processor time that it and its child processes used in the window,
    `window_busiest_thread_seconds` that of the one thread of theirs that used most.
    """

    planned: PlannedClient
    status: str
    reason: str | None
    events: Sequence[Event]
    identity: dict[str, Any] | None
    exit_code: int | None
    stderr_tail: list[str]
    window_host_cpu_seconds: float | None = None
    window_busiest_thread_seconds: float | None = None
    cause: str | None = None
    memory: dict[str, Any] | None = None

    @property
    def kind_of_end(self) -> str:
        """How it ended in a word: the cause of a failure where it is known, else the status."""
        is_told = self.status == STATUS_FAILED and self.cause is not None
        return self.cause.replace("_", " ") if is_told else self.status


@dataclass
class CoRunResult:
    """What was seen of a co-run; times on CLOCK_MONOTONIC, `None` where it did not get so far."""

    planned: PlannedCoRun
    outcome: str
    reason: str | None
    clients: list[ClientResult] = field(default_factory=list)
    ready_seconds: float | None = None
    window_start_seconds: float | None = None
    window_end_seconds: float | None = None
    go_skew_ms: float | None = None


class CoRunRefused(Exception):
    """Raised by `before_go`: the clients are not to be measured; the message says why."""


class _EndOfWindow(Exception):
    """The co-run ends before everyone was done."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason


class Launcher:
    """Runs one co-run after another with the same timeouts and environment."""

    def __init__(
        self,
        base_environment: Mapping[str, str],
        *,
        timeouts: Timeouts | None = None,
        stop_signal: StopSignal | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Keep what all co-runs share; `say` gets a line of progress now and then."""
        self._base_environment = base_environment
        self._timeouts = timeouts or Timeouts()
        self._stop_signal = stop_signal or StopSignal()
        self._say = say

    def run(
        self,
        planned: PlannedCoRun,
        paths_of: Callable[[str, int], ClientPaths],
        rule: FinishRule,
        before_go: Callable[[list[Client]], None] = lambda clients: None,
    ) -> CoRunResult:
        """Run the clients of `planned` until `rule` is met by all, and leave no process behind.

        `before_go` is called once, when every client is ready and idle; `CoRunRefused` makes the
        co-run and its clients failed, whatever else it raises is passed on. Failure, timeout and
        stop_signal are outcomes, not exceptions.
        """
        clients = [
            Client(client, paths_of(planned.co_run, client.client)) for client in planned.clients
        ]
        result = CoRunResult(planned, OUTCOME_OK, None)
        cpu_at_go: list[CpuReading | None] = [None] * len(clients)
        cpu_at_stop = cpu_at_go
        try:
            self._get_ready(planned, clients)
            result.ready_seconds = time.monotonic()
            before_go(clients)
            cpu_at_go = read_process_trees([client.pid for client in clients])
            # The window opens before the first command: a job that the first client begins while
            # the last one is still being told (see go_skew_ms) lies in it.
            result.window_start_seconds = time.monotonic()
            go_seconds = [client.send("go") for client in clients]
            result.go_skew_ms = 1000 * (go_seconds[-1] - go_seconds[0])
            self._contend(clients, rule, result.window_start_seconds)
        except _EndOfWindow as end:
            result.outcome, result.reason = end.outcome, end.reason
        except CoRunRefused as refusal:
            result.outcome, result.reason = OUTCOME_FAILED, str(refusal)
            for client in clients:
                client.refusal = result.reason
        finally:
            if result.window_start_seconds is not None:
                result.window_end_seconds = time.monotonic()
                cpu_at_stop = read_process_trees([client.pid for client in clients])
            self._end(clients)
        result.clients = [
            _client_outcome(client, result.outcome, at_go, at_stop)
            for client, at_go, at_stop in zip(clients, cpu_at_go, cpu_at_stop, strict=True)
        ]
        _settle_outcome(result)
        return result

    def _get_ready(self, planned: PlannedCoRun, clients: list[Client]) -> None:
        """Load in parallel, then warm up one at a time, so that nobody tunes beside a neighbor."""
        deadline = time.monotonic() + self._timeouts.timeout
        for client in clients:
            client.start(planned.command_of(client.planned), self._base_environment)
        self._wait(clients, lambda client: client.is_loaded, "load", deadline)
        for client in clients:
            client.send("warm")
            self._wait(
                clients, lambda other, this=client: other is not this or other.identity is not None,
                "get ready", deadline,
            )  # fmt: skip

    def _contend(self, clients: list[Client], rule: FinishRule, go_seconds: float) -> None:
        deadline = go_seconds + self._timeouts.timeout
        self._wait(
            clients, rule.is_done, "finish", deadline, not_before=go_seconds + rule.seconds,
            tolerates_failures=rule.tolerates_failures,
        )  # fmt: skip

    def _wait(
        self,
        clients: list[Client],
        is_done: Callable[[Client], bool],
        what: str,
        deadline: float,
        not_before: float = 0.0,
        *,
        tolerates_failures: bool = False,
    ) -> None:
        """Wait until `is_done` holds for every client, watching all of them.

        Raises `_EndOfWindow` when one fails (with `tolerates_failures`: when all have), when the
        deadline passes, or when somebody interrupts.
        """
        while True:
            for client in clients:
                client.poll()
            failed = [client for client in clients if client.has_failed]
            if failed and (len(failed) == len(clients) or not tolerates_failures):
                names = " and ".join(client.name for client in failed)
                raise _EndOfWindow(OUTCOME_FAILED, f"{names} failed")
            waiting = [client for client in clients if client not in failed and not is_done(client)]
            now = time.monotonic()
            if not waiting and now >= not_before:
                return
            if self._stop_signal.requested:
                raise _EndOfWindow(OUTCOME_INTERRUPTED, "interrupted")
            if now >= deadline:
                for client in waiting:
                    client.timed_out = True
                names = " and ".join(client.name for client in waiting)
                raise _EndOfWindow(
                    OUTCOME_TIMEOUT, f"{names} did not {what} within {self._timeouts.timeout:g} s"
                )
            time.sleep(self._timeouts.poll)

    # --- ending ---------------------------------------------------------------------------

    def _end(self, clients: list[Client]) -> None:
        """Stop everyone by the leash, then by SIGTERM, at last by SIGKILL; sweep what they left."""
        for client in clients:
            client.send("stop")
        for client in clients:
            client.close_stdin()
        patient_count = max(1, self._stop_signal.count)
        self._wait_for_end(
            clients, self._timeouts.stop, lambda: self._stop_signal.count > patient_count
        )
        for client in clients:
            if not client.has_ended:
                self._say(f"{client.name} does not stop: sending SIGTERM")
                client.terminated = True
                client.signal_process(signal.SIGTERM)
        self._wait_for_end(clients, self._timeouts.terminate)
        for client in clients:
            if not client.has_ended:
                self._say(f"{client.name} does not terminate: sending SIGKILL")
                client.signal_process(signal.SIGKILL)
        self._wait_for_end(clients, max(KILLED_SECONDS, self._timeouts.terminate))
        self._sweep(clients)

    def _wait_for_end(
        self,
        clients: list[Client],
        seconds: float,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        deadline = time.monotonic() + seconds
        while True:
            for client in clients:
                client.poll()
            if all(client.has_ended for client in clients):
                return
            if time.monotonic() >= deadline or give_up():
                return
            time.sleep(self._timeouts.poll)

    def _sweep(self, clients: list[Client]) -> None:
        """End helper processes that clients left in their sessions (data loaders, servers)."""
        left = [client for client in clients if client.signal_group(signal.SIGTERM)]
        deadline = time.monotonic() + min(5.0, self._timeouts.terminate)
        while left and time.monotonic() < deadline:
            left = [client for client in left if client.signal_group(0)]
            time.sleep(self._timeouts.poll)
        for client in left:
            client.signal_group(signal.SIGKILL)


def tail_of(path: Path, lines: int = STDERR_TAIL_LINES) -> list[str]:
    """Last lines of a text file, empty when there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 65536))
            content = stream.read()
    except OSError:
        return []
    return content.decode(errors="replace").splitlines()[-lines:]


def client_base_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of this process without what would decide a client's sharing mode.

    Inherited `CUDA_MPS_*` could attach a client to somebody's daemon, `CUDA_VISIBLE_DEVICES` could
    give it another GPU than the one that is watched.
    """
    return {
        name: value
        for name, value in inherited.items()
        if not name.startswith("CUDA_MPS_") and name != "CUDA_VISIBLE_DEVICES"
    }


def _client_outcome(
    client: Client, outcome: str, cpu_at_go: CpuReading | None, cpu_at_stop: CpuReading | None
) -> ClientResult:
    status, reason = _status(client, outcome)
    used = busiest = None
    if cpu_at_go is not None and cpu_at_stop is not None:
        used = cpu_at_stop.seconds_since(cpu_at_go)
        busiest = cpu_at_stop.busiest_thread_since(cpu_at_go)
    return ClientResult(
        planned=client.planned,
        status=status,
        reason=reason,
        events=client.events,
        identity=client.identity,
        exit_code=client.exit_code,
        stderr_tail=tail_of(client.paths.stderr),
        window_host_cpu_seconds=used,
        window_busiest_thread_seconds=busiest,
        cause=_cause(client) if status in (STATUS_FAILED, STATUS_OOM) else None,
        memory=_memory(client),
    )


def _cause(client: Client) -> str | None:
    """The client's word if it is one of the contract's, else what its exit code stands for."""
    told = client.error.get("cause") if client.error is not None else None
    return told if told in CAUSES else CAUSE_OF_EXIT_CODE.get(client.exit_code)


def _memory(client: Client) -> dict[str, Any] | None:
    told = client.error.get("memory") if client.error is not None else None
    return told if isinstance(told, dict) else None


def _status(client: Client, outcome: str) -> tuple[str, str | None]:
    """Status of a client that has ended, and why in words."""
    code = client.exit_code
    if client.start_failure is not None:
        return STATUS_FAILED, client.start_failure
    if client.refusal is not None:
        return STATUS_FAILED, client.refusal
    if client.error is not None:
        message = str(client.error.get("message") or "reported an error")
        return str(client.error.get("status") or STATUS_FAILED), message
    if code == EXIT_OUT_OF_MEMORY:
        return STATUS_OOM, "out of memory"
    if client.terminated:
        if outcome == OUTCOME_INTERRUPTED:
            return STATUS_KILLED, "did not stop when the run was interrupted"
        return STATUS_TIMEOUT, "did not stop when told to"
    if client.timed_out:
        return STATUS_TIMEOUT, "timed out"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        outside = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return (STATUS_KILLED if outside else STATUS_FAILED), f"ended by {name}"
    if code != 0:
        return STATUS_FAILED, f"exit code {code}"
    if last_event(client.events, "done") is None:
        return STATUS_FAILED, "exit code 0, but it never said `done`"
    if client.ended_early:
        return STATUS_FAILED, "exited prematurely"
    return STATUS_OK, None


def _settle_outcome(result: CoRunResult) -> None:
    """A client that failed only while ending still fails the co-run; reasons name the cause."""
    bad = [client for client in result.clients if client.status != STATUS_OK]
    if all(client.reason == result.reason for client in bad):
        return  # refused: the reason is everybody's
    if result.outcome == OUTCOME_OK and bad:
        only_slow = all(client.status == STATUS_TIMEOUT for client in bad)
        result.outcome = OUTCOME_TIMEOUT if only_slow else OUTCOME_FAILED
    if result.outcome in (OUTCOME_FAILED, OUTCOME_TIMEOUT):
        result.reason = (
            "; ".join(
                f"client {client.planned.client} ({client.planned.label}): "
                f"{client.kind_of_end}: {client.reason}"
                for client in bad
            )
            or result.reason
        )
