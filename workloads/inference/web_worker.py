"""The web server's processes: gunicorn, started by inference_server.py, with gevent workers.

gunicorn keeps the number of workers and replaces one that ends. Ours are the bounds on how long a
client may keep a worker waiting and on the connections of one address, a drain that does not wait
for silent connections, errors of the HTTP parser as JSON, the way to the engine (batching.py), and
that no process outlives the one that started it.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import math
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gevent
from flask import Flask, Response
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.http import Request
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.base_async import AsyncWorker
from gunicorn.workers.ggevent import GeventWorker

from workloads.inference import batching, web_app
from workloads.inference.image_input import PICTURE_BYTES
from workloads.inference.web_app import INTERNAL_ERROR
from workloads.inference.web_process import MAX_SLOTS, YIELD_SECONDS, Channel

SILENT_SECONDS = 10.0  # nothing received, or an answer not taken
CROWDED_SECONDS = 1.0  # who is waited for longer gives way when every connection is taken
# In a shutdown: for requests that are on their way, and for bodies that do not move.
LAST_REQUEST_SECONDS, LAST_BODY_SECONDS = 0.5, 2.0
HEARTBEAT_SECONDS = 0.1
WAIT_FOR_OTHERS_SECONDS, MAX_WAITS_FOR_OTHERS = 1e-3, 20
MAX_WORKERS_EVER = 1024
LINGER_SECONDS, LINGER_BYTES = 2.0, 8 << 20
RECORD_SECONDS = 0.01
OWN_ADDRESSES = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
USAGE = "usage: python3 workloads/inference/inference_server.py, which starts this program"
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(eq=False)
class Wait:
    """A connection's wait for its client."""

    client: socket.socket
    begin_seconds: float
    end_seconds: float
    has_request: bool
    is_cut: bool = False

    def cut(self) -> None:
        """End it: what has come is still read, and then the connection's end."""
        self.is_cut = True
        with suppress(OSError):
            self.client.shutdown(socket.SHUT_RD)


