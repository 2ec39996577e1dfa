"""Data from elsewhere without what would harm its reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarking.records import files
from benchmarking.records.writing import UNSAFE

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

# Of texts so many characters are kept; what is measured here lies far within the numbers.
LONGEST_TEXT = 10_000
LARGEST, SMALLEST = 1e18, 1e-18
DEEPEST = 50

_LINE_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+\s*")


def cleaned(value: Any, depth: int = 0) -> Any:
    """Return plain data without what steers a terminal, breaks a line or overflows.

    Raises `ValueError` for a number that nothing measures, and for what is nested too deeply.
    """
    if isinstance(value, str):
        text = UNSAFE.sub("?", _LINE_BREAKS.sub(" ", value[:LONGEST_TEXT]))
        return text.encode(errors="replace").decode()
    if depth > DEEPEST:
        raise ValueError("what is nested too deeply")
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item, depth + 1) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= LARGEST:
            raise ValueError("a number beyond 1e18")
        return value if abs(value) >= SMALLEST else 0
    return value


def cleaned_struct(value: _Struct) -> _Struct:
    """The same struct, cleaned; raises `ValueError` as `cleaned` does."""
    return msgspec.convert(cleaned(msgspec.to_builtins(value)), type(value))


def read_struct(path: Path, kind: type[_Struct]) -> _Struct:
    """Read the struct that a JSON file holds, cleaned.

    Raises `ValueError`, which says why, for a file that cannot be read or holds another thing.
    """
    try:
        return cleaned_struct(files.decode(msgspec.json.Decoder(kind), files.read_file(path)))
    except (OSError, ValueError, *files.NOT_DECODED) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(str(why)[: files.SHOWN_CHARACTERS]) from error
