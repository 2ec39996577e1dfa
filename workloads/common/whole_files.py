"""Files that appear whole or not at all, and the folder of what is kept between runs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """Return where decoded data is kept; XDG_CACHE_HOME moves it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gpu-sharing-bench"


@contextmanager
def written_whole(path: Path, mode: str = "b", **how: object) -> Iterator[IO]:
    """Give a file to write to, which takes the place of ``path`` once the block has ended well.

    A reader sees the old file or the whole new one, and after a failure nothing is left behind.
    The folder is made where there is none.

    Args:
        path: What the file is to be called.
        mode: ``b`` for bytes, ``t`` for text; both can be read back inside the block.
        how: Further arguments of ``open``.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, since a file is renamed within one file system only.
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
