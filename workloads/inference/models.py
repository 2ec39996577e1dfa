"""Image classifiers made ready for inference, for the server and the batch benchmark.

A model is loaded, its layers are fused, and it is cast once: autocast would convert the weights in
every forward pass, which at batch size 1 costs more than bf16 saves. ``Classifier`` is what the
server runs: uint8 pictures in, the likeliest classes out, one graph replay a batch.
"""

from __future__ import annotations

import difflib
import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from workloads.common import torch
from workloads.common.device import ComputeDevice
from workloads.common.engine import capture_forward, compile_module
from workloads.common.errors import NotFiniteError, UsageError
from workloads.common.weights import LoadedWeights, load_classifier, resolve_weights
from workloads.inference.image_input import IMAGE_SIZE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TOP_CLASSES = 5
# A small batch is waited for awake: to be woken up takes 0.12 ms, twice in a request that queues.
POLLING_SECONDS = 1e-3


def add_model_flags(flag: Callable[..., None]) -> None:
    """Add ``--model`` and ``--weights`` by ``flag`` of ``cli.flags``."""
    flag("--model", "resnet50", "resnet50, resnet18, vgg16 or any other classifier of torchvision, "
         "such as vit_b_16", metavar="NAME")  # fmt: skip
    flag("--weights", "auto", "auto: torchvision's ImageNet weights, else random ones with a "
         "warning; imagenet: an error without them; none: random; FILE: a saved state dict",
         metavar="auto|imagenet|none|FILE")  # fmt: skip


def require_model(name: str) -> None:
    """Look whether torchvision has a classifier ``name``.

    Raises:
        UsageError: It has none; the message names the nearest.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet50"]
        raise UsageError(
            f"torchvision has no classifier {name!r}; the nearest of its {len(known)}: "
            f"{', '.join(near)}"
        )


def resolve_model_flags(model: str, weights: str) -> tuple[list[str], list[str]]:
    """Find or download the weights once; return (flags that need no network, notes).

    Raises:
        UsageError: There is no such model, or its weights are not available.
    """
    require_model(model)
    path, kind = resolve_weights(model, weights)
    arguments = ["--weights", "none" if path is None else str(path)]
    return arguments, weights_notes(model, weights, kind)


def weights_notes(model: str, asked: str, kind: str) -> list[str]:
    """Return what a reader of the result must know about the weights."""
    if asked == "auto" and kind == "random":
        return [f"no pretrained weights for {model} are available: its weights are random"]
    return []


def load_inference_model(
    device: ComputeDevice, name: str, weights: str, seed: int
) -> tuple[torch.nn.Module, LoadedWeights]:
    """Load ``name`` onto ``device``; its inputs are (n, 3, 224, 224) in ``device.model_dtype``.

    Batch norms are folded into the convolutions in front of them. Except under the eager engine,
    which is the reference, ReLUs and residual sums are fused into them as well.

    Raises:
        UsageError: There is no such model, or its weights are not available or do not fit.
    """
    require_model(name)
    model, loaded = load_classifier(name, weights, seed)
    model = _fold_batch_norms(model)
    if isinstance(model, torch.fx.GraphModule) and device.is_cuda and device.engine != "eager":
        fuse_activations(model)
        if not _runs(model, device):
            model = _fold_batch_norms(load_classifier(name, weights, seed)[0])
    model.to(device.torch_device, device.model_dtype).to(memory_format=torch.channels_last)
    return compile_module(device, model), loaded


def _fold_batch_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Fold ``model``'s batch norms in place; return its graph, itself where it can't be traced."""
    from torch.fx.experimental.optimization import fuse

    # A forward pass that depends on its input raises what it likes, and stays as it is.
    try:
        return fuse(model, inplace=True)
    except Exception:
        return model


