"""Files of a results folder, written so that nobody else's are written to.

Others may be able to write where results lie: no link is followed, and no file of another user is
written to. Standard library alone: the drivers keep refusals before anything is installed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

LOCK_FILE = "run.lock"
PLAN_FILE = "plan.toml"
REFUSALS_FILE = "refusals.jsonl"
# Controls, also those of a letter each in UTF-8, and what turns the direction of writing.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def open_own(path: Path) -> int:
    """Open a file to append lines to it, made where it is missing (mode 0600).

    Returns its descriptor; a last line that was cut off is ended, or the next one would be part of
    it. Raises `OSError` for a link, for what is no regular file, and for a file that belongs
    neither to this user nor to whoever owns the folder.
    """
    not_own = OSError(errno.EPERM, f"{path.name} is a link or another user's", str(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise not_own if error.errno == errno.ELOOP else error from None
    try:
        status = os.fstat(descriptor)
        owners = (os.geteuid(), path.parent.stat().st_uid)
        is_file = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        if not is_file or status.st_uid not in owners:
            raise not_own
        if is_cut_off(descriptor):
            os.write(descriptor, b"\n")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_cut_off(descriptor: int) -> bool:
    """Whether a file ends within a line, as on a disk that was full: what follows would be lost."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def is_of_others(status: os.stat_result) -> bool:
    """Whether somebody else than its user, or root, may have written it; a link leads anywhere."""
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_foreign = status.st_uid not in (0, os.geteuid())
    return bool(is_foreign or is_open or stat.S_ISLNK(status.st_mode))


def append_text(path: Path, line: str) -> None:
    """Append a line by one write; it is on disk when this returns.

    Raises `OSError` when it cannot be written, on a full disk for instance (nothing of the line is
    there then) or where the file is not one's own.
    """
    content = f"{line}\n".encode()
    descriptor = open_own(path)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a text so that readers see the old file or the new one, never half.

    `mode` is cut by the umask. A link in its place is replaced, not followed.
    """
    write_bytes_atomic(path, text.encode("utf-8"), mode=mode)


def write_bytes_atomic(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """As `write_text_atomic`, for a file that is no text."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unbegun(folder: Path) -> None:
    """Take away the folder of a run that was cut off before it had a manifest, if that is one."""
    there = folder.glob("*")
    if all(path.name in (LOCK_FILE, PLAN_FILE) or path.suffix == ".tmp" for path in there):
        shutil.rmtree(folder, ignore_errors=True)


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def is_held(folder: Path) -> bool:
    """Whether a living process writes to this run."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # no lock, or another user's run, of whose end only its manifest tells
    try:
        return not take_lock(descriptor)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int) -> bool:
    """Take the lock until the file is closed; False when it is taken.

    The kernel lets go of it when its holder dies, however that comes.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def one_line(text: str) -> str:
    """Return text for a record and a terminal: on one line, UTF-8, and steering nothing."""
    return UNSAFE.sub(" ", text).encode(errors="replace").decode()


def first_of(texts: Sequence[str], joint: str = "; ") -> str:
    """Join texts, of many the first four: what 64 clients say each, nobody reads in a row."""
    more = [f"{len(texts) - 4} more"] if len(texts) > 5 else []
    return joint.join([*texts[:4], *(more or texts[4:])])


def append_refusal(folder: Path, command: Sequence[str], exit_code: int, sentence: str) -> None:
    """Note a command that was refused before there was a run to write to.

    Raises `OSError` when it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "created_at": utc_now(), "command": list(map(one_line, command)), "exit_code": exit_code,
        "sentence": one_line(sentence),
    }  # fmt: skip
    append_text(folder / REFUSALS_FILE, json.dumps(row, separators=(",", ":")))
