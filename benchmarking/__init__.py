"""Launches workloads as subprocesses, records them, analyzes the records."""

from __future__ import annotations

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
    else:
        sys.__excepthook__(kind, error, traceback)


# Here, since every script imports this package before anything that may be missing.
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _name_missing_package
