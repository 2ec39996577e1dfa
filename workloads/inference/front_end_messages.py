"""What the GPU process and a front-end process say to each other.

Over the work stream go records of eight bytes: from the front end a slot and how many synthetic
images (0: the slot's own picture), back a slot and its outcome. Over the control channel go
packets: one byte that says what, then JSON. A connection travels as a descriptor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

CONNECTION = b"C"
STATE = b"S"
DRAIN = b"D"
READY = b"R"
CONTROL_BYTES = 1 << 18
WORK_BYTES = 1 << 16
_RECORD = struct.Struct("<II")


def pack_record(slot: int, value: int) -> bytes:
    """Return one record."""
    return _RECORD.pack(slot, value)


def pack_records(records: Iterable[tuple[int, int]]) -> bytes:
    """Return records one after another."""
    return b"".join([_RECORD.pack(slot, value) for slot, value in records])


class RecordReader:
    """Cuts a stream into records."""

    def __init__(self) -> None:
        """Begin at a record's first byte."""
        self._rest = b""

    def read(self, data: bytes) -> list[tuple[int, int]]:
        """Return the records that ``data`` completes."""
        data = self._rest + data
        whole = len(data) - len(data) % _RECORD.size
        self._rest = data[whole:]
        return list(_RECORD.iter_unpack(data[:whole]))
