"""The load generator: keep-alive clients in several processes, on aiohttp.

A generator runs once. Each process runs ``serve`` and talks to the load test over a socket that is
its standard input: it gets its plan, then the start, then at most a stop, and ends as soon as the
socket closes, however the load test ended. Neither end imports torch: the machine belongs to the
server that is measured.

Clients take the next intended send in turn and sleep until it is due. In a closed loop one is due
as soon as a client asks for it. In an open loop a late answer delays no other request as long as a
client is free; when none is, the request waits, and its latency, counted from the intended time,
has the wait in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import math
import multiprocessing
import os
import resource
import select
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import aiohttp

from workloads.common.device import usable_cores
from workloads.common.errors import JobFailedError, UsageError

if TYPE_CHECKING:
    import numpy as np

# A process offers several times as much (docs/serving.md); a part of that keeps clients punctual.
CLIENTS_PER_PROCESS, RATE_PER_PROCESS = 16, 1000.0
# Files of a process that are no connection: its own socket, the event loop's, a resolver's.
OTHER_OPEN_FILES = 32
# Long enough for every process to have heard of the start before it comes.
START_LEAD_SECONDS = 0.02
REPORT_SECONDS, END_SECONDS = 0.25, 2.0
# Below what servers keep an idle connection for, so that they do not close one that we just use.
IDLE_CONNECTION_SECONDS = 5.0
# A refused or reset connection fails in microseconds; without a pause one dead server would fill
# the result with millions of failures.
PAUSE_AFTER_FAILURE_SECONDS = 0.05
NOT_SENT = "not sent in time"
# Failures of this machine, which say nothing about the server.
OWN_FAILURES = {
    errno.EMFILE: "open files (ulimit -n)",
    errno.ENFILE: "open files",
    errno.EADDRNOTAVAIL: "local ports, as when a server closes every connection",
    errno.ENOBUFS: "network buffers",
    errno.ENOMEM: "memory",
}
# Of one request: seconds on CLOCK_MONOTONIC, and the kind of failure, empty for status 200. `free`
# is when a client was free to send it, `sent` is NaN where it never was.
RECORD_FIELDS = [*((name, "f8") for name in ("intended", "free", "sent", "end")), ("failure", "O")]


@dataclass(frozen=True)
class LoadPlan:
    """What the load generator, or one process of it, does."""

    url: str  # of /predict, percent-encoded
    headers: dict[str, str]  # of every request
    bodies: list[bytes]  # distinct ones, sent in turn
    clients: int  # connections that are opened and warmed up before the start
    connections: int  # most requests in flight; a closed loop has one a client
    duration_seconds: float  # how long requests are sent for
    timeout_seconds: float = 30.0  # longest wait, for a connection or for an answer
    warm_up_requests: int = 2  # of each client before the start, not counted
    # Open loop: ascending seconds from the start to each intended send.
    offsets: list[float] | None = None

    def split(self, processes: int) -> list[LoadPlan]:
        """Return each process's part; no more processes are used than there are clients.

        Intended sends are dealt out in turn, so that each has its even share at any time.
        """
        count = min(processes, self.clients)
        return [
            replace(
                self,
                clients=len(range(index, self.clients, count)),
                connections=len(range(index, self.connections, count)),
                offsets=self.offsets and self.offsets[index::count],
            )
            for index in range(count)
        ]


@dataclass(frozen=True)
class Measured:
    """What one process has measured since its last report, or all have in a run."""

    requests: np.ndarray  # finished ones, structured, with RECORD_FIELDS
    cpu_seconds: Sequence[float]  # of each process
    connections_opened: int  # after the start: first ones, and closed ones again

    @staticmethod
    def together(reports: Sequence[Measured]) -> Measured:
        """Join at least one report; the requests are by intended time."""
        import numpy as np

        requests = np.concatenate([report.requests for report in reports])
        cpu_seconds = np.sum([report.cpu_seconds for report in reports], axis=0).tolist()
        opened = sum(report.connections_opened for report in reports)
        return Measured(requests[np.argsort(requests["intended"])], cpu_seconds, opened)


def default_processes(clients: int, rate: float | None) -> int:
    """Return how many processes the load needs, half the usable cores at most."""
    needed = math.ceil(max(clients / CLIENTS_PER_PROCESS, (rate or 0.0) / RATE_PER_PROCESS))
    return max(1, min(needed, usable_cores() // 2))


class LoadGenerator:
    """All clients, spread over processes, for one run.

    What waits for the processes raises JobFailedError where one died, and UsageError where this
    machine lacks what one needs.
    """

    def __init__(self, plan: LoadPlan, processes: int) -> None:
        """Start the processes; they open their connections and warm up until ``begin``.

        Raises:
            UsageError: This system does not give a process as many open files as it needs.
        """
        plans = plan.split(processes)
        _require_open_files(max(len(plans), *(part.connections for part in plans)))
        self.reports: list[Measured] = []  # what has come so far
        self.running: dict[Any, int] = {}  # pipes of those that still send or wait: their places
        try:
            self._processes = [_start_process() for _ in plans]
        except OSError as error:  # those that have started end with their sockets
            raise UsageError(
                f"cannot start {len(plans)} processes of the load generator ({error}); use fewer "
                "--processes, or close other programs"
            ) from error
        # All interpreters start at the same time, and only then are they written to.
        for (_, pipe), part in zip(self._processes, plans, strict=True):
            _send(pipe, part)

    def wait_until_prepared(self) -> None:
        """Block until every client has warmed up."""
        for index in range(len(self._processes)):
            self._receive(index)

    def begin(self) -> float:
        """Let every client send; return the agreed start on CLOCK_MONOTONIC."""
        start_seconds = time.monotonic() + START_LEAD_SECONDS
        for index, (_, pipe) in enumerate(self._processes):
            self.running[pipe] = index
            _send(pipe, start_seconds)
        return start_seconds

    def collect(self, timeout_seconds: float) -> list[Measured]:
        """Return the reports that come within ``timeout_seconds``."""
        arrived = []
        for pipe in wait(list(self.running), timeout_seconds):
            if report := self._receive(self.running[pipe]):
                arrived.append(report)
            else:
                del self.running[pipe]
        self.reports += arrived
        return arrived

    def stop(self) -> list[Measured]:
        """Give up the requests in flight, end the run, return the reports not seen yet."""
        first = len(self.reports)
        for pipe in self.running:
            _send(pipe, None)
        while self.running:
            self.collect(END_SECONDS)
        return self.reports[first:]

    def close(self) -> None:
        """End the processes; may be called twice."""
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.wait()

    def _receive(self, index: int) -> Measured | None:
        """Return the next report of a process; None where it has ended as it should."""
        import numpy as np

        process, pipe = self._processes[index]
        try:
            message = pipe.recv()
        except (EOFError, OSError) as error:
            code = process.wait(END_SECONDS)
            if code == 0:
                return None
            raise JobFailedError(
                f"process {index} of the load generator ended with code {code} in the middle of "
                "its work; look above for its message and run the test again"
            ) from error
        if isinstance(message, str):
            raise UsageError(message)
        records, cpu_seconds, connections_opened = message
        of_each = [cpu_seconds * (index == place) for place in range(len(self._processes))]
        return Measured(np.array(records, RECORD_FIELDS), of_each, connections_opened)


def _require_open_files(connections: int) -> None:
    """Raise the soft limit of open files, which the processes inherit, as far as they need it."""
    needed = connections + OTHER_OPEN_FILES
    # RLIM_INFINITY is -1.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:
        if 0 <= hard < needed:
            raise UsageError(
                f"the load generator needs {needed} open files a process, and this system allows "
                f"{hard}; raise that limit (ulimit -Hn), use more --processes, or ask for fewer "
                "--clients or --max-connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _start_process() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = multiprocessing.Pipe()
    # Our own path, and so never the folder where somebody happens to have started us, which
    # multiprocessing would look into for itself.
    program = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as it; it.serve()"
    # A session of its own: Ctrl-C in a terminal reaches the load test alone, which then closes
    # the pipe.
    process = subprocess.Popen(
        (sys.executable, "-c", program),
        stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return process, ours


def _send(pipe: Connection, message: object) -> None:
    # That the other end has gone is found where its messages are received.
    with contextlib.suppress(ConnectionError):
        pipe.send(message)


# --- in a process of the generator ----------------------------------------------------------------


class PunctualSelector(selectors.EpollSelector):
    """Wakes up within a tenth of a millisecond of a timer; epoll rounds up to whole ones."""

    def select(self, timeout: float | None = None) -> list:
        """Wait for a file or the time to come; as the selectors' own."""
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class _Clients:
    """The clients of one process: they send, it reports."""

    def __init__(self, plan: LoadPlan, pipe: Connection) -> None:
        self._plan, self._pipe = plan, pipe
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._bodies = itertools.cycle(plan.bodies)
        self._records: list[tuple[float, float, float, float, str]] = []
        self._cpu_seconds, self._connections_opened = 0.0, 0

    async def run(self) -> None:
        """Warm up, send from the start on, report all along, until it is over or a stop comes."""
        plan = self._plan
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._take_message)
        async with self._new_session() as self._session:
            await asyncio.gather(*(self._warm_up() for _ in range(plan.clients)))
            await self._report()
            sends = self._sends(start_seconds=await self._messages.get())
            sending = asyncio.gather(*(self._send(sends) for _ in range(plan.connections)))
            stop = asyncio.ensure_future(self._messages.get())
            stop.add_done_callback(lambda _: sending.cancel())
            done: set[asyncio.Future] = set()
            while not done:  # looked at before the report, which then holds all that was sent
                done, _ = await asyncio.wait((sending,), timeout=REPORT_SECONDS)
                await self._report()
            with contextlib.suppress(asyncio.CancelledError):  # a stop
                sending.result()  # raises what else ended a client

    def _take_message(self) -> None:
        try:
            self._messages.put_nowait(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # nobody is left to report to

    def _new_session(self) -> aiohttp.ClientSession:
        async def count_connection(*_: object) -> None:
            self._connections_opened += 1

        plan, trace = self._plan, aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count_connection)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=plan.connections,
                keepalive_timeout=IDLE_CONNECTION_SECONDS,
                ttl_dns_cache=None,
            ),
            timeout=aiohttp.ClientTimeout(total=plan.timeout_seconds),
            headers={"User-Agent": "gpu-sharing-bench", **plan.headers},
            skip_auto_headers=("Accept-Encoding",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trace_configs=[trace],
        )

    async def _warm_up(self) -> None:
        for _ in range(self._plan.warm_up_requests):
            await self._post()

    def _sends(self, start_seconds: float) -> Iterator[float]:
        """Yield when each request is due; in a closed loop that is when a client asks for it."""
        plan = self._plan
        if plan.offsets is not None:
            yield from (start_seconds + offset for offset in plan.offsets)
            return
        while (now := time.monotonic()) < start_seconds + plan.duration_seconds:
            yield max(start_seconds, now)

    async def _send(self, sends: Iterator[float]) -> None:
        plan = self._plan
        for intended in sends:  # shared by all clients, so that none is sent twice
            free = time.monotonic()
            if free - intended > plan.timeout_seconds:
                self._records.append((intended, free, math.nan, free, NOT_SENT))
                continue
            if free < intended:
                await asyncio.sleep(intended - free)
            sent = time.monotonic()
            failure = await self._post()
            self._records.append((intended, free, sent, time.monotonic(), failure))
            if failure and plan.offsets is None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    async def _post(self) -> str:
        """Send one request; return the kind of failure, empty for status 200.

        Raises:
            UsageError: It failed for want of something on this machine.
        """
        try:
            async with self._session.post(
                self._plan.url, data=next(self._bodies), allow_redirects=False
            ) as response:
                async for _ in response.content.iter_any():
                    pass  # an answer without end is to fill no memory until the timeout
                return "" if response.status == 200 else f"HTTP {response.status}"
        except asyncio.TimeoutError:
            return "timeout"
        except (aiohttp.ClientError, OSError) as error:
            return kind_of_failure(error)

    async def _report(self) -> None:
        cpu_seconds = time.process_time()
        report = (self._records, cpu_seconds - self._cpu_seconds, self._connections_opened)
        self._records, self._cpu_seconds, self._connections_opened = [], cpu_seconds, 0
        # On a thread: a load test that is slow to read delays no request.
        await asyncio.get_running_loop().run_in_executor(None, _send, self._pipe, report)


def kind_of_failure(error: aiohttp.ClientError | OSError) -> str:
    """Return the name of what went wrong.

    Raises:
        UsageError: It went wrong for want of something on this machine.
    """
    number = getattr(getattr(error, "os_error", error), "errno", None) or 0
    if number in OWN_FAILURES:
        raise UsageError(
            "the load generator failed, not the server: this machine has none left of its "
            f"{OWN_FAILURES[number]}; ask for fewer --clients or a lower --rate"
        ) from error
    # OSError makes itself the fitting subclass, such as ConnectionResetError, by its number.
    return type(OSError(number, "") if number > 0 else error).__name__


def serve() -> None:
    """Be one process of the load generator."""
    pipe = Connection(os.dup(sys.stdin.fileno()))
    try:
        plan: LoadPlan = pipe.recv()
    except (EOFError, OSError):  # the load test has gone, maybe in the middle of it
        os._exit(0)
    loop = asyncio.SelectorEventLoop(PunctualSelector())
    loop.set_debug(False)  # an inherited PYTHONASYNCIODEBUG would take the speed
    try:
        loop.run_until_complete(_Clients(plan, pipe).run())
    except UsageError as error:
        _send(pipe, str(error))
    os._exit(0)  # not waiting for requests in flight
