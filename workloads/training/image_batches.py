"""How images reach the device: batches that a captured step takes, cropped and flipped there.

Images that are files, or do not fit the device, are decoded by threads and copied into one static
buffer.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import PIL.Image
import PIL.ImageOps

from workloads.common import torch
from workloads.common.device import ComputeDevice, usable_cores
from workloads.common.engine import Batches
from workloads.inference.models import IMAGENET_MEAN, IMAGENET_STD
from workloads.training.images import BILINEAR, CIFAR_SIZE, Split, open_rgb

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CROP_PADDING = 4
RESIDENT_SHARE_OF_FREE_MEMORY = 0.25
MAX_LOADER_WORKERS = 8


class ImageBatches(Batches):
    """An epoch's images, with the guide's augmentation.

    Order, crop positions and flips of an epoch are drawn on the CPU from the seed (the same on
    every device) and copied over once an epoch.
    """

    def __init__(
        self, device: ComputeDevice, split: Split, image_size: int, augment: bool, seed: int,
        batch_size: int,
    ) -> None:  # fmt: skip
        """Prepare epochs over ``split``; ``augment`` shuffles, crops and flips."""
        super().__init__(device, split.labels, batch_size)
        where = device.torch_device
        self._augment, self._seed = augment, seed
        self._generator = torch.Generator()
        self.order = torch.arange(self.samples, device=where)
        is_cifar = image_size == CIFAR_SIZE
        self._crop_and_flip = augment and is_cifar
        if self._crop_and_flip:
            self._shift = torch.full((self.samples, 2), CROP_PADDING, device=where)
            self._flip = torch.zeros(self.samples, dtype=torch.bool, device=where)
        self._mean = torch.tensor(CIFAR_MEAN if is_cifar else IMAGENET_MEAN, device=where) * 255
        self._std = torch.tensor(CIFAR_STD if is_cifar else IMAGENET_STD, device=where) * 255
        self._place(split, image_size)
        self.restart()

    def _place(self, split: Split, image_size: int) -> None:
        self._images = torch.tensor(split.images, device=self.cursor.device)

    def restart(self) -> None:
        """Return to the state before the first epoch."""
        super().restart()
        self._generator.manual_seed(self._seed)

    def start_epoch(self, epoch: int = 0) -> None:
        """Draw the next epoch's order, crops and flips, and go to its beginning."""
        self.cursor.zero_()
        if not self._augment:
            return
        self.order.copy_(torch.randperm(self.samples, generator=self._generator))
        if self._crop_and_flip:
            shape = (self.samples, 2)
            shift = torch.randint(0, 2 * CROP_PADDING + 1, shape, generator=self._generator)
            flip = torch.rand(self.samples, generator=self._generator) < 0.5
            self._shift.copy_(shift)
            self._flip.copy_(flip)

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch; device work only.

        Returns:
            float32 images of shape (count, 3, size, size) in channels_last, normalized, and int64
            labels of shape (count,).
        """
        # Warm-up steps may run past the end of a small dataset: start again there.
        positions = (self.cursor + torch.arange(count, device=self.cursor.device)) % self.samples
        picked = self.order[positions]
        pixels = self._pixels(picked, count)
        if self._crop_and_flip:
            pixels = crop_and_flip(pixels, self._shift[positions], self._flip[positions])
        else:
            pixels = pixels.permute(0, 2, 3, 1)
        self.cursor.add_(count)
        images = (pixels.float() - self._mean) / self._std
        return images.permute(0, 3, 1, 2), self._labels[picked]

    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        """Return uint8 pixels of the samples ``picked``, shape (count, 3, size, size)."""
        return self._images[picked]


class StreamedBatches(ImageBatches):
    """Threads decode and prefetch; pinned copies feed one static buffer on the device.

    Threads and not processes: decoding lets go of the interpreter, and nothing has to be started,
    waited for without an answer, or handed over in shared memory, of which containers have little.
    """

    placement = "streamed"

    def __init__(
        self, device: ComputeDevice, split: Split, image_size: int, augment: bool,
        seed: int, batch_size: int, workers: int,
    ) -> None:  # fmt: skip
        """Prepare ``workers`` threads that decode batches of ``batch_size`` samples."""
        # Of crops in files: apart, since the order must not depend on where the images are.
        self._seeds = torch.Generator()
        super().__init__(device, split, image_size, augment, seed, batch_size)
        self._is_cuda = device.is_cuda
        self._prefetch = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._decoding: deque[Future[torch.Tensor]] = deque()
        self._waiting: Iterator[list[tuple[int, int]]] = iter(())

    def _place(self, split: Split, image_size: int) -> None:
        self._split = split
        shape = (self.batch_size, 3, image_size, image_size)
        self._static = torch.zeros(shape, dtype=torch.uint8, device=self.cursor.device)

    def restart(self) -> None:
        """Return to the state before the first epoch."""
        super().restart()
        self._seeds.manual_seed(self._seed)

    def start_rehearsal(self) -> None:
        """Let the threads decode one full batch and the smaller rest."""
        self.start_epoch(samples=self.batch_size + self.samples % self.batch_size)

    def start_epoch(self, epoch: int = 0, samples: int | None = None) -> None:
        """Draw the epoch's order and let the threads begin with its first ``samples`` (all)."""
        super().start_epoch(epoch)
        seeds = torch.randint(2**62, (self.samples,), generator=self._seeds)
        order = list(zip(self.order.tolist(), seeds.tolist(), strict=True))[:samples]
        starts = range(0, len(order), self.batch_size)
        self._waiting = iter([order[start : start + self.batch_size] for start in starts])
        self._decoding.clear()
        for _ in range(self._prefetch):
            self._submit()

    def _submit(self) -> None:
        batch = next(self._waiting, None)
        if batch is not None:
            self._decoding.append(self._pool.submit(self._decode, batch))

    def _decode(self, batch: list[tuple[int, int]]) -> torch.Tensor:
        """Return the pixels of a batch, each sample an index and the seed of its crop."""
        shape = (len(batch), *self._static.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._is_cuda)
        crop = random_crop if self._augment else central_crop
        for row, (index, seed) in zip(pixels.numpy(), batch, strict=True):
            image = self._split.images[index]
            if not self._split.is_decoded:
                image = np.asarray(crop(open_rgb(image), shape[-1], seed)).transpose(2, 0, 1)
            row[:] = image
        return pixels

    def feed(self, count: int) -> None:
        """Copy the next decoded batch into the static buffer, in stream order.

        Raises:
            UnreadableImageError: A file of the batch is no image.
        """
        pixels = self._decoding.popleft().result()
        self._submit()
        self._static[:count].copy_(pixels, non_blocking=True)

    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        return self._static[:count]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def random_crop(image: PIL.Image.Image, size: int, seed: int) -> PIL.Image.Image:
    """Return a random part, mirrored half of the time, as torchvision's RandomResizedCrop draws it.

    8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, where that fits after ten draws.
    """
    generator = random.Random(seed)
    for _ in range(10):
        area = image.width * image.height * generator.uniform(0.08, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = generator.randint(0, image.width - width)
            top = generator.randint(0, image.height - height)
            box = (left, top, left + width, top + height)
            part = image.resize((size, size), BILINEAR, box)
            break
    else:
        part = PIL.ImageOps.fit(image, (size, size), BILINEAR)
    return PIL.ImageOps.mirror(part) if generator.random() < 0.5 else part


def central_crop(image: PIL.Image.Image, size: int, seed: int = 0) -> PIL.Image.Image:
    """Return the central square without the customary margin of one eighth: 224 of 256 pixels."""
    return PIL.ImageOps.fit(image, (size, size), BILINEAR, bleed=1 / 16)


def crop_and_flip(pixels: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Crop each padded image at its own place and mirror some: RandomCrop(padding=4) and flip.

    The padding is black before normalization, as torchvision's RandomCrop does it.

    Args:
        pixels: uint8, shape (batch, 3, size, size).
        shift: int64, shape (batch, 2), rows and columns from 0 to twice the padding.
        flip: bool, shape (batch,).

    Returns:
        uint8, shape (batch, size, size, 3).
    """
    size = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (CROP_PADDING,) * 4)
    steps = torch.arange(size, device=pixels.device)
    rows = shift[:, :1] + steps
    columns = shift[:, 1:] + torch.where(flip[:, None], size - 1 - steps, steps)
    batch = torch.arange(len(pixels), device=pixels.device)
    # Index tensors on both sides of the channel slice: NumPy's rules put the channels last.
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]


def make_batches(
    device: ComputeDevice, split: Split, image_size: int, *, augment: bool,
    seed: int, batch_size: int, workers: int | None, clients: int,
) -> ImageBatches:  # fmt: skip
    """Return resident batches where the images fit a fair share of the device, else streamed ones.

    Each of the ``clients`` that share the GPU may fill its part of a quarter of the free memory.
    ``workers`` decode what is streamed; None takes a fair share of the cores.
    """
    shared = (device, split, image_size, augment, seed, batch_size)
    free_bytes = torch.cuda.mem_get_info(device.torch_device)[0] if device.is_cuda else math.inf
    share_bytes = free_bytes * RESIDENT_SHARE_OF_FREE_MEMORY / clients
    if split.is_decoded and split.images.nbytes <= share_bytes:
        return ImageBatches(*shared)
    if workers is None:
        workers = min(MAX_LOADER_WORKERS, usable_cores() // clients - 1)
    return StreamedBatches(*shared, max(1, workers))
