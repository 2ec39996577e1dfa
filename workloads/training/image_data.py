"""Image datasets for training: where they come from, and how they become arrays or file lists.

CIFAR-10 and folders of 32x32 images become uint8 arrays; folders of other images stay files that
are decoded while training.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common import console
from workloads.common.environment import usable_cores
from workloads.common.errors import UsageError
from workloads.common.whole_files import cache_folder, written_whole
from workloads.training.image_files import open_rgb, unreadable

if TYPE_CHECKING:
    import numpy as np

CIFAR_SIZE = 32
CIFAR_TRAIN_SAMPLES = 50_000
CIFAR_TEST_SAMPLES = 10_000
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"))
SIZE_PROBES = 64


@dataclass(frozen=True)
class ArraySplit:
    """Images of one size in memory.

    Attributes:
        images: uint8, shape (samples, 3, size, size).
        labels: int64, shape (samples,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def subset(self, chosen: np.ndarray) -> ArraySplit:
        """Return the samples at the indices ``chosen``."""
        return ArraySplit(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class FileSplit:
    """Images of any size on disk, decoded on the way to the device.

    Attributes:
        paths: One image file a sample.
        labels: int64, shape (samples,).
    """

    paths: Sequence[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def subset(self, chosen: np.ndarray) -> FileSplit:
        """Return the samples at the indices ``chosen``."""
        return FileSplit([self.paths[i] for i in chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageDataset:
    """A training and a test split of the same classes.

    Attributes:
        name: ``cifar10``, ``folder`` or ``synthetic``.
        image_size: Height and width of what the network sees, in pixels.
    """

    name: str
    train: ArraySplit | FileSplit
    test: ArraySplit | FileSplit
    class_names: Sequence[str]
    image_size: int

    def limited(self, train_samples: int | None, test_samples: int | None, seed: int):
        """Return the dataset with at most this many samples, the same ones for the same seed.

        Without ``test_samples`` a limited training split keeps the ratio of the two splits.
        """
        if train_samples is not None and test_samples is None:
            test_samples = max(1, round(len(self.test) * train_samples / len(self.train)))
        return ImageDataset(
            self.name,
            _random_subset(self.train, train_samples, seed),
            _random_subset(self.test, test_samples, seed),
            self.class_names,
            self.image_size,
        )


def load_dataset(
    kind: str,
    data_dir: Path,
    image_size: int | None,
    seed: int,
    warn: Callable[[str], None],
) -> ImageDataset:
    """Load the dataset that ``--dataset`` names.

    Args:
        kind: ``auto``, ``cifar10``, ``folder`` or ``synthetic``.
        data_dir: Folder of the data; CIFAR-10 is downloaded into it.
        image_size: Height and width for the network; None takes 32 for 32x32 images, else 224.
        seed: Seed of the synthetic images.
        warn: Called with what the user must know if synthetic images stand in.

    Raises:
        UsageError: The data cannot be had; the message names the fix.
        DamagedFileError: It is there, torn or altered: nothing stands in for it.
    """
    if kind == "synthetic":
        return synthetic_dataset(seed)
    if kind == "folder" or (kind == "auto" and (data_dir / "train").is_dir()):
        return _load_folder(data_dir, image_size)
    try:
        return _load_cifar10(data_dir)
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
    import numpy as np

    generator = np.random.default_rng(seed)
    pattern = generator.integers(0, 64, (len(CIFAR_CLASSES), 3, 4, 4), dtype=np.uint8)
    pattern = pattern.repeat(CIFAR_SIZE // 4, axis=2).repeat(CIFAR_SIZE // 4, axis=3)

    def split(samples: int) -> ArraySplit:
        labels = generator.integers(0, len(CIFAR_CLASSES), samples)
        shape = (samples, 3, CIFAR_SIZE, CIFAR_SIZE)
        noise = np.frombuffer(generator.bytes(samples * 3 * CIFAR_SIZE**2), np.uint8)
        images = noise.reshape(shape) // 2
        images += pattern[labels]
        return ArraySplit(images, labels)

    return ImageDataset(
        "synthetic", split(train_samples), split(test_samples), CIFAR_CLASSES, CIFAR_SIZE
    )


def _random_subset(
    split: ArraySplit | FileSplit, samples: int | None, seed: int
) -> ArraySplit | FileSplit:
    if samples is None or samples >= len(split):
        return split
    import numpy as np

    chosen = np.random.default_rng(seed).permutation(len(split))[:samples]
    return split.subset(np.sort(chosen))


def _load_cifar10(data_dir: Path) -> ImageDataset:
    import numpy as np

    from workloads.training.cifar10 import load_splits

    splits = load_splits(data_dir)
    arrays = [
        ArraySplit(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2)), np.asarray(s.targets))
        for s in splits
    ]
    return ImageDataset("cifar10", *arrays, tuple(splits[0].classes), CIFAR_SIZE)


def _load_folder(data_dir: Path, image_size: int | None) -> ImageDataset:
    data_dir = data_dir.resolve()
    train_dir = data_dir / "train"
    test_dir = next((data_dir / n for n in ("test", "val") if (data_dir / n).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise UsageError(
            f"{data_dir} has no train/ and test/ (or val/) folders; name with --data-dir a folder "
            "that has both, each with one folder a class"
        )
    class_names = sorted(entry.name for entry in train_dir.iterdir() if entry.is_dir())
    if len(class_names) < 2:
        raise UsageError(f"{train_dir} has {len(class_names)} class folders; at least 2 are needed")
    train = _list_images(train_dir, class_names)
    test = _list_images(test_dir, class_names)
    if image_size is None:
        image_size = CIFAR_SIZE if _is_all_cifar_size(train.paths) else 224
    if image_size == CIFAR_SIZE:
        train, test = _decode_cached(train, test)
    return ImageDataset("folder", train, test, class_names, image_size)


def _list_images(split_dir: Path, class_names: Sequence[str]) -> FileSplit:
    import numpy as np

    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        folder = split_dir / class_name
        if not folder.is_dir():
            raise UsageError(
                f"{split_dir} has no folder for the class {class_name!r}; train and test must "
                "have the same classes"
            )
        images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(images, key=lambda path: path.name)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise UsageError(f"{split_dir} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return FileSplit(paths, np.asarray(labels, dtype=np.int64))


def _is_all_cifar_size(paths: Sequence[Path]) -> bool:
    """Judge by a spread sample; ``_decode`` finds the exception among 32x32 images."""
    from PIL import Image

    for path in paths[:: max(1, len(paths) // SIZE_PROBES)]:
        try:
            with Image.open(path) as image:
                if image.size != (CIFAR_SIZE, CIFAR_SIZE):
                    return False
        # Decoders raise what they like.
        except Exception as error:
            raise unreadable(path, error) from error
    return True


def _decode_cached(train: FileSplit, test: FileSplit) -> tuple[ArraySplit, ArraySplit]:
    """Decode once and keep the arrays: eight clients must not decode 60,000 files each."""
    import numpy as np

    files = (*train.paths, *test.paths)
    cache = cache_folder() / f"images-{_fingerprint(files)}.npy"
    images = _map_cached(cache, len(files))
    if images is None:
        console.note(f"decoding {len(files)} images once; kept in {cache}")
        with ThreadPoolExecutor(usable_cores()) as pool:
            _save_array(cache, np.stack(list(pool.map(_decode, files, chunksize=256))))
        images = np.load(cache, mmap_mode="r")
    return (
        ArraySplit(images[: len(train)], train.labels),
        ArraySplit(images[len(train) :], test.labels),
    )


def _map_cached(cache: Path, count: int) -> np.ndarray | None:
    """Return the array kept in ``cache``; None where there is none, or (said) a torn one."""
    import numpy as np

    if not cache.exists():
        return None
    try:
        images = np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        images = None
    if images is None or images.shape != (count, 3, CIFAR_SIZE, CIFAR_SIZE):
        console.note(f"{cache} is cut off or damaged: it is made anew")
        return None
    return images


def _decode(path: Path) -> np.ndarray:
    """Return the image as uint8 of shape (3, 32, 32)."""
    import numpy as np

    pixels = np.asarray(open_rgb(path))
    if pixels.shape[:2] != (CIFAR_SIZE, CIFAR_SIZE):
        raise UsageError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]} among images of 32x32; resize it, or "
            "train on all of them at another size with --image-size 224"
        )
    return pixels.transpose(2, 0, 1)


def _fingerprint(files: Sequence[Path]) -> str:
    """Return a name that changes when a file is added, removed, renamed or rewritten."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write atomically, so that a client never maps half a cache."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < 2 * array.nbytes:
        raise UsageError(
            f"{path.parent} has too little room for {array.nbytes // 2**20} MiB of decoded images; "
            "free some, or set XDG_CACHE_HOME to a larger disk"
        )
    with written_whole(path) as file:
        np.save(file, array)
