"""Files of a results folder, opened so that nobody else's are written to and none is waited for.

Others may be able to write where results lie, and a folder of results may come from elsewhere. So
no link is followed on writing, no file of another user is written to, and of what is read neither
the kind of file nor its size, packed or not, is taken on trust.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import secrets
import stat
import zlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

PACKED_SUFFIX = ".gz"
# Of all that is read, after unpacking: hours of raw latencies are a tenth of it.
MAX_MIB = 256
# So many bad lines of a file are named one by one, and so much is said of each.
NAMED_LINES = 20
SHOWN_CHARACTERS = 200
NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_T = TypeVar("_T")


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
        if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            os.write(descriptor, b"\n")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def append_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON, by one write; it is on disk when this returns.

    Raises `OSError` when it cannot be written, on a full disk for instance (nothing of the line is
    there then) or where the file is not one's own, and `ValueError` for what is not a number.
    """
    line = (_json(value) + "\n").encode()
    descriptor = open_own(path)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as JSON, for this user alone; readers see the old file or the new one.

    Raises `ValueError` for what is not a number.
    """
    write_text_atomic(path, _json(value, indent=2) + "\n", mode=0o600)


def write_text_atomic(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a text so that readers see the old file or the new one, never half.

    `mode` is cut by the umask. A link in its place is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(value: Any, indent: int | None = None) -> str:
    """Return structs and plain values as JSON; msgspec's own would write NaN as null."""
    return json.dumps(msgspec.to_builtins(value), indent=indent, allow_nan=False)


def read_file(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in `.gz`.

    Raises `OSError` for what cannot be read, is no regular file, is damaged or holds too much.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        try:
            source = gzip.GzipFile(fileobj=stream) if path.suffix == PACKED_SUFFIX else stream
            content = source.read(MAX_MIB * 1024**2 + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(errno.EIO, f"is damaged ({error})", str(path)) from error
    if len(content) > MAX_MIB * 1024**2:
        raise OSError(errno.EFBIG, f"holds more than {MAX_MIB} MiB", str(path))
    return content


def decode(decoder: msgspec.json.Decoder[_T], content: bytes, reserve: int = 50) -> _T:
    """Decode with so many calls to spare: what is nested too deeply fails here, not in its users.

    Raises one of `NOT_DECODED`.
    """
    return decode(decoder, content, reserve - 1) if reserve else decoder.decode(content)


def read_lines(path: Path, kind: type[_T]) -> tuple[list[_T], list[str]]:
    """Read the lines of a file, packed or not, that are of a kind, and warnings about the others.

    A file that is not there has no lines.
    """
    packed = path.with_name(path.name + PACKED_SUFFIX)
    source = packed if packed.exists() and not path.exists() else path
    try:
        content = read_file(source)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{source}: {error.strerror}, skipped"]
    decoder = msgspec.json.Decoder(kind)
    values: list[_T] = []
    warnings: list[str] = []
    bad = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        try:
            values.extend([decode(decoder, line)] if line.strip() else [])
        except NOT_DECODED as error:
            bad += 1
            if bad <= NAMED_LINES:
                said = str(error)[:SHOWN_CHARACTERS]
                warnings.append(f"{path}: line {number} is truncated or edited, skipped ({said})")
    if bad > NAMED_LINES:
        warnings.append(f"{path}: so are {bad - NAMED_LINES} more lines, skipped")
    return values, warnings
