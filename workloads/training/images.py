"""Images for training: where they come from, and how they reach the device batch by batch.

CIFAR-10 and folders trained on at 32x32 become uint8 arrays that lie on the device; folders at
other sizes stay files that threads decode while training. Whatever a folder holds is used
or refused by name before training: an accuracy over fewer images than it says would be another
measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from workloads.common import console
from workloads.common.device import usable_cores
from workloads.common.errors import MIB, DamagedFileError, UnreadableImageError, UsageError
from workloads.common.results import cache_folder, written_whole
from workloads.common.weights import DownloadError, download
from workloads.inference.image_input import ImageRejected, open_image, to_rgb
from workloads.inference.models import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

    from workloads.common.device import ComputeDevice

CIFAR_SIZE = 32
LARGE_SIZE = 224
CIFAR_TRAIN_SAMPLES = 50_000
CIFAR_TEST_SAMPLES = 10_000
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
TEST_FOLDERS = ("test", "val", "valid", "validation")
# What file managers leave behind, besides names that begin with a dot.
LITTER = frozenset(("__macosx", "thumbs.db", "desktop.ini"))

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CROP_PADDING = 4
RESIDENT_SHARE_OF_FREE_MEMORY = 0.25
MAX_LOADER_WORKERS = 8


@dataclass(frozen=True)
class Split:
    """Images and their labels (int64 of shape (samples,)).

    Images are uint8 of shape (samples, 3, size, size), or paths of shape (samples,) of files that
    are decoded on the way to the device.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_decoded(self) -> bool:
        """Whether the images are in memory."""
        return self.images.dtype == np.uint8

    def limited(self, samples: int | None, seed: int) -> Split:
        """Return at most this many of the images, the same ones for the same seed."""
        if samples is None or samples >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:samples]
        chosen.sort()
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageDataset:
    """Two splits of the same classes; ``notes`` are what a reader of the summary must know."""

    name: str
    train: Split
    test: Split
    class_names: Sequence[str]
    image_size: int  # height and width of what the network sees, in pixels
    notes: Sequence[str] = field(default=())

    def limited(
        self, train_samples: int | None, test_samples: int | None, seed: int
    ) -> ImageDataset:
        """Return the dataset with at most this many samples a split.

        Without ``test_samples`` a limited training split keeps the ratio of the two splits.
        """
        if train_samples is not None and test_samples is None:
            test_samples = max(1, round(len(self.test) * train_samples / len(self.train)))
        return replace(
            self,
            train=self.train.limited(train_samples, seed),
            test=self.test.limited(test_samples, seed),
        )


def load_dataset(
    kind: str,
    data_dir: Path,
    image_size: int | None,
    seed: int,
    warn: Callable[[str], None],
) -> ImageDataset:
    """Load the dataset of the ``kind`` that ``--dataset`` names.

    ``image_size`` None takes 32 for 32x32 images, else 224. ``warn`` is called with what the user
    must know if synthetic images stand in.

    Raises:
        UsageError: The data is not available; the message names the fix.
        DamagedFileError: It is there, truncated or altered: nothing stands in for it.
    """
    if kind == "synthetic":
        return synthetic_dataset(seed)
    if kind == "folder" or (kind == "auto" and (data_dir / "train").is_dir()):
        return _load_folder(data_dir, image_size)
    try:
        return _load_cifar10(data_dir.absolute())
    except UsageError as error:
        if kind == "cifar10":
            raise
        warn(
            f"training on SYNTHETIC images, so accuracy means nothing ({error}). Speed and "
            "memory are those of CIFAR-10."
        )
        return synthetic_dataset(seed)


