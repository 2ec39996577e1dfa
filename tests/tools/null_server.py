#!/usr/bin/env python3
"""A server that answers any request at once, or as told: to test and measure the load generator.

    null_server.py [--statuses 200,503] [--health-statuses 503,200] [--stall-after S ...]

Prints its port. One asyncio process without work per request: 10,000 a second and more. POSTs are
answered by the statuses in turn; 0 closes the connection instead and -1 never answers. GET
/health and /stats answer by the others, of which the last one stays; GET /counts tells what came.
The stall is counted from the first POST: nothing is read or answered while it lasts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import Counter

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TYPE = re.compile(rb"\r\ncontent-type: *([^;\r]+)", re.IGNORECASE)
CLOSE, NEVER = 0, -1


class NullServer:
    """What the connections share: what to answer, and what came."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.statuses = [int(status) for status in options.statuses.split(",")]
        self.health_statuses = [int(status) for status in options.health_statuses.split(",")]
        self.stall_after, self.stall_seconds = options.stall_after, options.stall_seconds
        self.first_post_seconds: float | None = None
        self.posts = 0
        self.counts: Counter[str] = Counter()

    def stall_if_due(self) -> None:
        if not self.stall_seconds or self.first_post_seconds is None:
            return
        if time.monotonic() - self.first_post_seconds >= self.stall_after:
            time.sleep(self.stall_seconds)
            self.stall_seconds = 0.0

    def status_of_post(self) -> int:
        if self.first_post_seconds is None:
            self.first_post_seconds = time.monotonic()
        self.posts += 1
        return self.statuses[(self.posts - 1) % len(self.statuses)]

    def status_of_health(self) -> int:
        if len(self.health_statuses) > 1:
            return self.health_statuses.pop(0)
        return self.health_statuses[0]


class Connection(asyncio.Protocol):
    """One client; it does not pipeline."""

    def __init__(self, server: NullServer) -> None:
        self._server = server
        self._head = b""
        self._missing = 0
        self._is_known = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._server.stall_if_due()
        if not self._missing:
            head, _, body = data.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            self._head, self._first = head, body
            self._missing = (int(length[1]) if length else 0) - len(body)
        else:
            self._missing -= len(data)
            self._first = self._first or data
        if self._missing <= 0:
            self._missing = 0
            self._answer()

    def _answer(self) -> None:
        server, (method, path, _) = self._server, self._head.split(b" ", 2)
        if method == b"POST":
            server.counts[path.decode()] += 1
            server.counts[TYPE.search(self._head)[1].decode()] += 1
            server.counts["jpeg"] += b"\xff\xd8\xff" in self._first[:200]
            server.counts["connections"] += not self._is_known
            self._is_known = True
            self._reply(server.status_of_post())
        elif path.endswith((b"/health", b"/stats")):
            self._reply(server.status_of_health())
        else:
            self._reply(200, json.dumps(server.counts).encode())

    def _reply(self, status: int, content: bytes = b"{}") -> None:
        if status == CLOSE:
            self._transport.close()
        elif status != NEVER:
            head = (
                b"HTTP/1.1 %d Null\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            )
            self._transport.write(head % (status, len(content)) + content)


async def serve(options: argparse.Namespace) -> None:
    shared = NullServer(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(shared), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve on a free port until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--statuses", default="200")
    parser.add_argument("--health-statuses", default="200")
    parser.add_argument("--stall-after", type=float, default=0.0)
    parser.add_argument("--stall-seconds", type=float, default=0.0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
