"""JSON in the files of a results folder: written as `writing.py` does, and read with suspicion.

A folder of results may come from elsewhere: of what is read neither the kind of file nor its size,
packed or not, is taken on trust.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import zlib
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import msgspec

from benchmarking.records.writing import write_text_atomic

PACKED_SUFFIX = ".gz"
# Of all that is read, after unpacking: hours of raw latencies are a tenth of it.
MAX_MIB = 256
# So many bad lines of a file are named one by one, and so much is said of each.
NAMED_LINES = 20
SHOWN_CHARACTERS = 200
NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_T = TypeVar("_T")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as JSON, for this user alone; readers see the old file or the new one.

    Raises `ValueError` for what is not a number.
    """
    write_text_atomic(path, json_text(value, indent=2) + "\n", mode=0o600)


def json_text(value: Any, indent: int | None = None) -> str:
    """Return structs and plain values as JSON; msgspec's own would write NaN as null.

    Raises `ValueError` for what is not a number.
    In a path that is no UTF-8 stands a question mark, since half a character cannot be read again.
    """
    plain = msgspec.to_builtins(value)
    text = json.dumps(plain, indent=indent, allow_nan=False)
    if "\\ud" in text:
        text = json.dumps(plain, indent=indent, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def read_file(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in `.gz`.

    Raises `OSError` for what cannot be read, is a link or no regular file, is damaged or holds too
    much.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link", str(path)) from None
        raise
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        is_packed = path.suffix == PACKED_SUFFIX
        # A file is asked for no more than it has: so much memory is taken before it is read.
        most = MAX_MIB * 1024**2 if is_packed else min(status.st_size, MAX_MIB * 1024**2)
        try:
            source = gzip.GzipFile(fileobj=stream) if is_packed else stream
            content = source.read(most + 1)
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


def read_lines(path: Path, kind: type[_T] | UnionType) -> tuple[list[_T], list[str]]:
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
