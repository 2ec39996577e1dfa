"""The load test's side of its worker processes: how many, their start, what they measured.

Nothing here or in a worker knows torch: the generator must leave the machine to the server that it
measures.
"""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.common.environment import usable_cores
from workloads.common.errors import JobFailedError
from workloads.inference.load_messages import (
    RECORD_FIELDS,
    Begin,
    Report,
    Stop,
    WorkerPlan,
)
from workloads.inference.load_schedule import split

if TYPE_CHECKING:
    import numpy as np

WORKER = Path(__file__).with_name("load_worker.py")
# One process sent 4,000 requests a second and more; a quarter of that keeps its clients punctual.
CLIENTS_PER_PROCESS = 16
RATE_PER_PROCESS = 1000.0
# Long enough for every process to have heard of the start before it comes.
START_LEAD_SECONDS = 0.02
END_SECONDS = 2.0


def default_processes(clients: int, rate: float | None) -> int:
    """Return how many processes the load needs, half the usable cores at most."""
    needed = math.ceil(clients / CLIENTS_PER_PROCESS)
    if rate is not None:
        needed = max(needed, math.ceil(rate / RATE_PER_PROCESS))
    return max(1, min(needed, usable_cores() // 2))


def split_plan(plan: WorkerPlan, processes: int, offsets: np.ndarray | None) -> list[WorkerPlan]:
    """Return each process's part of ``plan``.

    Args:
        plan: What all processes do together; its ``offsets`` are not looked at.
        processes: How many; no more are used than there are clients.
        offsets: Open loop: ascending seconds from the start to each send, float64; else None.
    """
    processes = min(processes, plan.clients)
    dealt = [None] * processes if offsets is None else split(offsets, processes)
    return [
        replace(
            plan,
            clients=_share(plan.clients, index, processes),
            threads=_share(plan.threads, index, processes),
            offsets=None if part is None else part.tobytes(),
        )
        for index, part in enumerate(dealt)
    ]


def _share(total: int, index: int, processes: int) -> int:
    return total // processes + (index < total % processes)


@dataclass
class Measured:
    """What one job brought, over all processes.

    Attributes:
        records: float64 arrays of shape (requests, 5), columns RECORD_FIELDS.
        failures: Failed requests by kind.
        cpu_seconds: Processor time of each process while it measured.
        connections_opened: Connections opened after the start.
    """

    records: list[np.ndarray] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    cpu_seconds: list[float] = field(default_factory=list)
    connections_opened: int = 0

    def snapshot(self) -> Measured:
        """Return a copy that does not grow."""
        return replace(
            self,
            records=list(self.records),
            failures=Counter(self.failures),
            cpu_seconds=list(self.cpu_seconds),
        )

    def since(self, earlier: Measured) -> Measured:
        """Return what has come after ``earlier``, a snapshot of this."""
        spent = zip(self.cpu_seconds, earlier.cpu_seconds, strict=True)
        return Measured(
            records=self.records[len(earlier.records) :],
            failures=self.failures - earlier.failures,
            cpu_seconds=[now - before for now, before in spent],
            connections_opened=self.connections_opened - earlier.connections_opened,
        )

    def table(self) -> np.ndarray:
        """Return all records, shape (requests, 5), by intended time."""
        import numpy as np

        if not self.records:
            return np.empty((0, len(RECORD_FIELDS)))
        table = np.concatenate(self.records)
        return table[np.argsort(table[:, 0], kind="stable")]


class LoadGenerator:
    """All clients, spread over worker processes."""

    def __init__(self, plans: list[WorkerPlan]) -> None:
        """Start a process for each plan; they warm up until ``begin``."""
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        try:
            for _ in plans:
                self._workers.append(_start_worker())
            # All interpreters start at the same time, and only then are they written to.
            for plan, (_, pipe) in zip(plans, self._workers, strict=True):
                pipe.send(plan)
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    def wait_until_prepared(self) -> None:
        """Block until every client has warmed up.

        Raises:
            JobFailedError: A process died.
        """
        for index in range(self.processes):
            self._receive(index)

    def begin(self) -> float:
        """Let every client send; return the agreed start on CLOCK_MONOTONIC."""
        self._busy = set(range(self.processes))
        self.measured = Measured(cpu_seconds=[0.0] * self.processes)
        start_seconds = time.monotonic() + START_LEAD_SECONDS
        for index in range(self.processes):
            self._send(index, Begin(start_seconds))
        return start_seconds

    @property
    def busy(self) -> bool:
        """Whether a process is still sending or waiting for answers."""
        return bool(self._busy)

    def collect(self, timeout_seconds: float) -> list[np.ndarray]:
        """Take what comes within ``timeout_seconds`` into ``measured``; return its records.

        Raises:
            JobFailedError: A process died.
        """
        indices = {self._workers[index][1]: index for index in self._busy}
        return [
            self._take(indices[pipe]) for pipe in wait(list(indices), max(0.0, timeout_seconds))
        ]

    def stop(self) -> list[np.ndarray]:
        """Give up the requests in flight, end the job, return the records not seen yet.

        Raises:
            JobFailedError: A process died.
        """
        for index in self._busy:
            self._send(index, Stop())
        rest = []
        while self._busy:
            rest += self.collect(END_SECONDS)
        return rest

    def close(self) -> None:
        """End the processes; may be called twice."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def _take(self, index: int) -> np.ndarray:
        import numpy as np

        report: Report = self._receive(index)
        records = np.frombuffer(report.records).reshape(-1, len(RECORD_FIELDS))
        self.measured.records.append(records)
        self.measured.failures.update(report.failures)
        self.measured.cpu_seconds[index] += report.cpu_seconds
        self.measured.connections_opened += report.connections_opened
        if report.last:
            self._busy.discard(index)
        return records

    def _receive(self, index: int) -> Any:
        try:
            return self._workers[index][1].recv()
        except (EOFError, ConnectionError) as error:
            raise self._died(index) from error

    def _send(self, index: int, message: object) -> None:
        try:
            self._workers[index][1].send(message)
        except ConnectionError as error:
            raise self._died(index) from error

    def _died(self, index: int) -> JobFailedError:
        code = self._workers[index][0].wait(END_SECONDS)
        return JobFailedError(
            f"process {index} of the load generator ended with code {code} in the middle of its "
            "work; look above for its message and run the test again"
        )


def _start_worker() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = multiprocessing.Pipe()
    # A session of its own: Ctrl-C in a terminal reaches the load test alone, which then closes the
    # pipe. The pipe is what ends a worker, also when the load test is killed.
    process = subprocess.Popen(
        (sys.executable, str(WORKER), str(theirs.fileno())),
        pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return process, ours
