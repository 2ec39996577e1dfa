"""Files of torch.save: read with what is wrong told apart, in one sentence each."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

from workloads.common.errors import DamagedFileError, UsageError
from workloads.common.memory_picture import as_out_of_memory

ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"


def read_checkpoint(path: Path, fix: str, *, check_sums: bool = False) -> object:
    """Return what ``torch.save`` put into ``path``, its tensors on the CPU.

    Args:
        path: The file.
        fix: What to do about a file that will not do, for the end of the sentence.
        check_sums: Whether to hold the content against its CRC-32 first (0.1 s for 100 MB). PyTorch
            does not: a flipped bit becomes another weight. Some programs write no such sums.

    Raises:
        DamagedFileError: The file is empty, cut off or altered.
        UsageError: It is none of torch.save's, or holds Python objects besides tensors.
    """
    import torch

    if check_sums:
        _require_intact(path, fix)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # What a torn or foreign file raises depends on where it is torn: zip, pickle, storage sizes.
    except Exception as error:
        if as_out_of_memory(error):
            raise
        _require_intact(path, fix)
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UsageError(
                f"{path} holds Python objects instead of weights alone, which are not loaded; "
                f"save model.state_dict() with torch.save, or {fix}"
            ) from error
        if _start_of(path, fix).startswith(PICKLE_MAGIC):
            # The format before PyTorch 1.6, which has no sums: nothing tells more.
            raise _damaged(path, fix) from error
        raise UsageError(f"{path} cannot be read as a PyTorch file; {fix}") from error


def _require_intact(path: Path, fix: str) -> None:
    """Refuse an empty file, and an archive that is cut off or does not fit its sums."""
    start = _start_of(path, fix)
    if not start:
        raise DamagedFileError(f"{path} is empty; {fix}")
    if not start.startswith(ZIP_MAGIC):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path, fix) from error
    if broken is not None:
        raise DamagedFileError(f"{path} is damaged: {broken} in it fails its checksum; {fix}")


def _start_of(path: Path, fix: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(ZIP_MAGIC))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); {fix}") from error


def _damaged(path: Path, fix: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is cut off or damaged ({path.stat().st_size} bytes); delete it, and {fix}"
    )
