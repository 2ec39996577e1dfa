"""The model behind the server: uint8 pictures in, the five likeliest classes out.

Copying in, normalizing, model, softmax, top-5 and copying out are one graph replay. A graph has a
fixed shape, so there is one a batch bucket (1, 2, 4, ... ``max_batch``) and a batch is padded to
the next bucket; the eager engine runs any size as it is.

Two batches can be in flight. Each has a lane of its own: buffers, stream and graphs, so the
pictures of one batch are filled in and travel while the device works on the other. A batch takes
three calls that let go of the interpreter. Each more would cost: whoever lets go stands in line
behind the threads that decode, and with the copies launched one by one a batch took 4.3 ms on an
H100 that computes it in one.
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
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def batch_buckets(max_batch: int) -> list[int]:
    """Return the batch sizes that get a graph: powers of two below ``max_batch``, then itself."""
    buckets = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*buckets, max_batch]


class Lane:
    """The buffers, stream and graphs of one batch in flight.

    On the CPU the host buffers are the device's: nothing is copied and a batch is done when it has
    been launched.
    """

    def __init__(
        self, device: ComputeDevice, max_batch: int, row: int, forward: Callable[[Tensor], Tensor]
    ) -> None:
        """Set aside buffers for ``max_batch`` pictures and as many output rows of ``row`` values.

        Args:
            device: Where the batches run.
            max_batch: Pictures of the largest batch.
            row: Values of an output row.
            forward: From pictures, uint8 of shape (n, 224, 224, 3), to rows, shape (n, row).
        """
        import torch

        self._device = device
        self._forward = forward
        shape = (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.is_cuda)
        self._staging_bytes = memoryview(self._staging.numpy()).cast("B")
        self._outputs = torch.zeros((max_batch, row), pin_memory=device.is_cuda)
        self._output_array = self._outputs.numpy()
        self._pictures = self._staging
        self._replays: dict[int, Callable[[], None]] = {}
        if device.is_cuda:
            self._pictures = torch.zeros_like(self._staging, device=device.torch_device)
            self._stream = torch.cuda.Stream()
            # Sleeping, not spinning: the front ends and other clients need the cores.
            self._done = torch.cuda.Event(blocking=True)

    def prepare(self, size: int) -> None:
        """Capture batches of ``size`` pictures."""
        self._replays[size] = capture_forward(self._device, lambda: self._work(size), self._stream)

    def launch(self, images: Sequence[np.ndarray]) -> int:
        """Begin a batch of pictures, each uint8 of shape (n_i, 224, 224, 3); return how many."""
        import torch

        count = self._fill(images)
        if self._device.is_cuda:
            torch.cuda.set_stream(self._stream)
        if self._replays:
            self._replays[min(size for size in self._replays if size >= count)]()
        else:
            with torch.inference_mode():
                self._work(count)
        if self._device.is_cuda:
            self._done.record()
        return count

    def answers(self, count: int) -> np.ndarray:
        """Wait for the batch and return a copy of its first ``count`` output rows."""
        if self._device.is_cuda:
            self._done.synchronize()
        return self._output_array[:count].copy()

    def _fill(self, images: Sequence[np.ndarray]) -> int:
        """Put the pictures side by side in the staging buffer."""
        count = position = 0
        for piece in images:
            # NumPy would let go of the interpreter for each picture.
            content = memoryview(piece).cast("B")
            self._staging_bytes[position : position + len(content)] = content
            position += len(content)
            count += len(piece)
        return count

    def _work(self, size: int) -> None:
        if self._device.is_cuda:
            self._pictures[:size].copy_(self._staging[:size], non_blocking=True)
        self._outputs[:size].copy_(self._forward(self._pictures[:size]), non_blocking=True)


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
        lanes = [
            Lane(device, max_batch, 2 * self.top_classes, self._forward)
            for _ in range(BATCHES_IN_FLIGHT)
        ]
        self._lanes, self._next_lane = lanes, cycle(lanes)

    def warm_up(self) -> None:
        """Autotune and capture every bucket, largest first so that the memory pool fits all."""
        # The lanes' streams do not wait for the one that the model was loaded on.
        self._device.synchronize()
        if self._device.engine == "eager":
            sizes = [self._max_batch, 1]
        else:
            sizes = batch_buckets(self._max_batch)[::-1]
            for lane in self._lanes:
                for size in sizes:
                    lane.prepare(size)
        for size in sizes:
            picture = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            for _ in self._lanes:
                self.finish(self.start([picture]))

    def start(self, images: Sequence[np.ndarray]) -> Ticket:
        """Launch pictures, each uint8 of shape (n_i, 224, 224, 3), as one batch.

        At most ``BATCHES_IN_FLIGHT`` batches may be unfinished.
        """
        lane = next(self._next_lane)
        return Ticket(lane, lane.launch(images))

    def finish(self, ticket: Ticket) -> np.ndarray:
        """Wait for a batch; on any thread, in the order of the starts.

        Returns:
            float32 of shape (n, 10): five probabilities, then their five class indices, the
            likeliest first (fewer than five where the model has fewer classes).
        """
        return ticket.lane.answers(ticket.count)

    def _forward(self, pictures: Tensor) -> Tensor:
        import torch

        # (n, height, width, channel) seen as (n, channel, height, width) is channels-last.
        pixels = pictures.permute(0, 3, 1, 2).float()
        normalized = ((pixels - self._mean) / self._std).to(self._device.model_dtype)
        probabilities = self._model(normalized).float().softmax(dim=1)
        values, indices = probabilities.topk(self.top_classes, dim=1)
        return torch.cat((values, indices.float()), dim=1)