def synthetic_dataset(
    seed: int, train_samples: int = CIFAR_TRAIN_SAMPLES, test_samples: int = CIFAR_TEST_SAMPLES
) -> ImageDataset:
    """Return noise of CIFAR-10's shape with a faint color pattern a class, the same for a seed."""
    generator = np.random.default_rng(seed)
    pattern = generator.integers(0, 64, (len(CIFAR_CLASSES), 3, 4, 4), dtype=np.uint8)
    pattern = pattern.repeat(CIFAR_SIZE // 4, axis=2).repeat(CIFAR_SIZE // 4, axis=3)

    def split(samples: int) -> Split:
        labels = generator.integers(0, len(CIFAR_CLASSES), samples)
        shape = (samples, 3, CIFAR_SIZE, CIFAR_SIZE)
        noise = np.frombuffer(generator.bytes(samples * 3 * CIFAR_SIZE**2), np.uint8)
        images = noise.reshape(shape) // 2
        images += pattern[labels]
        return Split(images, labels)

    return ImageDataset(
        "synthetic", split(train_samples), split(test_samples), CIFAR_CLASSES, CIFAR_SIZE
    )


# --- CIFAR-10 -------------------------------------------------------------------------------------


def _load_cifar10(data_dir: Path) -> ImageDataset:
    """Read CIFAR-10 from ``data_dir``, downloaded into it where it is missing or damaged.

    The bytes that fit the published checksums are the bytes that are read: whoever owns the folder
    may exchange a file at any time, and its format is one that can run code.
    """
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    files = {
        name: _unpickle(content, folder / name)
        for name, content in _cifar10_files(data_dir).items()
    }

    def split(names: Sequence[Sequence[str]]) -> Split:
        parts = [files[name] for name, _ in names]
        images = np.concatenate([part["data"] for part in parts])
        labels = np.concatenate([part["labels"] for part in parts]).astype(np.int64)
        return Split(images.reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE), labels)

    class_names = tuple(files[CIFAR10.meta["filename"]][CIFAR10.meta["key"]])
    return ImageDataset(
        "cifar10", split(CIFAR10.train_list), split(CIFAR10.test_list), class_names, CIFAR_SIZE
    )


