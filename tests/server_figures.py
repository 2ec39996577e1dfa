"""What a server takes of the machine: memory, threads and open files of all its processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
from waiting import wait_until

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Figures:
    """One moment, in sum over all processes; memory that they share counts for each."""

    seconds: float  # CLOCK_MONOTONIC
    resident_mib: float
    threads: int
    open_files: int  # sockets included
    gpu_memory_mib: float | None = None  # in use on the whole card; None: not looked at


def figures_of(pid: int) -> Figures:
    """Return the present figures of the server with this process id.

    Raises `psutil.Error` where one of its processes has just ended.
    """
    server = psutil.Process(pid)
    processes = [server, *server.children(recursive=True)]
    return Figures(
        time.monotonic(),
        sum(each.memory_info().rss for each in processes) / 2**20,
        sum(each.num_threads() for each in processes),
        sum(each.num_fds() for each in processes),
    )


def figures_at_rest(pid: int, at_most: Figures | None = None) -> Figures:
    """Wait until no file has been opened or closed for a second; return the figures then.

    Then, half a minute at the most, for no more files and threads than `at_most`: connections that
    a client has left, and threads that decode large pictures, end when their time is over.
    """
    last = figures_of(pid)

    def rests() -> bool:
        nonlocal last
        before, last = last, figures_of(pid)
        return before.open_files == last.open_files

    wait_until(rests, "as many open files for a second", poll_seconds=1.0)
    deadline = time.monotonic() + 35.0
    while at_most is not None and time.monotonic() < deadline:
        last = figures_of(pid)
        if last.open_files <= at_most.open_files and last.threads <= at_most.threads:
            break
        time.sleep(SAMPLE_SECONDS)
    return last


class Watch:
    """Takes the figures twice a second, on a thread of its own, into `samples`."""

    def __init__(self, pid: int, gpu_memory_mib: Callable[[], float | None]) -> None:
        self.samples: list[Figures] = []
        self._pid, self._gpu_memory_mib = pid, gpu_memory_mib
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[Figures]:
        self._ended.set()
        self._thread.join()
        return self.samples

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                figures = figures_of(self._pid)
                self.samples.append(replace(figures, gpu_memory_mib=self._gpu_memory_mib()))
            except psutil.Error:  # whoever sends to it finds out
                return
