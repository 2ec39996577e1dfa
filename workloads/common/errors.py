"""What can go wrong in a workload and is understood: its sentence, its exit code, its cause.

Running out of memory comes with a snapshot of who held what: ``where`` is ``gpu`` or ``host``,
whichever memory ran out, and ``SNAPSHOT_KEYS`` name amounts in MiB (None: unknown).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path

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

    ``memory`` is the snapshot described above, None where nobody took one.
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
    return as_out_of_memory(error)


# --- out of memory --------------------------------------------------------------------------------

MPS_LIMIT_VARIABLE = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
SNAPSHOT_KEYS = (
    "tried_mib",  # what was to be allocated, from the error's text
    "free_mib",  # as the driver (GPU) or the kernel (host) says; under an MPS limit within that
    "total_mib",  # all there is
    "allowed_mib",  # what PyTorch was allowed to take, where it has a limit of its own
    "mps_limit_mib",  # the MPS memory limit in this process's environment
    "process_mib",  # what this process holds; on a GPU as the driver told PyTorch
    "others_mib",  # neither free nor this process's; unknown under an MPS limit
    "allocated_mib",  # in tensors (torch.cuda.memory_allocated); GPU only
    "reserved_mib",  # in PyTorch's pool (torch.cuda.memory_reserved); GPU only
    "peak_allocated_mib",  # the most that was ever in tensors; GPU only
)
_UNITS = {"bytes": 1 / MIB, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "TiB": 1024.0**2}
# Errors of CUDA and its libraries that PyTorch passes on as a plain RuntimeError.
_GPU_TEXT = re.compile(
    r"CUDA error: out of memory|CUDA out of memory|cudaErrorMemoryAllocation|"
    r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
)
_HOST_TEXT = re.compile(r"DefaultCPUAllocator: (not enough|can't allocate) memory")
# What PyTorch's text says of amounts.
_AMOUNT = r"([\d.]+) (bytes|[KMGT]iB)"
_TEXTS = {
    "tried_mib": rf"[Tt]ried to allocate {_AMOUNT}",
    "allowed_mib": rf"{_AMOUNT} allowed",
    "process_mib": rf"this process has {_AMOUNT} memory in use",
}
# One device only is shown to a client under a limit of the suite's, as number 0.
_MPS_LIMIT = re.compile(r"(?:^|,)0=(\d+)([KMG])B?(?:,|$)")


def as_out_of_memory(error: BaseException) -> OutOfGpuMemoryError | None:
    """Return what to raise instead if ``error`` says that memory ran out, else None."""
    if isinstance(error, OutOfGpuMemoryError):
        return error
    # Not imported to ask: what ran without PyTorch cannot have raised its errors.
    torch = sys.modules.get("torch")
    text = str(error)
    if isinstance(error, MemoryError) or _HOST_TEXT.search(text):
        import psutil

        memory = psutil.virtual_memory()
        where, figures = (
            "host",
            {
                "free_mib": memory.available / MIB,
                "total_mib": memory.total / MIB,
                "process_mib": psutil.Process().memory_info().rss / MIB,
            },
        )
    elif torch is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and _GPU_TEXT.search(text))
    ):
        where, figures = "gpu", _gpu_figures(torch)
    else:
        return None
    snapshot: dict = {"where": where, **dict.fromkeys(SNAPSHOT_KEYS)}
    for key, pattern in _TEXTS.items():
        if match := re.search(pattern, text):
            snapshot[key] = float(match[1]) * _UNITS[match[2]]
    snapshot |= figures
    total, free, process = (snapshot[key] for key in ("total_mib", "free_mib", "process_mib"))
    # Free within an MPS limit, taken from the whole card, would be blamed on the others.
    if snapshot["mps_limit_mib"] is None and None not in (total, free, process):
        snapshot["others_mib"] = max(0.0, total - free - process)
    return OutOfGpuMemoryError(_describe(snapshot, first_line(error)), snapshot)


def _gpu_figures(torch: object) -> dict:
    figures = {}
    limit = _MPS_LIMIT.search(os.environ.get(MPS_LIMIT_VARIABLE, ""))
    if limit:
        figures["mps_limit_mib"] = int(limit[1]) * _UNITS[f"{limit[2]}iB"]
    if torch.cuda.is_initialized():
        # After a fault on the card each of these raises too, and then the text has to do.
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info()
            figures |= {
                "free_mib": free / MIB,
                "total_mib": total / MIB,
                "allocated_mib": torch.cuda.memory_allocated() / MIB,
                "reserved_mib": torch.cuda.memory_reserved() / MIB,
                "peak_allocated_mib": torch.cuda.max_memory_allocated() / MIB,
            }
    return figures


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
    return f"out of {where} memory: {sentence}; lower --batch-size, or run fewer clients"