def _cifar10_files(data_dir: Path) -> dict[str, bytes]:
    """Return the content of each file as published: from the folder, the archive, or the network.

    Raises:
        DamagedFileError: What lies there does not fit its checksum and cannot be replaced.
        UsageError: Nothing lies there, and the download failed.
    """
    from torchvision.datasets import CIFAR10

    folder, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    wanted = dict((*CIFAR10.train_list, *CIFAR10.test_list))
    wanted[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    damaged: list[Path] = []
    contents = {name: _content(folder / name, md5, damaged) for name, md5 in wanted.items()}
    if None not in contents.values():
        return contents
    packed = _content(archive, CIFAR10.tgz_md5, damaged)
    # The archive first: it is what everything else comes from.
    names = " and ".join(map(str, sorted(damaged, key=lambda path: path != archive)))
    if damaged:
        console.note(f"{names}: damaged (wrong checksum); CIFAR-10 is taken anew")
    if packed is None:
        console.note(f"CIFAR-10: downloading {CIFAR10.url} once to {data_dir}")
        try:
            packed = _download_archive(CIFAR10.url, archive, CIFAR10.tgz_md5)
        except DownloadError as error:
            if damaged:
                raise DamagedFileError(
                    f"{names} does not fit its checksum, and CIFAR-10 could not be downloaded "
                    f"again ({error}); remove it, and put a whole {archive.name} in {data_dir}"
                ) from error
            raise UsageError(
                f"CIFAR-10 is not in {data_dir} and its download failed ({error}); put the "
                f"unpacked {folder.name} there, or name its folder with --data-dir"
            ) from error
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for name in wanted:
            contents[name] = tar.extractfile(f"{CIFAR10.base_folder}/{name}").read()
            with contextlib.suppress(OSError), written_whole(folder / name) as file:
                file.write(contents[name])
    return contents


def _content(path: Path, md5: str, damaged: list[Path]) -> bytes | None:
    """Return what a file holds; None where it is missing, or (noted in ``damaged``) altered."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
        return content
    damaged.append(path)
    return None


def _download_archive(url: str, archive: Path, md5: str) -> bytes:
    """Download into ``archive`` and return its content; a failure leaves nothing behind."""
    made = not archive.parent.exists()
    try:
        download(url, archive)
        packed = _content(archive, md5, [])
        if packed is None:
            raise DownloadError("the transfer broke off or brought another file")
    except BaseException:
        archive.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody uses it by now
                archive.parent.rmdir()
        raise
    return packed


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of arrays, and nothing that could run."""

    NAMES = frozenset(("_reconstruct", "_frombuffer", "ndarray", "dtype"))

    def find_class(self, module: str, name: str) -> object:
        """Return one of NumPy's own constructors of arrays."""
        if module.partition(".")[0] != "numpy" or name not in self.NAMES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(content: bytes, path: Path) -> dict:
    try:
        # Written by Python 2: its strings are bytes of one alphabet or another.
        return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise DamagedFileError(
            f"{path} is none of CIFAR-10's files ({error}); remove it"
        ) from error


# --- folders of images ----------------------------------------------------------------------------


def _load_folder(data_dir: Path, image_size: int | None) -> ImageDataset:
    data_dir = data_dir.resolve()
    test_dirs = [data_dir / name for name in TEST_FOLDERS if (data_dir / name).is_dir()]
    if not (data_dir / "train").is_dir() or not test_dirs:
        raise UsageError(
            f"{data_dir} has no train/ and test/ (or val/) folders; name with --data-dir a folder "
            "that has both, each with one folder a class"
        )
    notes = [f"{unused} is not used: the test is on {test_dirs[0]}" for unused in test_dirs[1:]]
    train_classes = _class_folders(data_dir / "train")
    test_classes = _class_folders(test_dirs[0])
    for split_dir, missing in (
        (test_dirs[0], train_classes.keys() - test_classes.keys()),
        (data_dir / "train", test_classes.keys() - train_classes.keys()),
    ):
        if missing:
            raise UsageError(
                f"{split_dir} has no folder for the class {min(missing)!r}; train and test must "
                "have the same classes"
            )
    train, test = _list_images(train_classes), _list_images(test_classes)
    files = [*train.images, *test.images]
    fingerprint = _fingerprint(files)
    sizes = _image_sizes(files, fingerprint)
    if image_size is None:
        image_size = CIFAR_SIZE if sizes == {(CIFAR_SIZE, CIFAR_SIZE)} else LARGE_SIZE
    if sizes != {(image_size, image_size)}:
        ends = sorted({min(sizes), max(sizes)})
        span = " to ".join(f"{width}x{height}" for width, height in ends)
        notes.append(f"images of {span} are resized to {image_size}x{image_size}")
    if image_size == CIFAR_SIZE:
        images = _decode_cached(files, fingerprint)
        train = Split(images[: len(train)], train.labels)
        test = Split(images[len(train) :], test.labels)
    return ImageDataset("folder", train, test, list(train_classes), image_size, notes)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """Return what lies in ``folder``, by name; of 60,000 files it knows which are folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"cannot read {folder} ({error.strerror}); chmod or remove it") from error
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and entry.name.lower() not in LITTER
    ]


def _class_folders(split_dir: Path) -> dict[str, str]:
    """Return the folder of each class, by name; everything else in ``split_dir`` is refused."""
    classes = {entry.name: entry.path for entry in _entries(split_dir)}
    for path in classes.values():
        if not os.path.isdir(path):
            raise UsageError(f"{path} lies in no class folder; move it into one, or remove it")
    if len(classes) < 2:
        raise UsageError(f"{split_dir} has {len(classes)} class folders; at least 2 are needed")
    return classes


def _list_images(classes: dict[str, str]) -> Split:
    """Return every file of each class folder, in its subfolders too, in the order of the names."""
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes.values()):
        files = list(_files_below(folder, set()))
        if not files:
            raise UsageError(f"{folder} holds no images; add some, or remove the class everywhere")
        paths += files
        labels += [label] * len(files)
    return Split(np.asarray(paths, dtype=object), np.asarray(labels, dtype=np.int64))


def _files_below(folder: str, seen: set[str]) -> Iterator[str]:
    """Yield the files in ``folder`` by name, links to folders followed, each folder once."""
    place = os.path.realpath(folder)
    if place not in seen:
        seen.add(place)
        for entry in _entries(folder):
            if entry.is_dir():
                yield from _files_below(entry.path, seen)
            else:
                yield entry.path


def _fingerprint(files: Sequence[str]) -> str:
    """Return a name that changes when a file is added, removed, renamed or rewritten.

    Raises:
        UnreadableImageError: A file is not there, such as where a link leads nowhere.
    """
    digest = hashlib.sha256()
    for path in files:
        with _reading(path):
            status = os.stat(path)
        digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:24]


def _image_sizes(files: Sequence[str], fingerprint: str) -> set[tuple[int, int]]:
    """Return the sizes (width, height) of all images, having opened each one once and for all.

    Raises:
        UnreadableImageError: A file is no image.
    """
    kept = None
    with contextlib.suppress(UsageError):  # without a cache each run opens them all
        kept = cache_folder() / f"sizes-{fingerprint}.json"
    if kept is not None and kept.is_file():
        with contextlib.suppress(OSError, ValueError, TypeError):
            return {(int(width), int(height)) for width, height in json.loads(kept.read_text())}
    with (
        console.stage(f"opening {len(files)} images"),
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        sizes = set(pool.map(_size, files, chunksize=256))
    if kept is not None:
        with contextlib.suppress(OSError), written_whole(kept, "t") as file:
            json.dump(sorted(sizes), file)
    return sizes


def _size(path: str) -> tuple[int, int]:
    with _reading(path), open_image(Path(path)) as image:
        return image.size


def open_rgb(path: str) -> Image:
    """Return the decoded image in RGB.

    Raises:
        UnreadableImageError: The file is no image, truncated, or cannot be read.
    """
    with _reading(path):
        return to_rgb(open_image(Path(path)))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (ImageRejected, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(
            f"{path} cannot be read as an image "
            f"({why.removeprefix('cannot decode the image: ')}); remove or replace it, none is "
            "skipped"
        ) from error


def _decode_cached(files: Sequence[str], fingerprint: str) -> np.ndarray:
    """Decode once and keep the array: eight clients must not decode 60,000 files each."""
    cache = cache_folder() / f"decoded-{fingerprint}.npy"
    if cache.exists():
        with contextlib.suppress(OSError, ValueError, EOFError):
            images = np.load(cache, mmap_mode="r")
            if images.shape == (len(files), 3, CIFAR_SIZE, CIFAR_SIZE):
                return images
        console.note(f"{cache} is cut off or damaged: it is made anew")
    console.note(f"decoding {len(files)} images once; kept in {cache}")
    with console.stage(f"decoding {len(files)} images"), ThreadPoolExecutor(usable_cores()) as pool:
        array = np.stack(list(pool.map(_decode_small, files, chunksize=256)))
    if shutil.disk_usage(cache.parent).free < 2 * array.nbytes:
        raise UsageError(
            f"{cache.parent} has too little room for {array.nbytes // MIB} MiB of decoded images; "
            "free some, or set XDG_CACHE_HOME to a larger disk"
        )
    with written_whole(cache) as file:
        np.save(file, array)
    return np.load(cache, mmap_mode="r")


def _decode_small(path: str) -> np.ndarray:
    """Return the image as uint8 of shape (3, 32, 32), cropped square and resized where needed."""
    size = (CIFAR_SIZE, CIFAR_SIZE)
    image = PIL.ImageOps.fit(open_rgb(path), size, PIL.Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


# --- batches on the device ------------------------------------------------------------------------


class ImageBatches:
    """An epoch's batches, with the guide's augmentation, ready to be captured.

    Order, crop positions and flips of an epoch are drawn on the CPU from the seed (the same on
    every device) and copied over once an epoch. Within the epoch a cursor on the device moves along
    them, so that taking a batch is device work only and can be part of a CUDA graph.

    Attributes:
        placement: ``resident`` (the whole dataset lies on the device) or ``streamed``.
        samples: How many images there are.
        batch_size: How many a full batch has.
        cursor: int64 scalar on the device, the position of the next sample of the epoch.
    """

    placement = "resident"

    def __init__(
        self, device: ComputeDevice, split: Split, image_size: int, augment: bool, seed: int,
        batch_size: int,
    ) -> None:  # fmt: skip
        """Prepare epochs over ``split``; ``augment`` shuffles, crops and flips."""
        where = device.torch_device
        self.samples, self.batch_size = len(split), batch_size
        self._augment = augment
        self._generator = torch.Generator()
        # Of crops in files: apart, since the order must not depend on where the images are.
        self._seeds = torch.Generator()
        self._seed = seed
        self._labels = torch.from_numpy(split.labels).to(where)
        self.cursor = torch.zeros((), dtype=torch.int64, device=where)
        self.order = torch.arange(self.samples, device=where)
        is_cifar = image_size == CIFAR_SIZE
        self._crop_and_flip = augment and is_cifar
        if self._crop_and_flip:
            self._shift = torch.full((self.samples, 2), CROP_PADDING, device=where)
            self._flip = torch.zeros(self.samples, dtype=torch.bool, device=where)
        self._mean = torch.tensor(CIFAR_MEAN if is_cifar else IMAGENET_MEAN, device=where) * 255
        self._std = torch.tensor(CIFAR_STD if is_cifar else IMAGENET_STD, device=where) * 255
        self._place(split, (3, image_size, image_size))
        self.restart()

    def restart(self) -> None:
        """Return to the state before the first epoch."""
        self._generator.manual_seed(self._seed)
        self._seeds.manual_seed(self._seed)
        self.cursor.zero_()

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

    def start_rehearsal(self) -> None:
        """Begin an epoch of which one full batch and the smaller rest are taken."""
        self.start_epoch()

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
        """End the threads that decode, if there are any."""

    def _place(self, split: Split, shape: tuple[int, int, int]) -> None:
        self._images = torch.tensor(split.images, device=self.cursor.device)

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
        super().__init__(device, split, image_size, augment, seed, batch_size)
        self._is_cuda = device.is_cuda
        self._prefetch = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._decoding: deque[Future[torch.Tensor]] = deque()
        self._waiting: Iterator[list[tuple[int, int]]] = iter(())

    def start_epoch(self, epoch: int = 0) -> None:
        """Draw the epoch's order and let the threads begin."""
        self._begin(self.samples)

    def start_rehearsal(self) -> None:
        """Let the threads decode one full batch and the smaller rest."""
        self._begin(self.batch_size + self.samples % self.batch_size)

    def feed(self, count: int) -> None:
        """Copy the next decoded batch into the static buffer, in stream order.

        Raises:
            UnreadableImageError: A file of the batch is no image.
        """
        pixels = self._decoding.popleft().result()
        self._submit()
        self._static[:count].copy_(pixels, non_blocking=True)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _place(self, split: Split, shape: tuple[int, int, int]) -> None:
        self._split = split
        shape = (self.batch_size, *shape)
        self._static = torch.zeros(shape, dtype=torch.uint8, device=self.cursor.device)

    def _begin(self, samples: int) -> None:
        super().start_epoch()
        seeds = torch.randint(2**62, (self.samples,), generator=self._seeds)
        order = list(zip(self.order.tolist(), seeds.tolist(), strict=True))[:samples]
        starts = range(0, samples, self.batch_size)
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
        for row, (index, seed) in zip(pixels.numpy(), batch, strict=True):
            row[:] = self._pixels_of(index, seed)
        return pixels

    def _pixels_of(self, index: int, seed: int) -> np.ndarray:
        if self._split.is_decoded:
            return self._split.images[index]
        image = open_rgb(self._split.images[index])
        crop = random_crop if self._augment else central_crop
        return np.asarray(crop(image, self._static.shape[-1], seed)).transpose(2, 0, 1)

    def _pixels(self, picked: torch.Tensor, count: int) -> torch.Tensor:
        return self._static[:count]


def random_crop(image: Image, size: int, seed: int) -> Image:
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
            part = image.resize((size, size), resample=PIL.Image.Resampling.BILINEAR, box=box)
            break
    else:
        part = PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BILINEAR)
    return PIL.ImageOps.mirror(part) if generator.random() < 0.5 else part


def central_crop(image: Image, size: int, seed: int = 0) -> Image:
    """Return the central square without the customary margin of one eighth: 224 of 256 pixels."""
    return PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BILINEAR, bleed=1 / 16)


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
    device: ComputeDevice, split: Split, image_size: int, *, augment: bool,
    seed: int, batch_size: int, workers: int | None, clients: int,
) -> ImageBatches:  # fmt: skip
    """Return resident batches where the images fit a fair share of the device, else streamed ones.

    Each of the ``clients`` that share the GPU may fill its part of a quarter of the free memory.
    ``workers`` decode what is streamed; None takes a fair share of the cores.
    """
    shared = (device, split, image_size, augment, seed, batch_size)
    free_bytes = math.inf
    if device.is_cuda:
        free_bytes, _ = torch.cuda.mem_get_info(device.torch_device)
    share_bytes = free_bytes * RESIDENT_SHARE_OF_FREE_MEMORY / clients
    if split.is_decoded and split.images.nbytes <= share_bytes:
        return ImageBatches(*shared)
    if workers is None:
        workers = min(MAX_LOADER_WORKERS, usable_cores() // clients - 1)
    return StreamedBatches(*shared, max(1, workers))