def _runs(model: torch.nn.Module, device: ComputeDevice) -> bool:
    """Put ``model`` on the device; return whether cuDNN has kernels for all its fused layers."""
    model.to(device.torch_device, device.model_dtype).to(memory_format=torch.channels_last)
    shape = (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    try:
        with torch.inference_mode():
            model(torch.zeros(shape, device=device.torch_device, dtype=device.model_dtype))
    except RuntimeError:
        return False
    return True


def fuse_activations(model: torch.fx.GraphModule) -> None:
    """Fuse each ReLU into the convolution (and sum) that alone feeds it, in place.

    ``model`` is in evaluation mode, its batch norms folded.

    Convolution, bias, residual sum and ReLU become one cuDNN kernel, which saves writing and
    reading every activation once more: on an H100 a ResNet50 in bf16 takes 1.57 ms instead of
    2.82 ms for 32 images and 0.41 ms instead of 0.64 ms for one.
    """
    from torch import fx, nn

    def fusible(node: fx.Node) -> nn.Conv2d | None:
        """Return the convolution that ``node`` is, where a ReLU can be fused into it."""
        convolution = _module(model, node)
        if (
            isinstance(convolution, nn.Conv2d)
            and (convolution.padding_mode, convolution.bias is None) == ("zeros", False)
            and len(node.users) == 1
        ):
            return convolution
        return None

    for relu in [node for node in model.graph.nodes if isinstance(_module(model, node), nn.ReLU)]:
        source, residual = relu.args[0], []
        is_sum = source.op == "call_function" and source.target in (operator.add, operator.iadd)
        if is_sum and len(source.users) == 1 and all(isinstance(n, fx.Node) for n in source.args):
            # A block's last convolution and its residual, in either order; where both are
            # convolutions (a downsampling block), the first one takes the sum along.
            source, *residual = sorted(source.args, key=lambda node: fusible(node) is None)
        convolution = fusible(source)
        if convolution is not None:
            name = f"{source.target}_fused"
            model.add_submodule(name, _fused(convolution))
            with model.graph.inserting_before(relu):
                fused = model.graph.call_module(name, (source.args[0], *residual))
            relu.replace_all_uses_with(fused)
    # A call of a module counts as having side effects; those that lost their users have none.
    model.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    model.delete_all_unused_submodules()
    model.recompile()


def _module(model: torch.fx.GraphModule, node: object) -> torch.nn.Module | None:
    if isinstance(node, torch.fx.Node) and node.op == "call_module":
        return model.get_submodule(str(node.target))
    return None


def _fused(convolution: torch.nn.Conv2d) -> torch.nn.Module:
    """Return ``relu(conv(x) + bias)``, or ``relu(conv(x) + bias + y)``, as one cuDNN kernel."""
    import torch  # the module itself, since the compiler reads the forward pass

    geometry: tuple[Any, ...] = (
        convolution.stride, convolution.padding, convolution.dilation, convolution.groups,
    )  # fmt: skip

    class FusedConvolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = convolution.weight, convolution.bias

        def forward(
            self, images: torch.Tensor, residual: torch.Tensor | None = None
        ) -> torch.Tensor:
            if residual is None:
                return torch.cudnn_convolution_relu(images, self.weight, self.bias, *geometry)
            return torch.cudnn_convolution_add_relu(
                images, self.weight, residual, 1.0, self.bias, *geometry
            )

    return FusedConvolution()


def batch_buckets(max_batch: int) -> list[int]:
    """Return the batch sizes that get a graph: powers of two below ``max_batch``, then itself."""
    return [*(1 << power for power in range((max_batch - 1).bit_length())), max_batch]


def require_finite(
    outputs: np.ndarray, device: ComputeDevice, model: str, weights: LoadedWeights
) -> None:
    """Look at the outputs of a batch, outside of every timing.

    Raises:
        NotFiniteError: Some are NaN or infinite, so that no figure of this model means anything.
    """
    broken = np.count_nonzero(~np.isfinite(outputs))
    if broken:
        raise NotFiniteError(
            f"{broken} of {outputs.size} outputs of {model} are NaN or infinite (weights "
            f"{weights.source}, {device.precision}); try --precision fp32 or other --weights"
        )


class Classifier:
    """A model on its device, with a staging buffer and a graph for each batch bucket.

    Copying in, normalizing, model, softmax, top-5 and copying out are one graph replay. A graph has
    a fixed shape, so a batch is padded to the next bucket; the eager engine runs any size as it is.
    """

    def __init__(
        self, device: ComputeDevice, name: str, weights: str, seed: int, max_batch: int
    ) -> None:
        """Load the model and set aside the buffers of the largest batch.

        Raises:
            UsageError: There is no such model, or its weights are not available or do not fit.
        """
        self._device, self._name, self._max_batch = device, name, max_batch
        self._model, self.weights = load_inference_model(device, name, weights, seed)
        where = device.torch_device
        self._mean = torch.tensor(IMAGENET_MEAN, device=where).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(IMAGENET_STD, device=where).view(1, 3, 1, 1) * 255
        shape = (max_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.is_cuda)
        self._staging_bytes = self._staging.numpy().data.cast("B")
        # On the CPU the host's buffers are the device's.
        self._pictures = self._staging.to(where) if device.is_cuda else self._staging
        self._top_classes = min(TOP_CLASSES, len(self.weights.class_names))
        columns = 2 * self._top_classes
        self._outputs = torch.zeros((max_batch, columns), pin_memory=device.is_cuda)
        self._replays: dict[int, Callable[[], None]] = {}
        self._done = torch.cuda.Event(blocking=True) if device.is_cuda else None

    def warm_up(self) -> None:
        """Capture every bucket, largest first so that the memory pool fits all, and run each.

        Raises:
            NotFiniteError: The model's outputs are NaN or infinite.
        """
        buckets = batch_buckets(self._max_batch)[::-1]
        if self._device.engine != "eager":
            for size in buckets:
                self._replays[size] = capture_forward(self._device, partial(self._work, size))
        for size in buckets if self._replays else (self._max_batch, 1):
            picture = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            probabilities = self.finish(self.start([picture]))[:, : self._top_classes]
            require_finite(probabilities, self._device, self._name, self.weights)

    def start(self, pictures: Sequence[np.ndarray]) -> int:
        """Launch arrays, uint8 of shape (n_i, 224, 224, 3), as one batch; return its size.

        The batch before must be finished.
        """
        position = 0
        for array in pictures:
            # NumPy would let go of the interpreter for each picture.
            content = array.data.cast("B")
            self._staging_bytes[position : position + len(content)] = content
            position += len(content)
        count = sum(map(len, pictures))
        if self._replays:
            self._replays[min(size for size in self._replays if size >= count)]()
        else:
            with torch.inference_mode():
                self._work(count)
        if self._done is not None:
            self._done.record()
        return count

    def finish(self, count: int) -> np.ndarray:
        """Wait for the batch.

        Returns:
            float32 of shape (count, 10): five probabilities, then their five class indices, the
            likeliest first (fewer than five where the model has fewer classes).
        """
        if self._done is not None:
            polling_end_seconds = time.monotonic() + POLLING_SECONDS
            while not self._done.query() and time.monotonic() < polling_end_seconds:
                pass
            self._done.synchronize()
        return self._outputs.numpy()[:count].copy()

    def _work(self, size: int) -> None:
        if self._device.is_cuda:
            self._pictures[:size].copy_(self._staging[:size], non_blocking=True)
        # (n, height, width, channel) seen as (n, channel, height, width) is channels-last.
        pixels = self._pictures[:size].permute(0, 3, 1, 2).float()
        normalized = ((pixels - self._mean) / self._std).to(self._device.model_dtype)
        probabilities = self._model(normalized).float().softmax(dim=1)
        values, indices = probabilities.topk(self._top_classes, dim=1)
        rows = torch.cat((values, indices.float()), dim=1)
        self._outputs[:size].copy_(rows, non_blocking=True)
