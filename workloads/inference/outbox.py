"""Sending to a process that may be stopped, without ever waiting for it.

A socket takes a few hundred messages that nobody reads. The threads of the GPU process serve every
front end, so none of them may block on one that SIGSTOP, a debugger or swapping holds.
"""

from __future__ import annotations

import socket
import threading
from array import array
from collections import deque
from collections.abc import Callable


class Outbox:
    """Messages to one process; what its socket does not take now waits here, in order."""

    def __init__(self, connection: socket.socket, on_gone: Callable[[], None]) -> None:
        """Send over ``connection``, a stream or one of packets; any thread may.

        Args:
            connection: Our end.
            on_gone: Called when the other end is closed; nothing is sent from then on.
        """
        self._connection = connection
        self._on_gone = on_gone
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send ``message`` after those that wait, now or by a later ``flush``."""
        with self._lock:
            self._waiting.append(message)
            self._send_waiting()

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        if self._waiting:
            with self._lock:
                self._send_waiting()

    def send_descriptor(self, message: bytes, descriptor: int) -> bool:
        """Send an open file along with ``message``; return whether it is on its way.

        Nothing is kept: an open file that cannot go now has other ways to go.
        """
        with self._lock:
            self._send_waiting()
            if self._waiting:
                return False
            try:
                # Not socket.send_fds: in Python 3.11 it takes flags and drops them.
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))
                self._connection.sendmsg([message], [rights], socket.MSG_DONTWAIT)
            except ConnectionError:
                self._on_gone()
                return False
            except OSError:
                # Full (BlockingIOError), or too many open files are on their way (ETOOMANYREFS).
                return False
        return True

    def _send_waiting(self) -> None:
        while self._waiting:
            message = self._waiting[0]
            try:
                sent = self._connection.send(message, socket.MSG_DONTWAIT)
            except ConnectionError:
                self._waiting.clear()
                self._on_gone()
                return
            except OSError:
                return
            if sent < len(message):
                self._waiting[0] = message[sent:]
            else:
                self._waiting.popleft()
