"""A card's setting for as long as one value is measured, by the scripts of gpu-configs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "gpu-configs"


class CardError(Exception):
    """A setting was not put in force, or not taken back; the message names the fix."""


@contextlib.contextmanager
def setting(setup: Sequence[str], undo: str, gpu: str) -> Iterator[None]:
    """Put a setting in force inside the block and take it back after it, whatever happens.

    `setup` is a script of `gpu-configs` with its arguments, `undo` a script, `gpu` the card's UUID.

    Raises:
        CardError: The setting could not be made (the script has put everything back), or not be
            taken back.
    """
    _run([*setup, "--gpu", gpu])
    try:
        yield
    finally:
        _run([undo, "--gpu", gpu])


def _run(words: Sequence[str]) -> None:
    """Run a script to its end: in a session of its own Ctrl-C does not reach it."""
    command = [*_as_root(), str(SCRIPTS / words[0]), *words[1:]]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        start_new_session=True,
    )  # fmt: skip
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        reason = (errors or said or [f"exit code {done.returncode}"])[-1]
        raise CardError(f"{words[0]}: {reason}")


def _as_root() -> list[str]:
    """What runs a script as root; where sudo asks for a password the script itself says so."""
    asks = ["sudo", "-n", "true"]
    if os.geteuid() == 0 or shutil.which("sudo") is None:
        return []
    done = subprocess.run(asks, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return asks[:2] if done.returncode == 0 else []
