"""Whether the host, not the GPU, set the pace of a co-run: then every sharing mode looks alike.

Two ways are told apart: the host has no core left, or a client's launching thread had no moment
left. A thread that waits for the GPU may spin, and then it is busy all the time too; so a busy
thread alone proves nothing, and what the GPU did decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarking.records.types import ClientRecord, GpuFigures
from benchmarking.records.writing import first_of

# A GPU this busy has no use for a faster host.
SATURATED_ACTIVITY_PERCENT = 50.0
BUSY_HOST_PERCENT = 90.0
BUSY_THREAD_FRACTION = 0.9
# Alone, a client that only spins for the GPU leaves it no gap: some kernel runs all the time.
GAPLESS_UTILIZATION_PERCENT = 90.0
# Whom the neighbors slow down more than this waits for what they share, not for its own Python.
UNDISTURBED_SLOWDOWN = 1.15


def is_host_limited(
    client: ClientRecord, gpu: GpuFigures | None, baseline: ClientRecord | None
) -> bool | None:
    """Return whether the host set a client's pace, `None` where that is unknown.

    Alone, it did when one thread of the client was busy all the time while the GPU had gaps.
    Together, when one thread was busy all the time, the GPU was not saturated, the same held alone
    (`baseline`), and the neighbors hardly slowed it down.
    """
    busy, (_, activity) = client.busiest_thread_cpu_fraction, _activity(gpu)
    if gpu is None or busy is None or activity is None:
        return None
    may_be = busy >= BUSY_THREAD_FRACTION and activity < SATURATED_ACTIVITY_PERCENT
    if client.clients == 1:
        utilization = gpu.utilization_gpu_percent
        return None if utilization is None else may_be and utilization < GAPLESS_UTILIZATION_PERCENT
    if not may_be:
        return False
    if client.slowdown is None or baseline is None or baseline.host_limited is None:
        return None
    return baseline.host_limited and client.slowdown <= UNDISTURBED_SLOWDOWN


def warnings(
    gpu: GpuFigures | None, clients: Sequence[ClientRecord], host_cores: int | None = None
) -> list[str]:
    """Return the sentence that says in what way the host was the bottleneck; none where it was not.

    `clients` ran together and have been judged; `host_cores` is how many cores they may use.
    """
    name, activity = _activity(gpu)
    if gpu is None or activity is None or activity >= SATURATED_ACTIVITY_PERCENT:
        return []
    # In a container the machine's own figure counts cores that the clients cannot use.
    used = sum(client.window_host_cpu_fraction or 0.0 for client in clients)
    limited = [f"client {one.client} ({one.label})" for one in clients if one.host_limited]
    if (gpu.host_cpu_percent or 0.0) >= BUSY_HOST_PERCENT:
        why = f"its CPU was {gpu.host_cpu_percent:.0f} % busy, while {name} was {activity:.0f} %"
    elif host_cores and 100 * used / host_cores >= BUSY_HOST_PERCENT:
        cores = f"{used:.1f} of {host_cores} cores"
        why = f"the clients used {cores}, while {name} was {activity:.0f} %"
    elif limited:
        why = (
            f"{name} was {activity:.0f} %, while one thread was busy all the time in "
            f"{first_of(limited, ' and ')}"
        )
    else:
        return []
    return [f"CPU-bound (host bottleneck): {why}"]


def _activity(gpu: GpuFigures | None) -> tuple[str, float | None]:
    """Return how busy the GPU was, by the better of the two figures that is known."""
    if gpu is not None and gpu.sm_activity_percent is not None:
        return "SM activity", gpu.sm_activity_percent
    return "GPU utilization", gpu.utilization_gpu_percent if gpu else None
