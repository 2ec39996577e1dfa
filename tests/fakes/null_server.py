#!/usr/bin/env python3
"""A server that answers any request at once, to see what a load generator can offer.

    null_server.py [--stall-after S --stall-seconds S]

Prints its port. One thread over epoll, no work per request: tens of thousands a second. The stall
is counted from the first POST: nothing is read or answered while it lasts.
"""

from __future__ import annotations

import argparse
import re
import select
import socket
import time

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: null\r\n"
    b"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\nContent-Length: 2\r\n\r\n{}"
)
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RECEIVE_BYTES = 1 << 18


class Connection:
    """One client: how much of its present request is still to come."""

    def __init__(self, client: socket.socket) -> None:
        """Take over an accepted socket."""
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = client
        self._missing = 0

    def answer(self, buffer: bytearray) -> bytes | None:
        """Read what is there and answer a complete request; return its method, None at the end."""
        try:
            count = self.socket.recv_into(buffer)
        except BlockingIOError:
            return b""
        except OSError:
            return None
        if not count:
            return None
        if not self._missing:
            head = buffer.find(b"\r\n\r\n", 0, count)
            length = LENGTH.search(buffer, 0, head)
            self._missing = head + 4 + (int(length[1]) if length else 0)
        self._missing -= count
        if not self._missing:
            self.socket.sendall(ANSWER)
        return bytes(buffer[:4])


def serve(listener: socket.socket, stall_after: float, stall_seconds: float) -> None:
    """Answer for ever, but for one stall."""
    events = select.epoll()
    events.register(listener, select.EPOLLIN)
    connections: dict[int, Connection] = {}
    buffer = bytearray(RECEIVE_BYTES)
    stall_at = None
    while True:
        for descriptor, _ in events.poll():
            if stall_seconds and stall_at is not None and time.monotonic() >= stall_at:
                time.sleep(stall_seconds)
                stall_seconds = 0.0
            if descriptor == listener.fileno():
                client, _ = listener.accept()
                connections[client.fileno()] = Connection(client)
                events.register(client, select.EPOLLIN)
                continue
            method = connections[descriptor].answer(buffer)
            if method is None:
                connections.pop(descriptor).socket.close()
            elif method == b"POST" and stall_at is None:
                stall_at = time.monotonic() + stall_after


def main() -> None:
    """Serve on a free port until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stall-after", type=float, default=0.0)
    parser.add_argument("--stall-seconds", type=float, default=0.0)
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    serve(listener, args.stall_after, args.stall_seconds)


if __name__ == "__main__":
    main()
