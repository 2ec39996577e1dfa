"""The engine: takes pictures from the web workers, gathers batches, and answers.

A web worker makes two connections to the engine and memory for its pictures, and sends the engine
its ends through the one socket that all workers inherit (the door). Nothing has a name, and whoever
dies closes his end, so there is nothing to clean up. On a connection many requests may wait at
once: each message names a slot, which is taken until its one answer has come.

=======  ==========================  =======================================================
message  content                     answered with
=======  ==========================  =======================================================
``p``    (the slot of the memory)    ``ROW`` with classes, or a refusal
``s``    uint32: how many synthetic  the same
``r``    ``RECORD``, some            nothing: finished requests are counted
``q``    a question                  its answer
``e``    uint32: unanswered ones     nothing: the worker ends in good order
=======  ==========================  =======================================================

The last two come on the second connection, which has a thread of its own: a batch may take seconds.

Adaptive micro-batching: the engine takes what is queued. Only while pictures are known to be on
their way (being decoded at this moment) does a batch wait for them, at most ``max_delay_seconds``
after its oldest picture was queued. So a lone client never pays for batching, and batches grow with
the load, since requests queue up while the device works.
"""

from __future__ import annotations

import argparse
import mmap
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from workloads.inference.image_input import IMAGE_SIZE
from workloads.inference.server_statistics import ENDPOINTS, Statistics

HEAD = struct.Struct("=cI")  # of a message: its kind and slot
ANSWER = struct.Struct("=IH")  # slot, HTTP status; the reason of a refusal follows as text
ROW = struct.Struct("=ddI")  # start and end of the batch (CLOCK_MONOTONIC), pictures in it
# Index into ENDPOINTS, status, pictures; start of the request (CLOCK_MONOTONIC), seconds in all, of
# decoding, in the queue, on the device (NaN: none).
RECORD = struct.Struct("=BHI5d")
COUNT = struct.Struct("=I")
MAX_MESSAGE_BYTES = 1 << 16
DEVICE_FAILED = "the device failed; the server's log has the details"
FULL = "too many requests are waiting; try again in a moment"
LATE = "the engine does not answer (timed out); try again later"
READING_SECONDS = 1.0  # that a worker has to take an answer where none of its room is left
POLL_SECONDS = 0.1  # how soon the engine sees that it is to end


@dataclass(eq=False)
class _Worker:
    """A web worker's pictures as the engine sees them."""

    connection: socket.socket
    pictures: np.ndarray  # uint8 of shape (slots, 1, 224, 224, 3), in memory that both share
    decoding: np.ndarray  # uint8 of shape (1,): how many pictures are being decoded


class Model(Protocol):
    """What the engine runs, such as ``models.Classifier``."""

    def start(self, pictures: list[np.ndarray]) -> Any:
        """Launch arrays, uint8 of shape (n_i, 224, 224, 3), as one batch."""

    def finish(self, ticket: Any) -> np.ndarray:
        """Wait for what ``start`` returned; return a row a picture."""


class _Request(NamedTuple):
    worker: _Worker
    slot: int
    pictures: np.ndarray  # uint8 of shape (n, 224, 224, 3)
    queued_seconds: float


