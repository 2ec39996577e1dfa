"""One keep-alive HTTP connection that sends requests prepared as bytes.

``http.client`` connects and reads the answers. Only the request is not built by it: headers and
body are the same all the time and go out as one write. That is 51 us of processor time a request
of 30 KB, against 87 us with ``HTTPConnection.request`` and 250 us with urllib3.
"""

from __future__ import annotations

import select
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

# A server gives an idle connection up after seconds, so one that was just used is not asked: that
# would cost a system call a request, and a change of threads with it.
IDLE_SECONDS = 0.5


class KeepAliveConnection:
    """A connection to the host of a URL, opened when first used and again after a failure.

    Attributes:
        opened: How many times it has connected.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        """Remember where to connect; ``timeout_seconds`` bounds each wait for the server."""
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_seconds)
        self._used_seconds = 0.0
        self.opened = 0

    def exchange(self, request: bytes) -> str | None:
        """Send one POST and read its answer; return None for status 200, else a kind of failure."""
        try:
            self._connect_if_needed()
            self._connection.sock.sendall(request)
            response = HTTPResponse(self._connection.sock, method="POST")
            response.begin()
            response.read()
            closes = response.will_close
            response.close()
        except TimeoutError:
            self.close()
            return "timeout"
        except (OSError, HTTPException) as error:
            self.close()
            return type(error).__name__
        if closes:
            self.close()
        self._used_seconds = time.monotonic()
        return None if response.status == 200 else f"HTTP {response.status}"

    def close(self) -> None:
        """Close the connection; the next exchange opens it again."""
        self._connection.close()

    def _connect_if_needed(self) -> None:
        # Nothing is due on an idle connection: what can be read is the server's good-bye.
        connection = self._connection
        if (
            connection.sock is not None
            and time.monotonic() - self._used_seconds > IDLE_SECONDS
            and _readable(connection.sock.fileno())
        ):
            connection.close()
        if connection.sock is None:
            connection.connect()
            self.opened += 1


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
