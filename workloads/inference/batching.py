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

import mmap
import os
import resource
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from workloads.inference.image_input import IMAGE_SIZE, PICTURE_BYTES

if TYPE_CHECKING:
    from workloads.inference.inference_server import Statistics
    from workloads.inference.models import Classifier

ROW = struct.Struct("=ddI")  # start and end of the batch (CLOCK_MONOTONIC), pictures in it
# Endpoint, status, pictures; start of the request (CLOCK_MONOTONIC), seconds in all, of decoding,
# in the queue, on the device (NaN: none).
RECORD = struct.Struct("=BHI5d")
SYNTHETIC = struct.Struct("=I")
REFUSAL = struct.Struct("=H")  # HTTP status; the reason follows as text
MAX_MESSAGE_BYTES = 1 << 16
QUESTION_SECONDS = 10.0  # for an answer that needs no device
Closable = TypeVar("Closable", "Lane", socket.socket)
# How soon the engine sees that it is to end.
POLL_SECONDS = 0.1


class Refusal(Exception):
    """A request that gets no result.

    Attributes:
        status: The HTTP status to answer with.
    """

    def __init__(self, status: int, message: str) -> None:
        """Keep what is wrong, as one sentence for the client."""
        super().__init__(message)
        self.status = status


def allow_many_files() -> None:
    """Raise this process's soft limit of open files to the hard one: a lane takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True)
class Answer:
    """What the engine says to one picture, or to one batch of synthetic ones.

    Attributes:
        started_seconds: When the batch was begun (CLOCK_MONOTONIC).
        ended_seconds: When its result was there.
        batch_images: Pictures in the batch, its neighbors' included.
        probabilities: Of the likeliest classes, in falling order.
        classes: Their indices.
    """

    started_seconds: float
    ended_seconds: float
    batch_images: int
    probabilities: list[float]
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
        return _read_answer(self._exchange(b"p", timeout_seconds))

    def classify_synthetic(self, images: int, timeout_seconds: float) -> Answer:
        """Run one batch of ``images`` synthetic pictures; raises as ``classify`` does."""
        return _read_answer(self._exchange(b"s" + SYNTHETIC.pack(images), timeout_seconds))

    def record(self, *values: float) -> None:
        """Have one finished request counted; ``values`` as in ``RECORD``."""
        self._socket.send(b"r" + RECORD.pack(*values))

    def close(self) -> None:
        """Give the lane up; what waits in it is not computed."""
        self._socket.close()
        self._memory.close()

    def _exchange(self, message: bytes, timeout_seconds: float) -> bytes:
        self._socket.settimeout(timeout_seconds)
        self._socket.send(message)
        answer = self._socket.recv(MAX_MESSAGE_BYTES)
        if not answer:
            raise OSError("it has ended")
        return answer


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
            line.settimeout(QUESTION_SECONDS)
            line.send(what.encode())
            if not (answer := line.recv(MAX_MESSAGE_BYTES)):
                raise OSError("it has ended")
        return answer

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
        lent, is_whole = None, False
        try:
            lent = free.pop() if free else make()
            yield lent
            is_whole = True
        except Refusal:
            is_whole = True
            raise
        except OSError as error:
            raise Refusal(503, f"the engine does not answer ({error}); try again later") from error
        finally:
            if is_whole:
                free.append(lent)
            elif lent is not None:
                lent.close()


def _read_answer(message: bytes) -> Answer:
    kind, content = message[:1], message[1:]
    if kind != b"o":
        (status,) = REFUSAL.unpack_from(content)
        raise Refusal(status, content[REFUSAL.size :].decode())
    values = np.frombuffer(content, np.float32, offset=ROW.size).tolist()
    half = len(values) // 2
    return Answer(*ROW.unpack_from(content), values[:half], list(map(int, values[half:])))


@dataclass(eq=False)
class _EngineLane:
    """The engine's end of a lane."""

    socket: socket.socket
    memory: memoryview
    picture: np.ndarray  # uint8 of shape (1, 224, 224, 3), in the shared memory
    closed: bool = False

    def send(self, message: bytes) -> None:
        # Whoever waited may be gone, or not reading; neither may hold up the others.
        with suppress(OSError):
            self.socket.send(message, socket.MSG_DONTWAIT)


@dataclass(eq=False)
class _Request:
    """Pictures that wait for the device."""

    lane: _EngineLane
    pictures: np.ndarray
    queued_seconds: float


