"""All front ends of a server, seen from the GPU process: one thread, or processes of their own."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Sequence

import numpy as np

from workloads.inference.batcher import Batcher
from workloads.inference.connections import Acceptor
from workloads.inference.front_end import FrontEndSettings
from workloads.inference.front_end_links import FrontEndProcess, LocalFrontEnd
from workloads.inference.front_end_messages import WORK_BYTES
from workloads.inference.http_app import ServerState
from workloads.inference.image_input import IMAGE_SIZE
from workloads.inference.shared_block import SharedBlock

# A front end ends its drain by itself; past its time and this it is ended.
DRAIN_MARGIN_SECONDS = 5.0
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
            listener, max_connections, self._open_connections, self._hand_over
        )
        self.port = self._acceptor.port
        self._acceptor.start()

    def set_state(self, state: ServerState) -> None:
        """Tell every front end how the server is."""
        for member in self._living():
            member.set_state(state)

    def drain(self, timeout_seconds: float) -> int:
        """Answer what has arrived, take nothing new, end; return how many were left unanswered.

        Blocks for ``timeout_seconds`` and a little more at the most; a second call changes nothing.
        """
        if not self._draining:
            self._acceptor.stop()
            self._draining = True
            end_seconds = time.monotonic() + timeout_seconds + DRAIN_MARGIN_SECONDS
            for member in self._living():
                member.begin_drain(timeout_seconds)
            for member in self._members:
                member.join(max(0.0, end_seconds - time.monotonic()))
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

    def _hand_over(self, connection: socket.socket) -> None:
        """Give a connection to whoever has the fewest; in turn, where that is several."""
        living = self._living()
        if not living:
            connection.close()
            return
        self._next += 1
        turned = living[self._next % len(living) :] + living[: self._next % len(living)]
        min(turned, key=lambda member: member.connections).hand_over(connection)

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
