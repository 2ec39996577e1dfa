"""What can go wrong in a workload and is understood: its sentence, its exit code, its cause.

Running out of memory comes with a snapshot of who held what (``_snapshot``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_GPU = 3
EXIT_OUT_OF_MEMORY = 12  # the number of ENOMEM, so that the suite can tell it from a crash
EXIT_NOT_FINITE = 34  # the number of ERANGE: a result that cannot be represented
EXIT_DAMAGED_FILE = 65  # EX_DATAERR of sysexits.h: what was given to read is not in order
EXIT_INTERRUPTED = 130

MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
# What becomes of writing where the disk is full or broken, or may only be read.
DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))


class WorkloadError(Exception):
    """What went wrong is understood; the message is one sentence."""

    exit_code = EXIT_FAILED
    cause: str | None = None  # the suite's word for it in its records


class UsageError(WorkloadError):
    """The request cannot be carried out as given; the message names the fix."""

    exit_code = EXIT_USAGE


class GpuUnavailableError(WorkloadError):
    """A GPU is there or was asked for, but PyTorch cannot use it."""

    exit_code = EXIT_NO_GPU


class InterruptedByUserError(WorkloadError):
    """Ctrl-C or SIGTERM."""

    exit_code = EXIT_INTERRUPTED


class JobFailedError(WorkloadError):
    """The job itself went wrong."""


class CannotWriteError(JobFailedError):
    """A file cannot be written: the disk is full, or the folder is shut or gone."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        path = Path(path)
        if SHARED_MEMORY in path.parents:
            fix = "enlarge it, such as by docker run --shm-size=1g"
        elif "gpu-sharing-bench" in path.parts:
            fix = "make room there, or set XDG_CACHE_HOME to a folder that you may write"
        else:
            fix = "make room there, or name another folder with --results-dir"
        super().__init__(f"cannot write {path} ({error.strerror or error}): {fix}")


class NotFiniteError(WorkloadError):
    """A model's outputs are NaN or infinite, so that no figure of theirs means anything."""

    exit_code = EXIT_NOT_FINITE
    cause = "not_finite"


class DivergedError(NotFiniteError):
    """A training's loss became NaN or infinite."""

    cause = "diverged"


class DamagedFileError(WorkloadError):
    """A file is truncated or altered; the message names it."""

    exit_code = EXIT_DAMAGED_FILE
    cause = "damaged_file"


class UnreadableImageError(DamagedFileError):
    """An image of a dataset cannot be decoded; the message names it."""

    cause = "unreadable_image"


class OutOfGpuMemoryError(WorkloadError):
    """Memory ran out, here or in a process that a workload had started.

    ``memory`` is the snapshot, None where nobody took one.
    """

    exit_code = EXIT_OUT_OF_MEMORY
    cause = "out_of_memory"

    def __init__(self, message: str, memory: dict | None = None) -> None:
        super().__init__(message)
        self.memory = memory


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    """Return ``text`` as any terminal takes it: names of files may hold bytes and control codes."""
    encodable = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1]
        for letter in encodable
    )


def as_known(error: BaseException) -> WorkloadError | None:
    """Return what ``error`` is among the errors above; None if it is a surprise.

    To be called while the error is being handled, before what held the memory is let go.
    """
    if isinstance(error, WorkloadError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedByUserError("interrupted")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return CannotWriteError(error.filename or "the output", error)
    # Asking whether a path exists raises too: a shut folder above it, a name too long, a loop.
    if isinstance(error, OSError) and error.filename is not None:
        return UsageError(
            f"cannot use {error.filename} ({error.strerror}); name another path, or see to it that "
            "this one is there and open to you"
        )
    return as_out_of_memory(error)


# --- out of memory --------------------------------------------------------------------------------

MPS_LIMIT_VARIABLE = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
# One device only is shown to a client under a limit of the suite's, as number 0.
_MPS_LIMIT = re.compile(r"(?:^|,)0=(\d+)([KMG])B?(?:,|$)")
_UNITS = {"bytes": 1 / MIB, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "TiB": 1024.0**2}
_AMOUNT = r"([\d.]+) (bytes|[KMGT]iB)"
# Errors of CUDA and its libraries that PyTorch passes on as a plain RuntimeError.
_GPU_TEXT = re.compile(
    r"CUDA error: out of memory|CUDA out of memory|cudaErrorMemoryAllocation|"
    r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
)
_HOST_TEXT = re.compile(
    r"DefaultCPUAllocator: (not enough|can't allocate) memory|Storage size calculation overflowed"
)


def as_out_of_memory(error: BaseException) -> OutOfGpuMemoryError | None:
    """Return what to raise instead if ``error`` says that memory ran out, else None."""
    if isinstance(error, OutOfGpuMemoryError):
        return error
    # Not imported to ask: what ran without PyTorch cannot have raised its errors.
    torch = sys.modules.get("torch")
    text = str(error)
    if isinstance(error, MemoryError) or _HOST_TEXT.search(text):
        torch = None
    elif torch is None or not (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and _GPU_TEXT.search(text))
    ):
        return None
    snapshot = _snapshot(torch, text)
    return OutOfGpuMemoryError(_describe(snapshot, first_line(error)), snapshot)


