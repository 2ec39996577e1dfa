"""All front ends of a server, seen from the GPU process: one thread, or processes of their own."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus

import numpy as np

from workloads.inference.batcher import Batcher
from workloads.inference.connections import Acceptor
from workloads.inference.front_end import FrontEndSettings
from workloads.inference.front_end_links import FrontEndProcess, LocalFrontEnd
from workloads.inference.front_end_messages import WORK_BYTES
from workloads.inference.http_app import ServerState
from workloads.inference.http_messages import RETRY_AFTER, answer_head
from workloads.inference.image_input import IMAGE_SIZE
from workloads.inference.shared_block import SharedBlock

# The end of a drain's time is kept for ending: front ends, device, result file, interpreter.
SPARE_SHARE = 0.4
MAX_SPARE_SECONDS = 4.0
# A front end that has not ended by itself so long after its own time is killed; with little to
# spare after half of that.
KILL_SECONDS = 1.0
# After a failure there is no time to keep to, and ending takes a moment on a busy machine.
FAILED_END_SECONDS = 3.0
# How long a connection waits for a front end that is alive and has too many to read, and between
# two tries.
BURST_SECONDS = 0.25
RETRY_SECONDS = 0.002
RECEIVE_SECONDS = 0.2


class FrontEnds:
    """Starts the front ends, gives them connections, and takes their pictures.

    Attributes:
        port: The port that is listened on.
        losses: A sentence for each front end that ended by itself.
        failure: Why nobody is left to answer; None while somebody is.
    """

    def __init__(
        self,
        listener: socket.socket,
        processes: int,
        block: SharedBlock,
        batcher: Batcher,
        settings: FrontEndSettings,
        max_connections: int,
    ) -> None:
        """Start ``processes`` front ends, or with 0 one on a thread of this process.

        Raises:
            RuntimeError: A front end did not start.
        """
        synthetic = np.random.default_rng(0).integers(
            0, 256, (settings.max_batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
        )
        self.losses: list[str] = []
        self.failure: str | None = None
        self._block = block
        self._draining = False
        self._next = 0
        self._receiver: threading.Thread | None = None
        self._members: Sequence[LocalFrontEnd | FrontEndProcess]
        if processes:
            self._members = [
                FrontEndProcess(index, block, batcher, synthetic, settings, max_connections)
                for index in range(processes)
            ]
            self._start_processes()
        else:
            self._members = [LocalFrontEnd(block, batcher, synthetic, settings)]
        self._acceptor = Acceptor(
            listener, max_connections, self._open_connections, self._note_crowd, self._hand_over
        )
        self.port = self._acceptor.port
        self._acceptor.start()

    def set_state(self, state: ServerState) -> None:
        """Tell every front end how the server is."""
        for member in self._living():
            member.set_state(state)

    def drain(self, timeout_seconds: float) -> int:
        """Answer what has arrived, take nothing new, end; return how many were left unanswered.

        Blocks for less than ``timeout_seconds``, or with 0 for FAILED_END_SECONDS, also where a
        front end is stopped; a second call changes nothing.
        """
        if not self._draining:
            self._acceptor.stop()
            self._draining = True
            spare = min(MAX_SPARE_SECONDS, SPARE_SHARE * timeout_seconds)
            own_seconds = timeout_seconds - spare
            kill_seconds = min(KILL_SECONDS, spare / 2) if timeout_seconds else FAILED_END_SECONDS
            end_seconds = time.monotonic() + own_seconds + kill_seconds
            for member in self._living():
                member.begin_drain(own_seconds)
            for member in self._members:
                killed = member.join(max(0.0, end_seconds - time.monotonic()))
                self.losses += [killed] if killed else []
                member.abandon_all()
            if self._receiver is not None:
                self._receiver.join()
        return sum(member.unanswered for member in self._members)

    def _start_processes(self) -> None:
        try:
            for member in self._members:
                member.wait_until_ready()
                self._block.engine.alive[member.index] = 1
        except RuntimeError:
            for member in self._members:
                member.join(0.0)
            raise
        self._receiver = threading.Thread(target=self._receive_all, name="receive", daemon=True)
        self._receiver.start()

    def _living(self) -> list[LocalFrontEnd | FrontEndProcess]:
        return [
            member for member in self._members if isinstance(member, LocalFrontEnd) or member.alive
        ]

    def _open_connections(self) -> int:
        return sum(member.connections for member in self._members)

    def _note_crowd(self) -> None:
        self._block.engine.crowded_seconds[0] = time.monotonic()

    def _hand_over(self, connection: socket.socket) -> None:
        """Give a connection to one of the front ends, or turn it away.

        Hundreds may come within milliseconds, more than a living front end's socket takes before
        it reads: what none can take now has a while until one can.
        """
        end_seconds = time.monotonic() + BURST_SECONDS
        self._next += 1
        while not self._handed_over(connection):
            if time.monotonic() > end_seconds or not any(m.responsive for m in self._living()):
                _turn_away(connection)
                return
            time.sleep(RETRY_SECONDS)

    def _handed_over(self, connection: socket.socket) -> bool:
        """Give a connection to whoever has the fewest; in turn, where that is several.

        Who has shown no sign of life lately comes last, and who cannot take it is passed over.
        """
        living = self._living()
        first = self._next % max(1, len(living))
        ranked = sorted(
            living[first:] + living[:first],
            key=lambda member: (not member.responsive, member.connections),
        )
        return any(member.hand_over(connection) for member in ranked)

    def _receive_all(self) -> None:
        """Take what the processes submit, and notice when one has ended; on its own thread."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(member.work, selectors.EVENT_READ, member)
            while selector.get_map():
                for key, _ in selector.select(RECEIVE_SECONDS):
                    member = key.data
                    if not self._receive(member):
                        selector.unregister(member.work)
                        self._block.engine.alive[member.index] = 0
                        if not self._draining:
                            self._lose(member)
                for member in self._members:
                    member.flush()

    @staticmethod
    def _receive(member: FrontEndProcess) -> bool:
        """Take what has come from one process; return whether it is still there."""
        try:
            data = member.work.recv(WORK_BYTES)
        except OSError:
            data = b""
        if data:
            member.receive(data)
        return bool(data)

    def _lose(self, member: FrontEndProcess) -> None:
        sentence = member.bury()
        left = len(self._living())
        if left:
            self.losses.append(f"{sentence}; the server goes on with {left}")
        else:
            self.failure = f"{sentence}, and no other is left to answer; start the server again"
            self.losses.append(sentence)


def _turn_away(connection: socket.socket) -> None:
    """Answer 503 and close; nobody is there to read the request."""
    body = json.dumps({"error": "no front end takes connections now; try again later"}).encode()
    head = answer_head(
        HTTPStatus.SERVICE_UNAVAILABLE, len(body) + 1, "application/json", (RETRY_AFTER,), "1.1",
        last=True,
    )  # fmt: skip
    # A client that has gone, or sends so much that the answer is lost, sees a closed connection.
    with connection, contextlib.suppress(OSError):
        connection.send(head + body + b"\n")
        connection.shutdown(socket.SHUT_WR)
