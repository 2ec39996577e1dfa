"""What glibc's allocator does with the large blocks that a server frees."""

from __future__ import annotations

import contextlib
import ctypes

# malloc.h of glibc.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 1 << 20
TRIM_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Let every block of a mebibyte and more go back to the system when it is freed.

    By itself glibc raises that bound to the largest block that was ever freed (32 MiB at most, see
    mallopt(3)) and keeps what is below it: after a few large pictures at a time a server held
    100 MiB and more that nobody used. It costs a CPU server a seventh of its capacity (two cores,
    ResNet18: 48 requests/s instead of 55 to 58), whose activations are such blocks too; those of a
    GPU lie elsewhere. Without glibc nothing is changed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
