"""HTTP for a WSGI application by waitress, with what an unattended server needs besides.

- Overload: requests past ``max_admitted`` get 503 with Retry-After at once, from a lane of its
  own that also answers ``/health`` and ``/stats``, so a full server still says how it is.
- Slow senders: a request must be complete ``request_seconds`` after its first byte, however
  steadily its bytes drip in.
- Draining: ``drain`` stops accepting, answers everything that has begun to arrive, tells
  keep-alive clients to close, and ends.
- Errors below the application (header too large, body too large) are JSON like all others.

waitress offers no hooks for these, so its channel and server classes are extended; this module
alone touches their attributes, and requirements.txt keeps waitress at the major version that has
them.
"""

from __future__ import annotations

import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error

from workloads.common.cli import UsageError
from workloads.inference.http_app import RECEIVED_KEY

EXPRESS_PATHS = ("/health", "/stats")
# For at most this long a drain leaves idle keep-alive connections open, so that a client about to
# send its next request gets an answer instead of a reset.
IDLE_GRACE_SECONDS = 0.5
LOOP_SECONDS = 0.2
IDLE_CONNECTION_SECONDS = 60
OVERDUE_CHECK_SECONDS = 0.5
MAX_HEADER_BYTES = 32 * 1024
BODY_SLACK_BYTES = 1 << 20
BACKLOG = 1024
RESERVED_DESCRIPTORS = 64


@dataclass(frozen=True)
class HttpLimits:
    """What one client, and all together, may take from the server.

    Attributes:
        threads: Requests handled at the same time.
        max_admitted: Requests inside the server, waiting ones included; more are refused.
        max_body_bytes: The longest request body.
        max_connections: Open connections; further ones wait in the kernel's queue.
        request_seconds: From a request's first byte to its last.
    """

    threads: int
    max_admitted: int
    max_body_bytes: int
    max_connections: int
    request_seconds: float


class _Overloaded(Error):
    code = 503
    reason = "Service Unavailable"


class _TimedTask(WSGITask):
    """Tells the application when the request was complete, before it waited for a thread."""

    def get_environment(self) -> dict:
        environment = super().get_environment()
        environment[RECEIVED_KEY] = self.request.received_seconds
        return environment