class WebWorker(GeventWorker):
    """A gevent worker that bounds how long clients keep it waiting, and drains quickly."""

    alive: bool
    is_stuck = False  # set where a thread will not come back: the worker is replaced

    def run(self) -> None:
        """Serve until told to stop, or until stuck; then answer what has been read."""
        # The flags of inference_server.py, and what it adds to them.
        self.settings = settings = self.app.settings
        self._silent_seconds = min(SILENT_SECONDS, settings.request_seconds)
        self._address_limit = math.ceil(settings.max_connections_per_address / self.cfg.workers)
        self._addresses: Counter[str] = Counter()  # connections of each
        self._waits: dict[gevent.Greenlet, Wait] = {}
        self._pool = Pool(self.worker_connections)
        with socket.socket(fileno=settings.door) as door:
            self._connect_to_engine(door)
        self.large_pictures = BoundedSemaphore(settings.threads)
        self.held_bytes = 0  # of bodies that are being read
        self._records: list[bytes] = []  # of finished requests
        web_app.begin(self)
        listener = self.sockets[0]
        accepting = gevent.spawn(self._accept_all, listener)
        while self.alive and not self.is_stuck:
            self.notify()
            self.count_connections(len(self._pool))
            self._cut_waits(CROWDED_SECONDS if self._pool.full() else math.inf)
            gevent.sleep(HEARTBEAT_SECONDS)
        self.alive = False
        self._drain(accepting, listener, settings.drain_seconds)
        self._send_records()
        unanswered = sum(map(self._has_request, self._pool))
        self.questions.send(b"e", batching.COUNT.pack(unanswered))
        # Not by the interpreter's own end, which would wait for a thread that is stuck.
        os._exit(0)

    def _connect_to_engine(self, door: socket.socket) -> None:
        descriptor = os.memfd_create("pictures")
        slots = min(self.worker_connections, MAX_SLOTS)
        os.ftruncate(descriptor, slots * PICTURE_BYTES + 1)
        # The last byte: how many pictures are on their way, being decoded.
        self.memory = mmap.mmap(descriptor, 0)
        self.pictures, self.questions = Channel(slots, self.memory), Channel(slots)
        with self.pictures.engines_end as pictures, self.questions.engines_end as questions:
            descriptors = [pictures.fileno(), questions.fileno(), descriptor]
            socket.send_fds(door, [b"%d" % os.getpid()], descriptors)
        os.close(descriptor)

    def record(self, content: bytes) -> None:
        """Have a finished request counted, soon: waking the engine for each would cost both."""
        if not self._records:
            gevent.spawn_later(RECORD_SECONDS, self._send_records)
        self._records.append(content)

    def _send_records(self) -> None:
        records, self._records = self._records, []
        if records:
            self.pictures.send(b"r", b"".join(records))

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            self._pool.wait_available()
            self._wait_for_others()
            try:
                client, address = listener.accept()
            except OSError:  # no more files, or the client has left already
                gevent.sleep(HEARTBEAT_SECONDS)
                continue
            self._pool.spawn(self.handle, listener, client, address)

    def _wait_for_others(self) -> None:
        """Let workers with fewer connections go first, for a moment.

        Else a burst goes to whoever wakes up, and 64 clients kept for a whole test what they got in
        the first milliseconds: eight workers answered 4,088 requests/s with a p95 of 41 ms.
        """
        for _ in range(MAX_WAITS_FOR_OTHERS):
            self.count_connections(len(self._pool))
            if len(self._pool) * self.cfg.workers <= sum(self.app.connections):
                break
            gevent.sleep(WAIT_FOR_OTHERS_SECONDS)

    def count_connections(self, count: int) -> None:
        """Tell the other workers how many connections this one has."""
        self.app.connections[self.age % MAX_WORKERS_EVER] = count

    def _drain(self, accepting: gevent.Greenlet, listener: socket.socket, seconds: float) -> None:
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            self.notify()
            if elapsed > LAST_REQUEST_SECONDS:
                accepting.kill()
                listener.close()
                self._cut_waits(0.0, with_request=elapsed > LAST_BODY_SECONDS)
                if not self._pool:
                    break
            gevent.sleep(HEARTBEAT_SECONDS / 2)

    def _cut_waits(self, seconds: float = math.inf, *, with_request: bool = True) -> None:
        """End the waits whose time is over, or that have lasted for ``seconds``."""
        now = time.monotonic()
        for wait in list(self._waits.values()):
            is_long = now - wait.begin_seconds > seconds and (with_request or not wait.has_request)
            if is_long or now > wait.end_seconds:
                wait.cut()

    def _has_request(self, greenlet: gevent.Greenlet) -> bool:
        wait = self._waits.get(greenlet)
        return wait is None or wait.has_request

    @contextmanager
    def waiting_for_client(self, seconds: float, *, has_request: bool = True) -> Iterator[Wait]:
        """Bound the block's wait for what the client of this greenlet sends."""
        me, now = gevent.getcurrent(), time.monotonic()
        self._waits[me] = wait = Wait(me.client, now, now + seconds, has_request)
        try:
            yield wait
        finally:
            me.is_cut |= wait.is_cut
            del self._waits[me]

    def timeout_ctx(self) -> AbstractContextManager[Wait]:
        """Bound the wait for a request's first line and headers."""
        return self.waiting_for_client(self._silent_seconds, has_request=False)

    def handle(self, listener: socket.socket, client: socket.socket, address: tuple) -> None:
        """Serve one connection, unless its address has too many."""
        me = gevent.getcurrent()
        me.client, me.is_cut = client, False
        client.settimeout(self._silent_seconds)
        origin = _origin(address[0])
        self._addresses[origin] += 1
        try:
            if self._addresses[origin] <= self._address_limit or address[0] in OWN_ADDRESSES:
                AsyncWorker.handle(self, listener, client, address)
            else:
                with client:
                    _refuse(client, 503, "too many connections from your address")
        finally:
            self._addresses[origin] -= 1
            if not self._addresses[origin]:
                del self._addresses[origin]

    def handle_request(
        self, listener_name: object, req: Request, sock: socket.socket, addr: object
    ) -> None:
        """Serve one request; gunicorn's object is kept for ``close_after``."""
        me = gevent.getcurrent()
        me.request = req
        if me.is_cut:  # it came at the last moment, and nothing more can
            req.force_close()
        gevent.sleep(YIELD_SECONDS)  # one connection may have sent thousands that need only us
        try:
            super().handle_request(listener_name, req, sock, addr)
        finally:
            self.hold_packets(sock, False)

    @staticmethod
    def hold_packets(client: socket.socket, on: bool) -> None:
        """Let head and body of an answer be one packet, or send what was held."""
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)

    @staticmethod
    def close_after(response: Response) -> None:
        """Close the connection after ``response``, of whose request not all has been read."""
        me = gevent.getcurrent()
        me.request.force_close()
        me.request.body.failed = True
        # Else what is unread would make the kernel reset it, before the answer has been read.
        response.call_on_close(
            partial(util.close_graceful, me.client, LINGER_SECONDS, LINGER_BYTES)
        )

    def handle_error(
        self, req: object, client: socket.socket, addr: object, exc: Exception
    ) -> None:
        """Answer what gunicorn's parser refuses."""
        status, message = 500, INTERNAL_ERROR
        if isinstance(exc, ParseException):
            status = {LimitRequestHeaders: 431, LimitRequestLine: 414}.get(type(exc), 400)
            message = f"bad request: {exc}"
        else:
            web_app.app.logger.error("connection failed", exc_info=exc)
        _refuse(client, status, message)
        util.close_graceful(client, LINGER_SECONDS, LINGER_BYTES)


