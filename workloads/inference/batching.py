"""From the web workers to the model and back: lanes between the processes, and micro-batching.

A lane is a socket pair with memory for one picture, made by a web worker, which sends the engine
its end over the one socket that all workers inherit (the door). Nothing has a name, an index or a
lock, and whoever dies closes his end, so there is nothing to clean up. A worker writes the picture
into the memory and sends one small message; the answer is one small message.

=======  ==========================  ==============================================================
message  content                     answered with
=======  ==========================  ==============================================================
``p``    (the picture is in memory)  ``ROW``, or a refusal
``s``    uint32: how many synthetic  ``ROW``, or a refusal
``r``    ``RECORD``                  nothing: a finished request is counted
=======  ==========================  ==============================================================

Questions (health, statistics) come on connections of their own, and a thread of its own takes in
whoever comes through the door and answers them, since a batch may take seconds. One more connection
of each worker says that it lives.

Adaptive micro-batching: the engine takes what is queued. Only while pictures are known to be on
their way (being decoded at this moment) does a batch wait for them, at most ``max_delay_seconds``
after its oldest picture was queued. So a lone client never pays for batching, and batches grow with
the load, since requests queue up while the device works.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from workloads.inference.image_input import IMAGE_SIZE, PICTURE_BYTES

if TYPE_CHECKING:
    from workloads.inference.inference_server import Statistics
    from workloads.inference.models import Classifier

ROW = struct.Struct("=ddI")  # start and end of the batch (CLOCK_MONOTONIC), pictures in it
# Index into ENDPOINTS, status, pictures; start of the request (CLOCK_MONOTONIC), seconds in all, of
# decoding, in the queue, on the device (NaN: none).
RECORD = struct.Struct("=BHI5d")
ENDPOINTS = ("predict", "batch_predict")
SYNTHETIC = struct.Struct("=I")
REFUSAL = struct.Struct("=H")  # HTTP status; the reason follows as text
DEVICE_FAILED = "the device failed; the server's log has the details"
MAX_MESSAGE_BYTES = 1 << 16
QUESTION_SECONDS = 10.0  # for an answer that needs no device
Closable = TypeVar("Closable", "Lane", socket.socket)
POLL_SECONDS = 0.1  # how soon the engine sees that it is to end


class Refusal(Exception):
    """A request that gets no result: the HTTP status, and one sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def allow_many_files() -> None:
    """Raise this process's soft limit of open files to the hard one: a lane takes two."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Answer(NamedTuple):
    """The engine's answer to one picture, or to one batch of synthetic ones."""

    started_seconds: float  # the batch's start and end, CLOCK_MONOTONIC
    ended_seconds: float
    batch_images: int  # of all requests in the batch
    probabilities: list[float]  # of the likeliest classes, in falling order
    classes: list[int]


class Lane:
    """A web worker's end of one lane; used by one request at a time."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        """Open a lane; ``connect`` hands the engine its end and the memory."""
        memory = os.memfd_create("lane")
        try:
            os.ftruncate(memory, PICTURE_BYTES + 1)
            self._memory = mmap.mmap(memory, PICTURE_BYTES + 1)
            self._socket = connect(b"lane", memory)
        finally:
            os.close(memory)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Let the engine know that a picture is on its way, while it is being decoded."""
        self._memory[PICTURE_BYTES] = 1
        try:
            yield
        finally:
            self._memory[PICTURE_BYTES] = 0

    def classify(self, picture: bytes, timeout_seconds: float) -> Answer:
        """Have ``picture`` classified, uint8 of shape (224, 224, 3).

        Raises:
            Refusal: The engine takes it not.
            OSError: No answer came in time, or the engine is gone.
        """
        self._memory[:PICTURE_BYTES] = picture
        return self._exchange(b"p", timeout_seconds)

    def classify_synthetic(self, images: int, timeout_seconds: float) -> Answer:
        """Run one batch of synthetic pictures; raises as ``classify`` does."""
        return self._exchange(b"s" + SYNTHETIC.pack(images), timeout_seconds)

    def record(self, endpoint: str, *values: float) -> None:
        """Have one finished request counted; ``values`` as in ``RECORD``."""
        self._socket.send(b"r" + RECORD.pack(ENDPOINTS.index(endpoint), *values))

    def close(self) -> None:
        """Give the lane up; what waits in it is not computed."""
        self._socket.close()
        self._memory.close()

    def _exchange(self, message: bytes, timeout_seconds: float) -> Answer:
        answer = _asked(self._socket, message, timeout_seconds)
        kind, content = answer[:1], answer[1:]
        if kind != b"o":
            (status,) = REFUSAL.unpack_from(content)
            raise Refusal(status, content[REFUSAL.size :].decode())
        values = np.frombuffer(content, np.float32, offset=ROW.size).tolist()
        half = len(values) // 2
        return Answer(*ROW.unpack_from(content), values[:half], list(map(int, values[half:])))


