"""Gathers images into batches, and keeps up to two batches on the device.

The GPU belongs to one thread (graphs and torch.compile are bound to the thread that recorded them,
and two threads that launch on one stream only interleave). That thread launches batches; a second
one waits for each to be done and announces its answers, so that batch k + 1 is filled and copied
while the device works on batch k.

Adaptive micro-batching: the thread takes what is queued. If every request inside the server is
already queued, the batch goes at once; only while others are known to be on their way (still being
decoded) does it wait for them, at most ``max_delay_seconds`` after its oldest image was queued. So
a lone client never pays for batching.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import numpy as np

from workloads.inference.shared_block import EngineRegion

Answer = TypeVar("Answer")
BATCHES_IN_FLIGHT = 2


class Outcome(IntEnum):
    """What became of one piece of work."""

    DONE = 0
    QUEUE_FULL = 1
    CLOSED = 2
    FAILED = 3
    ABANDONED = 4


class Owner(Protocol):
    """Who submitted a piece and gets it back."""

    def deliver(self, pieces: Sequence[Piece]) -> None:
        """Take back pieces that have an outcome; called on any thread."""


@dataclass(eq=False)
class Piece:
    """One piece of work and, in the end, what became of it.

    Attributes:
        owner: Gets it back.
        slot: The owner's name for it.
        images: uint8 of shape (n, 224, 224, 3) with n up to ``max_batch``.
        queued_seconds: When it was submitted (CLOCK_MONOTONIC).
        abandoned: Nobody waits for it any more; set by any thread.
        outcome: What became of it; None until then.
        outputs: One row an image, as the model returned it.
        started_seconds: When its batch was begun.
        ended_seconds: When the answer of its batch was there.
        batch_images: Images in its batch, its neighbors' included.
    """

    owner: Owner
    slot: int
    images: np.ndarray
    queued_seconds: float
    abandoned: bool = False
    outcome: Outcome | None = None
    outputs: np.ndarray | None = None
    started_seconds: float = 0.0
    ended_seconds: float = 0.0
    batch_images: int = 0


class Model(Protocol):
    """A device that works on one batch while the next is prepared."""

    def start(self, images: Sequence[np.ndarray]) -> Any:
        """Begin a batch and return what ``finish`` needs; on the GPU thread."""

    def finish(self, ticket: Any) -> np.ndarray:
        """Wait for a batch, in the order of their starts, and return one row an image."""


class GpuThread:
    """One thread that runs given calls in order."""

    def __init__(self) -> None:
        """Start the thread; it waits for calls."""
        self._calls: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Answer]) -> Answer:
        """Run ``function`` on the thread and return what it returns, or raise what it raises."""
        return self.start(function).result()

    def start(self, function: Callable[[], Answer]) -> Future[Answer]:
        """Run ``function`` on the thread; its end can be waited for."""
        answer: Future[Answer] = Future()
        self._calls.put((function, answer))
        return answer

    def close(self, timeout_seconds: float) -> None:
        """End the thread after its present call."""
        self._calls.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            function, answer = entry
            try:
                answer.set_result(function())
            # Carried over to the thread that asked for the call, whatever it is.
            except BaseException as error:
                answer.set_exception(error)


class Batcher:
    """A bounded queue of images and the loop that answers them in batches."""

    def __init__(
        self,
        region: EngineRegion,
        *,
        max_batch: int,
        max_delay_seconds: float,
        queue_size: int,
        decoding: Callable[[], int],
    ) -> None:
        """Prepare; ``serve`` does the work.

        Args:
            region: Where the waiting images and the batch sizes are counted.
            max_batch: The most images in one batch.
            max_delay_seconds: The longest that a batch waits for requests still being decoded.
            queue_size: The most images that may wait.
            decoding: Returns how many requests are being decoded at this moment.
        """
        self._region = region
        self._max_batch = max_batch
        self._max_delay_seconds = max_delay_seconds
        self._queue_size = queue_size
        self._decoding = decoding
        self._waiting: deque[Piece] = deque()
        self._waiting_images = 0
        self._in_flight = 0
        self._gathering = False
        self._closed = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._launched: queue.SimpleQueue[tuple[list[Piece], Any] | None] = queue.SimpleQueue()

    def submit(self, pieces: Sequence[Piece]) -> None:
        """Queue ``pieces``; each is delivered to its owner in the end, a refused one at once."""
        refused: list[Piece] = []
        with self._changed:
            for piece in pieces:
                if self._closed:
                    piece.outcome = Outcome.CLOSED if self._failure is None else Outcome.FAILED
                elif self._waiting and self._waiting_images + len(piece.images) > self._queue_size:
                    piece.outcome = Outcome.QUEUE_FULL
                else:
                    self._waiting.append(piece)
                    self._count_waiting(len(piece.images))
                    continue
                refused.append(piece)
            # While a batch gathers, waking its thread for each image would only cost: the thread
            # takes the interpreter from those who decode.
            if not self._gathering or self._nobody_to_wait_for():
                self._changed.notify()
        _deliver(refused)

    def serve(self, model: Model) -> None:
        """Let ``model`` answer batch after batch until ``close``, and what is queued by then.

        Raises:
            Exception: What the model raised. Every waiting request has failed with it: after a
                failed kernel the device cannot be trusted.
        """
        completer = threading.Thread(
            target=self._complete_all, args=(model,), name="answers", daemon=True
        )
        completer.start()
        while batch := self._next_batch():
            started_seconds = time.monotonic()
            for piece in batch:
                piece.started_seconds = started_seconds
            try:
                ticket = model.start([piece.images for piece in batch])
            except Exception as error:
                self._fail(batch, error)
                break
            self._launched.put((batch, ticket))
        self._launched.put(None)
        completer.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Take no more work; ``serve`` returns when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _next_batch(self) -> list[Piece]:
        """Wait for work and for room on the device; return no piece when closed and done."""
        batch: list[Piece] = []
        dropped: list[Piece] = []
        with self._changed:
            while not batch:
                self._changed.wait_for(self._can_launch)
                if self._failure is not None or not self._waiting:
                    break
                self._gather()
                batch = self._take(dropped)
                self._in_flight += bool(batch)
        _deliver(dropped)
        return batch

    def _can_launch(self) -> bool:
        if self._failure is not None:
            return True
        return self._in_flight < BATCHES_IN_FLIGHT and bool(self._waiting or self._closed)

    def _gather(self) -> None:
        """Wait for those still being decoded, as long as the oldest image may be kept waiting."""
        self._gathering = True
        deadline = self._waiting[0].queued_seconds + self._max_delay_seconds
        while not self._nobody_to_wait_for():
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0 or self._closed:
                break
            self._changed.wait(left_seconds)
        self._gathering = False

    def _nobody_to_wait_for(self) -> bool:
        return self._waiting_images >= self._max_batch or self._decoding() == 0

    def _take(self, dropped: list[Piece]) -> list[Piece]:
        """Take as many pieces as fit into one batch; those nobody waits for are dropped."""
        batch: list[Piece] = []
        images = 0
        while self._waiting and images + len(self._waiting[0].images) <= self._max_batch:
            piece = self._waiting.popleft()
            self._count_waiting(-len(piece.images))
            if piece.abandoned:
                piece.outcome = Outcome.ABANDONED
                dropped.append(piece)
            else:
                images += len(piece.images)
                batch.append(piece)
        return batch

    def _count_waiting(self, images: int) -> None:
        self._waiting_images += images
        self._region.waiting[0] = self._waiting_images

    def _complete_all(self, model: Model) -> None:
        """Wait for each launched batch and announce its answers; on a thread of its own."""
        while (entry := self._launched.get()) is not None:
            batch, ticket = entry
            try:
                outputs = model.finish(ticket)
            except Exception as error:
                self._fail(batch, error)
                continue
            with self._changed:
                self._in_flight -= 1
                if not self._gathering:
                    self._changed.notify()
            self._announce(batch, outputs)

    def _announce(self, batch: list[Piece], outputs: np.ndarray) -> None:
        ended_seconds = time.monotonic()
        images = len(outputs)
        self._region.batches[images] += 1
        position = 0
        for piece in batch:
            piece.outputs = outputs[position : position + len(piece.images)]
            position += len(piece.images)
            piece.ended_seconds = ended_seconds
            piece.batch_images = images
            piece.outcome = Outcome.DONE
        _deliver(batch)

    def _fail(self, batch: list[Piece], error: Exception) -> None:
        with self._changed:
            self._closed = True
            self._failure = self._failure or error
            failed = [*batch, *self._waiting]
            self._waiting.clear()
            self._count_waiting(-self._waiting_images)
            self._changed.notify()
        for piece in failed:
            piece.outcome = Outcome.FAILED
        _deliver(failed)


def _deliver(pieces: Sequence[Piece]) -> None:
    """Give pieces back, those of one owner together."""
    by_owner = sorted(pieces, key=lambda piece: id(piece.owner))
    for owner, own in groupby(by_owner, key=attrgetter("owner")):
        owner.deliver(list(own))
