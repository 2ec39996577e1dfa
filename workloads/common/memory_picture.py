"""Out of memory: how it is recognized, and who held what at that moment.

The picture is a dict whose values are MiB, or None where nobody knows:

=======================  ==========================================================================
``where``                ``gpu`` or ``host``, whichever memory ran out
``tried_mib``            what was to be allocated, from the error's text
``free_mib``             free, as the driver (GPU) or the kernel (host, ``MemAvailable``) says;
                         under an MPS memory limit the driver says what is free within that
``total_mib``            all there is
``allowed_mib``          what PyTorch was allowed to take, where it has a limit of its own
``mps_limit_mib``        the MPS memory limit in this process's environment; GPU only
``process_mib``          what this process holds; on a GPU as the driver told PyTorch
``others_mib``           what is neither free nor this process's; unknown under an MPS limit
``allocated_mib``        in tensors (``torch.cuda.memory_allocated``); GPU only
``reserved_mib``         in PyTorch's pool (``torch.cuda.memory_reserved``); GPU only
``peak_allocated_mib``   the most that was ever in tensors; GPU only
=======================  ==========================================================================
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from workloads.common.errors import OutOfGpuMemoryError, first_line

MIB = 2**20
MEMORY_INFO = Path("/proc/meminfo")
PROCESS_STATUS = Path("/proc/self/status")
MPS_LIMIT_VARIABLE = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
UNITS = {"bytes": 1 / MIB, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "TiB": 1024.0**2}

# Errors of CUDA and its libraries that PyTorch passes on as a plain RuntimeError.
_GPU_TEXT = re.compile(
    r"CUDA error: out of memory|CUDA out of memory|cudaErrorMemoryAllocation|"
    r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
)
_HOST_TEXT = re.compile(r"DefaultCPUAllocator: (not enough|can't allocate) memory")
_AMOUNT = r"([\d.]+) (bytes|[KMGT]iB)"
_TRIED = re.compile(rf"(?:Tried to allocate|tried to allocate) {_AMOUNT}")
_ALLOWED = re.compile(rf"{_AMOUNT} allowed")
# One device only is shown to a client under a limit of the suite's, as number 0.
_MPS_LIMIT = re.compile(r"(?:^|,)0=(\d+)([KMG])B?(?:,|$)")
_PROCESS = re.compile(rf"this process has {_AMOUNT} memory in use")


def as_out_of_memory(error: BaseException) -> OutOfGpuMemoryError | None:
    """Return what to raise instead if ``error`` says that memory ran out, else None.

    To be called while the error is being handled, before what held the memory is let go.
    """
    if isinstance(error, OutOfGpuMemoryError):
        return error
    # Not imported to ask: what ran without PyTorch cannot have raised its errors.
    torch = sys.modules.get("torch")
    text = str(error)
    if isinstance(error, MemoryError) or _HOST_TEXT.search(text):
        picture = _host_picture(text)
    elif torch is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and _GPU_TEXT.search(text))
    ):
        picture = _gpu_picture(torch, text)
    else:
        return None
    return OutOfGpuMemoryError(in_words(picture, first_line(error)), picture)


def in_words(picture: dict, said: str) -> str:
    """Return the sentence for the terminal; ``said`` is the error's own first line."""
    where = "GPU" if picture["where"] == "gpu" else "host"
    tried, free, total = (picture[key] for key in ("tried_mib", "free_mib", "total_mib"))
    parts = [f"tried {_amount(tried)}" if tried is not None else said]
    if free is not None and picture["mps_limit_mib"] is not None:
        parts[0] += f" with {_amount(free)} free within the MPS memory limit of "
        parts[0] += _amount(picture["mps_limit_mib"])
    elif free is not None and total is not None:
        parts[0] += f" with {_amount(free)} of {_amount(total)} free"
    if picture["allowed_mib"] is not None:
        parts.append(f"{_amount(picture['allowed_mib'])} allowed")
    if picture["process_mib"] is not None:
        parts.append(f"this process holds {_amount(picture['process_mib'])}")
    if picture["others_mib"] is not None:
        place = "on the card" if where == "GPU" else "on the machine"
        parts.append(f"others {place} hold {_amount(picture['others_mib'])}")
    return f"out of {where} memory: {'; '.join(parts)}; lower --batch-size, or run fewer clients"


def _gpu_picture(torch: object, text: str) -> dict:
    free = total = None
    allocated = reserved = peak = None
    if torch.cuda.is_initialized():
        # After a fault on the card each of these raises too, and then the text has to do.
        try:
            free, total = (size / MIB for size in torch.cuda.mem_get_info())
            allocated = torch.cuda.memory_allocated() / MIB
            reserved = torch.cuda.memory_reserved() / MIB
            peak = torch.cuda.max_memory_allocated() / MIB
        except RuntimeError:
            pass
    process = _found(_PROCESS, text)
    limit = _MPS_LIMIT.search(os.environ.get(MPS_LIMIT_VARIABLE, ""))
    return {
        "where": "gpu",
        "tried_mib": _found(_TRIED, text),
        "free_mib": free,
        "total_mib": total,
        "allowed_mib": _found(_ALLOWED, text),
        "mps_limit_mib": int(limit[1]) * UNITS[f"{limit[2]}iB"] if limit else None,
        "process_mib": process,
        # Free within a limit, taken from the whole card, would be blamed on the others.
        "others_mib": None if limit else _others(total, free, process),
        "allocated_mib": allocated,
        "reserved_mib": reserved,
        "peak_allocated_mib": peak,
    }


def _host_picture(text: str) -> dict:
    free = _kernel_mib(MEMORY_INFO, "MemAvailable")
    total = _kernel_mib(MEMORY_INFO, "MemTotal")
    process = _kernel_mib(PROCESS_STATUS, "VmRSS")
    return {
        "where": "host",
        "tried_mib": _found(_TRIED, text),
        "free_mib": free,
        "total_mib": total,
        "allowed_mib": None,
        "mps_limit_mib": None,
        "process_mib": process,
        "others_mib": _others(total, free, process),
        "allocated_mib": None,
        "reserved_mib": None,
        "peak_allocated_mib": None,
    }


def _others(total: float | None, free: float | None, process: float | None) -> float | None:
    if total is None or free is None or process is None:
        return None
    return max(0.0, total - free - process)


def _found(pattern: re.Pattern[str], text: str) -> float | None:
    """Return the amount that the pattern finds, in MiB."""
    match = pattern.search(text)
    return float(match[1]) * UNITS[match[2]] if match else None


def _kernel_mib(path: Path, name: str) -> float | None:
    """Return a line such as ``MemTotal:  1024 kB`` of a file of the kernel's, in MiB."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) / 1024 if match else None


def _amount(mib: float) -> str:
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
