"""What a program says at its end to the driver script that started it.

The driver hands down a pipe of its own and reads a line from it: words for its records that no full
disk can keep back.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat

# Set by the drivers to the number of the pipe.
PIPE_VARIABLE = "GPU_SHARING_WORDS_FD"
# In UTF-8 no longer than what a pipe takes in one piece.
MOST_CHARACTERS = 1000


def tell_driver(sentence: str) -> None:
    """Hand a sentence to the driver script, if one waits for it; never fails, never waits."""
    number = os.environ.get(PIPE_VARIABLE, "")
    if not number.isdecimal() or not sentence:
        return
    line = " ".join(sentence.split())[:MOST_CHARACTERS].encode(errors="replace") + b"\n"
    # Only inherited, the number may be another file of this process by now.
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISFIFO(os.fstat(int(number)).st_mode) and _has_room(int(number)):
            os.write(int(number), line)


def _has_room(pipe: int) -> bool:
    return bool(select.select([], [pipe], [], 0)[1])
