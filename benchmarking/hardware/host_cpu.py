"""Processor time of a client and of everything that it started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil


@dataclass(frozen=True)
class CpuReading:
    """Processor seconds (user and system) so far: of all processes, and of each living thread.

    `threads` goes by thread id. `seconds` holds threads and processes that have ended too, if
    their parents have noticed.
    """

    seconds: float
    threads: dict[int, float] = field(default_factory=dict)

    def seconds_since(self, earlier: CpuReading) -> float:
        """Return the processor seconds since `earlier`; never negative."""
        # A process that was orphaned and has ended takes its time away with it.
        return max(0.0, self.seconds - earlier.seconds)

    def busiest_thread_since(self, earlier: CpuReading) -> float:
        """Return the most seconds that any one thread has used since `earlier`."""
        used = [now - earlier.threads.get(thread, 0.0) for thread, now in self.threads.items()]
        return max(used, default=0.0)


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
    sessions = {pid: _session(pid) for pid in parents}
    return [_read(_family(pid, parents, sessions)) if pid in parents else None for pid in pids]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended meanwhile
        return None


def _family(
    pid: int, parents: Mapping[int, int | None], sessions: Mapping[int, int | None]
) -> set[int]:
    members = {pid} | {other for other, session in sessions.items() if session == pid}
    while True:
        found = {other for other, parent in parents.items() if parent in members} - members
        if not found:
            return members
        members |= found


def _read(members: set[int]) -> CpuReading:
    seconds, threads = 0.0, {}
    for pid in members:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process = psutil.Process(pid)
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
            threads |= {one.id: one.user_time + one.system_time for one in process.threads()}
    return CpuReading(seconds, threads)