def _snapshot(torch: ModuleType | None, text: str) -> dict:
    """Return who holds what on the GPU, without ``torch`` on the host, beside what ``text`` says.

    Amounts are in MiB; None is unknown.
    """

    def said(words: str) -> float | None:
        match = re.search(words.format(_AMOUNT), text)
        return float(match[1]) * _UNITS[match[2]] if match else None

    snapshot: dict[str, Any] = {
        "where": "gpu" if torch else "host",
        "tried_mib": said("[Tt]ried to allocate {}"),
        "free_mib": None,  # as driver or kernel says; under an MPS limit within that
        "total_mib": None,  # all there is
        "allowed_mib": said("{} allowed"),  # to PyTorch, where it has a limit of its own
        "mps_limit_mib": None,  # the MPS memory limit in this process's environment
        "process_mib": said("this process has {} memory in use"),
        "others_mib": None,  # neither free nor this process's; unknown under an MPS limit
        "allocated_mib": None,  # in tensors; this and what follows on the GPU only
        "reserved_mib": None,  # in PyTorch's pool
        "peak_allocated_mib": None,  # the most that was ever in tensors
    }
    if torch is None:
        import psutil

        memory = psutil.virtual_memory()
        snapshot |= {"free_mib": memory.available / MIB, "total_mib": memory.total / MIB}
        snapshot["process_mib"] = psutil.Process().memory_info().rss / MIB
    elif limit := _MPS_LIMIT.search(os.environ.get(MPS_LIMIT_VARIABLE, "")):
        snapshot["mps_limit_mib"] = int(limit[1]) * _UNITS[f"{limit[2]}iB"]
    if torch is not None and torch.cuda.is_initialized():
        # After a fault on the card each of these raises too, and then the text has to do.
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info()
            snapshot |= {
                "free_mib": free / MIB,
                "total_mib": total / MIB,
                "allocated_mib": torch.cuda.memory_allocated() / MIB,
                "reserved_mib": torch.cuda.memory_reserved() / MIB,
                "peak_allocated_mib": torch.cuda.max_memory_allocated() / MIB,
            }
    total, free, process = (snapshot[key] for key in ("total_mib", "free_mib", "process_mib"))
    # Free within an MPS limit, taken from the whole card, would be blamed on the others.
    if snapshot["mps_limit_mib"] is None and None not in (total, free, process):
        snapshot["others_mib"] = max(0.0, total - free - process)
    return snapshot


def _describe(snapshot: dict, said: str) -> str:
    """Return the sentence for the terminal; ``said`` is the error's own first line."""

    def amount(key: str, text: str) -> str:
        mib = snapshot[key]
        if mib is None:
            return ""
        return text.format(f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB")

    where, place = ("GPU", "card") if snapshot["where"] == "gpu" else ("host", "machine")
    within = amount("mps_limit_mib", " free within the MPS memory limit of {}")
    within = within or amount("total_mib", " of {} free")
    parts = (
        (amount("tried_mib", "tried {}") or said) + amount("free_mib", f" with {{}}{within}"),
        amount("allowed_mib", "{} allowed"),
        amount("process_mib", "this process holds {}"),
        amount("others_mib", f"others on the {place} hold {{}}"),
    )
    sentence = "; ".join(filter(None, parts))
    fix = "run fewer clients, or smaller ones (by --batch-size, --max-batch or --matrix-size)"
    return f"out of {where} memory: {sentence}; {fix}"
