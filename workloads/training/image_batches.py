"""Batches of images on the device, with the guide's augmentation, ready to be captured.

Order, crop positions and flips of an epoch are drawn on the CPU from the seed (the same on every
device) and copied over once an epoch. Within the epoch a cursor on the device moves along them,
so that taking a batch is device work only and can be part of a CUDA graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from workloads.common.errors import UnreadableImageError
from workloads.training.image_data import CIFAR_SIZE, ArraySplit, FileSplit
from workloads.training.image_files import open_rgb

if TYPE_CHECKING:
    from workloads.common.device import ComputeDevice

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PADDING = 4
RESIDENT_SHARE_OF_FREE_MEMORY = 0.25


class Batches(ABC):
    """An epoch's batches; the base of both ways in which images reach the device.

    Attributes:
        placement: ``resident`` or ``streamed``, as recorded in the result.
        cursor: int64 scalar on the device, the position of the next sample of the epoch.
    """

    placement: str

    def __init__(
        self, device: ComputeDevice, labels: torch.Tensor, image_size: int, augment: bool, seed: int
    ) -> None:
        """Prepare epochs over ``labels`` (int64, shape (samples,))."""
        where = device.torch_device
        self.samples = len(labels)
        self._augment = augment
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._labels = labels.to(where)
        self.cursor = torch.zeros((), dtype=torch.int64, device=where)
        self.order = torch.arange(self.samples, device=where)
        self._crop_and_flip = augment and image_size == CIFAR_SIZE
        if self._crop_and_flip:
            self._shift = torch.full((self.samples, 2), CROP_PADDING, device=where)
            self._flip = torch.zeros(self.samples, dtype=torch.bool, device=where)
        is_cifar = image_size == CIFAR_SIZE
        self._mean = torch.tensor(CIFAR_MEAN if is_cifar else IMAGENET_MEAN, device=where) * 255
        self._std = torch.tensor(CIFAR_STD if is_cifar else IMAGENET_STD, device=where) * 255

    def restart(self) -> None:
        """Return to the state before the first epoch."""
        self._generator.manual_seed(self._seed)
        self.cursor.zero_()

    def start_epoch(self) -> None:
        """Draw the epoch's order, crops and flips, and go to its beginning."""
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

    def feed(self, count: int) -> None:
        """Bring the next ``count`` samples to where ``take`` finds them; before every step."""

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

    def close(self) -> None:
        """End the processes that decode, if there are any."""

    @abstractmethod
    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        """Return uint8 pixels of the samples ``picked``, shape (count, 3, size, size)."""


class ResidentBatches(Batches):
    """The whole dataset lies on the device."""

    placement = "resident"

    def __init__(
        self, device: ComputeDevice, split: ArraySplit, image_size: int, augment: bool, seed: int
    ) -> None:
        """Copy ``split`` to the device."""
        super().__init__(device, torch.from_numpy(split.labels), image_size, augment, seed)
        self._images = torch.tensor(split.images, device=device.torch_device)

    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        return self._images[picked]


class StreamedBatches(Batches):
    """Worker processes decode and prefetch; pinned copies feed one static buffer on the device."""

    placement = "streamed"

    def __init__(
        self,
        device: ComputeDevice,
        split: ArraySplit | FileSplit,
        image_size: int,
        augment: bool,
        seed: int,
        batch_size: int,
        workers: int,
    ) -> None:
        """Prepare ``workers`` processes that deliver batches of ``batch_size`` samples."""
        super().__init__(device, torch.from_numpy(split.labels), image_size, augment, seed)
        self._static = torch.zeros(
            (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=device.torch_device
        )
        self._epoch_order: list[tuple[int, int]] = []
        self._draws_in_workers = augment and not self._crop_and_flip
        self._iterator: Iterator[torch.Tensor] | None = None
        self._loader = torch.utils.data.DataLoader(
            _PixelDataset(split, image_size, augment),
            batch_sampler=_BatchesInOrder(self._epoch_order, batch_size),
            collate_fn=_stack,
            num_workers=workers,
            pin_memory=device.is_cuda,
            persistent_workers=workers > 0,
            # A plain fork after CUDA has started is undefined; a spawned worker imports anew.
            multiprocessing_context="spawn" if workers > 0 else None,
            # Its own: the loader draws from it, and the order must not depend on the placement.
            generator=torch.Generator().manual_seed(seed),
        )

    def start_epoch(self) -> None:
        """Draw the epoch's order and let the workers begin."""
        super().start_epoch()
        seeds = torch.zeros(self.samples, dtype=torch.int64)
        if self._draws_in_workers:
            seeds = torch.randint(2**62, (self.samples,), generator=self._generator)
        self._epoch_order[:] = zip(self.order.tolist(), seeds.tolist(), strict=True)
        self._iterator = iter(self._loader)

    def feed(self, count: int) -> None:
        """Copy the next decoded batch into the static buffer, in stream order.

        Raises:
            UnreadableImageError: A file of the batch is no image.
        """
        pixels = next(self._iterator)
        if isinstance(pixels, UnreadableImageError):
            raise pixels
        self._static[:count].copy_(pixels, non_blocking=True)

    def close(self) -> None:
        """End the workers."""
        self._iterator = None
        self._loader = None

    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        return self._static[:count]


class _BatchesInOrder:
    """Yields, batch by batch, the epoch's samples: index and seed of the augmentation."""

    def __init__(self, order: list[tuple[int, int]], batch_size: int) -> None:
        self._order = order
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self._order), self._batch_size):
            yield self._order[start : start + self._batch_size]

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)


