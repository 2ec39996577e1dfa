"""What can go wrong in a workload and is understood: its sentence, its exit code, its cause."""

from __future__ import annotations

from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_GPU = 3
EXIT_OUT_OF_MEMORY = 12  # the number of ENOMEM, so that the suite can tell it from a crash
EXIT_NOT_FINITE = 34  # the number of ERANGE: a result that cannot be represented
EXIT_DAMAGED_FILE = 65  # EX_DATAERR of sysexits.h: what was given to read is not in order
EXIT_INTERRUPTED = 130


class WorkloadError(Exception):
    """What went wrong is understood; the message is one sentence.

    Attributes:
        exit_code: What the process ends with.
        cause: The suite's word for it in its records; None where the sentence is all there is.
    """

    exit_code = EXIT_FAILED
    cause: str | None = None


class UsageError(WorkloadError):
    """The request cannot be carried out as given; the message names the fix."""

    exit_code = EXIT_USAGE


class GpuUnavailableError(WorkloadError):
    """A GPU is there or was asked for, but PyTorch cannot use it."""

    exit_code = EXIT_NO_GPU


class JobFailedError(WorkloadError):
    """The job itself went wrong."""


class CannotWriteError(JobFailedError):
    """A file cannot be written: the disk is full, or the folder is shut or gone."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        """Say which file, why, and what to do."""
        super().__init__(
            f"cannot write {path} ({error.strerror or error}): make room there, or name another "
            "folder with --results-dir"
        )


class NotFiniteError(WorkloadError):
    """A model's outputs are NaN or infinite, so that no figure of theirs means anything."""

    exit_code = EXIT_NOT_FINITE
    cause = "not_finite"


class DivergedError(NotFiniteError):
    """A training's loss became NaN or infinite."""

    cause = "diverged"


class DamagedFileError(WorkloadError):
    """A file is torn or altered; the message names it."""

    exit_code = EXIT_DAMAGED_FILE
    cause = "damaged_file"


class UnreadableImageError(DamagedFileError):
    """An image of a dataset cannot be decoded; the message names it."""

    cause = "unreadable_image"


class OutOfGpuMemoryError(WorkloadError):
    """Memory ran out, here or in a process that a workload had started.

    Attributes:
        memory: The memory picture (see ``memory_picture``), None where nobody took one.
    """

    exit_code = EXIT_OUT_OF_MEMORY
    cause = "out_of_memory"

    def __init__(self, message: str, memory: dict | None = None) -> None:
        """Say ``message``, which stands for itself, and keep the picture."""
        super().__init__(message)
        self.memory = memory


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