class EngineClient:
    """The engine as a web worker sees it."""

    def __init__(self, door: socket.socket) -> None:
        """Tell the engine through ``door`` that this process is a web worker."""
        door.settimeout(QUESTION_SECONDS)
        self._door = door
        self._door_lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._lines: list[socket.socket] = []
        self._life = self._connect(b"worker %d" % os.getpid())

    def lane(self) -> AbstractContextManager[Lane]:
        """Lend a lane; there are as many as requests are under way.

        Raises:
            Refusal: The engine does not answer (503), or refuses.
        """
        return self._lend(self._lanes, lambda: Lane(self._connect))

    def ask(self, what: str) -> bytes:
        """Return what the engine says about ``what``.

        Raises:
            Refusal: It does not answer (503).
        """
        with self._lend(self._lines, lambda: self._connect(b"line")) as line:
            return _asked(line, what.encode(), QUESTION_SECONDS)

    def report_unanswered(self, requests: int) -> None:
        """Say how many requests this worker leaves without an answer, at its orderly end."""
        self._life.send(b"%d" % requests)

    def _connect(self, kind: bytes, *descriptors: int) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A door holds about ten messages, and a second greenlet may not wait for the same socket.
        with theirs, self._door_lock:
            socket.send_fds(self._door, [kind], [theirs.fileno(), *descriptors])
        return ours

    @contextmanager
    def _lend(self, free: list[Closable], make: Callable[[], Closable]) -> Iterator[Closable]:
        """Lend what is free, or a new one; one that failed half-way is given up."""
        lent = None
        try:
            lent = free.pop() if free else make()
            yield lent
        except Refusal:
            free.append(lent)
            raise
        except BaseException as error:
            if lent is not None:
                lent.close()
            if not isinstance(error, OSError):
                raise
            raise Refusal(503, f"the engine does not answer ({error}); try again later") from error
        free.append(lent)


def _asked(connection: socket.socket, message: bytes, timeout_seconds: float) -> bytes:
    connection.settimeout(timeout_seconds)
    connection.send(message)
    if not (answer := connection.recv(MAX_MESSAGE_BYTES)):
        raise OSError("it has ended")
    return answer


@dataclass(eq=False)
class _EngineLane:
    """The engine's end of a lane, and the one request in it at a time."""

    socket: socket.socket
    memory: memoryview
    picture: np.ndarray  # uint8 of shape (1, 224, 224, 3), in the shared memory
    pictures: np.ndarray = field(init=False)  # of the request
    queued_seconds: float = 0.0
    closed: bool = False

    def send(self, message: bytes) -> None:
        # Whoever waited may be gone, or not reading; neither may hold up the others.
        with suppress(OSError):
            self.socket.send(message, socket.MSG_DONTWAIT)


