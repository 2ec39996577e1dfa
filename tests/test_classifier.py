"""The buffers of two batches in flight: what runs on which stream, and that nothing is mixed up."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workloads.inference.classifier import Lane, batch_buckets

CPU = SimpleNamespace(is_cuda=False, torch_device=torch.device("cpu"))


class FakeCuda:
    """Stands in for CUDA's streams and events and writes down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream = "computing"

    def event(self, blocking: bool = False) -> SimpleNamespace:
        name = "done" if blocking else "arrived"

        def note(what: str) -> None:
            self.log.append(f"{what} {name} on {self.stream}")

        return SimpleNamespace(
            record=lambda: note("record"),
            wait=lambda: note("wait for"),
            synchronize=lambda: self.log.append(f"host waits for {name}"),
        )

    @contextmanager
    def on_stream(self, stream: str):
        previous, self.stream = self.stream, stream
        yield
        self.stream = previous


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "stream", fake.on_stream)
    return fake


def pictures(value: int, count: int) -> np.ndarray:
    return np.full((count, 224, 224, 3), value, dtype=np.uint8)


def test_copies_have_their_own_stream_and_only_the_answer_makes_the_host_wait(cuda):
    lane = Lane(CPU, max_batch=4, row=1, copies="copying")
    static_input = torch.zeros((4, 224, 224, 3), dtype=torch.uint8)
    count = lane.fill([pictures(3, 1), pictures(5, 2)])
    lane.load(count, static_input)
    lane.fetch(static_input[:count, 0, 0, :1].float())
    assert cuda.log == [
        "record arrived on copying",
        "wait for arrived on computing",
        "record done on computing",
    ]
    assert lane.answers(count).tolist() == [[3], [5], [5]]
    assert cuda.log[3:] == ["host waits for done"]


def test_a_batch_in_flight_keeps_its_pictures_while_the_next_is_filled(cuda):
    first, second = (Lane(CPU, 4, 1, "copying") for _ in range(2))
    static_input = torch.zeros((4, 224, 224, 3), dtype=torch.uint8)
    first.fill([pictures(1, 2)])
    second.fill([pictures(2, 1)])
    for lane, size in ((first, 2), (second, 1)):
        lane.load(size, static_input)
        lane.fetch(static_input[:size, 0, 0, :1].float())
    assert first.answers(2).tolist() == [[1], [1]]
    assert second.answers(1).tolist() == [[2]]


def test_answers_outlive_the_next_batch_of_their_lane():
    lane = Lane(CPU, 4, 1, copies=None)
    lane.fetch(torch.tensor([[1.0], [2.0]]))
    kept = lane.answers(2)
    lane.fetch(torch.tensor([[8.0], [9.0]]))
    assert kept.tolist() == [[1], [2]]


def test_every_batch_size_has_a_bucket():
    assert batch_buckets(32) == [1, 2, 4, 8, 16, 32]
    assert batch_buckets(24) == [1, 2, 4, 8, 16, 24]
    assert batch_buckets(1) == [1]
