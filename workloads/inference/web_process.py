"""What a web worker (web_worker.py) and the application in it (web_app.py) share.

``Channel`` is the way to the engine, whose own side and messages are in batching.py.
"""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import suppress

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from workloads.inference.batching import ANSWER, FULL, HEAD, LATE, MAX_MESSAGE_BYTES
from workloads.inference.image_input import PICTURE_BYTES

# Messages to the engine that wait for an answer; so many answers fit into a buffer of 416 KiB.
MAX_SLOTS = 512
BUFFER_BYTES = 1 << 20  # of a connection to the engine, as far as the system allows
# A sleep for all others' sake. After one of 0 gevent goes on with whoever slept: it looks at the
# sockets once in some fifty times, and a single busy client held the others off for seconds.
YIELD_SECONDS = 1e-9


class Refusal(Exception):
    """A request that gets no result: the HTTP status, and one sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Channel:
    """A connection to the engine, on which many greenlets may wait for their answers at once.

    With memory for pictures each slot has its part of it.
    """

    def __init__(self, slots: int, memory: mmap.mmap | None = None) -> None:
        self._socket, self.engines_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, self.engines_end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        if memory is not None:
            self._memory = memory
        self._free = list(range(slots))[::-1]
        self._answers: dict[int, AsyncResult] = {}
        self._sending = BoundedSemaphore()  # a second greenlet may not wait for the same socket
        gevent.spawn(self._receive)

    def send(self, kind: bytes, content: bytes, slot: int = 0) -> None:
        """Send a message, which without a slot has no answer."""
        with self._sending:
            self._socket.send(HEAD.pack(kind, slot) + content)

    def ask(
        self, kind: bytes, content: bytes, timeout_seconds: float, picture: bytes | None = None
    ) -> bytes:
        """Send a message and return its answer.

        Raises:
            Refusal: The engine refuses, or does not answer in time.
        """
        if not self._free:
            raise Refusal(503, FULL)
        slot = self._free.pop()  # until the engine has answered, also if nobody waits any more
        if picture is not None:
            self._memory[slot * PICTURE_BYTES : (slot + 1) * PICTURE_BYTES] = picture
        answer = self._answers[slot] = AsyncResult()
        self.send(kind, content, slot)
        try:
            status, content = answer.get(timeout=timeout_seconds)
        except gevent.Timeout:
            raise Refusal(503, LATE) from None
        if status != 200:
            raise Refusal(status, content.decode())
        return content

    def _receive(self) -> None:
        with suppress(OSError):
            while message := self._socket.recv(MAX_MESSAGE_BYTES):
                slot, status = ANSWER.unpack_from(message)
                self._free.append(slot)
                self._answers.pop(slot).set((status, message[ANSWER.size :]))
        os._exit(1)  # the engine has ended, or has given this worker up
