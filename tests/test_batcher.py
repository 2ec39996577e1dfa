"""Micro-batching: what goes together, what waits, what overlaps, what is refused, what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

import numpy as np
import pytest

from workloads.inference.batcher import Batcher, GpuThread, Outcome, Piece
from workloads.inference.shared_block import BlockShape, SharedBlock

# Long enough that not to have waited for it can be told on a busy machine.
DELAY_SECONDS = 2.0


class SlowModel:
    """Returns each picture's first value, after a while; can be held up and made to fail.

    Like a GPU it takes a batch at once and works on it while the next one is brought.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.threads: set[str] = set()
        self.unfinished = 0
        self.most_unfinished = 0
        self.log: list[tuple[str, int]] = []

    def start(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        self.unfinished += 1
        self.most_unfinished = max(self.most_unfinished, self.unfinished)
        outputs = np.concatenate([piece[:, 0, 0, :1] for piece in images])
        self.log.append(("start", int(outputs[0, 0])))
        self.entered.set()
        return outputs

    def finish(self, ticket: np.ndarray) -> np.ndarray:
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.unfinished -= 1
        self.log.append(("finish", int(ticket[0, 0])))
        return ticket


class Clients:
    """Submits pictures and keeps what comes back."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._answers: dict[int, Future[Piece]] = {}

    def submit(self, value: int, count: int = 1) -> Future[Piece]:
        slot = len(self._answers)
        answer = self._answers[slot] = Future()
        images = np.full((count, 2, 2, 3), value, dtype=np.uint8)
        answer.piece = Piece(self, slot, images, time.monotonic())
        self._batcher.submit([answer.piece])
        return answer

    def deliver(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._answers[piece.slot].set_result(piece)


class Server:
    """A batcher with its thread, its model and the number of pictures being decoded."""

    def __init__(self) -> None:
        self.model = SlowModel()
        self.block = SharedBlock(BlockShape(front_ends=1, slots=1, max_batch=4))
        self.decoding = 0
        self.batcher = Batcher(
            self.block.engine, max_batch=4, max_delay_seconds=DELAY_SECONDS, queue_size=6,
            decoding=lambda: self.decoding,
        )  # fmt: skip
        self.thread = GpuThread()
        self.ended = self.thread.start(lambda: self.batcher.serve(self.model))
        self.submit = Clients(self.batcher).submit

    def hold(self) -> list[Future[Piece]]:
        """Fill the device, so that everything submitted from now on waits."""
        self.model.gate.clear()
        held = []
        for _ in range(2):
            self.model.entered.clear()
            held.append(self.submit(0))
            assert self.model.entered.wait(10)
        return held


@pytest.fixture
def server():
    server = Server()
    yield server
    server.model.gate.set()
    server.batcher.close()
    wait([server.ended], 10)
    server.thread.close(10)


def test_a_lone_request_goes_at_once(server):
    started = time.monotonic()
    piece = server.submit(7).result(5)
    assert piece.outcome is Outcome.DONE
    assert piece.outputs.tolist() == [[7]]
    assert piece.batch_images == 1
    assert piece.queued_seconds <= piece.started_seconds <= piece.ended_seconds
    assert time.monotonic() - started < 0.8 * DELAY_SECONDS


def test_requests_that_wait_together_go_together_and_get_their_own_answers(server):
    held = server.hold()
    answers = [server.submit(value) for value in range(1, 7)]
    assert server.block.engine.waiting[0] == 6
    server.model.gate.set()
    pieces = [answer.result(5) for answer in answers]
    assert [piece.outputs[0, 0] for piece in pieces] == [1, 2, 3, 4, 5, 6]
    assert [piece.batch_images for piece in pieces] == [4, 4, 4, 4, 2, 2]
    assert [answer.result(5).batch_images for answer in held] == [1, 1]
    assert server.block.engine.batches.tolist() == [0, 2, 1, 0, 1]
    assert server.model.threads == {"gpu"}


def test_a_second_batch_starts_while_the_first_is_unfinished_but_no_third(server):
    held = server.hold()
    third = server.submit(3)
    time.sleep(0.1)
    assert server.model.log == [("start", 0), ("start", 0)]
    server.model.gate.set()
    wait([*held, third], 5)
    assert server.model.most_unfinished == 2
    # Batches are finished in the order in which they were started.
    assert [value for what, value in server.model.log if what == "finish"] == [0, 0, 3]


def test_a_batch_waits_for_a_request_that_is_still_being_decoded(server):
    server.decoding = 1
    early = server.submit(1)
    time.sleep(0.05)
    server.decoding = 0
    late = server.submit(2)
    assert early.result(5).batch_images == late.result(5).batch_images == 2
    assert late.piece.started_seconds - early.piece.queued_seconds < 0.8 * DELAY_SECONDS


def test_a_batch_waits_no_longer_than_the_delay(server):
    server.decoding = 1
    piece = server.submit(1).result(10)
    assert piece.batch_images == 1
    queued_seconds = piece.started_seconds - piece.queued_seconds
    assert 0.9 * DELAY_SECONDS < queued_seconds < DELAY_SECONDS + 3


def test_a_full_batch_waits_for_nobody(server):
    server.decoding = 1
    started = time.monotonic()
    answers = [server.submit(value) for value in range(4)]
    assert {answer.result(5).batch_images for answer in answers} == {4}
    assert time.monotonic() - started < 0.8 * DELAY_SECONDS


def test_a_full_queue_refuses_at_once_and_recovers(server):
    server.hold()
    answers = [server.submit(1) for _ in range(6)]
    assert server.submit(2).result(0).outcome is Outcome.QUEUE_FULL
    server.model.gate.set()
    wait(answers, 5)
    assert server.submit(3).result(5).outputs[0, 0] == 3


def test_what_nobody_waits_for_any_more_is_not_computed(server):
    server.hold()
    given_up = server.submit(1)
    kept = server.submit(2)
    given_up.piece.abandoned = True
    server.model.gate.set()
    assert kept.result(5).batch_images == 1
    assert given_up.result(5).outcome is Outcome.ABANDONED


def test_closing_answers_what_waits_and_takes_no_more(server):
    server.hold()
    waiting = server.submit(5)
    server.batcher.close()
    assert server.submit(6).result(0).outcome is Outcome.CLOSED
    server.model.gate.set()
    assert waiting.result(5).outputs[0, 0] == 5
    assert server.ended.result(5) is None


def test_a_failed_batch_fails_everyone_who_waits_and_ends_the_loop(server):
    held = server.hold()
    waiting = server.submit(5)
    server.model.failure = RuntimeError("device lost")
    server.model.gate.set()
    assert {answer.result(5).outcome for answer in (*held, waiting)} == {Outcome.FAILED}
    with pytest.raises(RuntimeError, match="device lost"):
        server.ended.result(5)
    assert server.submit(6).result(0).outcome is Outcome.FAILED


def test_the_gpu_thread_carries_an_error_to_its_caller():
    thread = GpuThread()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 3) == 3
    thread.close(5)