class _PixelDataset(torch.utils.data.Dataset):
    """uint8 pixels by index: from an array, or decoded, cropped and flipped from a file."""

    def __init__(self, split: ArraySplit | FileSplit, image_size: int, augment: bool) -> None:
        self._split = split
        self._transform = None
        if isinstance(split, FileSplit):
            self._transform = _file_transform(image_size, augment)

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, sample: tuple[int, int]) -> torch.Tensor | UnreadableImageError:
        """Return the pixels, or why there are none: what a worker raises loses its type and gets
        the worker's traceback for a message.
        """
        index, seed = sample
        if isinstance(self._split, ArraySplit):
            return torch.tensor(self._split.images[index])
        try:
            image = open_rgb(self._split.paths[index])
        except UnreadableImageError as error:
            return error
        # Seeded by the sample: a worker's own random state would go on from job to job.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._transform(image)


def _stack(samples: list[torch.Tensor | UnreadableImageError]) -> object:
    """Return the batch, or the first error in it."""
    broken = next((sample for sample in samples if isinstance(sample, Exception)), None)
    return broken or torch.stack(samples)


def _file_transform(image_size: int, augment: bool):
    """Return the usual ImageNet transform from a PIL image to uint8 (3, size, size)."""
    from torchvision.transforms import v2

    if augment:
        steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    else:
        # 256 for 224: the customary margin of one eighth around the center crop.
        steps = [v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size)]
    return v2.Compose([*steps, v2.PILToTensor()])


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
    padded = F.pad(pixels, (CROP_PADDING,) * 4)
    steps = torch.arange(size, device=pixels.device)
    rows = shift[:, :1] + steps
    columns = shift[:, 1:] + torch.where(flip[:, None], size - 1 - steps, steps)
    batch = torch.arange(len(pixels), device=pixels.device)
    # Index tensors on both sides of the channel slice: NumPy's rules put the channels last.
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]


def make_batches(
    device: ComputeDevice,
    split: ArraySplit | FileSplit,
    image_size: int,
    *,
    augment: bool,
    seed: int,
    batch_size: int,
    workers: int,
    clients: int,
) -> Batches:
    """Return resident batches where the images fit a fair share of the device, else streamed ones.

    Args:
        device: Where the batches are wanted.
        split: The images.
        image_size: Height and width in pixels.
        augment: Whether to shuffle, crop and flip (training).
        seed: Fixes order and augmentation.
        batch_size: Samples a batch.
        workers: Decoding processes of streamed batches.
        clients: How many clients share the GPU; each may fill a quarter of the free memory
            divided by this number.
    """
    if isinstance(split, ArraySplit) and _fits(device, split.images.nbytes, clients):
        return ResidentBatches(device, split, image_size, augment, seed)
    return StreamedBatches(device, split, image_size, augment, seed, batch_size, workers)


def _fits(device: ComputeDevice, size_bytes: int, clients: int) -> bool:
    if not device.is_cuda:
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device.torch_device)
    return size_bytes <= free_bytes * RESIDENT_SHARE_OF_FREE_MEMORY / clients
