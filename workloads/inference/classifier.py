"""The model behind the server: uint8 pictures in, the five likeliest classes out.

Normalizing, model, softmax and top-5 are one graph replay on the device. A graph has a fixed
shape, so there is one a batch bucket (1, 2, 4, ... ``max_batch``) and a batch is padded to the
next bucket; the eager engine runs any size as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from workloads.common.device import ComputeDevice
from workloads.common.engine import capture_forward
from workloads.inference.image_input import IMAGE_SIZE
from workloads.inference.inference_model import load_inference_model

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TOP_CLASSES = 5


def batch_buckets(max_batch: int) -> list[int]:
    """Return the batch sizes that get a graph: powers of two below ``max_batch``, then itself."""
    buckets = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*buckets, max_batch]


class Classifier:
    """A model on its device. Every method belongs on the one thread that owns the device."""

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
        shape = (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.is_cuda)
        self._staging_array = self._staging.numpy()
        # On the CPU the staging buffer itself is the model's input: no second copy.
        self._input = torch.zeros_like(self._staging, device=where) if device.is_cuda else None
        self._forwards: dict[int, Callable[[], Tensor]] = {}

    def warm_up(self) -> None:
        """Autotune and capture every bucket, largest first so that the memory pool fits all."""
        if self._device.engine == "eager":
            self._run(self._max_batch)
            self._run(1)
            return
        for size in reversed(batch_buckets(self._max_batch)):
            self._forwards[size] = capture_forward(self._device, self._forward_of(size))
            self._run(size)

    def infer(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Classify the pictures in ``pieces`` (each uint8 of shape (n_i, 224, 224, 3)) in one go.

        Returns:
            float32 of shape (n, 10): five probabilities, then their five class indices, the
            likeliest first (fewer than five where the model has fewer classes).
        """
        count = 0
        for piece in pieces:
            self._staging_array[count : count + len(piece)] = piece
            count += len(piece)
        return self._run(count)

    def _run(self, count: int) -> np.ndarray:
        size = count
        if self._forwards:
            size = next(bucket for bucket in sorted(self._forwards) if bucket >= count)
        if self._input is not None:
            self._input[:size].copy_(self._staging[:size], non_blocking=True)
        outputs = self._forwards[size]() if self._forwards else self._eager(size)
        # The copy back waits for the device; only then may the staging buffer be filled again.
        return outputs[:count].cpu().numpy().copy()

    def _eager(self, size: int) -> Tensor:
        import torch

        with torch.inference_mode():
            return self._forward_of(size)()

    def _forward_of(self, size: int) -> Callable[[], Tensor]:
        import torch

        source = self._staging if self._input is None else self._input

        def forward() -> Tensor:
            # (n, height, width, channel) seen as (n, channel, height, width) is channels-last.
            pixels = source[:size].permute(0, 3, 1, 2).float()
            normalized = ((pixels - self._mean) / self._std).to(self._device.model_dtype)
            probabilities = self._model(normalized).float().softmax(dim=1)
            values, indices = probabilities.topk(self.top_classes, dim=1)
            return torch.cat((values, indices.float()), dim=1)

        return forward


def describe_top(outputs: np.ndarray, class_names: Sequence[str]) -> list[dict]:
    """Return one picture's output row as ``rank, class_id, class_name, probability`` entries."""
    half = len(outputs) // 2
    return [
        {
            "rank": rank + 1,
            "class_id": int(outputs[half + rank]),
            "class_name": class_names[int(outputs[half + rank])],
            "probability": round(float(outputs[rank]), 6),
        }
        for rank in range(half)
    ]
