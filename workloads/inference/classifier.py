"""The model behind the server: uint8 pictures in, the five likeliest classes out.

Normalizing, model, softmax and top-5 are one graph replay on the device. A graph has a fixed
shape, so there is one a batch bucket (1, 2, 4, ... ``max_batch``) and a batch is padded to the
next bucket; the eager engine runs any size as it is.

Two batches can be in flight. Each has buffers of its own (a lane), and copies to the device run on
a stream of their own, so the pictures of one batch travel while the device works on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from workloads.common.device import ComputeDevice
from workloads.common.engine import capture_forward
from workloads.inference.batcher import BATCHES_IN_FLIGHT
from workloads.inference.image_input import IMAGE_SIZE
from workloads.inference.inference_model import load_inference_model
from workloads.inference.shared_block import TOP_CLASSES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def batch_buckets(max_batch: int) -> list[int]:
    """Return the batch sizes that get a graph: powers of two below ``max_batch``, then itself."""
    buckets = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*buckets, max_batch]


class Lane:
    """The buffers of one batch in flight, and the copies between host and device.

    On the CPU the host buffers are the device's: nothing is copied and a batch is done when it has
    been launched.
    """

    def __init__(
        self, device: ComputeDevice, max_batch: int, row: int, copies: torch.cuda.Stream | None
    ) -> None:
        """Set aside buffers for ``max_batch`` pictures and as many output rows of ``row`` values.

        ``copies`` is the stream for copies to the device; None on the CPU.
        """
        import torch

        self._copies = copies
        shape = (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.is_cuda)
        self._staging_array = self._staging.numpy()
        self._outputs = torch.zeros((max_batch, row), pin_memory=device.is_cuda)
        if copies is not None:
            self._pictures = torch.zeros_like(self._staging, device=device.torch_device)
            self._arrived = torch.cuda.Event()
            # Sleeping, not spinning: the front ends and other clients need the cores.
            self._done = torch.cuda.Event(blocking=True)

    def fill(self, images: Sequence[np.ndarray]) -> int:
        """Put pictures, each uint8 of shape (n_i, 224, 224, 3), side by side; return how many."""
        count = 0
        for piece in images:
            self._staging_array[count : count + len(piece)] = piece
            count += len(piece)
        return count

    def load(self, size: int, into: Tensor) -> None:
        """Begin to bring the first ``size`` pictures into the first rows of ``into``."""
        if self._copies is None:
            into[:size].copy_(self._staging[:size])
            return
        import torch

        with torch.cuda.stream(self._copies):
            self._pictures[:size].copy_(self._staging[:size], non_blocking=True)
            self._arrived.record()
        # ``into`` is what the graphs read, and the batch before may still be reading it: only the
        # computing stream, where that batch comes first, may write there.
        self._arrived.wait()
        into[:size].copy_(self._pictures[:size])

    def fetch(self, outputs: Tensor) -> None:
        """Begin to bring ``outputs``, one row a picture, to the host."""
        self._outputs[: len(outputs)].copy_(outputs, non_blocking=True)
        if self._copies is not None:
            self._done.record()

    def answers(self, count: int) -> np.ndarray:
        """Wait for the batch and return a copy of its first ``count`` output rows."""
        if self._copies is not None:
            self._done.synchronize()
        return self._outputs[:count].numpy().copy()


@dataclass(frozen=True)
class Ticket:
    """A batch in flight."""

    lane: Lane
    count: int


class Classifier:
    """A model on its device. Every method but ``finish`` belongs on the one GPU thread."""

    def __init__(
        self, device: ComputeDevice, model_name: str, weights: str, seed: int, max_batch: int
    ) -> None:
        """Load the model and set aside the buffers of the largest batch.

        Raises:
            UsageError: The weights cannot be had or do not fit.
        """
        import torch

        self._device = device
        self._max_batch = max_batch
        self._model, self.weights = load_inference_model(device, model_name, weights, seed)
        self.top_classes = min(TOP_CLASSES, len(self.weights.class_names))
        where = device.torch_device
        self._mean = torch.tensor(IMAGENET_MEAN, device=where).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(IMAGENET_STD, device=where).view(1, 3, 1, 1) * 255
        self._input = torch.zeros(
            (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=where
        )
        copies = torch.cuda.Stream() if device.is_cuda else None
        self._lanes = cycle(
            [Lane(device, max_batch, 2 * self.top_classes, copies)
             for _ in range(BATCHES_IN_FLIGHT)]
        )  # fmt: skip
        self._forwards: dict[int, Callable[[], Tensor]] = {}

    def warm_up(self) -> None:
        """Autotune and capture every bucket, largest first so that the memory pool fits all."""
        if self._device.engine == "eager":
            sizes = [self._max_batch, 1]
        else:
            sizes = batch_buckets(self._max_batch)[::-1]
        for size in sizes:
            if self._device.engine != "eager":
                self._forwards[size] = capture_forward(self._device, self._forward_of(size))
            picture = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            self.finish(self.start([picture]))

    def start(self, images: Sequence[np.ndarray]) -> Ticket:
        """Launch pictures, each uint8 of shape (n_i, 224, 224, 3), as one batch.

        At most ``BATCHES_IN_FLIGHT`` batches may be unfinished.
        """
        lane = next(self._lanes)
        count = lane.fill(images)
        size = count
        if self._forwards:
            size = next(bucket for bucket in sorted(self._forwards) if bucket >= count)
        lane.load(size, self._input)
        outputs = self._forwards[size]() if self._forwards else self._eager(size)
        lane.fetch(outputs)
        return Ticket(lane, count)

    def finish(self, ticket: Ticket) -> np.ndarray:
        """Wait for a batch; on any thread, in the order of the starts.

        Returns:
            float32 of shape (n, 10): five probabilities, then their five class indices, the
            likeliest first (fewer than five where the model has fewer classes).
        """
        return ticket.lane.answers(ticket.count)

    def _eager(self, size: int) -> Tensor:
        import torch

        with torch.inference_mode():
            return self._forward_of(size)()

    def _forward_of(self, size: int) -> Callable[[], Tensor]:
        import torch

        def forward() -> Tensor:
            # (n, height, width, channel) seen as (n, channel, height, width) is channels-last.
            pixels = self._input[:size].permute(0, 3, 1, 2).float()
            normalized = ((pixels - self._mean) / self._std).to(self._device.model_dtype)
            probabilities = self._model(normalized).float().softmax(dim=1)
            values, indices = probabilities.topk(self.top_classes, dim=1)
            return torch.cat((values, indices.float()), dim=1)

        return forward
