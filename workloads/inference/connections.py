"""The listening socket, and the thread that takes connections from it."""

from __future__ import annotations

import resource
import select
import socket
import threading
import time
from collections.abc import Callable

from workloads.common.errors import UsageError

BACKLOG = 1024
RESERVED_DESCRIPTORS = 64
FULL_PAUSE_SECONDS = 0.01
NO_DESCRIPTOR_PAUSE_SECONDS = 0.1


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on ``host`` and ``port`` (0: a free one).

    Raises:
        UsageError: The address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error}); name another with --host and --port"
        ) from error


def raise_open_files_limit(connections: int) -> int:
    """Raise the limit of open files if needed; return how many connections it then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - RESERVED_DESCRIPTORS))


class Acceptor:
    """Accepts connections on a thread and hands each over.

    One acceptor for all front ends: where each of them accepts by itself, whichever wakes first
    takes all of a burst, and keep-alive connections stay where they are.
    """

    def __init__(
        self,
        listener: socket.socket,
        max_connections: int,
        open_connections: Callable[[], int],
        on_crowded: Callable[[], None],
        hand_over: Callable[[socket.socket], None],
    ) -> None:
        """Prepare; ``start`` accepts.

        Args:
            listener: The listening socket; it is closed by ``stop``.
            max_connections: Open connections; further ones wait in the kernel's queue.
            open_connections: Returns how many are open.
            on_crowded: Called again and again while some wait there, so that room is made.
            hand_over: Takes an accepted, non-blocking connection.
        """
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        self._waker, self._woken = socket.socketpair()
        self._max_connections = raise_open_files_limit(max_connections)
        self._open_connections = open_connections
        self._on_crowded = on_crowded
        self._hand_over = hand_over
        self._stopping = False
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """Hand over what has already connected, then close the listening socket.

        Closing it at once would reset connections that the kernel has accepted for us. A second
        call changes nothing.
        """
        if self._stopping:
            return
        self._stopping = True
        if self._thread.is_alive():
            self._waker.send(b".")
            self._thread.join()
            for _ in range(BACKLOG):
                if not self._accept_one():
                    break
        for each in (self._listener, self._waker, self._woken):
            each.close()

    def _accept_all(self) -> None:
        poll = select.poll()
        for each in (self._listener, self._woken):
            poll.register(each, select.POLLIN)
        while not self._stopping:
            poll.poll()
            if self._open_connections() >= self._max_connections:
                self._on_crowded()
                time.sleep(FULL_PAUSE_SECONDS)
            else:
                self._accept_one()

    def _accept_one(self) -> bool:
        """Accept a connection if there is one; return whether there was."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError:
            # No descriptor or no memory is left: what is there must end first.
            time.sleep(NO_DESCRIPTOR_PAUSE_SECONDS)
            return False
        connection.setblocking(False)
        self._hand_over(connection)
        return True
