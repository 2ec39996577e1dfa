"""Files that are kept: where, written whole or not at all, and whether a folder takes any."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from workloads.common.errors import UsageError


def cache_folder() -> Path:
    """Return the folder of what is kept between runs, made where it is missing.

    Raises:
        UsageError: There is none that this user may write.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative path is to be ignored (XDG Base Directory Specification).
        folder = Path(base) if base.startswith("/") else Path.home() / ".cache"
        folder = folder / "gpu-sharing-bench"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    # Without HOME and without an account there is no home folder: RuntimeError.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"there is no cache folder to write to ({why}); set XDG_CACHE_HOME to a folder that "
            "you may write"
        ) from error
    return folder


@contextmanager
def written_whole(path: Path, mode: str = "b", **how: Any) -> Iterator[IO[Any]]:
    """Give a file to write to, which takes the place of ``path`` once the block has ended well.

    A reader sees the old file or the whole new one, and after a failure nothing is left behind.
    The folder is made where there is none. ``mode`` is ``b`` for bytes or ``t`` for text, both of
    which can be read back inside the block; ``how`` are further arguments of ``open``.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file is renamed within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open(f"x+{mode}", **how) as file:
            yield file
            file.flush()
            # A rename can reach the disk before the content does.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make sure that ``folder`` exists and takes new files.

    Raises:
        UsageError: It does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder} ({error.strerror}); name a writable folder with "
            "--results-dir"
        ) from error