class Engine:
    """The loop that owns the device: receives pictures, gathers batches, answers.

    Its thread alone calls the model once ``model`` is set. The attributes may be read and set by
    any thread.

    Attributes:
        model: What answers pictures (``models.Classifier``); None while it is being loaded.
        status: What ``/health`` says.
        failure: What the model raised; it is not called again after that.
        workers: Pids of the web workers that live.
        lost_workers: Pids of those that ended without a word, with the requests in them.
        unanswered: Requests that workers left without an answer when they were told to end.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_delay_seconds: float,
        queue_size: int,
        answer_seconds: float,
        statistics: Statistics,
        tell: Callable[[str], bytes],
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            max_batch: The most pictures in one batch.
            max_delay_seconds: The longest that a batch waits for pictures still being decoded.
            queue_size: The most pictures that may wait for the device.
            answer_seconds: After so long nobody waits for an answer any more.
            statistics: Counts requests and batches.
            tell: Answers what workers ask, on a thread of its own.
        """
        allow_many_files()
        self.model: Classifier | None = None
        self.status = "loading"
        self.failure: Exception | None = None
        self.workers: set[int] = set()
        self.lost_workers: list[int] = []
        self.unanswered = 0
        self._max_batch = max_batch
        self._max_delay_seconds = max_delay_seconds
        self._queue_size = queue_size
        self._answer_seconds = answer_seconds
        self._statistics, self._tell = statistics, tell
        self._noise = np.random.default_rng(0).integers(
            0, 256, (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
        )
        # What is sent to the first end is received at the second, by whoever inherits it.
        self.worker_door, self._door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll, self._line_poll = select.epoll(), select.epoll()
        self._line_poll.register(self._door, select.EPOLLIN)
        self._lanes: dict[int, _EngineLane] = {}
        self._lines: dict[int, tuple[socket.socket, int | None]] = {}
        self._queue: deque[_Request] = deque()
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
        waiting = sum(len(request.pictures) for request in tuple(self._queue))
        decoding = self._decoding()
        return {
            "waiting_images": waiting,
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
        waiting = sum(len(request.pictures) for request in self._queue)
        if waiting >= self._max_batch or not self._decoding():
            return 0.0
        return self._queue[0].queued_seconds + self._max_delay_seconds - time.monotonic()

    def _decoding(self) -> int:
        return sum(lane.memory[PICTURE_BYTES] for lane in tuple(self._lanes.values()))

    def _receive(self, timeout_seconds: float) -> None:
        """Take whatever has come, waiting for it as long as that."""
        for descriptor, _ in self._poll.poll(max(0.0, timeout_seconds)):
            self._hear(self._lanes[descriptor])

    def _answer_questions(self) -> None:
        while True:
            for descriptor, _ in self._line_poll.poll():
                if descriptor == self._door.fileno():
                    self._take_in()
                else:
                    self._answer(descriptor, *self._lines[descriptor])

    def _take_in(self) -> None:
        kind, descriptors, _, _ = socket.recv_fds(self._door, 64, 2)
        if not kind:
            self._line_poll.unregister(self._door)  # no worker is left, and none can come
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
            self._lines[connection.fileno()] = connection, pid
            self._line_poll.register(connection, select.EPOLLIN)

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

    def _answer(self, descriptor: int, connection: socket.socket, pid: int | None) -> None:
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
        self._line_poll.unregister(descriptor)
        del self._lines[descriptor]
        connection.close()

    def _hear(self, lane: _EngineLane) -> None:
        message = _received(lane.socket)
        kind, content = message[:1], message[1:]
        if kind == b"r":
            self._statistics.record(*RECORD.unpack(content))
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
            lane.send(_refusal(500, "the device failed; the server's log has the details"))
        elif self.model is None:
            lane.send(_refusal(503, f"the server is not ready ({self.status}); ask /health"))
        elif len(self._queue) >= self._queue_size:
            lane.send(_refusal(503, "too many requests are waiting; try again in a moment"))
        else:
            self._queue.append(_Request(lane, pictures, time.monotonic()))

    def _next_batch(self) -> list[_Request]:
        """Take as many requests as fit into one batch; those nobody waits for are dropped."""
        batch: list[_Request] = []
        images = 0
        # Whoever would have waited too long by the end of this batch is not there any more.
        oldest_seconds = time.monotonic() + self._batch_seconds - self._answer_seconds
        while self._queue and images + len(self._queue[0].pictures) <= self._max_batch:
            request = self._queue.popleft()
            if not request.lane.closed and request.queued_seconds > oldest_seconds:
                batch.append(request)
                images += len(request.pictures)
        return batch

    def _run_batch(self, model: Classifier) -> None:
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
                request.lane.send(_refusal(500, "the device failed; see the server's log"))
            return
        finally:
            self._running = 0
        self._batch_seconds = time.monotonic() - started_seconds
        self._statistics.count_batch(len(rows))
        self._announce(batch, rows, ROW.pack(started_seconds, time.monotonic(), len(rows)))

    @staticmethod
    def _announce(batch: Iterable[_Request], rows: np.ndarray, head: bytes) -> None:
        position = 0
        for request in batch:
            request.lane.send(b"o" + head + rows[position].tobytes())
            position += len(request.pictures)


def _received(connection: socket.socket) -> bytes:
    """Return the next message, empty when the other end is closed."""
    try:
        return connection.recv(MAX_MESSAGE_BYTES)
    except OSError:
        return b""


def _refusal(status: int, message: str) -> bytes:
    return b"!" + REFUSAL.pack(status) + message.encode()
