"""Result files and the summary on the terminal."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from workloads.common.errors import CannotWriteError, UsageError
from workloads.common.whole_files import written_whole

SCHEMA_VERSION = 1


def require_writable(folder: Path) -> None:
    """Make sure that ``folder`` exists and takes new files.

    Raises:
        UsageError: It does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder} ({error.strerror}); name a writable folder with "
            "--results-dir"
        ) from error


def write_json_atomic(path: Path, content: dict) -> None:
    """Write ``content`` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        CannotWriteError: The disk is full, or the folder is shut or gone by now.
    """
    try:
        with written_whole(path, "t") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise CannotWriteError(path, error) from error


def write_result(results_dir: Path, name: str, payload: dict) -> Path:
    """Write one result file ``<name>_<local time>_<pid>.json`` and return its path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = results_dir / f"{name}_{stamp}_{os.getpid()}.json"
    write_json_atomic(path, {"schema_version": SCHEMA_VERSION, "workload": name, **payload})
    return path


def print_summary(title: str, rows: Sequence[tuple[str, str]], warnings: Sequence[str]) -> None:
    """Print ``rows`` (label, text) under ``title`` on standard output, warnings last."""
    width = max((len(label) for label, _ in rows), default=0)
    print(f"\n{title}\n{'-' * len(title)}")
    for label, text in rows:
        print(f"{label:<{width}}  {text}")
    for warning in warnings:
        print(f"NOTE: {warning}")
    print(flush=True)