class Engine:
    """The loop that owns the device: receives pictures, gathers batches, answers.

    Its thread alone calls the model once ``model`` is set. The public attributes may be read and
    set by any thread.
    """

    def __init__(
        self, args: argparse.Namespace, statistics: Statistics, tell: Callable[[str], bytes]
    ) -> None:
        """Prepare with the server's flags; ``start`` begins.

        ``tell`` answers what workers ask, on a thread of its own.
        """
        allow_many_files()
        self.model: Classifier | None = None  # None while it is being loaded
        self.status = "loading"  # as ``/health`` says it
        self.failure: Exception | None = None  # of the model, which is not called again after that
        self.workers: set[int] = set()  # pids of those that live
        self.lost_workers: list[int] = []  # of those that ended without a word
        self.unanswered = 0  # requests that workers left when they were told to end
        self._args, self._statistics, self._tell = args, statistics, tell
        shape = (args.max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        # What is sent to the first end is received at the second, by whoever inherits it.
        self.worker_door, self._door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll, self._questions = select.epoll(), selectors.DefaultSelector()
        self._questions.register(self._door, selectors.EVENT_READ, self._take_in)
        self._lanes: dict[int, _EngineLane] = {}
        self._queue: deque[_EngineLane] = deque()
        self._running = 0
        self._batch_seconds = 0.0
        self._closing = threading.Event()
        self._thread = self._thread_of(self._serve)

    def start(self) -> None:
        """Begin to answer; until there is a model, pictures are refused."""
        self._thread.start()
        self._thread_of(self._answer_questions).start()

    def _thread_of(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            # A server whose thread has ended must not look healthy.
            try:
                work()
            except Exception as error:
                self.failure = self.failure or error

        return threading.Thread(target=run, name=work.__name__, daemon=True)

    def close(self, timeout_seconds: float) -> bool:
        """End the loop; return whether it has ended, or the device was still at work."""
        self._closing.set()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def gauges(self) -> dict[str, int]:
        """Return how many pictures wait, are being decoded, and are inside the server."""
        decoding = self._decoding()
        return {
            "waiting_images": self._waiting(),
            "decoding_requests": decoding,
            "requests_inside": decoding + len(self._queue) + self._running,
            "workers": len(self.workers),
        }

    def _serve(self) -> None:
        while not self._closing.is_set():
            self._receive(self._delay_seconds())
            if self._queue and self.model is not None and self._delay_seconds() <= 0:
                self._run_batch(self.model)

    def _delay_seconds(self) -> float:
        """Return how long the next batch may still wait for more pictures."""
        if not self._queue:
            return POLL_SECONDS
        if self._waiting() >= self._args.max_batch or not self._decoding():
            return 0.0
        end_seconds = self._queue[0].queued_seconds + self._args.max_delay_ms / 1e3
        return end_seconds - time.monotonic()

    def _waiting(self) -> int:
        return sum(len(lane.pictures) for lane in tuple(self._queue))

    def _decoding(self) -> int:
        return sum(lane.memory[PICTURE_BYTES] for lane in tuple(self._lanes.values()))

    def _receive(self, timeout_seconds: float) -> None:
        for descriptor, _ in self._poll.poll(max(0.0, timeout_seconds)):
            self._hear(self._lanes[descriptor])

    def _answer_questions(self) -> None:
        while True:
            for key, _ in self._questions.select():
                key.data()

    def _take_in(self) -> None:
        kind, descriptors, _, _ = socket.recv_fds(self._door, 64, 2)
        if not kind:
            self._questions.unregister(self._door)  # no worker is left, and none can come
        elif len(descriptors) < (2 if kind == b"lane" else 1):
            # No more files can be opened here: the worker finds its end closed, and answers 503.
            for descriptor in descriptors:
                os.close(descriptor)
        elif kind == b"lane":
            self._open_lane(socket.socket(fileno=descriptors[0]), descriptors[1])
        else:
            connection = socket.socket(fileno=descriptors[0])
            pid = None if kind == b"line" else int(kind.removeprefix(b"worker "))
            if pid is not None:
                self.workers.add(pid)
            answer = partial(self._answer, connection, pid)
            self._questions.register(connection, selectors.EVENT_READ, answer)

    def _open_lane(self, connection: socket.socket, shared: int) -> None:
        try:
            memory = memoryview(mmap.mmap(shared, PICTURE_BYTES + 1))
        except OSError:
            connection.close()
            return
        finally:
            os.close(shared)
        picture = np.frombuffer(memory, np.uint8, PICTURE_BYTES)
        picture = picture.reshape(1, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._lanes[connection.fileno()] = _EngineLane(connection, memory, picture)
        self._poll.register(connection, select.EPOLLIN)

    def _answer(self, connection: socket.socket, pid: int | None) -> None:
        """Answer a question, or hear the last word of the worker with that pid."""
        message = _received(connection)
        if message and pid is None:
            with suppress(OSError):
                connection.send(self._tell(message.decode()))
            return
        if message:
            self.unanswered += int(message)
        elif pid in self.workers:
            self.lost_workers.append(pid)
        if pid is not None:
            self.workers.discard(pid)
        self._questions.unregister(connection)
        connection.close()

    def _hear(self, lane: _EngineLane) -> None:
        message = _received(lane.socket)
        kind, content = message[:1], message[1:]
        if kind == b"r":
            which, *values = RECORD.unpack(content)
            self._statistics.record(ENDPOINTS[which], *values)
        elif kind == b"p":
            self._let_in(lane, lane.picture)
        elif kind == b"s":
            self._let_in(lane, self._noise[: SYNTHETIC.unpack(content)[0]])
        else:
            self._poll.unregister(lane.socket)
            del self._lanes[lane.socket.fileno()]
            lane.socket.close()
            lane.closed = True

    def _let_in(self, lane: _EngineLane, pictures: np.ndarray) -> None:
        if self.failure is not None:
            lane.send(_refusal(500, DEVICE_FAILED))
        elif self.model is None:
            lane.send(_refusal(503, f"the server is not ready ({self.status}); ask /health"))
        elif len(self._queue) >= self._args.queue_size:
            lane.send(_refusal(503, "too many requests are waiting; try again in a moment"))
        else:
            lane.pictures, lane.queued_seconds = pictures, time.monotonic()
            self._queue.append(lane)

    def _next_batch(self) -> list[_EngineLane]:
        """Take as many requests as fit into one batch; those nobody waits for are dropped."""
        batch: list[_EngineLane] = []
        images = 0
        # Whoever would have waited too long by the end of this batch is not there any more.
        oldest_seconds = time.monotonic() + self._batch_seconds - self._args.request_seconds
        while self._queue and images + len(self._queue[0].pictures) <= self._args.max_batch:
            lane = self._queue.popleft()
            if not lane.closed and lane.queued_seconds > oldest_seconds:
                batch.append(lane)
                images += len(lane.pictures)
        return batch

    def _run_batch(self, model: Classifier) -> None:
        batch = self._next_batch()
        if not batch:
            return
        self._running = len(batch)
        started_seconds = time.monotonic()
        try:
            ticket = model.start([lane.pictures for lane in batch])
            self._receive(0.0)  # while the device works
            rows = model.finish(ticket)
        # After a failed kernel the device cannot be trusted: all are told, and the server ends.
        except Exception as error:
            self.failure = error
            batch += self._queue
            self._queue.clear()
            for lane in batch:
                lane.send(_refusal(500, DEVICE_FAILED))
            return
        finally:
            self._running = 0
        self._batch_seconds = time.monotonic() - started_seconds
        self._statistics.count_batch(len(rows))
        head = b"o" + ROW.pack(started_seconds, time.monotonic(), len(rows))
        position = 0
        for lane in batch:
            lane.send(head + rows[position].tobytes())
            position += len(lane.pictures)


def _received(connection: socket.socket) -> bytes:
    """Return the next message, empty when the other end is closed."""
    try:
        return connection.recv(MAX_MESSAGE_BYTES)
    except OSError:
        return b""


def _refusal(status: int, message: str) -> bytes:
    return b"!" + REFUSAL.pack(status) + message.encode()
