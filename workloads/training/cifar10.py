"""CIFAR-10 on disk: found, downloaded where it is missing, downloaded again where it is damaged."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common import console
from workloads.common.errors import DamagedFileError, UsageError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

DOWNLOAD_SILENCE_SECONDS = 10.0


def load_splits(data_dir: Path) -> list[CIFAR10]:
    """Return the training and the test split that lie in ``data_dir`` or are downloaded into it.

    Raises:
        DamagedFileError: What lies there does not fit its checksums and cannot be had anew.
        UsageError: Nothing lies there, and the download failed.
    """
    with contextlib.suppress(RuntimeError):  # not there, or not as published
        return _open(data_dir, download=False)
    damaged = damaged_files(data_dir)
    if damaged:
        names = " and ".join(map(str, damaged))
        console.note(f"{names}: damaged (wrong checksum); CIFAR-10 is taken anew")
    try:
        with _limited_silence():
            return _open(data_dir, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        reason = _reason(error, data_dir)
        if damaged:
            raise DamagedFileError(
                f"{names} does not fit its checksum, and CIFAR-10 could not be had anew "
                f"({reason}); remove it, and put a whole {_archive(data_dir).name} in {data_dir}"
            ) from error
        _remove_leftovers(data_dir)
        raise UsageError(
            f"CIFAR-10 is not in {data_dir} and its download failed ({reason}); put the unpacked "
            f"{_folder(data_dir).name} there, or name its folder with --data-dir"
        ) from error


def damaged_files(data_dir: Path) -> list[Path]:
    """Return the files of CIFAR-10 in ``data_dir`` whose MD5 is not the published one."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = _folder(data_dir)
    published = [
        (_archive(data_dir), CIFAR10.tgz_md5),
        *((folder / name, md5) for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list)),
        (folder / CIFAR10.meta["filename"], CIFAR10.meta["md5"]),
    ]
    return [path for path, md5 in published if path.is_file() and not check_integrity(path, md5)]


def _open(data_dir: Path, *, download: bool) -> list[CIFAR10]:
    from torchvision.datasets import CIFAR10

    return [CIFAR10(str(data_dir), train=train, download=download) for train in (True, False)]


def _archive(data_dir: Path) -> Path:
    from torchvision.datasets import CIFAR10

    return data_dir / CIFAR10.filename


def _folder(data_dir: Path) -> Path:
    from torchvision.datasets import CIFAR10

    return data_dir / CIFAR10.base_folder


def _reason(error: Exception, data_dir: Path) -> str:
    """Return why the download failed; torchvision says "not found or corrupted" of a cut one."""
    if _archive(data_dir).is_file() and _archive(data_dir) in damaged_files(data_dir):
        return "the transfer broke off or brought another file"
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _remove_leftovers(data_dir: Path) -> None:
    """Take away what a failed download leaves: half an archive, and a folder made for it."""
    if _archive(data_dir) in damaged_files(data_dir):
        _archive(data_dir).unlink()
    if data_dir.is_dir() and not any(data_dir.iterdir()):
        data_dir.rmdir()


@contextlib.contextmanager
def _limited_silence() -> Iterator[None]:
    """Let new sockets give up after a while; torchvision sets no limit of its own.

    Behind a firewall that drops packets a download would otherwise wait for minutes.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
