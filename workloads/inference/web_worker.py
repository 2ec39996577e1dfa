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
import os
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gevent
from flask import Flask
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.base_async import AsyncWorker
from gunicorn.workers.ggevent import GeventWorker

from workloads.inference import web_app
from workloads.inference.batching import EngineClient, allow_many_files
from workloads.inference.web_app import INTERNAL_ERROR, Settings

SILENT_SECONDS = 10.0  # nothing received, or an answer not taken
CROWDED_SECONDS = 1.0  # who is waited for longer gives way when every connection is taken
# In a shutdown: for requests that are on their way, and for bodies that do not move.
LAST_REQUEST_SECONDS, LAST_BODY_SECONDS = 0.5, 2.0
HEARTBEAT_SECONDS = 0.1
LINGER_SECONDS, LINGER_BYTES = 2.0, 8 << 20
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(eq=False)
class Wait:
    """A greenlet that waits for its client, and what is raised in it to end that."""

    since_seconds: float
    ending: BaseException
    has_request: bool


class WebWorker(GeventWorker):
    """A gevent worker that bounds how long clients keep it waiting, and drains quickly.

    Attributes:
        is_stuck: Set where a thread of this process will not come back: the worker is replaced.
    """

    is_stuck = False

    def run(self) -> None:
        """Serve until told to stop, or until stuck; then answer what has been read."""
        settings = self.app.settings
        self._silent_seconds = min(SILENT_SECONDS, settings.request_seconds)
        self._waits: dict[gevent.Greenlet, Wait] = {}
        self._pool = Pool(self.worker_connections)
        engine = EngineClient(socket.socket(fileno=settings.door))
        web_app.begin(settings, engine, self)
        handle = partial(self.handle, self.sockets[0])
        server = StreamServer(self.sockets[0], handle=handle, spawn=self._pool)
        server.max_accept = 1  # the other workers shall get some
        server.start()
        while self.alive and not self.is_stuck:
            self.notify()
            if self._pool.full():
                self._end_waits(CROWDED_SECONDS)
            gevent.sleep(HEARTBEAT_SECONDS)
        self.alive = False
        self._drain(server, settings.drain_seconds)
        if cut_off := sum(self._has_request(greenlet) for greenlet in self._pool):
            engine.report_unanswered(cut_off)
        # Not by the interpreter's own end, which would wait for a thread that is stuck.
        os._exit(0)

    def _drain(self, server: StreamServer, seconds: float) -> None:
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            self.notify()
            if elapsed > LAST_REQUEST_SECONDS:
                server.close()
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
        if not isinstance(exc, ParseException):
            self.log.error("connection failed", exc_info=exc)
        status = {LimitRequestHeaders: 431, LimitRequestLine: 414}.get(type(exc), 400)
        message = f"bad request: {exc}"
        if not isinstance(exc, ParseException):
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

    def __init__(self, settings: Settings) -> None:
        """Keep the settings; ``run`` serves."""
        self.settings = settings
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
            "loglevel": "warning",
            "post_fork": lambda server, worker: _die_with_parent(),
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Return the application; called by gunicorn."""
        return web_app.app


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve as the engine's process, our parent, says."""
    _die_with_parent()
    try:
        settings = Settings(**json.load(sys.stdin))
    except (ValueError, TypeError):
        sys.exit("usage: python3 workloads/inference/inference_server.py, which starts this")
    allow_many_files()
    WebServer(settings).run()


if __name__ == "__main__":
    main()
