"""Gathers requests that arrive together into batches, on the one thread that owns the GPU.

Everything that touches the device happens on that thread: load, warm-up, capture and inference
(CUDA graphs of torch.compile are bound to the thread that recorded them, and two threads that
launch on one stream only interleave). Request threads put work on a bounded queue and wait.

Adaptive micro-batching: the thread takes what is queued. If every request inside the server is
already in that batch, it goes at once; only while others are known to be on their way (announced,
still being decoded) does it wait for them, at most ``max_delay_seconds``. So a lone client never
pays for batching.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Answer = TypeVar("Answer")


class QueueFull(Exception):
    """As much work waits as may wait; try again later."""


class BatcherClosed(Exception):
    """The batcher takes no more work."""


@dataclass(frozen=True)
class Inference:
    """What became of one piece of work.

    Attributes:
        outputs: One entry an image, as the infer function returned it.
        queue_seconds: From being queued to the start of its batch.
        compute_seconds: The batch itself: copy to the device, forward pass, copy back.
        batch_images: Images in that batch, its neighbours' included.
    """

    outputs: np.ndarray
    queue_seconds: float
    compute_seconds: float
    batch_images: int


@dataclass
class _Piece:
    images: np.ndarray
    queued_seconds: float
    answer: Future[Inference] = field(default_factory=Future)


class GpuThread:
    """One thread that runs given calls in order, then batches until it is closed."""

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
        infer: Callable[[Sequence[np.ndarray]], np.ndarray],
        *,
        max_batch: int,
        max_delay_seconds: float,
        queue_size: int,
    ) -> None:
        """Prepare; ``serve`` does the work.

        Args:
            infer: Takes arrays of shape (n_i, 224, 224, 3), at most ``max_batch`` images in sum,
                and returns one row of outputs an image, in order.
            max_batch: The most images in one batch.
            max_delay_seconds: The longest that a batch waits for requests still being decoded.
            queue_size: The most images that may wait.
        """
        self._infer = infer
        self._max_batch = max_batch
        self._max_delay_seconds = max_delay_seconds
        self._queue_size = queue_size
        self._waiting: deque[_Piece] = deque()
        self._waiting_images = 0
        self._announced = 0
        self._closed = False
        self._changed = threading.Condition()
        self.batch_sizes: dict[int, int] = {}

    @property
    def waiting_images(self) -> int:
        """How many images wait at this moment."""
        return self._waiting_images

    @contextmanager
    def announced(self) -> Iterator[Callable[[np.ndarray], Future[Inference]]]:
        """Tell that a request is inside the server; it gets the function to queue its images with.

        From here until it has queued them (or failed to) a batch may wait for it.
        """
        arrived = False

        def arrive() -> None:
            nonlocal arrived
            with self._changed:
                if not arrived:
                    arrived = True
                    self._announced -= 1
                    self._changed.notify()

        def submit(images: np.ndarray) -> Future[Inference]:
            answer = self.submit(images)
            arrive()
            return answer

        with self._changed:
            self._announced += 1
        try:
            yield submit
        finally:
            arrive()

    def submit(self, images: np.ndarray) -> Future[Inference]:
        """Queue ``images``, uint8 of shape (n, 224, 224, 3) with n up to ``max_batch``.

        Raises:
            QueueFull: ``queue_size`` images wait already.
            BatcherClosed: ``close`` was called.
        """
        piece = _Piece(images, time.monotonic())
        with self._changed:
            if self._closed:
                raise BatcherClosed("the server is shutting down")
            if self._waiting and self._waiting_images + len(images) > self._queue_size:
                raise QueueFull(f"{self._waiting_images} images wait already; try again later")
            self._waiting.append(piece)
            self._waiting_images += len(images)
            self._changed.notify()
        return piece.answer

    def serve(self) -> None:
        """Answer batch after batch until ``close``; what is queued by then is still answered.

        Raises:
            Exception: What the infer function raised. Every waiting request has got it too: after
                a failed kernel the device cannot be trusted.
        """
        while batch := self._next_batch():
            try:
                self._answer(batch)
            except Exception as error:
                self._fail_all(batch, error)
                raise

    def close(self) -> None:
        """Take no more work; ``serve`` returns when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _next_batch(self) -> list[_Piece]:
        """Wait for work and return it; empty when closed and done."""
        batch: list[_Piece] = []
        with self._changed:
            while not batch:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                self._changed.wait_for(self._nobody_to_wait_for, self._max_delay_seconds)
                batch = self._take()
        return batch

    def _nobody_to_wait_for(self) -> bool:
        return self._announced == 0 or self._waiting_images >= self._max_batch

    def _take(self) -> list[_Piece]:
        """Take as many pieces as fit into one batch, without those nobody waits for any more."""
        batch: list[_Piece] = []
        images = 0
        while self._waiting and images + len(self._waiting[0].images) <= self._max_batch:
            piece = self._waiting.popleft()
            self._waiting_images -= len(piece.images)
            if piece.answer.set_running_or_notify_cancel():
                images += len(piece.images)
                batch.append(piece)
        return batch

    def _answer(self, batch: list[_Piece]) -> None:
        start_seconds = time.monotonic()
        outputs = self._infer([piece.images for piece in batch])
        compute_seconds = time.monotonic() - start_seconds
        images = len(outputs)
        self.batch_sizes[images] = self.batch_sizes.get(images, 0) + 1
        position = 0
        for piece in batch:
            count = len(piece.images)
            piece.answer.set_result(
                Inference(
                    outputs=outputs[position : position + count],
                    queue_seconds=start_seconds - piece.queued_seconds,
                    compute_seconds=compute_seconds,
                    batch_images=images,
                )
            )
            position += count

    def _fail_all(self, batch: list[_Piece], error: Exception) -> None:
        with self._changed:
            self._closed = True
            batch = [*batch, *self._waiting]
            self._waiting.clear()
            self._waiting_images = 0
        for piece in batch:
            if not piece.answer.done():
                piece.answer.set_exception(error)
