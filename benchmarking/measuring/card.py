"""The card that a run is on: found, or why it cannot be used, and who else is on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from benchmarking.cli import EXIT_MODE_NOT_IN_FORCE, EXIT_NO_GPU, EXIT_USAGE, SuiteError
from benchmarking.hardware import nvidia_tools, nvml
from benchmarking.measuring import proofs
from benchmarking.planning.request import Request


def find_gpu(
    request: Request, environment: Mapping[str, str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the facts of the GPU to use and notes; `None` only where there is no GPU to use.

    Raises `SuiteError`: code 2 for a `--gpu` that does not exist, code 3 where a GPU is there or
    was asked for but cannot be used.
    """
    if request.device == "cpu":
        return None, ["--device cpu: CPU demonstration, whatever mode was asked for"]
    try:
        selector = request.gpu or nvml.visible_gpu(environment)
        gpu = nvml.open_gpu(selector)
    except nvml.GpuHiddenError as error:
        if request.device == "auto":
            return None, [f"{error}: CPU demonstration"]
        raise SuiteError(
            f"--device cuda, but {error}: unset it, or name a GPU by --gpu", EXIT_NO_GPU
        ) from error
    except nvml.GpuNotFoundError as error:
        code = EXIT_USAGE if nvml.unavailable_reason() is None else EXIT_NO_GPU
        raise SuiteError(str(error), code) from error
    except nvml.GpuUnusableError as error:
        raise SuiteError(
            f"{error}; --device cpu gives the CPU demonstration", EXIT_NO_GPU
        ) from error
    if gpu is None:
        return None, [_without_a_gpu(request)]
    facts = gpu.describe()
    if facts["uuid"] is None:
        raise SuiteError(
            "the driver does not tell the GPU's UUID, so no job can be sent to it: look for "
            "Xid in the kernel's log, and restart", EXIT_NO_GPU,
        )  # fmt: skip
    if not str(facts["uuid"]).startswith(("GPU-", "MIG-")):
        raise SuiteError(
            f"{facts['name']} cannot be measured: its UUID {facts['uuid']} is none of those by "
            "which a job is sent to a GPU, as of a Jetson board; --device cpu gives the CPU "
            "demonstration", EXIT_NO_GPU,
        )  # fmt: skip
    if str(facts["uuid"]).startswith("MIG-"):
        raise SuiteError(
            f"{selector} is a MIG instance: name the card with --gpu, each client gets an "
            "instance of it", EXIT_USAGE,
        )  # fmt: skip
    return facts, nvml.lost_gpus()


def _without_a_gpu(request: Request) -> str:
    """Return the note on a machine without a GPU; raises `SuiteError` where one is or must be."""
    reason = nvml.unavailable_reason()
    # A damaged or lost GPU changes the exit status and adds a line; the others are listed.
    if nvidia_tools.A_GPU.search(nvidia_tools.ask("-L")[0]):
        raise SuiteError(
            f"nvidia-smi lists a GPU but it cannot be asked: {reason} "
            "(pip install -r requirements.txt, or --device cpu for the CPU demonstration)",
            EXIT_NO_GPU,
        )
    if request.device == "cuda":
        raise SuiteError(
            f"--device cuda, but there is no GPU: {reason} (leave --device out for the CPU "
            "demonstration)", EXIT_NO_GPU,
        )  # fmt: skip
    return f"no GPU here ({reason}): CPU demonstration, whatever mode was asked for"


def look_for_foreign_processes(gpu_uuid: str, *, allowed: bool) -> tuple[bool, list[str]]:
    """Look who is on the GPU before a client of ours is: whether somebody, and notes.

    Raises `SuiteError` where somebody is and may not be.
    """
    processes = nvml.compute_processes(gpu_uuid)
    if processes is None:
        return False, ["whether other processes are on the GPU could not be asked"]
    pids = proofs.foreign_pids(processes)
    if not pids:
        return False, []
    found = f"other processes are on the GPU: {proofs.describe_pids(pids)}"
    if not allowed:
        raise SuiteError(
            f"{found}; wait until they have ended, choose another card with --gpu, or measure "
            "next to them with --allow-contention", EXIT_MODE_NOT_IN_FORCE,
        )  # fmt: skip
    return True, [f"{found}: the GPU is contended, figures hold next to them only"]


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: affinity, and a container's quota if lower."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the cores that this process's control group, and each above it, may use at most.

    Version 2 has both numbers in one file, and version 1 in two, with a negative one for no limit.
    Inside a container the group's own path is often not to be seen, but its limits are at the top.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            names, mount = ["cpu.max"], root / "sys/fs/cgroup"
            if "cpu" in controllers.split(","):
                names, mount = ["cpu.cfs_quota_us", "cpu.cfs_period_us"], mount / "cpu"
            for folder in (PurePath(path.lstrip("/")), *PurePath(path.lstrip("/")).parents):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    words = [(mount / folder / name).read_text() for name in names]
                    quota, period = map(int, " ".join(words).split())
                    if quota > 0:
                        yield quota / period
