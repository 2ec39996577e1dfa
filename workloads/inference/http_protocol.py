"""One connection of the server: HTTP/1.1 with limits on what a client may send, and how slowly.

httptools (the parser of Node.js, in C) reads the bytes. Added here: requests one after another in
the order they were sent, bounded headers and bodies, a deadline for a whole request however
steadily its bytes drip in, errors as JSON, and a close that lets the client read the last answer.

Everything happens on the event loop's thread. Processor time bounds how many pictures one process
can take: without their decoding, waitress and Flask on 64 threads spent 1.3 ms a request, this and
what stands on it 0.35 ms (224x224 JPEGs in multipart forms, two cores).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus

import httptools

from workloads.inference.http_messages import (
    RETRY_AFTER,
    BodyMemory,
    HttpLimits,
    Request,
    answer_head,
    path_of,
)

MAX_HEADER_BYTES = 32 * 1024
# Slightly too long a body is read to its end and then refused: refusing it earlier closes the
# connection while the client still sends, and many then see no answer.
BODY_SLACK_BYTES = 1 << 20
IDLE_CONNECTION_SECONDS = 60.0
# How long a refused client may go on sending into the void before the connection is cut.
LINGER_SECONDS = 2.0
# While others wait for a connection: how long one is left to a client that sends nothing, with a
# second more for each so many bytes of its request; and how long to one between two requests (a
# usual keep-alive time, Apache's). First bytes take one journey and a slow 2G line sends as fast.
CROWDED_SECONDS = 1.0
CROWDED_BYTES_PER_SECOND = 4096
CROWDED_IDLE_SECONDS = 5.0
_REQUEST_LINE = re.compile(rb"([!-~]+)( [!-~]+ HTTP/1\.[01]\r?\n)")
# Stands for a method that the parser does not know; nothing else of a request depends on it.
_STAND_IN = b"POST"


class _Refused(Exception):
    """What is being sent cannot be read on; carries the status and says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpProtocol(asyncio.Protocol):
    """Reads requests from one connection and hands them on one at a time.

    Attributes:
        lost: Whether the connection is closed.
    """

    def __init__(
        self,
        limits: HttpLimits,
        memory: BodyMemory,
        handle: Callable[[Request], None],
        on_lost: Callable[[HttpProtocol], None],
    ) -> None:
        """Remember whom to hand requests to, and whom to tell when the connection is lost."""
        self._limits = limits
        self._memory = memory
        self._handle = handle
        self._on_lost = on_lost
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._incoming: Request | None = None
        self._unknown_method: str | None = None
        self._read_requests = 0
        self._url = b""
        self._head_bytes = 0
        self._unparsed_bytes = 0
        self._head_complete = False
        self._expects_continue = False
        self._chunks: list[bytes] = []
        self._body_bytes = 0
        self._announced_bytes = 0
        self._bare_bytes = 0
        self._complete: deque[Request] = deque()
        self._answering: Request | None = None
        self._discards_since: float | None = None
        self._write_stalled_since: float | None = None
        # A connection that never says anything has its deadline too.
        self._owing_since: float | None = time.monotonic()
        self._owing_bytes = 0
        self._idle_since = time.monotonic()
        self.lost = False
        self._closing = False
        self._last_wanted = False

    @property
    def busy(self) -> bool:
        """Whether somebody still gets an answer here, or is sending a request."""
        if self.lost or self._discards_since is not None:
            return False
        unsent = self._transport is not None and self._transport.get_write_buffer_size() > 0
        return bool(self._answering or self._complete or self._incoming or unsent)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """End; a request under way finds itself abandoned."""
        self.lost = True
        for request in (self._incoming, self._answering, *self._complete):
            self._forget_body(request)
        self._on_lost(self)

    def eof_received(self) -> bool:
        """Keep the connection for answers under way; the client only stopped sending."""
        self._closing = True
        if self._answering is not None or self._complete:
            return True
        if self._incoming is not None:
            self._refuse(_Refused(HTTPStatus.BAD_REQUEST, "the request ends before it is whole"))
        return False

    def pause_writing(self) -> None:
        """Note that the client does not take its answers."""
        self._write_stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        """Go on with the next request."""
        self._write_stalled_since = None
        self._handle_next()

    def data_received(self, data: bytes) -> None:
        """Read on, up to what is refused."""
        if self._discards_since is not None or (self._closing and self._incoming is None):
            return
        now = time.monotonic()
        if self._owing_since is None:
            self._owe_from(now)
        self._owing_bytes += len(data)
        try:
            self._read(data)
        except _Refused as refusal:
            self._refuse(refusal)
            return
        if self._incoming is None:
            self._owing_since = None
            self._idle_since = now
        self._handle_next()

    def _read(self, data: bytes) -> None:
        if self._bare_bytes:
            self._read_bare(data)
            return
        read_before = self._read_requests
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._closing = True
            self._read_bare(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, _Refused):
                raise error.__context__ from None
            raise
        except httptools.HttpParserInvalidMethodError as error:
            line = _REQUEST_LINE.match(data)
            if line is None or self._read_requests > read_before:
                raise _Refused(HTTPStatus.BAD_REQUEST, "this is no HTTP request") from error
            self._read_unknown(line[1], data[line.end(1) :])
            return
        except httptools.HttpParserError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        if self._incoming is not None and not self._head_complete:
            # A header that is not whole yet has not been counted.
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > 2 * MAX_HEADER_BYTES:
                self._count_head(self._unparsed_bytes)

    def _read_unknown(self, method: bytes, rest: bytes) -> None:
        """Read a request whose method the parser does not know, up to a whole one like any other.

        What the path takes is the application's to say, and who may ask it.
        """
        self._parser = httptools.HttpRequestParser(self)
        self._unknown_method = method.decode("latin-1")
        self._read(_STAND_IN + rest)

    def _read_bare(self, data: bytes) -> None:
        """Read the body of a request that offers another protocol, which the parser leaves alone.

        Some clients offer HTTP/2 with their first request. No other protocol is spoken here, so
        the request is answered as it is, and the connection ends with it.
        """
        body = data[: self._bare_bytes]
        if body:
            self._bare_bytes -= len(body)
            self.on_body(body)
            if not self._bare_bytes:
                self._put_in_line()

    def _owe_from(self, now: float) -> None:
        """Begin to wait for the rest of a request."""
        self._owing_since = now
        self._owing_bytes = 0

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._incoming = Request(self, "")
        self._url = b""
        self._head_bytes = 0
        self._unparsed_bytes = 0
        self._head_complete = False
        self._expects_continue = False
        self._chunks = []
        self._body_bytes = 0
        self._announced_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take the request's target, or a piece of it."""
        self._count_head(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header."""
        self._count_head(len(name) + len(value) + 4)
        name = name.lower()
        if name == b"content-type":
            self._incoming.content_type = value.decode("latin-1")
        elif name == b"authorization":
            self._incoming.authorization = value.decode("latin-1")
        elif name == b"expect":
            self._expects_continue = value.lower() == b"100-continue"
        elif name == b"content-length":
            # Without digits alone the parser itself refuses it.
            self._announced_bytes = int(value[:20]) if value.isdigit() else 0
            if self._announced_bytes > self._limits.max_body_bytes + BODY_SLACK_BYTES:
                raise self._too_long()
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise _Refused(HTTPStatus.BAD_REQUEST, "no transfer encoding but chunked is known")

    def on_headers_complete(self) -> None:
        """Ask for the body where the client waits to be asked."""
        self._head_complete = True
        if self._expects_continue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; what is past the limit is counted and let go."""
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._chunks.clear()
            if self._body_bytes > self._limits.max_body_bytes + BODY_SLACK_BYTES:
                raise self._too_long()
            return
        if not self._memory.take(len(body)):
            raise _Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "too much is being sent at once; try again later"
            )
        self._incoming.body_bytes += len(body)
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """Put the request in line."""
        if self._parser.should_upgrade() and self._announced_bytes:
            self._bare_bytes = self._announced_bytes
        else:
            self._put_in_line()

    def _put_in_line(self) -> None:
        request, self._incoming = self._incoming, None
        self._read_requests += 1
        request.method = self._unknown_method or self._parser.get_method().decode("latin-1")
        self._unknown_method = None
        request.version = self._parser.get_http_version()
        request.keep_alive = self._parser.should_keep_alive()
        request.path = path_of(self._url)
        request.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        request.too_long = self._body_bytes > self._limits.max_body_bytes
        request.received_seconds = time.monotonic()
        self._chunks = []
        self._complete.append(request)

    def _count_head(self, bytes_: int) -> None:
        self._head_bytes += bytes_
        if self._head_bytes > MAX_HEADER_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the headers exceed {MAX_HEADER_BYTES} bytes",
            )

    def _too_long(self) -> _Refused:
        return _Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"request entity too large: at most {self._limits.max_body_bytes} bytes are accepted",
        )

    # Answers.

    def _handle_next(self) -> None:
        while self._complete and self._answering is None and not self._write_stalled_since:
            self._answering = self._complete.popleft()
            self._handle(self._answering)
        if self.lost or self._transport.is_closing():
            return
        # Whoever sends requests ahead of their answers is read no further meanwhile.
        if self._complete:
            self._transport.pause_reading()
        elif not self._transport.is_reading():
            self._owing_since = None
            if self._incoming is not None:
                self._owe_from(time.monotonic())
            self._transport.resume_reading()

    def send_answer(
        self,
        request: Request,
        status: int,
        body: bytes,
        content_type: str,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        """Write one answer and go on; ``Request.respond`` calls this."""
        self._answering = None
        self._forget_body(request)
        if self.lost:
            return
        self._closing = self._closing or self._last_wanted or not request.keep_alive
        # The answers to requests sent ahead come first.
        last = self._closing and not self._complete
        self._transport.write(
            answer_head(status, len(body), content_type, headers, request.version, last)
            + (b"" if request.method == "HEAD" else body)
        )
        self._idle_since = time.monotonic()
        if last:
            self._transport.close()
        elif self._complete or not self._transport.is_reading():
            # Not at once: a long line of requests would become a deep stack.
            asyncio.get_running_loop().call_soon(self._handle_next)

    def _refuse(self, refusal: _Refused) -> None:
        """Answer what cannot be read on, then let the client finish sending before closing."""
        for request in (self._incoming, *self._complete):
            self._forget_body(request)
        self._incoming = None
        self._complete.clear()
        self._discards_since = time.monotonic()
        self._closing = True
        if self._answering is not None:
            return
        body = json.dumps({"error": str(refusal)}).encode() + b"\n"
        overloaded = refusal.status == HTTPStatus.SERVICE_UNAVAILABLE
        headers = (RETRY_AFTER,) if overloaded else ()
        self._transport.write(
            answer_head(refusal.status, len(body), "application/json", headers, "1.1", True) + body
        )
        self._transport.write_eof()

    def _forget_body(self, request: Request | None) -> None:
        if request is not None:
            self._memory.give_back(request.body_bytes)
            request.body_bytes = 0

    def end_if_overdue(self, now: float, crowded: bool) -> None:
        """End the connection if its client takes longer than it may.

        Args:
            now: CLOCK_MONOTONIC.
            crowded: Whether others wait for a connection to become free, or a shutdown for all.
        """
        if crowded and self._holds_a_place(now):
            self._give_up("the request arrives too slowly for a server that is full or shuts down")
            return
        latest = now - self._limits.request_seconds
        if self._discards_since is not None:
            overdue = now - self._discards_since > LINGER_SECONDS
        elif self._write_stalled_since is not None:
            overdue = self._write_stalled_since < latest
        elif self._answering is not None or self._complete:
            overdue = False
        elif self._owing_since is not None:
            if self._owing_since < latest:
                self._give_up(
                    f"the request did not arrive within {self._limits.request_seconds:g} s"
                )
            return
        else:
            overdue = now - self._idle_since > IDLE_CONNECTION_SECONDS
        if overdue:
            self.end()

    def _holds_a_place(self, now: float) -> bool:
        """Whether a connection is kept from others for little: nothing is asked, or too slowly."""
        if self._discards_since is not None:
            return now - self._discards_since > CROWDED_SECONDS
        if self._answering is not None or self._complete or self._write_stalled_since is not None:
            return False
        if self._owing_since is None:
            return now - self._idle_since > CROWDED_IDLE_SECONDS
        allowed_seconds = CROWDED_SECONDS + self._owing_bytes / CROWDED_BYTES_PER_SECOND
        return now - self._owing_since > allowed_seconds

    def _give_up(self, message: str) -> None:
        """End a connection by its client's fault, with a word where a request has begun."""
        if self._incoming is not None and self._transport is not None:
            self._refuse(_Refused(HTTPStatus.REQUEST_TIMEOUT, message))
        else:
            self.end()

    def close_after_answers(self) -> None:
        """Let the next answer be the last one."""
        self._last_wanted = True

    def end(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()
