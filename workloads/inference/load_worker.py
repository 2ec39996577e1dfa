"""One process of the load test: keep-alive clients, a thread each, driven over a pipe.

Started as a program with the descriptor of its pipe, because a fresh interpreter that imports only
what it needs is ready in a tenth of a second. It lives as long as the other end of the pipe.

Closed loop: a client sends when it has the answer to its last request. Open loop: the threads take
the intended sends in turn and sleep until each is due, so that an answer that is late delays no
other request as long as a thread is free; when none is, the request waits and its latency, counted
from the intended time, has the wait in it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.inference.http_connection import KeepAliveConnection
from workloads.inference.inherited import descriptors
from workloads.inference.load_messages import Begin, Prepared, Report, Stop, WorkerPlan

REPORT_SECONDS = 0.25
# How often a worker looks whether its threads are through, where nothing wakes it.
FINISH_PROBE_SECONDS = 0.01
# A refused or reset connection fails in microseconds; without a pause one dead server would fill
# the result with millions of failures and a core with nothing.
PAUSE_AFTER_FAILURE_SECONDS = 0.05
NOT_SENT = "not sent in time"


class Tally:
    """What the threads have measured and nobody has taken yet."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._lock = threading.Lock()
        self._records = array("d")
        self._failures: Counter[str] = Counter()

    def add(
        self, intended: float, free: float, sent: float, end: float, failure: str | None
    ) -> None:
        """Record one request; ``failure`` is None where it succeeded."""
        with self._lock:
            self._records.extend((intended, free, sent, end, failure is None))
            if failure is not None:
                self._failures[failure] += 1

    def take(self) -> Report:
        """Return what has come together since the last call."""
        with self._lock:
            records, self._records = self._records, array("d")
            failures, self._failures = self._failures, Counter()
        return Report(records.tobytes(), dict(failures))


class Clients:
    """The connections of one process and the two ways of sending over them."""

    def __init__(self, plan: WorkerPlan) -> None:
        """Prepare connections; none is opened yet."""
        self._plan = plan
        self._connections = [self._new_connection() for _ in range(plan.clients)]
        # Open loop: idle connections, the last one used on top, so that as few as needed are open.
        self._idle = list(self._connections)
        self._offsets = array("d")
        if plan.offsets is not None:
            self._offsets.frombytes(plan.offsets)
        self.tally = Tally()
        self.stopped = False

    def warm_up(self) -> list[threading.Thread]:
        """Start sending the uncounted requests over every connection."""
        return [
            _start(self._warm_up, connection, number)
            for number, connection in enumerate(self._connections)
        ]

    def begin(self, start_seconds: float) -> list[threading.Thread]:
        """Start the threads of one job."""
        if self._plan.offsets is None:
            return [
                _start(self._send_in_turn, start_seconds, connection, number)
                for number, connection in enumerate(self._connections)
            ]
        self._claims = iter(range(len(self._offsets)))
        return [_start(self._send_as_intended, start_seconds) for _ in range(self._plan.threads)]

    def connections_opened(self) -> int:
        """Return how many connections have been opened so far."""
        return sum(connection.opened for connection in list(self._connections))

    def _new_connection(self) -> KeepAliveConnection:
        return KeepAliveConnection(self._plan.url, self._plan.timeout_seconds)

    def _warm_up(self, connection: KeepAliveConnection, number: int) -> None:
        requests = itertools.cycle(self._plan.requests)
        for request in itertools.islice(requests, number, number + self._plan.warm_up_requests):
            connection.exchange(request)

    def _send_in_turn(
        self, start_seconds: float, connection: KeepAliveConnection, number: int
    ) -> None:
        plan, add = self._plan, self.tally.add
        requests = itertools.islice(itertools.cycle(plan.requests), number, None)
        end_seconds = start_seconds + plan.duration_seconds
        _sleep_until(start_seconds)
        while not self.stopped and (sent := time.monotonic()) < end_seconds:
            failure = connection.exchange(next(requests))
            add(sent, sent, sent, time.monotonic(), failure)
            if failure is not None:
                time.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    def _send_as_intended(self, start_seconds: float) -> None:
        plan, add = self._plan, self.tally.add
        # One iterator for all threads: taking the next number is atomic, so none is sent twice.
        for index in self._claims:
            if self.stopped:
                break
            intended = start_seconds + self._offsets[index]
            free = time.monotonic()
            if free - intended > plan.timeout_seconds:
                add(intended, free, math.nan, free, NOT_SENT)
                continue
            _sleep_until(intended)
            connection = self._take_idle()
            sent = time.monotonic()
            failure = connection.exchange(plan.requests[index % len(plan.requests)])
            add(intended, free, sent, time.monotonic(), failure)
            self._idle.append(connection)

    def _take_idle(self) -> KeepAliveConnection:
        try:
            return self._idle.pop()
        except IndexError:
            connection = self._new_connection()
            self._connections.append(connection)
            return connection


def serve(pipe: Connection) -> None:
    """Obey the load test until it says stop.

    Raises:
        EOFError: The load test has gone.
    """
    plan: WorkerPlan = pipe.recv()
    clients = Clients(plan)
    _wait_for(clients.warm_up(), pipe)
    pipe.send(Prepared())
    while isinstance(message := pipe.recv(), Begin) and _run_job(
        clients, plan, message.start_seconds, pipe
    ):
        pass


def _run_job(clients: Clients, plan: WorkerPlan, start_seconds: float, pipe: Connection) -> bool:
    """Send for one job and report as it goes; return False if it was stopped."""
    cpu_seconds, opened = time.process_time(), clients.connections_opened()
    threads = clients.begin(start_seconds)
    end_seconds = start_seconds + plan.duration_seconds
    reported_seconds = start_seconds
    while True:
        until_end = end_seconds - time.monotonic()
        pause = min(REPORT_SECONDS, until_end) if until_end > 0 else FINISH_PROBE_SECONDS
        stopped = pipe.poll(pause) and isinstance(pipe.recv(), Stop)
        # Before the last report is taken: what is sent after it would be in no report.
        clients.stopped = stopped
        last = stopped or not any(thread.is_alive() for thread in threads)
        now = time.monotonic()
        if not last and now - reported_seconds < REPORT_SECONDS:
            continue
        reported_seconds = now
        report = clients.tally.take()
        report.cpu_seconds, cpu_seconds = time.process_time() - cpu_seconds, time.process_time()
        total = clients.connections_opened()
        report.connections_opened, opened = total - opened, total
        report.last = last
        pipe.send(report)
        if last:
            return not stopped


def _wait_for(threads: list[threading.Thread], pipe: Connection) -> None:
    """Wait for ``threads``, unless the load test goes or says stop in the meantime."""
    while any(thread.is_alive() for thread in threads):
        if pipe.poll(FINISH_PROBE_SECONDS) and isinstance(pipe.recv(), Stop):
            raise EOFError


def _sleep_until(seconds: float) -> None:
    if (remaining := seconds - time.monotonic()) > 0:
        time.sleep(remaining)


def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def main() -> None:
    """Serve the pipe named on the command line; end without waiting for requests in flight."""
    (pipe,) = descriptors(sys.argv[1:], 1, "workloads/inference/load_test.py")
    # When the load test closes its end or dies, nobody is left to report to.
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(pipe))
    os._exit(0)


if __name__ == "__main__":
    main()