class _JsonErrorTask(ErrorTask):
    """Answers a request that never reaches the application."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": f"{error.reason.lower()}: {error.body}"}).encode() + b"\n"
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        if error.code == 503:
            self.response_headers.append(("Retry-After", "1"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class _Channel(HTTPChannel):
    """A connection that knows since when it owes a complete request."""

    task_class = _TimedTask
    error_task_class = _JsonErrorTask

    def __init__(self, *args: object, **keywords: object) -> None:
        super().__init__(*args, **keywords)
        # A connection that never says anything has its deadline too.
        self.owing_since: float | None = time.monotonic()

    def received(self, data: bytes) -> bool:
        if self.owing_since is None:
            self.owing_since = time.monotonic()
        result = super().received(data)
        if self.request is None:
            self.owing_since = None
        return result

    def service(self) -> None:
        request = self.requests[0]
        try:
            super().service()
        finally:
            self.server.finished(request)

    def close_after_answers(self) -> None:
        """Let the answers under way say ``Connection: close``, and end the connection with them."""
        with self.requests_lock:
            for request in self.requests:
                request.headers["CONNECTION"] = "close"


class HttpServer:
    """A waitress server on a thread of its own."""

    def __init__(
        self,
        application: Callable,
        host: str,
        port: int,
        limits: HttpLimits,
        on_refused: Callable[[str], None] = lambda path: None,
    ) -> None:
        """Bind the port; ``start`` answers.

        Args:
            application: The WSGI application.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            limits: See ``HttpLimits``.
            on_refused: Told the path of each request refused because the server is full.

        Raises:
            UsageError: The address cannot be listened on.
        """
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._limits = limits
        self._on_refused = on_refused
        self._map: dict = {}
        self._server = create_server(
            application,
            map=self._map,
            # A socket of our own: for a host name with several addresses waitress would make
            # several servers, and none of them would know the others' connections.
            sockets=[_listening_socket(host, port)],
            threads=limits.threads,
            ident="gpu-sharing-bench",
            # Slightly too long a body is read and answered by the application: refusing it here
            # closes the connection while the client still sends, and many then see no answer.
            max_request_body_size=limits.max_body_bytes + BODY_SLACK_BYTES,
            max_request_header_size=MAX_HEADER_BYTES,
            connection_limit=_affordable_connections(limits.max_connections),
            channel_timeout=IDLE_CONNECTION_SECONDS,
            cleanup_interval=1,
            asyncore_use_poll=True,
            inbuf_overflow=1 << 20,
            log_socket_errors=False,
        )
        self._server.channel_class = _Channel
        self._server.add_task = self._add_task
        self._server.finished = self._finished
        self._express = ThreadedTaskDispatcher()
        self._express.set_thread_count(1)
        self._admission = threading.Lock()
        self._admitted: set[HTTPRequestParser] = set()
        self._drain_started_seconds: float | None = None
        self._drain_end_seconds = float("inf")
        self._next_overdue_check_seconds = 0.0
        self._cut_off = 0
        self._thread = threading.Thread(target=self._loop, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.effective_port)

    @property
    def draining(self) -> bool:
        """Whether ``drain`` has been called."""
        return self._drain_started_seconds is not None

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def drain(self, timeout_seconds: float) -> int:
        """Answer what has arrived, take nothing new, end; return how many were left unanswered.

        Blocks for ``timeout_seconds`` at the most; a second call changes nothing.
        """
        if self.draining:
            self._thread.join()
            return self._cut_off
        self._drain_end_seconds = time.monotonic() + timeout_seconds
        self._drain_started_seconds = time.monotonic()
        self._server.pull_trigger()
        self._thread.join()
        return self._cut_off

    def _loop(self) -> None:
        while not self.draining:
            self._turn()
        self._stop_listening()
        while self._map and time.monotonic() < self._drain_end_seconds and self._has_duties():
            self._turn()
        self._cut_off = sum(1 for channel in self._channels() if _is_busy(channel))
        for dispatcher in (self._server.task_dispatcher, self._express):
            dispatcher.shutdown(timeout=0.1)
        wasyncore.close_all(self._map, ignore_all=True)

    def _turn(self) -> None:
        wasyncore.loop(timeout=LOOP_SECONDS, map=self._map, use_poll=True, count=1)
        self._end_overdue()

    def _stop_listening(self) -> None:
        """Accept what has already connected, then close the listening socket.

        Closing it at once would reset connections that the kernel has accepted for us.
        """
        for _ in range(BACKLOG):
            connections = len(self._map)
            self._server.handle_accept()
            if len(self._map) == connections:
                break
        self._server.accepting = False
        self._server.del_channel(self._map)
        self._server.socket.close()

    def _has_duties(self) -> bool:
        """Whether somebody still gets an answer; ends idle connections after their grace."""
        grace_over = time.monotonic() > self._drain_started_seconds + IDLE_GRACE_SECONDS
        duties = False
        for channel in self._channels():
            channel.close_after_answers()
            if _is_busy(channel) or not grace_over:
                duties = True
        return duties

    def _end_overdue(self) -> None:
        now = time.monotonic()
        if now < self._next_overdue_check_seconds:
            return
        self._next_overdue_check_seconds = now + OVERDUE_CHECK_SECONDS
        latest = now - self._limits.request_seconds
        for channel in self._channels():
            overdue = channel.owing_since is not None and channel.owing_since < latest
            if overdue and not channel.requests:
                channel.will_close = True

    def _channels(self) -> list[_Channel]:
        return list(self._server.active_channels.values())

    def _add_task(self, channel: _Channel) -> None:
        """Give a complete request to the lane it belongs to, or refuse it.

        The caller holds the channel's ``requests_lock``.
        """
        request = channel.requests[0]
        request.received_seconds = time.monotonic()
        if self.draining:
            request.headers["CONNECTION"] = "close"
        if request.error is None and request.path not in EXPRESS_PATHS:
            with self._admission:
                admitted = len(self._admitted) < self._limits.max_admitted
                if admitted:
                    self._admitted.add(request)
            if admitted:
                self._server.task_dispatcher.add_task(channel)
                return
            request.error = _Overloaded("too many requests are waiting; try again in a moment")
            self._on_refused(request.path)
        self._express.add_task(channel)

    def _finished(self, request: HTTPRequestParser) -> None:
        with self._admission:
            self._admitted.discard(request)


def _is_busy(channel: _Channel) -> bool:
    return bool(channel.requests or channel.total_outbufs_len or channel.request is not None)


def _listening_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error}); name another with --host and --port"
        ) from error


def _affordable_connections(asked: int) -> int:
    """Raise the limit of open files if needed; return how many connections it then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each connection may also hold a spooled body.
    needed = 2 * asked + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return asked
    return max(1, min(asked, (soft - RESERVED_DESCRIPTORS) // 2))
