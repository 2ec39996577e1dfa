"""Processor time of a client and of everything that it started, read from `/proc`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")


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
        return max(
            (
                seconds - earlier.threads.get(thread, 0.0)
                for thread, seconds in self.threads.items()
            ),
            default=0.0,
        )


@dataclass(frozen=True)
class _Stat:
    """The fields of one `/proc` stat file that are needed here."""

    parent: int
    session: int
    own_seconds: float
    ended_children_seconds: float


def read_process_trees(pids: Sequence[int | None]) -> list[CpuReading | None]:
    """Read processes, each with its descendants and the members of its session.

    Front ends, load-test workers and data loaders count as the client that started them, also
    when their starter has left them behind in its session.

    Args:
        pids: The processes; `None` stands for one that was never started.

    Returns:
        A reading for each; `None` for one that is gone.
    """
    stats = _all_processes()
    return [_read_tree(pid, stats) if pid in stats else None for pid in pids]


def _read_tree(pid: int, stats: Mapping[int, _Stat]) -> CpuReading:
    members = _family(pid, stats)
    threads = {thread: seconds for member in members for thread, seconds in _threads_of(member)}
    seconds = sum(
        stats[member].own_seconds + stats[member].ended_children_seconds for member in members
    )
    return CpuReading(seconds, threads)


def _family(pid: int, stats: Mapping[int, _Stat]) -> set[int]:
    members = {pid} | {other for other, stat in stats.items() if stat.session == pid}
    while True:
        found = {other for other, stat in stats.items() if stat.parent in members} - members
        if not found:
            return members
        members |= found


def _all_processes() -> dict[int, _Stat]:
    found = {}
    for entry in os.scandir(PROC):
        if entry.name.isdecimal():
            stat = _read_stat(Path(entry.path) / "stat")
            if stat is not None:
                found[int(entry.name)] = stat
    return found


def _threads_of(pid: int) -> Iterator[tuple[int, float]]:
    try:
        threads = list(os.scandir(PROC / str(pid) / "task"))
    except OSError:
        return
    for entry in threads:
        stat = _read_stat(Path(entry.path) / "stat")
        if stat is not None:
            yield int(entry.name), stat.own_seconds


def _read_stat(path: Path) -> _Stat | None:
    """Read a process's or thread's stat file; `None` when it has ended meanwhile."""
    try:
        text = path.read_text(errors="replace")  # a process may call itself anything
    except OSError:
        return None
    # The second field, the name, may hold spaces and brackets: count from its closing one.
    fields = text.rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    user, system, children_user, children_system = (int(field) for field in fields[11:15])
    return _Stat(
        parent=int(fields[1]),
        session=int(fields[3]),
        own_seconds=(user + system) / tick,
        ended_children_seconds=(children_user + children_system) / tick,
    )
