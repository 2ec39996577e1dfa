"""Two batches in flight, each in a lane of its own: nothing is mixed up."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workloads.common.device import ComputeDevice
from workloads.inference.classifier import Lane, batch_buckets

CPU = SimpleNamespace(is_cuda=False, torch_device=torch.device("cpu"))


def pictures(value: int, count: int) -> np.ndarray:
    return np.full((count, 224, 224, 3), value, dtype=np.uint8)


def first_value(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, :1].float()


def test_a_batch_in_flight_keeps_its_answers_while_the_next_is_launched():
    first, second = (Lane(CPU, max_batch=4, row=1, forward=first_value) for _ in range(2))
    counts = first.launch([pictures(3, 1), pictures(5, 2)]), second.launch([pictures(2, 1)])
    assert counts == (3, 1)
    assert first.answers(3).tolist() == [[3], [5], [5]]
    assert second.answers(1).tolist() == [[2]]


def test_answers_outlive_the_next_batch_of_their_lane():
    lane = Lane(CPU, max_batch=4, row=1, forward=first_value)
    kept = lane.answers(lane.launch([pictures(1, 2)]))
    lane.launch([pictures(8, 2)])
    assert kept.tolist() == [[1], [1]]


def test_every_batch_size_has_a_bucket():
    assert batch_buckets(32) == [1, 2, 4, 8, 16, 32]
    assert batch_buckets(24) == [1, 2, 4, 8, 16, 24]
    assert batch_buckets(1) == [1]


@pytest.mark.gpu
def test_overlapping_batches_of_changing_size_on_a_gpu_keep_their_answers_apart():
    device = ComputeDevice(torch.device("cuda:0"), "bf16", "graph")

    def brightest(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).amax(dim=1, keepdim=True).float()

    lanes = [Lane(device, max_batch=8, row=1, forward=brightest) for _ in range(2)]
    for lane in lanes:
        for size in (8, 4, 2, 1):
            lane.prepare(size)
    random = np.random.default_rng(0)
    waiting: deque[tuple[Lane, np.ndarray]] = deque()
    for turn in range(400):
        if len(waiting) == 2:
            lane, values = waiting.popleft()
            assert lane.answers(len(values))[:, 0].tolist() == values.tolist()
        values = random.integers(0, 256, 1 + turn % 8)
        lanes[turn % 2].launch([pictures(value, 1) for value in values])
        waiting.append((lanes[turn % 2], values))
