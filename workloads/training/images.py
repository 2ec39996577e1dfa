"""Images for training: CIFAR-10, folders of one's own, or noise in its place.

CIFAR-10 and folders trained on at 32x32 become uint8 arrays; folders at other sizes stay files that
are decoded while training. Whatever a folder holds is used or refused by name before training: an
accuracy over fewer images than it says would be another measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from workloads.common import console
from workloads.common.device import usable_cores
from workloads.common.errors import DamagedFileError, UnreadableImageError, UsageError
from workloads.common.files import cache_folder, written_whole
from workloads.common.weights import DownloadError, download
from workloads.inference.image_input import ImageRejected, open_image, to_rgb

CIFAR_SIZE = 32
LARGE_SIZE = 224
CIFAR_TRAIN_SAMPLES = 50_000
CIFAR_TEST_SAMPLES = 10_000
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
TEST_FOLDERS = ("test", "val", "valid", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# What file managers leave behind, besides names that begin with a dot.
LITTER = frozenset(("__macosx", "thumbs.db", "desktop.ini"))
BILINEAR = PIL.Image.Resampling.BILINEAR


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
    notes: Sequence[str] = ()

    def limited(
        self, train_samples: int | None, test_samples: int | None, seed: int
    ) -> ImageDataset:
        """Return the dataset with at most this many samples a split.

        Without ``test_samples`` a limited training split keeps the ratio of the two splits.
        """
        if train_samples is not None and test_samples is None:
            test_samples = max(1, round(len(self.test) * train_samples / len(self.train)))
        train, test = self.train.limited(train_samples, seed), self.test.limited(test_samples, seed)
        return replace(self, train=train, test=test)


def load_dataset(
    kind: str, data_dir: Path, image_size: int | None, seed: int, warn: Callable[[str], None]
) -> ImageDataset:
    """Load the dataset of the ``kind`` that ``--dataset`` names.

    ``image_size`` None takes 32 for 32x32 images, else 224. ``warn`` is called with what the user
    must know if synthetic images stand in.

    Raises:
        UsageError: The data is not available; the message names the fix.
        DamagedFileError: It is there, truncated or altered: nothing stands in for it.
    """
    if kind == "folder" or (kind == "auto" and _is_for_training(data_dir)):
        return _load_folder(data_dir.resolve(), image_size)
    if image_size not in (None, CIFAR_SIZE):
        raise UsageError(
            f"--image-size {image_size} is for folders of images; these are of {CIFAR_SIZE}x"
            f"{CIFAR_SIZE}, so leave it out or name a folder with --dataset folder --data-dir"
        )
    if kind == "synthetic":
        return synthetic_dataset(seed)
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
        noise = np.frombuffer(generator.bytes(samples * 3 * CIFAR_SIZE**2), np.uint8)
        images = noise.reshape(samples, 3, CIFAR_SIZE, CIFAR_SIZE) // 2
        images += pattern[labels]
        return Split(images, labels)

    train, test = split(train_samples), split(test_samples)
    return ImageDataset("synthetic", train, test, CIFAR_CLASSES, CIFAR_SIZE)


# --- CIFAR-10 -------------------------------------------------------------------------------------


def _load_cifar10(data_dir: Path) -> ImageDataset:
    """Read CIFAR-10 from ``data_dir``, downloaded into it where it is missing or damaged.

    The bytes that fit the published checksums are the bytes that are read: whoever owns the folder
    may exchange a file at any time, and its format is one that can run code.
    """
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    contents = _cifar10_files(data_dir)
    files = {name: _unpickle(content, folder / name) for name, content in contents.items()}

    def split(names: Sequence[Sequence[str]]) -> Split:
        parts = [files[name] for name, _ in names]
        images = np.concatenate([part["data"] for part in parts])
        labels = np.concatenate([part["labels"] for part in parts]).astype(np.int64)
        return Split(images.reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE), labels)

    train, test = split(CIFAR10.train_list), split(CIFAR10.test_list)
    class_names = tuple(files[CIFAR10.meta["filename"]][CIFAR10.meta["key"]])
    return ImageDataset("cifar10", train, test, class_names, CIFAR_SIZE)


def _cifar10_files(data_dir: Path) -> dict[str, bytes]:
    """Return the content of each file as published: from the folder, the archive, or the network.

    Raises:
        DamagedFileError: What lies there does not fit its checksum and cannot be replaced.
        UsageError: Nothing lies there, and the download failed.
    """
    from torchvision.datasets import CIFAR10

    folder, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    damaged: list[Path] = []

    def content(path: Path, md5: str) -> bytes | None:
        with contextlib.suppress(OSError):
            found = path.read_bytes()
            if hashlib.md5(found, usedforsecurity=False).hexdigest() == md5:
                return found
            damaged.append(path)
        return None

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    wanted = dict((*CIFAR10.train_list, *CIFAR10.test_list, meta))
    unpacked = {name: content(folder / name, md5) for name, md5 in wanted.items()}
    contents = {name: found for name, found in unpacked.items() if found is not None}
    if len(contents) == len(wanted):
        return contents
    packed = content(archive, CIFAR10.tgz_md5)
    # The archive first: it is what everything else comes from.
    names = " and ".join(map(str, sorted(damaged, key=lambda path: path != archive)))
    if damaged:
        console.note(f"{names}: damaged (wrong checksum); CIFAR-10 is taken anew")
    if packed is None:
        console.note(f"CIFAR-10: downloading {CIFAR10.url} once to {data_dir}")
        try:
            with tempfile.TemporaryDirectory() as temporary:
                download(CIFAR10.url, Path(temporary, archive.name))
                packed = content(Path(temporary, archive.name), CIFAR10.tgz_md5)
            if packed is None:
                raise DownloadError("the transfer broke off or brought another file")
            with written_whole(archive) as file:
                file.write(packed)
        except (DownloadError, OSError) as error:
            if names:
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
            member = tar.extractfile(f"{CIFAR10.base_folder}/{name}")
            contents[name] = b"" if member is None else member.read()
            with contextlib.suppress(OSError), written_whole(folder / name) as file:
                file.write(contents[name])
    return contents


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


def _is_for_training(data_dir: Path) -> bool:
    """Whether a user means it as a dataset, be it only by names that are not quite right."""
    names = {name.lower() for name in os.listdir(data_dir)} if data_dir.is_dir() else set()
    return not names.isdisjoint(("train", "training", *TEST_FOLDERS)) or any(
        path.suffix.lower() in IMAGE_SUFFIXES for path in data_dir.glob("*/*")
    )


def _load_folder(data_dir: Path, image_size: int | None) -> ImageDataset:
    train_dir = data_dir / "train"
    test_dirs = [data_dir / name for name in TEST_FOLDERS if (data_dir / name).is_dir()]
    if not train_dir.is_dir() or not test_dirs:
        raise UsageError(
            f"{data_dir} has no train/ and test/ (or val/) folders; name with --data-dir a folder "
            "that has both, each with one folder a class, or choose another --dataset"
        )
    notes = [f"{unused} is not used: the test is on {test_dirs[0]}" for unused in test_dirs[1:]]
    classes = {split_dir: _class_files(split_dir) for split_dir in (train_dir, test_dirs[0])}
    for split_dir, found in classes.items():
        missing = set().union(*classes.values()) - found.keys()
        if missing:
            raise UsageError(
                f"{split_dir} has no folder for the class {min(missing)!r}; train and test must "
                "have the same classes"
            )
    train, test = (
        Split(
            np.asarray([file for files in found.values() for file in files], dtype=object),
            np.repeat(np.arange(len(found)), [len(files) for files in found.values()]),
        )
        for found in classes.values()
    )
    files = [*train.images, *test.images]
    fingerprint = _fingerprint([group for found in classes.values() for group in found.values()])
    try:
        found_sizes = _kept(f"sizes-{fingerprint}", lambda: _sizes(files))
    except UsageError:  # without a cache each run opens them all
        found_sizes = _sizes(files)
    sizes = {(width, height) for width, height in found_sizes.tolist()}
    if image_size is None:
        image_size = CIFAR_SIZE if sizes == {(CIFAR_SIZE, CIFAR_SIZE)} else LARGE_SIZE
    if sizes != {(image_size, image_size)}:
        ends = sorted({min(sizes), max(sizes)})
        span = " to ".join(f"{width}x{height}" for width, height in ends)
        notes.append(f"images of {span} are resized to {image_size}x{image_size}")
    if image_size == CIFAR_SIZE:
        images = _kept(f"decoded-{fingerprint}", lambda: _decode_all(files))
        train = Split(images[: len(train)], train.labels)
        test = Split(images[len(train) :], test.labels)
    return ImageDataset("folder", train, test, list(classes[train_dir]), image_size, notes)


def _class_files(split_dir: Path) -> dict[str, list[str]]:
    """Return the files of each class folder by its name; whatever else lies there is refused."""
    folders, strays = _list_folder(split_dir)
    if strays:
        raise UsageError(f"{strays[0]} lies in no class folder; move it into one, or remove it")
    if len(folders) < 2:
        raise UsageError(f"{split_dir} has {len(folders)} class folders; at least 2 are needed")
    classes = {}
    for folder in folders:
        files = classes[os.path.basename(folder)] = _files_below(folder, set())
        if not files:
            raise UsageError(f"{folder} holds no images; add some, or remove the class everywhere")
    return classes


def _files_below(folder: str, seen: set[str]) -> list[str]:
    """Return all files in ``folder`` and below, links to folders followed, each folder once."""
    place = os.path.realpath(folder)
    if place in seen:
        return []
    seen.add(place)
    folders, files = _list_folder(folder)
    return files + [file for below in folders for file in _files_below(below, seen)]


def _list_folder(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the folders and the files in ``folder``, by name, without hidden ones and litter."""
    try:
        # Of 60,000 files it knows which are folders.
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        folders: list[str] = []
        files: list[str] = []
        for entry in entries:
            if not entry.name.startswith(".") and entry.name.lower() not in LITTER:
                (folders if entry.is_dir() else files).append(entry.path)
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename} ({error.strerror}); chmod or remove it"
        ) from error
    return folders, files


