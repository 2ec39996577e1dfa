"""The GPU process's side of each front end: submissions in, answers out, the process itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from workloads.inference.batcher import Batcher, Outcome, Piece
from workloads.inference.front_end import FrontEnd, FrontEndSettings
from workloads.inference.front_end_messages import (
    CONNECTION,
    DRAIN,
    READY,
    STATE,
    RecordReader,
    pack_records,
)
from workloads.inference.http_app import ServerState
from workloads.inference.image_service import ABANDON
from workloads.inference.outbox import Outbox
from workloads.inference.shared_block import FrontEndRegion, SharedBlock

PROCESS_SCRIPT = Path(__file__).with_name("front_end_process.py")
START_SECONDS = 60.0
# Six times as long as an event loop takes to show itself again.
SILENT_SECONDS = 3.0
# NumPy's libraries start a thread for each core in every process, and nobody here uses them.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)  # fmt: skip


class SlotWork:
    """Turns records of a front end into pieces of work, and their outcomes into records."""

    def __init__(self, region: FrontEndRegion, batcher: Batcher, synthetic: np.ndarray) -> None:
        """Read pictures from ``region`` and write answers there.

        Args:
            region: The front end's memory.
            batcher: Takes the pieces.
            synthetic: uint8 of shape (max_batch, 224, 224, 3), for synthetic batches.
        """
        self._region = region
        self._batcher = batcher
        self._synthetic = synthetic
        self._pending: dict[int, Piece] = {}

    def submit_all(self, records: Iterable[tuple[int, int]]) -> None:
        """Queue the work of records (slot, synthetic images), in bulk."""
        now = time.monotonic()
        pieces: list[Piece] = []
        for slot, images in records:
            if images == ABANDON:
                abandoned = self._pending.get(slot)
                if abandoned is not None:
                    abandoned.abandoned = True
                continue
            pictures = self._synthetic[:images] if images else self._region.images[slot : slot + 1]
            piece = Piece(self, slot, pictures, now)
            self._pending[slot] = piece
            pieces.append(piece)
        self._batcher.submit(pieces)

    def deliver(self, pieces: Sequence[Piece]) -> None:
        """Write the answers of ``pieces`` and announce them."""
        for piece in pieces:
            del self._pending[piece.slot]
            if piece.outcome is Outcome.DONE:
                row = piece.outputs[0]
                self._region.outputs[piece.slot, : len(row)] = row
                self._region.timings[piece.slot] = (
                    piece.started_seconds, piece.ended_seconds, piece.batch_images,
                )  # fmt: skip
        self.announce([(piece.slot, int(piece.outcome)) for piece in pieces])

    def announce(self, results: list[tuple[int, int]]) -> None:
        """Tell the front end which slots have an outcome."""
        raise NotImplementedError

    def abandon_all(self) -> None:
        """Give up whatever is pending: its front end is gone."""
        for piece in list(self._pending.values()):
            piece.abandoned = True


class LocalFrontEnd(SlotWork):
    """The front end of a server that is one process, on a thread of its own.

    Attributes:
        responsive: Always: its thread stops only with ours.
    """

    responsive = True

    def __init__(
        self,
        block: SharedBlock,
        batcher: Batcher,
        synthetic: np.ndarray,
        settings: FrontEndSettings,
    ) -> None:
        """Start the thread."""
        super().__init__(block.front_ends[0], batcher, synthetic)
        self._handed_over = 0
        self._front_end = FrontEnd(0, block, self, settings)
        self._thread = threading.Thread(target=self._front_end.run, name="http", daemon=True)
        self._thread.start()

    def submit(self, slot: int, images: int) -> None:
        """Queue one record; the decoding threads call it."""
        self.submit_all([(slot, images)])

    def announce(self, results: list[tuple[int, int]]) -> None:
        """Wake the event loop with the results."""
        self._front_end.loop.call_soon_threadsafe(self._front_end.answered, results)

    @property
    def connections(self) -> int:
        """Open connections."""
        return self._handed_over - int(self._region.gauges[FrontEndRegion.CLOSED])

    def hand_over(self, connection: socket.socket) -> bool:
        """Give a connection to the event loop, which always takes it."""
        self._handed_over += 1
        self._front_end.loop.call_soon_threadsafe(self._front_end.adopt, connection)
        return True

    def set_state(self, state: ServerState) -> None:
        """Tell how the server is."""
        self._front_end.loop.call_soon_threadsafe(self._front_end.set_state, state)

    def begin_drain(self, timeout_seconds: float) -> None:
        """Let the front end answer what has arrived, and end."""
        self._front_end.loop.call_soon_threadsafe(self._front_end.begin_drain, timeout_seconds)

    def join(self, timeout_seconds: float) -> str | None:
        """Wait for the end; as a thread it cannot be ended, so there is nothing to tell."""
        self._thread.join(timeout_seconds)
        return None

    @property
    def unanswered(self) -> int:
        """Requests cut off by the end of the drain."""
        return int(self._region.gauges[FrontEndRegion.CUT_OFF])


class FrontEndProcess(SlotWork):
    """A front end in a process of its own.

    Nothing here waits for the process to read: it may be stopped.
    """

    def __init__(
        self,
        index: int,
        block: SharedBlock,
        batcher: Batcher,
        synthetic: np.ndarray,
        settings: FrontEndSettings,
        max_connections: int,
    ) -> None:
        """Start the process; ``wait_until_ready`` waits for it."""
        super().__init__(block.front_ends[index], batcher, synthetic)
        self.index = index
        self.alive = True
        self._records = RecordReader()
        self._handed_over = 0
        self.work, work = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answers = Outbox(self.work, self._notice_end)
        self._orders = Outbox(self._control, self._notice_end)
        with work, control:
            descriptors = (work.fileno(), control.fileno(), block.descriptor)
            self._process = subprocess.Popen(
                (sys.executable, str(PROCESS_SCRIPT), *map(str, descriptors)),
                pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
            )  # fmt: skip
        first_message = {
            "index": index,
            "shape": block.shape.as_dict(),
            "limits": settings.as_dict(),
            "max_connections": max_connections,
        }
        self._control.send(json.dumps(first_message).encode())

    def wait_until_ready(self) -> None:
        """Wait until the process can take connections.

        Raises:
            RuntimeError: It ended, or took too long.
        """
        self._control.settimeout(START_SECONDS)
        try:
            ready = self._control.recv(1) == READY
        except OSError:
            ready = False
        self._control.settimeout(None)
        if not ready:
            raise RuntimeError(f"front end {self.index} did not start; its messages are above")

    def receive(self, data: bytes) -> None:
        """Queue the records in ``data``, as read from ``work``."""
        self.submit_all(self._records.read(data))

    def announce(self, results: list[tuple[int, int]]) -> None:
        """Send the results over the work stream."""
        self._answers.send(pack_records(results))

    def flush(self) -> None:
        """Send what the process could not take earlier."""
        self._answers.flush()
        self._orders.flush()

    @property
    def responsive(self) -> bool:
        """Whether its event loop has shown itself lately; a stopped process does not."""
        return time.monotonic() - float(self._region.seen_seconds[0]) < SILENT_SECONDS

    @property
    def connections(self) -> int:
        """Open connections."""
        return self._handed_over - int(self._region.gauges[FrontEndRegion.CLOSED])

    def hand_over(self, connection: socket.socket) -> bool:
        """Send a connection over and close it here; return False where it cannot go now."""
        if not self._orders.send_descriptor(CONNECTION, connection.fileno()):
            return False
        self._handed_over += 1
        connection.close()
        return True

    def set_state(self, state: ServerState) -> None:
        """Tell how the server is."""
        self._orders.send(STATE + json.dumps(asdict(state)).encode())

    def begin_drain(self, timeout_seconds: float) -> None:
        """Let the front end answer what has arrived, and end."""
        self._orders.send(DRAIN + json.dumps(timeout_seconds).encode())

    def join(self, timeout_seconds: float) -> str | None:
        """Wait for the end of the process; where it does not come end it, and return a sentence."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            gauges = self._region.gauges
            gauges[FrontEndRegion.CUT_OFF] = gauges[FrontEndRegion.INSIDE]
            return (
                f"{self._name()} did not end by itself and was killed with {self.connections} "
                "connections open"
            )
        return None

    @property
    def unanswered(self) -> int:
        """Requests cut off by the end of the drain."""
        return int(self._region.gauges[FrontEndRegion.CUT_OFF])

    def bury(self) -> str:
        """Clean up after a process that ended by itself; return what happened as a sentence.

        Its pictures stay where they are, since the device may still read them: the region is not
        used again.
        """
        self.alive = False
        self.abandon_all()
        self.join(1.0)
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        gauges = self._region.gauges
        gauges[FrontEndRegion.INSIDE] = gauges[FrontEndRegion.DECODING] = 0
        gauges[FrontEndRegion.CLOSED] = self._handed_over
        return f"{self._name()} ended unexpectedly ({how})"

    def _name(self) -> str:
        return f"front end {self.index} (pid {self._process.pid})"

    def _notice_end(self) -> None:
        # Who reads the work stream notices too, and says so.
        self.alive = False
