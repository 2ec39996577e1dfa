"""Runs the clients of one co-run: start, warm up one at a time, go together, stop, leave nothing.

Each client is a process in a session of its own, with standard input as its control channel: the
commands `warm`, `go` and `stop`, and end-of-file when this process dies (`client`). What they say
comes from their event files (`event_log`). A baseline is a co-run of one.

A client is never killed with work in flight if it can be helped: first `stop`, then SIGTERM, and
SIGKILL only after another grace, since killing an MPS client hard may harm its neighbors.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarking.cli import SuiteError
from benchmarking.hardware.host_cpu import read_process_trees, signal_sessions
from benchmarking.measuring.client import Client, ClientResult
from benchmarking.measuring.event_log import last_event
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.plan import PlannedCoRun
from benchmarking.records.run_folder import ClientPaths
from benchmarking.records.types import CoRunStatus
from benchmarking.records.writing import first_of

# A killed process ends when the kernel gets to it: in the driver, or on a busy machine, later.
KILLED_SECONDS = 10.0
# How long everyone goes on past the window, as a part of the time to settle before it.
TAIL_PART = 1 / 3


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
    """When the counting window opens, and when it may close: for all clients at once.

    It opens `settle_seconds` after go. With `window_seconds` it lasts so long, and on until every
    client has done `min_units` units, but never past `longest_seconds`. Without, it lasts
    `min_seconds` and as long as a job of the slowest client takes; with `needs_whole_job`, until a
    whole job of every client lies in it, so that it holds every kind of unit.
    """

    min_seconds: float
    settle_seconds: float = 0.0
    needs_whole_job: bool = False
    window_seconds: float | None = None
    longest_seconds: float = math.inf
    min_units: int = 10
    # Whether a client that fails is left behind, instead of ending the window.
    tolerates_failures: bool = False

    def is_done(self, client: Client, window_seconds: float) -> bool:
        """Whether this client has done enough in a window of that length so far."""
        if self.window_seconds is not None:
            return client.units >= self.min_units or window_seconds >= self.longest_seconds
        if self.needs_whole_job:
            return client.whole_jobs > 0
        return any(seconds <= window_seconds for seconds in client.job_seconds)

    @property
    def seconds(self) -> float:
        """Least length of the window."""
        return self.min_seconds if self.window_seconds is None else self.window_seconds


@dataclass
class CoRunResult:
    """What was seen of a co-run; times on CLOCK_MONOTONIC, `None` where it did not get so far."""

    planned: PlannedCoRun
    outcome: CoRunStatus
    reason: str | None
    clients: Sequence[ClientResult] = ()
    ready_seconds: float | None = None
    settle_seconds: float = 0.0
    window_start_seconds: float | None = None
    window_end_seconds: float | None = None
    go_skew_ms: float | None = None
    refusal: SuiteError | None = None


class _EndOfWindow(Exception):
    """The co-run ends before everyone was done."""

    def __init__(self, outcome: CoRunStatus, reason: str) -> None:
        super().__init__(reason)
        self.outcome: CoRunStatus = outcome


@dataclass(frozen=True)
class Launcher:
    """Runs one co-run after another with the same timeouts; `say` gets a line now and then."""

    base_environment: Mapping[str, str]
    timeouts: Timeouts = Timeouts()
    stop_signal: StopSignal = field(default_factory=StopSignal)
    say: Callable[[str], None] = lambda text: None

    def run(
        self,
        planned: PlannedCoRun,
        paths_of: Callable[[str, int], ClientPaths],
        rule: FinishRule,
        before_go: Callable[[list[Client]], None] = lambda clients: None,
    ) -> CoRunResult:
        """Run the clients of `planned` until `rule` is met by all, and leave no process behind.

        `before_go` is called once, when every client is ready and idle; a `SuiteError` of it
        becomes the result's `refusal` and makes the co-run and its clients failed, whatever else
        it raises is passed on. Failure, timeout and interruption are outcomes, not exceptions.
        """
        clients = [
            Client(one, paths=paths_of(planned.co_run, one.client)) for one in planned.clients
        ]
        result = CoRunResult(planned, "ok", None, clients)
        try:
            self._get_ready(planned, clients)
            result.ready_seconds = time.monotonic()
            before_go(clients)
            self._measure(result, clients, rule)
        except _EndOfWindow as end:
            result.outcome, result.reason = end.outcome, str(end)
        except SuiteError as refusal:
            result.outcome, result.reason, result.refusal = "failed", str(refusal), refusal
            for client in clients:
                client.failure = ("failed", str(refusal))
        finally:
            self._end(clients)
        for client in clients:
            client.settle(result.outcome)
        _settle_outcome(result)
        return result

    def _get_ready(self, planned: PlannedCoRun, clients: list[Client]) -> None:
        """Load in parallel, then warm up one at a time, so that nobody tunes beside a neighbor."""
        deadline = time.monotonic() + self.timeouts.timeout
        for client in clients:
            client.start(planned.command_of(client.planned), self.base_environment)
        self._wait(clients, lambda client: client.is_loaded, "load", deadline)
        warmed: list[Client] = []
        for client in clients:
            client.send("warm")
            warmed.append(client)
            self._wait(
                clients, lambda one: one.identity is not None or one not in warmed, "get ready",
                deadline,
            )  # fmt: skip

    def _measure(self, result: CoRunResult, clients: list[Client], rule: FinishRule) -> None:
        """Let everyone go at once, let them settle, and count until all have done enough."""
        # Where a client fails before the window opens, the time since go is on record.
        start = result.window_start_seconds = time.monotonic()
        result.settle_seconds = rule.settle_seconds
        for client in clients:
            client.window_start_seconds = start + rule.settle_seconds
        go_seconds = [client.send("go") for client in clients]
        result.go_skew_ms = 1000 * (go_seconds[-1] - go_seconds[0])
        try:
            self._let_run(clients, start + rule.settle_seconds, rule)
            self._count(result, clients, rule, start + rule.settle_seconds)
        finally:
            result.window_end_seconds = result.window_end_seconds or time.monotonic()
        # Units that are in hand at the end shall come to theirs next to the same neighbors.
        tail_seconds = TAIL_PART * rule.settle_seconds
        self._let_run(clients, result.window_end_seconds + tail_seconds, rule)

    def _let_run(self, clients: list[Client], until_seconds: float, rule: FinishRule) -> None:
        self._wait(
            clients, lambda client: True, "run", math.inf, until_seconds,
            tolerates_failures=rule.tolerates_failures,
        )  # fmt: skip

    def _count(
        self, result: CoRunResult, clients: list[Client], rule: FinishRule, opening: float
    ) -> None:
        """Keep the window open from `opening` on until everyone has done enough."""
        pids = [client.pid for client in clients]
        cpu_at_start = read_process_trees(pids)
        result.window_start_seconds = opening
        try:
            self._wait(
                clients, lambda client: rule.is_done(client, time.monotonic() - opening), "finish",
                opening + max(self.timeouts.timeout, rule.seconds), opening + rule.seconds,
                tolerates_failures=rule.tolerates_failures,
            )  # fmt: skip
        finally:
            result.window_end_seconds = time.monotonic()
            seconds = result.window_end_seconds - opening
            cpu_at_end = read_process_trees(pids)
            for client, before, after in zip(clients, cpu_at_start, cpu_at_end, strict=True):
                if before is not None and after is not None and seconds > 0:
                    client.window_host_cpu_fraction = after.seconds_since(before) / seconds
                    client.busiest_thread_cpu_fraction = after.busiest_since(before) / seconds
                    client.cpu_wait_fraction = after.longest_wait_since(before) / seconds

    def _wait(
        self, clients: list[Client], is_done: Callable[[Client], bool], what: str, deadline: float,
        not_before: float = 0.0, *, tolerates_failures: bool = False,
    ) -> None:  # fmt: skip
        """Wait until `is_done` holds for every client, watching all of them.

        Raises `_EndOfWindow` when one fails (with `tolerates_failures`: when all have), when the
        deadline passes, or when somebody interrupts.
        """
        while True:
            for client in clients:
                client.poll()
            failed = [client for client in clients if client.has_failed]
            if failed and (len(failed) == len(clients) or not tolerates_failures):
                raise _EndOfWindow("failed", f"{_names(failed)} failed")
            waiting = [client for client in clients if client not in failed and not is_done(client)]
            now = time.monotonic()
            if not waiting and now >= not_before:
                return
            if self.stop_signal.requested:
                raise _EndOfWindow("interrupted", "interrupted")
            if now >= deadline:
                said = f"did not {what} within {self.timeouts.timeout:g} s"
                for client in waiting:
                    client.timed_out = f"{said} (benchmark_suite.py --timeout allows more)"
                raise _EndOfWindow("timeout", f"{_names(waiting)} {said}")
            time.sleep(self.timeouts.poll)

    def _end(self, clients: list[Client]) -> None:
        """Stop everyone by command, then by SIGTERM, at last by SIGKILL; sweep what they left."""
        started = [client for client in clients if client.process is not None]
        for client in started:
            client.send("stop")
        asked = max(1, self.stop_signal.count)
        self._wait_for_end(started, self.timeouts.stop, lambda: self.stop_signal.count > asked)
        for number, what, seconds in (
            (signal.SIGTERM, "stop", self.timeouts.terminate),
            (signal.SIGKILL, "terminate", max(KILLED_SECONDS, self.timeouts.terminate)),
        ):
            for client in started:
                if client.process is not None and client.exit_code is None:
                    self.say(f"{client.name} does not {what}: sending {number.name}")
                    client.was_signaled = True
                    client.process.send_signal(number)
            self._wait_for_end(started, seconds)
        # Helper processes that clients left in their sessions: data loaders, servers.
        sessions = [client.pid for client in clients if client.pid is not None]
        left = signal_sessions(sessions, signal.SIGTERM)
        psutil.wait_procs(left, min(5.0, self.timeouts.terminate))
        signal_sessions(sessions, signal.SIGKILL)

    def _wait_for_end(
        self, clients: list[Client], seconds: float, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        deadline = time.monotonic() + seconds
        while True:
            for client in clients:
                client.poll()
            is_over = time.monotonic() >= deadline or give_up()
            if is_over or all(client.exit_code is not None for client in clients):
                return
            time.sleep(self.timeouts.poll)


def _names(clients: Sequence[Client]) -> str:
    return first_of([client.name for client in clients], " and ")


def _failed_seconds(client: ClientResult) -> float:
    return (last_event(client.events, "error") or {}).get("time_seconds") or math.inf


def _settle_outcome(result: CoRunResult) -> None:
    """A client that failed only while ending still fails the co-run; reasons name the cause."""
    bad = [client for client in result.clients if client.status != "ok"]
    if all(client.reason == result.reason for client in bad):
        return  # refused: the reason is everybody's
    if result.outcome == "ok":
        only_slow = all(client.status == "timeout" for client in bad)
        result.outcome = "timeout" if only_slow else "failed"
    if result.outcome in ("failed", "timeout"):
        reasons = []
        for client in sorted(bad, key=_failed_seconds):  # it may have taken the others along
            told = client.cause if client.status == "failed" else None
            kind = told.replace("_", " ") if told else client.status
            reasons.append(f"{client.name}: {kind}: {client.reason}")
        result.reason = first_of(reasons)
