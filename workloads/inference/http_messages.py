"""What travels over an HTTP connection of the server: a request, the head of an answer, limits."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import httptools

SERVER_NAME = "gpu-sharing-bench"
RETRY_AFTER = ("Retry-After", "1")


@dataclass(frozen=True)
class HttpLimits:
    """What one client may take from the server.

    Attributes:
        max_body_bytes: The longest request body.
        request_seconds: From a request's first byte to its last, and for taking an answer; less
            while others wait for a connection (see ``HttpProtocol.end_if_overdue``).
    """

    max_body_bytes: int
    request_seconds: float


class BodyMemory:
    """Bounds what the bodies of all requests of a front end take, from arrival to answer."""

    def __init__(self, limit_bytes: int) -> None:
        """Allow ``limit_bytes`` in all."""
        self._limit_bytes = limit_bytes
        self._used_bytes = 0

    def take(self, bytes_: int) -> bool:
        """Count ``bytes_`` more if they fit; return whether they do."""
        fits = self._used_bytes + bytes_ <= self._limit_bytes
        if fits:
            self._used_bytes += bytes_
        return fits

    def give_back(self, bytes_: int) -> None:
        """Count ``bytes_`` less."""
        self._used_bytes -= bytes_


class Connection(Protocol):
    """What a request needs of the connection that it came by."""

    @property
    def lost(self) -> bool:
        """Whether the client has gone."""

    def send_answer(
        self,
        request: Request,
        status: int,
        body: bytes,
        content_type: str,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        """Send the answer to one of its requests."""


class Request:
    """One complete request, to be answered once by ``respond``."""

    __slots__ = (
        "_connection", "authorization", "body", "body_bytes", "content_type", "keep_alive",
        "method", "path", "received_seconds", "too_long", "version",
    )  # fmt: skip

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection = connection
        self.method = method
        self.path = ""
        self.authorization = ""
        self.content_type = ""
        self.version = "1.1"
        self.keep_alive = False
        self.body = b""
        self.body_bytes = 0
        self.too_long = False
        self.received_seconds = 0.0

    @property
    def abandoned(self) -> bool:
        """Whether the client has gone."""
        return self._connection.lost

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Send the answer; on the event loop's thread."""
        self._connection.send_answer(self, status, body, content_type, headers)

    def respond_json(
        self, status: int, content: object, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Send ``content`` as JSON; an overload (503) tells when to try again."""
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers = (*headers, RETRY_AFTER)
        self.respond(status, json.dumps(content).encode() + b"\n", headers=headers)

    def respond_error(
        self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Send ``{"error": message}``."""
        self.respond_json(status, {"error": message}, headers)


def path_of(url: bytes) -> str:
    """Return the path of a request's target, without query and closing slash."""
    if not url.startswith(b"/"):
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            url = b"*"
    path = url.partition(b"?")[0].decode("latin-1")
    return path.rstrip("/") or "/"


_date = (0, "")


def _http_date() -> str:
    """Return the present time as HTTP writes it, formatted once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True))
    return _date[1]


def answer_head(
    status: int,
    length: int,
    content_type: str,
    headers: tuple[tuple[str, str], ...],
    version: str,
    last: bool,
) -> bytes:
    """Return status line and headers of an answer.

    Args:
        status: The HTTP status.
        length: Bytes of the body.
        content_type: What the body is.
        headers: Further headers.
        version: Of the request, ``1.0`` or ``1.1``.
        last: Whether the connection ends with this answer.
    """
    lines = [
        f"HTTP/1.1 {status:d} {HTTPStatus(status).phrase}",
        f"Server: {SERVER_NAME}",
        f"Date: {_http_date()}",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
        *[f"{name}: {value}" for name, value in headers],
    ]
    if last:
        lines.append("Connection: close")
    elif version == "1.0":
        lines.append("Connection: keep-alive")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