def _fingerprint(classes: Sequence[Sequence[str]]) -> str:
    """Return a name that changes when a file is added, removed, renamed or rewritten.

    Raises:
        UsageError: A link brings one file into two of the ``classes``, or into train and test.
        UnreadableImageError: A file is not there, such as where a link leads nowhere, or is a pipe
            or a device, which would be read without end.
    """
    digest = hashlib.sha256()
    first: dict[tuple[int, int], tuple[int, str]] = {}
    for number, path in [(number, path) for number, files in enumerate(classes) for path in files]:
        with _reading(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no regular file")
        place = (status.st_dev, status.st_ino)
        other_number, other = first.setdefault(place, (number, path))
        if number != other_number:
            raise UsageError(
                f"{path} and {other} are one file, which then has two labels or is tested after "
                "training on it; remove the link"
            )
        digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:24]


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


def open_rgb(path: str) -> PIL.Image.Image:
    """Return the decoded image in RGB.

    Raises:
        UnreadableImageError: The file is no image, truncated, or cannot be read.
    """
    with _reading(path):
        return to_rgb(open_image(Path(path)))


def _kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array that is made once: eight clients must not each open 60,000 files."""
    path = cache_folder() / f"{name}.npy"
    if path.exists():
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(path, mmap_mode="r")
        console.note(f"{path} is cut off or damaged: it is made anew")
    array = make()
    try:
        with written_whole(path) as file:
            np.save(file, array)
    except OSError as error:
        console.note(f"{path} cannot be kept for the next run ({error.strerror})")
    return array


def _sizes(files: Sequence[str]) -> np.ndarray:
    """Return the distinct sizes (width, height) of all images, each opened once."""

    def size(path: str) -> tuple[int, int]:
        with _reading(path), open_image(Path(path)) as image:
            return image.size

    with console.stage(f"opening {len(files)} images"), ThreadPoolExecutor(usable_cores()) as pool:
        return np.asarray(sorted(set(pool.map(size, files, chunksize=256))))


def _decode_all(files: Sequence[str]) -> np.ndarray:
    """Return the images as uint8 of shape (n, 3, 32, 32), cropped square and resized if needed."""

    def decode(path: str) -> np.ndarray:
        image = PIL.ImageOps.fit(open_rgb(path), (CIFAR_SIZE, CIFAR_SIZE), BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    console.note(f"decoding {len(files)} images once; kept in {cache_folder()}")
    with console.stage(f"decoding {len(files)} images"), ThreadPoolExecutor(usable_cores()) as pool:
        return np.stack(list(pool.map(decode, files, chunksize=256)))
