"""The web server's processes: gunicorn, started by inference_server.py, with gevent workers.

gunicorn keeps the number of workers and replaces one that ends. Ours are the bounds on how long a
client may keep a worker waiting, a drain that does not wait for silent connections, errors of the
HTTP parser as JSON, and that no process outlives the one that started it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import mmap
import os
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gevent
import numpy as np
from flask import Flask
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.base_async import AsyncWorker
from gunicorn.workers.ggevent import GeventWorker

from workloads.inference import web_app
from workloads.inference.batching import EngineClient, allow_many_files
from workloads.inference.web_app import INTERNAL_ERROR

SILENT_SECONDS = 10.0  # nothing received, or an answer not taken
CROWDED_SECONDS = 1.0  # who is waited for longer gives way when every connection is taken
# In a shutdown: for requests that are on their way, and for bodies that do not move.
LAST_REQUEST_SECONDS, LAST_BODY_SECONDS = 0.5, 2.0
HEARTBEAT_SECONDS = 0.1
WAIT_FOR_OTHERS_SECONDS, MAX_WAITS_FOR_OTHERS = 1e-3, 20
MAX_WORKERS_EVER = 4096
LINGER_SECONDS, LINGER_BYTES = 2.0, 8 << 20
USAGE = "usage: python3 workloads/inference/inference_server.py, which starts this program"
PR_SET_PDEATHSIG = 1  # prctl(2)


class Wait(NamedTuple):
    """A greenlet's wait for its client, and what is raised in it to end that."""

    since_seconds: float
    ending: BaseException
    has_request: bool


class WebWorker(GeventWorker):
    """A gevent worker that bounds how long clients keep it waiting, and drains quickly."""

    is_stuck = False  # set where a thread will not come back: the worker is replaced

    def run(self) -> None:
        """Serve until told to stop, or until stuck; then answer what has been read."""
        # The flags of inference_server.py, and what it adds to them.
        self.settings = settings = self.app.settings
        self._silent_seconds = min(SILENT_SECONDS, settings.request_seconds)
        self._waits: dict[gevent.Greenlet, Wait] = {}
        self._pool = Pool(self.worker_connections)
        self.engine = EngineClient(socket.socket(fileno=settings.door))
        self.large_pictures = BoundedSemaphore(settings.threads)
        self.held_bytes = 0  # of bodies that are being read
        web_app.begin(self)
        listener = self.sockets[0]
        accepting = gevent.spawn(self._accept_all, listener)
        while self.alive and not self.is_stuck:
            self.notify()
            self.count_connections(len(self._pool))
            if self._pool.full():
                self._end_waits(CROWDED_SECONDS)
            gevent.sleep(HEARTBEAT_SECONDS)
        self.alive = False
        self._drain(accepting, listener, settings.drain_seconds)
        self.engine.report_unanswered(sum(map(self._has_request, self._pool)))
        # Not by the interpreter's own end, which would wait for a thread that is stuck.
        os._exit(0)

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
            if len(self._pool) * self.cfg.workers <= self.app.connections.sum():
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
                self._end_waits(0.0, with_request=elapsed > LAST_BODY_SECONDS)
                if not self._pool:
                    break
            gevent.sleep(HEARTBEAT_SECONDS / 2)

    def _end_waits(self, seconds: float, *, with_request: bool = True) -> None:
        """End the waits of over ``seconds`` for clients of whom nothing has come."""
        oldest_seconds = time.monotonic() - seconds
        for greenlet, wait in list(self._waits.items()):
            if wait.since_seconds < oldest_seconds and (with_request or not wait.has_request):
                # In the hub, where nothing can happen between the look and the throw.
                gevent.get_hub().loop.run_callback(self._end_wait, greenlet, wait)

    def _end_wait(self, greenlet: gevent.Greenlet, wait: Wait) -> None:
        if self._waits.get(greenlet) is wait and not _has_input(greenlet.client):
            greenlet.throw(wait.ending)

    def _has_request(self, greenlet: gevent.Greenlet) -> bool:
        wait = self._waits.get(greenlet)
        return wait is None or wait.has_request

    @contextmanager
    def waiting_for_client(self, seconds: float, refusal: Exception | None) -> Iterator[None]:
        """Bound a wait; in the end ``refusal`` is raised, or None of it remains."""
        timeout = gevent.Timeout(seconds, refusal or False)
        me = gevent.getcurrent()
        self._waits[me] = Wait(time.monotonic(), refusal or timeout, refusal is not None)
        try:
            with timeout:
                yield
        finally:
            del self._waits[me]

    def timeout_ctx(self):
        """Bound the wait for a request's first line and headers."""
        return self.waiting_for_client(self._silent_seconds, None)

    def handle(self, listener: socket.socket, client: socket.socket, address: tuple) -> None:
        """Serve one connection."""
        gevent.getcurrent().client = client
        client.settimeout(self._silent_seconds)
        AsyncWorker.handle(self, listener, client, address)

    def handle_request(self, listener_name, req, sock, addr) -> None:
        """Serve one request; gunicorn's object is kept for ``close_after``."""
        gevent.getcurrent().request = req
        gevent.sleep(0)  # one connection may have sent thousands that need nothing but us
        super().handle_request(listener_name, req, sock, addr)

    @staticmethod
    def close_after(response: Flask.response_class) -> None:
        """Close the connection after ``response``, of whose request not all has been read."""
        me = gevent.getcurrent()
        me.request.force_close()
        me.request.body.failed = True
        # Else what is unread would make the kernel reset it, before the answer has been read.
        response.call_on_close(
            partial(util.close_graceful, me.client, LINGER_SECONDS, LINGER_BYTES)
        )

    def handle_error(self, req, client, addr, exc) -> None:
        """Answer what gunicorn's parser refuses."""
        status = {LimitRequestHeaders: 431, LimitRequestLine: 414}.get(type(exc), 400)
        message = f"bad request: {exc}"
        if not isinstance(exc, ParseException):
            web_app.app.logger.error("connection failed", exc_info=exc)
            status, message = 500, INTERNAL_ERROR
        body = json.dumps({"error": message}) + "\n"
        head = f"HTTP/1.1 {status} Refused\r\nConnection: close\r\nContent-Type: application/json"
        with suppress(OSError):
            client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            util.close_graceful(client, LINGER_SECONDS, LINGER_BYTES)


def _has_input(client: socket.socket) -> bool:
    """Whether something has come that was not read yet."""
    with suppress(OSError, ValueError):
        answer = fcntl.ioctl(client.fileno(), termios.FIONREAD, bytes(4))
        return struct.unpack("i", answer)[0] > 0
    return False


class WebServer(BaseApplication):
    """gunicorn, set up from ``settings`` and by nothing that the environment says."""

    def __init__(self, settings: SimpleNamespace) -> None:
        self.settings = settings
        # How many each worker has, by its age; in memory that all of them share.
        self.connections = np.frombuffer(mmap.mmap(-1, 2 * MAX_WORKERS_EVER), np.uint16)
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
    allow_many_files()
    WebServer(settings).run()


if __name__ == "__main__":
    main()
