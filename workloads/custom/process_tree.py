"""All processes that a command has started: finding them, and ending them gently.

A command may be a shell script that starts a launcher that starts the process with the GPU work,
and some of these put themselves into sessions of their own. So everything here goes by descent:
after `adopt_orphans` even a process whose parent has ended stays a descendant of this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_SECONDS = 0.05
KILL_SECONDS = 5.0


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (prctl(2), subreaper).

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


def descendants() -> set[int]:
    """Return the pids of all living descendants of this process."""
    found: set[int] = set()
    waiting = _children(os.getpid())
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += _children(pid)
    return {pid for pid in found if not _is_zombie(pid)}


def end_descendants(grace_seconds: float) -> None:
    """End every descendant: SIGTERM, and SIGKILL for what still runs after `grace_seconds`.

    An interruption cuts the grace short, but never leaves a process behind.
    """
    try:
        _signal_until_gone(signal.SIGTERM, grace_seconds, again=False)
    finally:
        _signal_until_gone(signal.SIGKILL, KILL_SECONDS, again=True)
        _reap()


def _signal_until_gone(number: signal.Signals, seconds: float, *, again: bool) -> None:
    """Signal each descendant once, those that appear meanwhile too, until none is left."""
    deadline = time.monotonic() + seconds
    told: set[int] = set()
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left if again else left - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        told |= left
        time.sleep(POLL_SECONDS)


def _reap() -> None:
    """Take the exit status of those that have ended, or they stay as zombies while this runs."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _children(pid: int) -> list[int]:
    """Children of every thread of a process; none when it has ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
                found += map(int, text.split())
    return found


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