class Engine:
    """The loop that owns the device: receives pictures, gathers batches, answers.

    Its thread alone calls the model once ``model`` is set. The public attributes may be read and
    set by any thread.
    """

    def __init__(self, args: argparse.Namespace, tell: Callable[[str], bytes]) -> None:
        """Prepare with the server's flags; ``start`` begins.

        ``tell`` answers what workers ask, on a thread of its own.
        """
        self.model: Model | None = None  # None while it is being loaded
        self.status = "loading"  # as ``/health`` says it
        self.failure: Exception | None = None  # of the model, which is not called again after that
        self.lost_workers: list[int] = []  # pids of those that ended without a word
        self.unanswered = 0  # requests that workers left when they were told to end
        self._args, self._tell = args, tell
        shape = (args.max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        # What is sent to the first end is received at the second, by whoever inherits it.
        self.worker_door, self._door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll, self._questions = select.epoll(), selectors.DefaultSelector()
        self._questions.register(self._door, selectors.EVENT_READ, self._take_in)
        self._workers: dict[int, _Worker] = {}
        self._queue: deque[_Request] = deque()
        self._running = 0
        self._batch_seconds = 0.0
        self._closing = threading.Event()
        self._thread = self._thread_of(self._serve)
        self._questions_thread = self._thread_of(self._answer_questions)
        self.statistics = Statistics(self.gauges)

    def start(self) -> None:
        """Begin to answer; until there is a model, pictures are refused."""
        self._thread.start()
        self._questions_thread.start()

    def _thread_of(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            # A server whose thread has ended must not look healthy.
            try:
                work()
            except Exception as error:
                self.failure = self.failure or error

        return threading.Thread(target=run, name=work.__name__, daemon=True)

    def close(self, timeout_seconds: float) -> bool:
        """End the loop; return whether it has ended, or the device was still at work.

        The web workers have ended, and what each of them said last is heard first.
        """
        self._closing.set()
        self._questions_thread.join(timeout_seconds)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def gauges(self) -> dict[str, int]:
        """Return how many pictures wait, are being decoded, and are inside the server."""
        decoding = self._decoding()
        return {
            "waiting_images": self._waiting(),
            "decoding_requests": decoding,
            "requests_inside": decoding + len(self._queue) + self._running,
            "workers": len(self._workers),
        }

    # --- the thread of questions ------------------------------------------------------------------

    def _answer_questions(self) -> None:
        while self._questions.get_map():
            for key, _ in self._questions.select():
                key.data()

    def _take_in(self) -> None:
        """Receive a new worker's connections, its memory and its pid."""
        pid, descriptors, _, _ = socket.recv_fds(self._door, MAX_MESSAGE_BYTES, 3)
        if not pid:
            self._questions.unregister(self._door)  # no worker is left, and none can come
            return
        pictures, questions = (socket.socket(fileno=number) for number in descriptors[:2])
        content = np.frombuffer(mmap.mmap(descriptors[2], 0), np.uint8)
        os.close(descriptors[2])
        pictures.setblocking(False)
        questions.settimeout(READING_SECONDS)
        shape = (-1, 1, IMAGE_SIZE, IMAGE_SIZE, 3)
        worker = _Worker(pictures, content[:-1].reshape(shape), content[-1:])
        self._workers[pictures.fileno()] = worker
        self._poll.register(pictures, select.EPOLLIN)
        hear = partial(self._hear_question, questions, int(pid))
        self._questions.register(questions, selectors.EVENT_READ, hear)

    def _hear_question(self, connection: socket.socket, pid: int) -> None:
        message = b""
        try:
            message = connection.recv(MAX_MESSAGE_BYTES)
            if message.startswith(b"q"):
                _, slot = HEAD.unpack_from(message)
                answer = self._tell(message[HEAD.size :].decode())
                connection.send(ANSWER.pack(slot, 200) + answer)
                return
        except ConnectionError:  # it has ended, and what it said last is still there
            return
        except OSError:  # it does not read, and ends when it is given up
            pass
        if message.startswith(b"e"):
            self.unanswered += COUNT.unpack_from(message, HEAD.size)[0]
        else:
            self.lost_workers.append(pid)
        self._questions.unregister(connection)
        connection.close()

    # --- the thread of the device -----------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closing.is_set():
            self._receive(self._delay_seconds())
            if self._queue and self.model is not None and self._delay_seconds() <= 0:
                self._run_batch(self.model)
        self._receive(0.0)  # the last requests' records

    def _delay_seconds(self) -> float:
        """Return how long the next batch may still wait for more pictures."""
        if not self._queue:
            return POLL_SECONDS
        if self._waiting() >= self._args.max_batch or not self._decoding():
            return 0.0
        end_seconds = self._queue[0].queued_seconds + self._args.max_delay_ms / 1e3
        return end_seconds - time.monotonic()

    def _waiting(self) -> int:
        return sum(len(request.pictures) for request in tuple(self._queue))

    def _decoding(self) -> int:
        return sum(int(worker.decoding[0]) for worker in tuple(self._workers.values()))

    def _receive(self, timeout_seconds: float) -> None:
        for descriptor, _ in self._poll.poll(max(0.0, timeout_seconds)):
            worker = self._workers[descriptor]
            # Takes the error of one that ended with answers unread: what it said comes first.
            worker.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            try:
                while message := worker.connection.recv(MAX_MESSAGE_BYTES):
                    self._hear(worker, message)
            except (BlockingIOError, ConnectionResetError):
                continue
            self._poll.unregister(worker.connection)
            del self._workers[descriptor]
            worker.connection.close()

    def _hear(self, worker: _Worker, message: bytes) -> None:
        kind, slot = HEAD.unpack_from(message)
        content = message[HEAD.size :]
        if kind == b"r":
            for which, *values in RECORD.iter_unpack(content):
                self.statistics.record(ENDPOINTS[which], *values)
            return
        pictures = (
            worker.pictures[slot] if kind == b"p" else self._noise[: COUNT.unpack(content)[0]]
        )
        request = _Request(worker, slot, pictures, time.monotonic())
        if self.failure is not None:
            self._answer(request, 500, DEVICE_FAILED.encode())
        elif self.model is None:
            text = f"the server is not ready ({self.status}); ask /health"
            self._answer(request, 503, text.encode())
        elif len(self._queue) >= self._args.queue_size:
            self._answer(request, 503, FULL.encode())
        else:
            self._queue.append(request)

    def _answer(self, request: _Request, status: int, content: bytes) -> None:
        connection = request.worker.connection
        try:
            connection.send(ANSWER.pack(request.slot, status) + content)
        except OSError:
            # It has ended, or does not read, and ends at our end; what it has said is still heard.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _next_batch(self) -> list[_Request]:
        """Take as many requests as fit into one batch; those nobody waits for are dropped."""
        batch: list[_Request] = []
        images = 0
        # Whoever would have waited too long by the end of this batch is not there any more.
        oldest_seconds = time.monotonic() + self._batch_seconds - self._args.request_seconds
        while self._queue and images + len(self._queue[0].pictures) <= self._args.max_batch:
            request = self._queue.popleft()
            if request.queued_seconds < oldest_seconds:
                self._answer(request, 503, LATE.encode())
            elif request.worker.connection.fileno() >= 0:
                batch.append(request)
                images += len(request.pictures)
        return batch

    def _run_batch(self, model: Model) -> None:
        batch = self._next_batch()
        if not batch:
            return
        self._running = len(batch)
        started_seconds = time.monotonic()
        try:
            ticket = model.start([request.pictures for request in batch])
            self._receive(0.0)  # while the device works
            rows = model.finish(ticket)
        # After a failed kernel the device cannot be trusted: all are told, and the server ends.
        except Exception as error:
            self.failure = error
            batch += self._queue
            self._queue.clear()
            for request in batch:
                self._answer(request, 500, DEVICE_FAILED.encode())
            return
        finally:
            self._running = 0
        self._batch_seconds = time.monotonic() - started_seconds
        self.statistics.count_batch(len(rows))
        head = ROW.pack(started_seconds, time.monotonic(), len(rows))
        position = 0
        for request in batch:
            self._answer(request, 200, head + rows[position].tobytes())
            position += len(request.pictures)
