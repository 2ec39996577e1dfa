"""The load generator: keep-alive clients in several processes, on aiohttp.

Each process runs ``serve`` and talks to the load test over a socket that is its standard input; it
ends as soon as that closes, however the load test ended. Neither end imports torch: the machine
belongs to the server that is measured.

Closed loop: a client sends when it has the answer to its last request. Open loop: connections take
the intended sends in turn and sleep until each is due, so that a late answer delays no other
request as long as a connection is free; when none is, the request waits, and its latency, counted
from the intended time, has the wait in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import itertools
import math
import multiprocessing
import os
import resource
import secrets
import select
import selectors
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import aiohttp

from workloads.common.device import usable_cores
from workloads.common.errors import JobFailedError, UsageError

if TYPE_CHECKING:
    import numpy as np

IMAGE_SIZE = 224
# A process offers several times as much (see README.md); a part of that keeps clients punctual.
CLIENTS_PER_PROCESS = 16
RATE_PER_PROCESS = 1000.0
# Files of a process that are no connection: its own socket, the event loop's, a resolver's.
OTHER_OPEN_FILES = 32
# Long enough for every process to have heard of the start before it comes.
START_LEAD_SECONDS = 0.02
REPORT_SECONDS = 0.25
END_SECONDS = 2.0
# Below what servers keep an idle connection for, so that they do not close one that we just use.
IDLE_CONNECTION_SECONDS = 5.0
# A refused or reset connection fails in microseconds; without a pause one dead server would fill
# the result with millions of failures.
PAUSE_AFTER_FAILURE_SECONDS = 0.05
NOT_SENT = "not sent in time"
# Failures of this machine, which say nothing about the server.
_OWN_FAILURES = {
    errno.EMFILE: "open files (ulimit -n)",
    errno.ENFILE: "open files",
    errno.EADDRNOTAVAIL: "local ports, as when a server closes every connection",
    errno.ENOBUFS: "network buffers",
    errno.ENOMEM: "memory",
}

# A record of one request: float64 seconds on CLOCK_MONOTONIC. `free` is when a client was free to
# send it, `sent` is NaN where it never was, `ok` is 1 for an answer with status 200, else 0.
RECORD_FIELDS = [(name, "f8") for name in ("intended", "free", "sent", "end", "ok")]


@dataclass(frozen=True)
class LoadPlan:
    """What the load generator, or one process of it, does in every job."""

    url: str  # of /predict, percent-encoded
    headers: dict[str, str]  # of every request
    bodies: list[bytes]  # distinct ones, sent in turn
    clients: int  # connections that are opened and warmed up before the start
    connections: int  # most requests in flight; a closed loop has one a client
    duration_seconds: float  # how long requests are sent for
    timeout_seconds: float = 30.0  # longest wait, for a connection or for an answer
    warm_up_requests: int = 2  # of each client before the start, not counted
    # Open loop: ascending float64 seconds from the start to each intended send.
    offsets: np.ndarray | array | None = None

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
                offsets=None
                if self.offsets is None
                else array("d", self.offsets[index::count].tobytes()),
            )
            for index in range(count)
        ]


@dataclass(frozen=True)
class Report:
    """What a process measured since its last report."""

    records: bytes  # of finished requests, one after another
    failures: Counter[str]  # failed requests by kind
    cpu_seconds: float
    connections_opened: int  # first ones, and closed ones again
    last: bool = False  # the job is over


@dataclass(frozen=True)
class Measured:
    """What was measured over all processes."""

    requests: np.ndarray  # structured, with RECORD_FIELDS, by intended time
    failures: Counter[str]  # failed requests by kind
    cpu_seconds: list[float]  # of each process
    connections_opened: int  # after the start


def default_processes(clients: int, rate: float | None) -> int:
    """Return how many processes the load needs, half the usable cores at most."""
    needed = math.ceil(clients / CLIENTS_PER_PROCESS)
    if rate is not None:
        needed = max(needed, math.ceil(rate / RATE_PER_PROCESS))
    return max(1, min(needed, usable_cores() // 2))


def encode_images(count: int, seed: int) -> list[bytes]:
    """Return ``count`` JPEG files of random 224x224 RGB noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def encode_bodies(images: list[bytes], upload: str) -> tuple[list[bytes], str]:
    """Return a request body for each JPEG, and their content type.

    Args:
        images: JPEG files.
        upload: ``multipart`` (field ``image``, as ``curl -F``) or ``raw`` (the JPEG as the body).
    """
    if upload == "raw":
        return images, "image/jpeg"
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    return [head + image + tail for image in images], f"multipart/form-data; boundary={boundary}"