def _refuse(client: socket.socket, status: int, message: str) -> None:
    body = json.dumps({"error": message}) + "\n"
    head = f"HTTP/1.1 {status} Refused\r\nConnection: close\r\nContent-Type: application/json"
    head += "\r\nRetry-After: 1" if status == 503 else ""
    with suppress(OSError):
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def _origin(address: str) -> str:
    """Return whom an address belongs to: of IPv6 everybody has at least 2^64."""
    if "." in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


class WebServer(BaseApplication):
    """gunicorn, set up from ``settings`` and by nothing that the environment says."""

    def __init__(self, settings: SimpleNamespace) -> None:
        self.settings = settings
        # How many each worker has, by its age; in memory that all of them share.
        self.connections = memoryview(mmap.mmap(-1, 2 * MAX_WORKERS_EVER)).cast("H")
        super().__init__()

    def load_config(self) -> None:
        """Tell gunicorn how to run; called by it."""
        settings = self.settings
        options = {
            "bind": [f"fd://{settings.listener}"],
            "worker_class": WebWorker,
            "workers": settings.workers,
            "worker_connections": math.ceil(settings.max_connections / settings.workers),
            # A worker that shows no sign of life for so long is killed and replaced.
            "timeout": max(5, math.ceil(settings.request_seconds)),
            # The workers keep the drain's time themselves, and say what they cut off.
            "graceful_timeout": math.ceil(settings.drain_seconds) + 1,
            "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
            "control_socket_disable": True,
            "forwarded_allow_ips": "",
            "loglevel": "critical",  # resets and deadlines of clients are no errors of ours
            "post_fork": lambda server, worker: _die_with_parent(),
            "child_exit": lambda server, worker: worker.count_connections(0),
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Return the application; called by gunicorn."""
        return web_app.app


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve as the engine's process, our parent, says on standard input."""
    try:
        settings = SimpleNamespace(**json.loads("" if sys.argv[1:] else sys.stdin.read()))
    except (ValueError, TypeError):
        is_asked = "--help" in sys.argv
        print(USAGE, file=sys.stdout if is_asked else sys.stderr)
        raise SystemExit(0 if is_asked else 2) from None
    _die_with_parent()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    WebServer(settings).run()


if __name__ == "__main__":
    main()
