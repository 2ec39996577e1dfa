"""Processes of keep-alive clients that send images as fast as they are answered.

Each process holds a share of the clients, one thread and one connection each, and sends what it
measured to its parent several times a second. Bodies are encoded once, before the start. Nothing
here knows torch: the generator must leave the machine to the server that it measures.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

IMAGE_SIZE = 224
DISTINCT_IMAGES = 16
CLIENTS_PER_PROCESS = 16
REPORT_SECONDS = 0.25
# A refused or reset connection fails in microseconds; without a pause one dead server would fill
# the result with millions of failures and a core with nothing.
PAUSE_AFTER_FAILURE_SECONDS = 0.05


@dataclass(frozen=True)
class LoadPlan:
    """What the clients send.

    Attributes:
        url: Address of ``/predict``.
        clients: Clients in this process.
        upload: ``multipart`` (field ``image``) or ``raw`` (the JPEG as the body).
        seed: Fixes the pictures.
        timeout_seconds: The longest that a client waits for an answer.
        warm_up_requests: Requests a client before the start, not counted.
    """

    url: str
    clients: int
    upload: str
    seed: int
    timeout_seconds: float
    warm_up_requests: int


@dataclass
class Measured:
    """What came back: successful requests one by one, failures by kind.

    Attributes:
        start_seconds: When each successful request was sent (CLOCK_MONOTONIC).
        duration_seconds: From sending it to having read its answer.
        failures: Failed requests by kind.
        cpu_seconds: Processor time of the generator while it measured.
    """

    start_seconds: list[float] = field(default_factory=list)
    duration_seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0

    def add(self, other: Measured) -> None:
        """Take in what another batch measured."""
        self.start_seconds += other.start_seconds
        self.duration_seconds += other.duration_seconds
        self.failures += other.failures
        self.cpu_seconds += other.cpu_seconds


class LoadGenerator:
    """All clients, spread over as few processes as they need."""

    def __init__(self, plan: LoadPlan) -> None:
        """Start the processes; they prepare bodies and connections until ``begin``."""
        # Spawned, not forked: a fork would copy threads' locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        shares = _shares(plan.clients)
        self.processes = len(shares)
        self._connections: list[Connection] = []
        self._processes = []
        for index, clients in enumerate(shares):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_process, args=(plan, clients, index, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def wait_until_prepared(self) -> None:
        """Block until every client has warmed up.

        Raises:
            EOFError: A process died.
        """
        for connection in self._connections:
            connection.recv()

    def begin(self) -> None:
        """Let every client send."""
        for connection in self._connections:
            connection.send("begin")

    def collect(self, timeout_seconds: float) -> Measured:
        """Return what has been measured since the last call, waiting for some of it."""
        measured = Measured()
        for connection in wait(self._connections, timeout_seconds):
            measured.add(connection.recv())
        return measured

    def end(self) -> Measured:
        """Let the requests in flight finish and return the rest of what was measured."""
        for connection in self._connections:
            connection.send("end")
        rest = Measured()
        for connection in self._connections:
            while (measured := connection.recv()) is not None:
                rest.add(measured)
        return rest

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.terminate()


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


def _shares(clients: int) -> list[int]:
    """Split ``clients`` evenly over as many processes as they need and the machine can feed."""
    from workloads.common.environment import usable_cores

    wanted = -(-clients // CLIENTS_PER_PROCESS)
    processes = min(wanted, max(1, usable_cores() // 2))
    return [clients // processes + (index < clients % processes) for index in range(processes)]


def _run_process(plan: LoadPlan, clients: int, index: int, parent: Connection) -> None:
    """Run the clients of one process; its parent's end or death ends it."""
    bodies = _bodies(plan, index)
    shared = _Shared(threading.Barrier(clients + 1))
    threads = [
        threading.Thread(target=_run_client, args=(plan, bodies, number, shared), daemon=True)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        shared.barrier.wait()
        parent.send("prepared")
        if parent.recv() != "begin":
            return
        cpu_seconds = time.process_time()
        shared.begin.set()
        stopped = False
        while not stopped:
            stopped = parent.poll(REPORT_SECONDS)
            if stopped:
                parent.recv()
                shared.end.set()
                for thread in threads:
                    thread.join()
            measured = shared.take()
            now = time.process_time()
            measured.cpu_seconds, cpu_seconds = now - cpu_seconds, now
            parent.send(measured)
        parent.send(None)
        parent.recv()
    except (EOFError, OSError, KeyboardInterrupt):
        # The parent closed its end or has gone; Ctrl-C reaches the whole terminal's group.
        return


class _Shared:
    """What the client threads of one process have in common."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier
        self.begin = threading.Event()
        self.end = threading.Event()
        self._lock = threading.Lock()
        self._measured = Measured()

    def success(self, start_seconds: float, duration_seconds: float) -> None:
        with self._lock:
            self._measured.start_seconds.append(start_seconds)
            self._measured.duration_seconds.append(duration_seconds)

    def failure(self, kind: str) -> None:
        with self._lock:
            self._measured.failures[kind] += 1

    def take(self) -> Measured:
        with self._lock:
            measured, self._measured = self._measured, Measured()
        return measured


def _bodies(plan: LoadPlan, index: int) -> list[tuple[bytes, dict[str, str]]]:
    """Return each distinct request body with its headers."""
    import urllib3

    images = encode_images(DISTINCT_IMAGES, plan.seed + index)
    if plan.upload == "raw":
        return [(image, {"Content-Type": "image/jpeg"}) for image in images]
    bodies = []
    for image in images:
        body, content_type = urllib3.encode_multipart_formdata(
            {"image": ("image.jpg", image, "image/jpeg")}
        )
        bodies.append((body, {"Content-Type": content_type}))
    return bodies


def _run_client(
    plan: LoadPlan, bodies: list[tuple[bytes, dict[str, str]]], number: int, shared: _Shared
) -> None:
    import urllib3

    pool = urllib3.connection_from_url(
        plan.url, maxsize=1, timeout=plan.timeout_seconds, retries=False
    )
    path = urllib3.util.parse_url(plan.url).request_uri
    mine = itertools.islice(itertools.cycle(bodies), number, None)
    for _ in range(plan.warm_up_requests):
        _send(pool, path, *next(mine))
    shared.barrier.wait()
    shared.begin.wait()
    while not shared.end.is_set():
        body, headers = next(mine)
        start_seconds = time.monotonic()
        failure = _send(pool, path, body, headers)
        if failure is None:
            shared.success(start_seconds, time.monotonic() - start_seconds)
        else:
            shared.failure(failure)
            shared.end.wait(PAUSE_AFTER_FAILURE_SECONDS)
    pool.close()


def _send(pool, path: str, body: bytes, headers: dict[str, str]) -> str | None:
    """Send one request; return None when it was answered with 200, else the kind of failure."""
    from urllib3 import exceptions

    try:
        response = pool.urlopen("POST", path, body=body, headers=headers, redirect=False)
    except exceptions.TimeoutError:
        return "timeout"
    except exceptions.HTTPError as error:
        return type(error).__name__
    return None if response.status == 200 else f"HTTP {response.status}"
