"""One run at a time on a card: a lock for each card, and one for the host's CPU.

Every user has a lock file of his own for a card, 0600 and held by flock, so that nobody who may
merely read it can hold it, and the kernel lets go of it however its holder dies. Whether another
user's is held stands in /proc/locks, which everybody may read. All of them lie in a folder of
root's with the sticky bit: nobody can take away another's. Of two users who start in the same
moment each may find the other's and both refuse, never both run.

A process that holds a lock may take it again: a driver holds it over all of its suite runs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from benchmarking.cli import EXIT_MODE_NOT_IN_FORCE, SuiteError
from benchmarking.records.writing import take_lock

# For tests, and for machines whose administrator wants another place.
FOLDER_VARIABLE = "GPU_SHARING_LOCK_DIR"
FOLDERS = (Path("/run/lock"), Path("/tmp"))
PREFIX = "gpu-sharing-bench"
CPU = "cpu"

_held: set[Path] = set()


class InUseError(SuiteError):
    """Another run is at work on the card; `found` names its process, the message a way out."""

    def __init__(self, found: str) -> None:
        """Keep what was found."""
        super().__init__(
            f"{found}, or measure next to it with --allow-contention", EXIT_MODE_NOT_IN_FORCE
        )
        self.found = found


@contextlib.contextmanager
def hold(gpu_uuid: str | None) -> Iterator[None]:
    """Hold the lock of a card, of the host's CPU where that is `None`, inside the block.

    Raises:
        InUseError: Another run holds it, or its file is not ours.
    """
    key = re.sub(r"[^A-Za-z0-9-]", "", gpu_uuid or CPU)
    path = _folder() / f"{PREFIX}.{key}.{os.getuid()}.lock"
    if path in _held:
        yield
        return
    what = f"GPU {gpu_uuid}" if gpu_uuid else "this machine's CPU"
    with _opened(path) as descriptor:
        if not take_lock(descriptor):
            raise InUseError(_in_use(what, os.pread(descriptor, 20, 0).decode()))
        for other, pid in _held_by_others(path.parent, key):
            raise InUseError(_in_use(what, str(pid), other))
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # anybody can fill that disk, and the lock needs no room
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


@contextlib.contextmanager
def hold_or_note(gpu_uuid: str | None, *, is_refused: bool) -> Iterator[str | None]:
    """As `hold`; where another run at work is not refused, give what is to be noted of it."""
    with contextlib.ExitStack() as stack:
        note = None
        try:
            stack.enter_context(hold(gpu_uuid))
        except InUseError as error:
            if is_refused:
                raise
            note = f"{error.found}: figures hold next to it only"
        yield note


def _in_use(what: str, pid: str, owner: int | None = None) -> str:
    who = (
        f"pid {pid}" if pid.isdecimal() and int(pid) else "a process that cannot be seen from here"
    )
    with contextlib.suppress(KeyError):
        who += f" of {pwd.getpwuid(owner).pw_name}" if owner is not None else ""
    return f"another run is at work on {what}: {who}; wait for its end"


def _folder() -> Path:
    """The folder of the locks: one in which nobody can take away another's file."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return next((folder for folder in FOLDERS if _is_shared(folder)), FOLDERS[-1])


def _is_shared(folder: Path) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    everyone = stat.S_IWOTH | stat.S_ISVTX
    return found.st_uid == 0 and found.st_mode & everyone == everyone


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a lock file of ours; neither a link nor another user's file is taken for it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InUseError(f"{_cannot_lock(path)} ({error.strerror})") from error
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode) or found.st_mode & 0o77:
            raise InUseError(f"{_cannot_lock(path)} (it is not a file of yours alone)")
        yield descriptor
    finally:
        os.close(descriptor)


def _cannot_lock(path: Path) -> str:
    return f"whether another run is at work cannot be told: remove {path}, or set {FOLDER_VARIABLE}"


def _held_by_others(folder: Path, key: str) -> list[tuple[int, int]]:
    """Return owner and pid of other users' held locks of a card; the pid is 0 where unknown.

    A file counts where its owner is the one whom its name says.
    """
    holders = _holders()
    found = []
    for path in folder.glob(f"{PREFIX}.{key}.*.lock"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            is_real = stat.S_ISREG(status.st_mode) and path.suffixes[-2] == f".{status.st_uid}"
            place = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
            if is_real and status.st_uid != os.getuid() and place in holders:
                found.append((status.st_uid, holders[place]))
    return found


def _holders() -> dict[tuple[int, int, int], int]:
    """Return the pid of every held flock by device and inode, from /proc/locks."""
    # 1: FLOCK  ADVISORY  WRITE 1234 00:1a:56 0 EOF
    line = re.compile(r"FLOCK +\S+ +WRITE +(-?\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ")
    try:
        text = Path("/proc/locks").read_text()
    except OSError:
        return {}
    return {
        (int(major, 16), int(minor, 16), int(inode)): max(int(pid), 0)
        for pid, major, minor, inode in line.findall(text)
    }
