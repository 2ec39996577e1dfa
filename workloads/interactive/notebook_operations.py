"""The guide's four notebook operations as fixed work that a CUDA graph can hold.

An operation reads and writes fixed tensors and leaves everything that it changes as it found it or
overwrites it the next time, so running it again is the same work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

from workloads.common import torch
from workloads.common.device import ComputeDevice
from workloads.common.engine import capture_forward, compile_module
from workloads.inference.models import IMAGENET_MEAN, IMAGENET_STD

NETWORK_SIZES = (784, 256, 10)
TRAIN_SAMPLES = 1024
TRAIN_BATCH_SIZE = 64
TRAIN_LR = 0.1
PREPROCESS_IMAGES = 32
# Images are interpolated to 7/8 of their size, as from the customary 256 to 224 pixels.
PREPROCESS_SHRINK = (7, 8)


def draw_sizes(seed: int, **given: int | None) -> SimpleNamespace:
    """Draw each size from the guide's range, the same for the same seed; ``given`` ones win.

    One draw a kind, not one a cell: cells of one kind are then the same work, so that their times
    can be compared with each other and between runs. Sizes are sides in rows or pixels, and how
    often each part is repeated; preprocessing handles ``PREPROCESS_IMAGES`` of ``image_size``.
    """
    generator = random.Random(seed)
    # All are drawn, so that giving one leaves the others as they were. Multiples of 8, since
    # tensor cores want aligned rows.
    sizes = SimpleNamespace(
        matrix_size=generator.randrange(1000, 2001, 8),
        matrix_iterations=100,
        preprocess_iterations=generator.randint(30, 50),
        train_epochs=generator.randint(5, 10),
        inference_images=generator.randint(50, 100),
        image_size=224,
    )
    vars(sizes).update({name: value for name, value in given.items() if value is not None})
    return sizes


def matrix_operation(
    device: ComputeDevice, sizes: SimpleNamespace, seed: int
) -> Callable[[], None]:
    """Return the multiplication of two square matrices, and ReLU, ``matrix_iterations`` times."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.matrix_size, sizes.matrix_size)
    left, right = (
        torch.randn(shape, generator=generator).to(device.torch_device, device.model_dtype)
        for _ in range(2)
    )
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(sizes.matrix_iterations):
            torch.mm(left, right, out=product)
            product.relu_()

    return multiply


def preprocess_operation(
    device: ComputeDevice, sizes: SimpleNamespace, seed: int
) -> Callable[[], None]:
    """Return normalization and interpolation of uint8 images, ``preprocess_iterations`` times."""
    generator = torch.Generator().manual_seed(seed)
    where, dtype = device.torch_device, device.model_dtype
    small, large = PREPROCESS_SHRINK
    side = sizes.image_size * large // small
    images = torch.randint(
        0, 256, (PREPROCESS_IMAGES, 3, side, side), dtype=torch.uint8, generator=generator
    ).to(where)
    mean, std = (
        torch.tensor(values, device=where, dtype=dtype).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    target = (sizes.image_size, sizes.image_size)

    def preprocess() -> None:
        for _ in range(sizes.preprocess_iterations):
            normalized = (images.to(dtype) / 255 - mean) / std
            torch.nn.functional.interpolate(
                normalized, size=target, mode="bilinear", align_corners=False
            )

    return preprocess


def train_operation(device: ComputeDevice, sizes: SimpleNamespace, seed: int) -> Callable[[], None]:
    """Return a quick experiment: a 784-256-10 network trained ``train_epochs`` from its start."""
    network = small_network(device, seed)
    inputs, labels = synthetic_digits(device, seed)
    parameters = list(network.parameters())
    beginning = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=TRAIN_LR, fused=True)
    forward = compile_module(device, network)

    def train() -> None:
        with torch.no_grad():
            for parameter, start in zip(parameters, beginning, strict=True):
                parameter.copy_(start)
        for _ in range(sizes.train_epochs):
            for batch in range(0, TRAIN_SAMPLES, TRAIN_BATCH_SIZE):
                chosen = slice(batch, batch + TRAIN_BATCH_SIZE)
                optimizer.zero_grad(set_to_none=True)
                with device.autocast():
                    loss = torch.nn.functional.cross_entropy(
                        forward(inputs[chosen]), labels[chosen]
                    )
                loss.backward()
                optimizer.step()

    return train


def inference_operation(
    device: ComputeDevice, sizes: SimpleNamespace, seed: int, model: torch.nn.Module
) -> Callable[[], object]:
    """Return ``model``'s pass, ready for the engine, over random images as one batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.inference_images, 3, sizes.image_size, sizes.image_size)
    images = torch.randn(shape, generator=generator).to(
        device.torch_device, device.model_dtype, memory_format=torch.channels_last
    )

    return capture_forward(device, lambda: model(images))


def small_network(device: ComputeDevice, seed: int) -> torch.nn.Module:
    """Return the guide's feed-forward network, its weights drawn from ``seed``."""
    inputs, hidden, outputs = NETWORK_SIZES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs)
        )
    return network.to(device.torch_device)


def synthetic_digits(device: ComputeDevice, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (1024, 784) and labels (1024,) that a linear rule decides, to be learned."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TRAIN_SAMPLES, NETWORK_SIZES[0], generator=generator)
    rule = torch.randn(NETWORK_SIZES[0], NETWORK_SIZES[-1], generator=generator)
    labels = (inputs @ rule).argmax(dim=1)
    return inputs.to(device.torch_device), labels.to(device.torch_device)
