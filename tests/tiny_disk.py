"""A disk of a few MiB that a test can fill, in a mount namespace of its own: really full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_AS_ROOT = os.geteuid() == 0
_UNSHARE = ["unshare", *([] if _AS_ROOT else ["--map-root-user"]), "--mount"]
_ENTER = ["nsenter", *([] if _AS_ROOT else ["--user", "--preserve-credentials"]), "--mount"]


def _can_mount() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    mount = [*_UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not _can_mount(), reason="nothing may be mounted here")


class TinyDisk:
    """What is mounted at a folder, for the commands that are started by it alone."""

    def __init__(self, folder: Path, holder: int) -> None:
        self._holder = holder
        # The same folder as those commands see it.
        self.seen = Path(f"/proc/{holder}/root{folder}")
        self._filler = self.seen / "filler"

    def command(self, where: Path, *words: str | Path) -> list[str]:
        """The command line that starts a program on this disk, in the folder `where`."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(where)]
        return [*_ENTER, f"--target={self._holder}", "--", *inside, *map(str, words)]

    def fill(self) -> None:
        """Leave no block free."""
        with self._filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        """Take away what fills it."""
        self._filler.unlink()


@contextlib.contextmanager
def tiny_disk(folder: Path, mib: int = 16) -> Iterator[TinyDisk]:
    """Mount one at `folder`, which is made; it goes with its last process."""
    folder.mkdir()
    script = f'mount -t tmpfs -o size={mib}m none "$0" && echo ready && exec sleep 600'
    with subprocess.Popen(
        [*_UNSHARE, "sh", "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "ready\n"
            yield TinyDisk(folder, holder.pid)
        finally:
            holder.kill()
