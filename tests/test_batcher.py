"""Micro-batching: what goes together, what waits, what is refused, what happens on failure."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest

from workloads.inference.batcher import Batcher, BatcherClosed, GpuThread, QueueFull


class SlowModel:
    """Returns each picture's first value, after a while; can be held up and made to fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.threads: set[str] = set()

    def __call__(self, pieces) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return np.concatenate([piece[:, 0, 0, :1] for piece in pieces])


@pytest.fixture
def model():
    return SlowModel()


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, max_batch=4, max_delay_seconds=1.0, queue_size=6)
    thread = GpuThread()
    batcher.ended = thread.start(batcher.serve)
    yield batcher
    model.gate.set()
    batcher.close()
    wait([batcher.ended], 10)
    thread.close(10)


def picture(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, dtype=np.uint8)


def hold(batcher, model):
    """Occupy the GPU thread, so that everything submitted from now on waits."""
    model.gate.clear()
    model.entered.clear()
    first = batcher.submit(picture(0))
    assert model.entered.wait(10)
    return first


def test_a_lone_request_goes_at_once(batcher):
    started = time.monotonic()
    inference = batcher.submit(picture(7)).result(5)
    assert inference.outputs.tolist() == [[7]]
    assert inference.batch_images == 1
    assert time.monotonic() - started < 0.8


def test_requests_that_wait_together_go_together_and_get_their_own_answers(batcher, model):
    first = hold(batcher, model)
    answers = [batcher.submit(picture(value)) for value in range(1, 7)]
    model.gate.set()
    assert [answer.result(5).outputs[0, 0] for answer in answers] == [1, 2, 3, 4, 5, 6]
    assert [answer.result(5).batch_images for answer in answers] == [4, 4, 4, 4, 2, 2]
    assert first.result(5).batch_images == 1
    assert batcher.batch_sizes == {1: 1, 4: 1, 2: 1}
    assert model.threads == {"gpu"}


def test_a_batch_waits_for_a_request_that_is_still_being_decoded(batcher):
    with batcher.announced() as submit_late:
        early = batcher.submit(picture(1))
        time.sleep(0.05)
        late = submit_late(picture(2))
    assert early.result(5).batch_images == late.result(5).batch_images == 2


def test_a_batch_waits_no_longer_than_the_delay(batcher):
    with batcher.announced():
        started = time.monotonic()
        assert batcher.submit(picture(1)).result(5).batch_images == 1
        assert 0.9 < time.monotonic() - started < 4


def test_a_request_that_fails_to_decode_holds_nobody_up(batcher):
    with pytest.raises(ValueError, match="bad picture"), batcher.announced():
        early = batcher.submit(picture(1))
        raise ValueError("bad picture")
    assert early.result(0.8).batch_images == 1


def test_a_full_queue_refuses_and_recovers(batcher, model):
    hold(batcher, model)
    answers = [batcher.submit(picture(1)) for _ in range(6)]
    with pytest.raises(QueueFull, match="6 images wait"):
        batcher.submit(picture(2))
    model.gate.set()
    wait(answers, 5)
    assert batcher.submit(picture(3)).result(5).outputs[0, 0] == 3


def test_what_nobody_waits_for_any_more_is_not_computed(batcher, model):
    hold(batcher, model)
    given_up = batcher.submit(picture(1))
    kept = batcher.submit(picture(2))
    assert given_up.cancel()
    model.gate.set()
    assert kept.result(5).batch_images == 1


def test_closing_answers_what_waits_and_takes_no_more(batcher, model):
    hold(batcher, model)
    waiting = batcher.submit(picture(5))
    batcher.close()
    with pytest.raises(BatcherClosed):
        batcher.submit(picture(6))
    model.gate.set()
    assert waiting.result(5).outputs[0, 0] == 5
    assert batcher.ended.result(5) is None


def test_a_failed_batch_fails_everyone_who_waits_and_ends_the_loop(batcher, model):
    first = hold(batcher, model)
    waiting = batcher.submit(picture(5))
    model.failure = RuntimeError("device lost")
    model.gate.set()
    for answer in (first, waiting, batcher.ended):
        with pytest.raises(RuntimeError, match="device lost"):
            answer.result(5)


def test_the_gpu_thread_carries_an_error_to_its_caller():
    thread = GpuThread()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 3) == 3
    thread.close(5)