def arrival_offsets(rate: float, arrival: str, duration_seconds: float, seed: int) -> np.ndarray:
    """Return when an open loop intends to send; drawn up front, so that no answer can delay it.

    Args:
        rate: Requests a second, on average.
        arrival: ``constant`` (request i at i / rate) or ``poisson`` (independent exponential gaps
            of mean 1 / rate, the first before the first request).
        duration_seconds: Sends are intended before this time only.
        seed: Fixes the gaps.

    Returns:
        Ascending float64 seconds after the start, possibly none.
    """
    import numpy as np

    if arrival == "constant":
        # 0.3 s at 10 a second are three requests, whichever way the product was rounded.
        return np.arange(math.ceil(round(rate * duration_seconds, 9))) / rate
    random = np.random.default_rng(seed)
    # Drawn a chunk at a time until past the end; one chunk nearly always does.
    chunk = int(rate * duration_seconds + 6 * math.sqrt(rate * duration_seconds)) + 16
    offsets = np.cumsum(random.exponential(1.0 / rate, chunk))
    while offsets[-1] < duration_seconds:
        more = offsets[-1] + np.cumsum(random.exponential(1.0 / rate, chunk))
        offsets = np.concatenate((offsets, more))
    return offsets[offsets < duration_seconds]


class LoadGenerator:
    """All clients, spread over processes.

    Attributes:
        busy: The processes, by number, that are still sending or waiting for answers.
        reports: What has come of the present job, each with its process's number.
    """

    def __init__(self, plan: LoadPlan, processes: int) -> None:
        """Start the processes; they open their connections and warm up until ``begin``.

        Raises:
            UsageError: This system does not give a process as many open files as it needs.
        """
        plans = plan.split(processes)
        _require_open_files(max(len(plans), *(part.connections for part in plans)))
        self._processes: list[tuple[subprocess.Popen, Connection]] = []
        self.reports: list[tuple[int, Report]] = []
        self.busy: set[int] = set()
        try:
            for _ in plans:
                self._processes.append(_start_process())
            # All interpreters start at the same time, and only then are they written to.
            for index, part in enumerate(plans):
                self._send(index, part)
        except OSError as error:
            self.close()
            raise UsageError(
                f"cannot start {len(plans)} processes of the load generator ({error}); use fewer "
                "--processes, or close other programs"
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return len(self._processes)

    def wait_until_prepared(self) -> None:
        """Block until every client has warmed up.

        Raises:
            JobFailedError, UsageError: A process died, or cannot go on.
        """
        for index in range(self.processes):
            self._receive(index)

    def begin(self) -> float:
        """Let every client send; return the agreed start on CLOCK_MONOTONIC."""
        self.busy = set(range(self.processes))
        self.reports = []
        start_seconds = time.monotonic() + START_LEAD_SECONDS
        for index in range(self.processes):
            self._send(index, start_seconds)
        return start_seconds

    def collect(self, timeout_seconds: float) -> list[np.ndarray]:
        """Return the records that come within ``timeout_seconds``, an array a report.

        Raises:
            JobFailedError, UsageError: A process died, or cannot go on.
        """
        indices = {self._processes[index][1]: index for index in self.busy}
        arrived = []
        for pipe in wait(list(indices), max(0.0, timeout_seconds)):
            index = indices[pipe]
            report = self._receive(index)
            self.reports.append((index, report))
            arrived.append(_records(report.records))
            if report.last:
                self.busy.discard(index)
        return arrived

    def stop(self) -> list[np.ndarray]:
        """Give up the requests in flight, end the job, return the records not seen yet.

        Raises:
            JobFailedError, UsageError: A process died, or cannot go on.
        """
        for index in self.busy:
            self._send(index, None)
        rest = []
        while self.busy:
            rest += self.collect(END_SECONDS)
        return rest

    def measured(self, since: int = 0) -> Measured:
        """Return what this job's reports hold, but for the first ``since`` of them."""
        import numpy as np

        reports = self.reports[since:]
        requests = _records(b"".join(report.records for _, report in reports))
        cpu_seconds = [0.0] * self.processes
        failures: Counter[str] = Counter()
        for index, report in reports:
            cpu_seconds[index] += report.cpu_seconds
            failures.update(report.failures)
        opened = sum(report.connections_opened for _, report in reports)
        order = np.argsort(requests["intended"], kind="stable")
        return Measured(requests[order], failures, cpu_seconds, opened)

    def close(self) -> None:
        """End the processes; may be called twice."""
        for _, pipe in self._processes:
            pipe.close()
        for process, _ in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []

    def _receive(self, index: int) -> Report:
        try:
            message = self._processes[index][1].recv()
        except (EOFError, ConnectionError) as error:
            raise self._died(index) from error
        if isinstance(message, str):
            raise UsageError(message)
        return message

    def _send(self, index: int, message: object) -> None:
        try:
            self._processes[index][1].send(message)
        except ConnectionError as error:
            raise self._died(index) from error

    def _died(self, index: int) -> JobFailedError:
        code = self._processes[index][0].wait(END_SECONDS)
        return JobFailedError(
            f"process {index} of the load generator ended with code {code} in the middle of its "
            "work; look above for its message and run the test again"
        )


def _records(content: bytes) -> np.ndarray:
    import numpy as np

    return np.frombuffer(content, dtype=RECORD_FIELDS)


def _require_open_files(connections: int) -> None:
    """Raise the soft limit of open files, which the processes inherit, as far as they need it."""
    needed = connections + OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UsageError(
                f"the load generator needs {needed} open files a process, and this system allows "
                f"{hard}; raise that limit (ulimit -Hn), use more --processes, or ask for fewer "
                "--clients or --max-connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _start_process() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = multiprocessing.Pipe()
    # Our own path, and so never the folder where somebody happens to have started us.
    program = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as it; it.serve()"
    # A session of its own: Ctrl-C in a terminal reaches the load test alone, which then closes
    # the pipe.
    process = subprocess.Popen(
        (sys.executable, "-c", program),
        stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return process, ours


class _PunctualSelector(selectors.EpollSelector):
    """Wakes up within a tenth of a millisecond of a timer; epoll rounds up to whole ones."""

    def select(self, timeout: float | None = None) -> list:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class _Clients:
    """The clients of one process: they send, it reports."""

    def __init__(self, plan: LoadPlan, pipe: Connection) -> None:
        self._plan = plan
        self._pipe = pipe
        self._messages: asyncio.Queue[float | None] = asyncio.Queue()
        self._records = array("d")
        self._failures: Counter[str] = Counter()
        self._connections_opened = 0
        self._cpu_seconds = 0.0

    async def serve(self) -> None:
        """Warm up, then run the jobs that the load test asks for until it goes."""
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._take_message)
        async with self._new_session() as self._session:
            await asyncio.gather(*map(self._warm_up, range(self._plan.clients)))
            await self._report(last=False)
            while True:
                start_seconds = await self._messages.get()
                if start_seconds is not None:  # else a stop that crossed the job's last report
                    await self._run_job(start_seconds)

    def _take_message(self) -> None:
        try:
            self._messages.put_nowait(self._pipe.recv())
        except (EOFError, ConnectionError):
            os._exit(0)  # nobody is left to report to

    def _new_session(self) -> aiohttp.ClientSession:
        async def count_connection(*_: object) -> None:
            self._connections_opened += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count_connection)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._plan.connections,
                keepalive_timeout=IDLE_CONNECTION_SECONDS,
                ttl_dns_cache=None,
            ),
            timeout=aiohttp.ClientTimeout(total=self._plan.timeout_seconds),
            headers={"User-Agent": "gpu-sharing-bench", "Accept": "application/json",
                     **self._plan.headers},
            skip_auto_headers=("Accept-Encoding",),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )  # fmt: skip

    async def _warm_up(self, client: int) -> None:
        for body in itertools.islice(self._bodies(client), self._plan.warm_up_requests):
            await self._post(body)

    async def _run_job(self, start_seconds: float) -> None:
        """Send for one job and report as it goes, until it is over or a stop comes."""
        sends = iter(range(len(self._plan.offsets or ())))
        clients = asyncio.gather(
            *(self._send_in_turn(start_seconds, client) for client in range(self._plan.clients))
            if self._plan.offsets is None
            else (self._send_when_due(start_seconds, sends) for _ in range(self._plan.connections))
        )
        stop = asyncio.ensure_future(self._messages.get())
        ended: set[asyncio.Future] = set()
        while not ended:
            ended, _ = await asyncio.wait(
                (clients, stop), timeout=REPORT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if clients in ended:
                clients.result()  # raises what ended a client
            elif ended:
                clients.cancel()
                await asyncio.wait((clients,))
            await self._report(last=bool(ended))
        stop.cancel()

    async def _send_in_turn(self, start_seconds: float, client: int) -> None:
        bodies = self._bodies(client)
        end_seconds = start_seconds + self._plan.duration_seconds
        await _sleep_until(start_seconds)
        while (sent := time.monotonic()) < end_seconds:
            failure = await self._post(next(bodies))
            self._record(sent, sent, sent, failure)
            if failure is not None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    async def _send_when_due(self, start_seconds: float, sends: Iterator[int]) -> None:
        plan = self._plan
        for index in sends:  # shared by all connections, so that none is sent twice
            intended = start_seconds + plan.offsets[index]
            free = time.monotonic()
            if free - intended > plan.timeout_seconds:
                self._record(intended, free, math.nan, NOT_SENT)
                continue
            await _sleep_until(intended)
            sent = time.monotonic()
            failure = await self._post(plan.bodies[index % len(plan.bodies)])
            self._record(intended, free, sent, failure)

    def _bodies(self, client: int) -> Iterator[bytes]:
        return itertools.islice(itertools.cycle(self._plan.bodies), client, None)

    async def _post(self, body: bytes) -> str | None:
        """Send one request; return None for status 200, else the kind of failure.

        Raises:
            UsageError: It failed for want of something on this machine.
        """
        try:
            async with self._session.post(
                self._plan.url, data=body, allow_redirects=False
            ) as response:
                await response.read()
                return None if response.status == 200 else f"HTTP {response.status}"
        except asyncio.TimeoutError:
            return "timeout"
        except (aiohttp.ClientError, OSError) as error:
            return _kind_of_failure(error)

    def _record(self, intended: float, free: float, sent: float, failure: str | None) -> None:
        self._records.extend((intended, free, sent, time.monotonic(), failure is None))
        if failure is not None:
            self._failures[failure] += 1

    async def _report(self, last: bool) -> None:
        cpu_seconds = time.process_time()
        report = Report(
            self._records.tobytes(), self._failures, cpu_seconds - self._cpu_seconds,
            self._connections_opened, last,
        )  # fmt: skip
        self._records, self._failures = array("d"), Counter()
        self._cpu_seconds, self._connections_opened = cpu_seconds, 0
        # On a thread: a load test that is slow to read delays no request.
        await asyncio.get_running_loop().run_in_executor(None, self._pipe.send, report)


def _kind_of_failure(error: aiohttp.ClientError | OSError) -> str:
    """Return the name of what went wrong.

    Raises:
        UsageError: It went wrong for want of something on this machine.
    """
    number = getattr(getattr(error, "os_error", error), "errno", None) or 0
    if number in _OWN_FAILURES:
        raise UsageError(
            "the load generator failed, not the server: this machine has none left of its "
            f"{_OWN_FAILURES[number]}; ask for fewer --clients or a lower --rate"
        ) from error
    # OSError makes itself the fitting subclass, such as ConnectionResetError, by its number.
    return type(OSError(number, "") if number > 0 else error).__name__


async def _sleep_until(seconds: float) -> None:
    await asyncio.sleep(max(0.0, seconds - time.monotonic()))


def serve() -> None:
    """Be one process of the load generator, until the load test goes."""
    pipe = Connection(os.dup(sys.stdin.fileno()))
    # That the load test goes in the middle of a report is no error.
    with contextlib.suppress(EOFError, ConnectionError):
        plan: LoadPlan = pipe.recv()
        loop = asyncio.SelectorEventLoop(_PunctualSelector())
        loop.set_debug(False)  # an inherited PYTHONASYNCIODEBUG would take the speed
        try:
            loop.run_until_complete(_Clients(plan, pipe).serve())
        except UsageError as error:
            pipe.send(str(error))
    os._exit(0)  # not waiting for requests in flight
