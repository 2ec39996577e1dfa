"""Processor time of a client and of everything that it started, and the end of what it left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class CpuReading:
    """Processor seconds (user and system) so far: of all processes, and of each living thread.

    `threads` goes by thread id, `waits` likewise: seconds that the thread was ready to run and had
    no core. `seconds` holds threads and processes that have ended too, if their parents have
    noticed.
    """

    seconds: float
    threads: dict[int, float] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)

    def seconds_since(self, earlier: CpuReading) -> float:
        """Return the processor seconds since `earlier`; never negative."""
        # A process that was orphaned and has ended takes its time away with it; a thread is read a
        # moment after its process.
        return max(0.0, self.seconds - earlier.seconds, self.busiest_since(earlier))

    def busiest_since(self, earlier: CpuReading) -> float:
        """Return the most seconds that any one thread has used since `earlier`."""
        return _most(earlier.threads, self.threads)

    def longest_wait_since(self, earlier: CpuReading) -> float:
        """Return the most seconds that any one thread has waited for a core since `earlier`."""
        return _most(earlier.waits, self.waits)


def _most(earlier: dict[int, float], now: dict[int, float]) -> float:
    return max((value - earlier.get(thread, 0.0) for thread, value in now.items()), default=0.0)


def read_process_trees(pids: Sequence[int | None]) -> list[CpuReading | None]:
    """Read processes, each with its descendants and the members of its session.

    Front ends, load-test workers and data loaders count as the client that started them, also
    when their starter has left them behind in its session.

    Args:
        pids: The processes; `None` stands for one that was never started.

    Returns:
        A reading for each; `None` for one that is gone.
    """
    parents = {one.pid: one.info["ppid"] for one in psutil.process_iter(["ppid"])}
    sessions = dict(_sessions())
    readings: list[CpuReading | None] = []
    for pid in pids:
        if pid is None or pid not in parents:
            readings.append(None)
            continue
        members = {pid} | {other for other, session in sessions.items() if session == pid}
        while found := {one for one, parent in parents.items() if parent in members} - members:
            members |= found
        readings.append(_read(members))
    return readings


def _read(members: set[int]) -> CpuReading:
    seconds = 0.0
    threads: dict[int, float] = {}
    waits: dict[int, float] = {}
    for pid in members:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process = psutil.Process(pid)
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
            for one in process.threads():
                threads[one.id] = one.user_time + one.system_time
                waits[one.id] = _seconds_without_a_core(pid, one.id)
    return CpuReading(seconds, threads, waits)


def _seconds_without_a_core(pid: int, thread: int) -> float:
    """The second number of schedstat (Documentation/scheduler/sched-stats of the kernel), in ns."""
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # ended meanwhile, or a kernel without it
        return 0.0


def signal_sessions(leaders: Sequence[int], number: int) -> list[psutil.Process]:
    """Signal every process in the sessions of `leaders`, and return them."""
    signaled = []
    for pid, session in _sessions():
        with contextlib.suppress(psutil.Error):
            if session in leaders:
                process = psutil.Process(pid)
                process.send_signal(number)
                signaled.append(process)
    return signaled


def _sessions() -> Iterator[tuple[int, int]]:
    """Yield every process with the leader of its session."""
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield pid, os.getsid(pid)
