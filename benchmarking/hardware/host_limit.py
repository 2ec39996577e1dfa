"""Whether the host, not the GPU, set the pace of a co-run: then every sharing mode looks alike.

Pure functions over records. Two ways are told apart: the host has no core left, or a client's
launching thread had no moment left. A thread that waits for the GPU may spin, and then it is busy
all the time too; so a busy thread alone proves nothing, and what the GPU did decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# A GPU this busy has no use for a faster host.
SATURATED_ACTIVITY_PERCENT = 50.0
BUSY_HOST_PERCENT = 90.0
BUSY_THREAD_FRACTION = 0.9
# Alone, a client that only spins for the GPU leaves it no gap: some kernel runs all the time.
GAPLESS_UTILIZATION_PERCENT = 90.0
# Whom the neighbors slow down more than this waits for what they share, not for its own Python.
UNDISTURBED_SLOWDOWN = 1.15


def judged(
    client_records: Sequence[Record], gpu: Record | None, baselines: Mapping[str, Record]
) -> list[dict[str, Any]]:
    """Return the client records of one co-run, each with `host_limited` (`None`: unknown).

    Alone, a client is limited by its host when one thread of it was busy all the time while the
    GPU had gaps. Together, when one thread was busy all the time, the GPU was not saturated, the
    same held alone, and the neighbors hardly slowed it down.

    Args:
        client_records: Records of the clients that ran together; one client ran alone.
        gpu: Figures of the GPU in the window; `None` where they are unknown.
        baselines: Judged records of the jobs alone, by `job_key`.
    """
    is_alone = len(client_records) == 1
    return [
        {
            **record,
            "host_limited": _is_limited_alone(record, gpu)
            if is_alone
            else _is_limited_together(record, gpu, baselines.get(record["job_key"])),
        }
        for record in client_records
    ]


def warnings(
    gpu: Record | None, client_records: Iterable[Record], host_cores: int | None = None
) -> list[str]:
    """Return sentences that say in what way the host was the limit; none where it was not.

    Args:
        gpu: Figures of the GPU in the window; `None` where they are unknown.
        client_records: Judged records of the clients that ran together.
        host_cores: How many cores the clients may use; `None`: unknown.
    """
    name, activity = _activity(gpu)
    if activity is None or activity >= SATURATED_ACTIVITY_PERCENT:
        return []
    records = list(client_records)
    busy = _busy_host(gpu or {}, records, host_cores)
    if busy is not None:
        return [f"the host was the limit: {busy}, while {name} was {activity:.0f} %"]
    limited = [
        f"client {record['client']} ({record['label']})"
        for record in records
        if record.get("host_limited")
    ]
    if limited:
        return [
            f"the host was the limit: {name} was {activity:.0f} %, while one thread was busy all "
            f"the time in {' and '.join(limited)}"
        ]
    return []


def _is_limited_alone(record: Record, gpu: Record | None) -> bool | None:
    busy, (_, activity) = _has_busy_thread(record), _activity(gpu)
    utilization = (gpu or {}).get("utilization_gpu_percent")
    if busy is None or activity is None or utilization is None:
        return None
    is_saturated = activity >= SATURATED_ACTIVITY_PERCENT
    return busy and not is_saturated and utilization < GAPLESS_UTILIZATION_PERCENT


def _is_limited_together(
    record: Record, gpu: Record | None, baseline: Record | None
) -> bool | None:
    busy, (_, activity) = _has_busy_thread(record), _activity(gpu)
    if busy is None or activity is None:
        return None
    if not busy or activity >= SATURATED_ACTIVITY_PERCENT:
        return False
    slowdown = record.get("slowdown")
    was_limited_alone = (baseline or {}).get("host_limited")
    if slowdown is None or was_limited_alone is None:
        return None
    return was_limited_alone and slowdown <= UNDISTURBED_SLOWDOWN


def _has_busy_thread(record: Record) -> bool | None:
    fraction = record.get("busiest_thread_cpu_fraction")
    return None if fraction is None else fraction >= BUSY_THREAD_FRACTION


def _activity(gpu: Record | None) -> tuple[str, float | None]:
    """Return how busy the GPU was, by the better of the two figures that is known."""
    figures = gpu or {}
    if figures.get("sm_activity_percent") is not None:
        return "SM activity", figures["sm_activity_percent"]
    return "GPU utilization", figures.get("utilization_gpu_percent")


def _busy_host(gpu: Record, records: Sequence[Record], host_cores: int | None) -> str | None:
    """Return in words that the host has no core left; `None` where it has, or nobody knows."""
    host = gpu.get("host_cpu_percent")
    if host is not None and host >= BUSY_HOST_PERCENT:
        return f"its CPU was {host:.0f} % busy"
    # In a container the machine's own figure counts cores that the clients cannot use.
    used = sum(record.get("window_host_cpu_fraction") or 0.0 for record in records)
    if host_cores and 100 * used / host_cores >= BUSY_HOST_PERCENT:
        return f"the clients used {used:.1f} of {host_cores} cores"
    return None
