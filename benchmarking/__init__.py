"""Launches workloads as subprocesses, records them, analyzes the records."""

from __future__ import annotations

import codecs
import io
import os
import sys
from types import TracebackType

# Of the project, in every new manifest; CHANGELOG.md and CITATION.cff say the same.
PROJECT_VERSION = "2.0.0"


def _name_missing_package(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Say in one sentence that a package is not installed; show anything else as usual."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        print(
            f"error: the Python package {error.name.split('.')[0]} is missing here: source "
            ".venv/bin/activate, which ./run_experiments.sh makes on first use, or pip install -r "
            "requirements.txt",
            file=sys.stderr,
        )
    elif not issubclass(kind, KeyboardInterrupt):  # a Ctrl-C says nothing new in a traceback
        sys.__excepthook__(kind, error, traceback)


# Which standard streams were closed when the program was started.
closed_streams: set[str] = set()


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what a stream's encoding lacks: a path's bytes as they are, a letter by its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _repair_streams() -> None:
    """Open standard streams that were closed, and let no letter fail that standard output lacks.

    A file that was opened in the place of a closed one would get what is meant for people.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            closed_streams.add(name)
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # else a test captures it
        codecs.register_error("readable", _readable)
        sys.stdout.reconfigure(errors="readable")


# Here, since every script imports this package before anything that may be missing.
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _name_missing_package
_repair_streams()
