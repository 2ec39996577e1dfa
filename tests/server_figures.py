"""What a server takes of the machine: memory, threads and open files of all its processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from waiting import wait_until

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Figures:
    """One moment.

    Attributes:
        seconds: On CLOCK_MONOTONIC.
        processes: How many there are.
        resident_mib: Their resident memory in sum; what they share counts for each.
        threads: Theirs in sum.
        open_files: Theirs in sum, sockets included.
        gpu_memory_mib: In use on the whole card; None where there is none or nobody was to look.
    """

    seconds: float
    processes: int
    resident_mib: float
    threads: int
    open_files: int
    gpu_memory_mib: float | None = None


def processes_of(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            with suppress(FileNotFoundError):  # A thread that has just ended.
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def figures_of(pid: int) -> Figures:
    """Return the present figures of the server with this process id."""
    pids = processes_of(pid)
    status = [Path(f"/proc/{each}/status").read_text() for each in pids]
    return Figures(
        seconds=time.monotonic(),
        processes=len(pids),
        resident_mib=sum(_number(text, "VmRSS:") for text in status) / 1024,
        threads=sum(_number(text, "Threads:") for text in status),
        open_files=sum(len(os.listdir(f"/proc/{each}/fd")) for each in pids),
    )


def _number(status: str, name: str) -> int:
    return int(status.partition(name)[2].split()[0])


def figures_at_rest(pid: int, at_most_files: int | None = None) -> Figures:
    """Wait until no file has been opened or closed for a second; return the figures then.

    Args:
        pid: The server's process id.
        at_most_files: Wait for no more open files than these, half a minute at the most:
            connections that a client has left are closed when their time is over.
    """
    last = figures_of(pid)

    def rests() -> bool:
        nonlocal last
        before, last = last, figures_of(pid)
        return before.open_files == last.open_files

    wait_until(rests, "as many open files for a second", poll_seconds=1.0)
    deadline = time.monotonic() + 35.0
    while at_most_files is not None and time.monotonic() < deadline:
        last = figures_of(pid)
        if last.open_files <= at_most_files:
            break
        time.sleep(SAMPLE_SECONDS)
    return last


class Watch:
    """Takes the figures twice a second, on a thread of its own.

    Attributes:
        samples: What was seen so far.
        failure: Why it ended early; None where it did not.
    """

    def __init__(self, pid: int, gpu_memory_mib: Callable[[], float | None] = lambda: None) -> None:
        """Begin.

        Args:
            pid: The server's process id.
            gpu_memory_mib: Returns the memory in use on its card.
        """
        self.samples: list[Figures] = []
        self.failure: str | None = None
        self._pid = pid
        self._gpu_memory_mib = gpu_memory_mib
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[Figures]:
        """End, and return all samples."""
        self._ended.set()
        self._thread.join()
        return self.samples

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                figures = figures_of(self._pid)
                self.samples.append(replace(figures, gpu_memory_mib=self._gpu_memory_mib()))
            except (OSError, ValueError) as error:
                self.failure = f"a process of the server has ended ({error})"
                return
