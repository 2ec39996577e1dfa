"""What the programs of this folder share with their users: exit codes, errors, argument types.

Imports nothing of the project, so that every program may use it at no cost.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from benchmarking.records.types import RunOutcome

PROJECT_ROOT = Path(__file__).resolve().parents[1]
EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_NO_GPU = 0, 1, 2, 3
MOST_COUNTED = 9999
EXIT_MODE_NOT_IN_FORCE, EXIT_INVALID, EXIT_INTERRUPTED = 4, 5, 130


class SuiteError(Exception):
    """The run cannot be done as asked; the message names the fix."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        """Keep the message and the exit code that belongs to it."""
        super().__init__(message)
        self.exit_code = exit_code


class RunEnded(Exception):
    """The run ends early, with an outcome for the manifest and an exit code."""

    def __init__(self, outcome: RunOutcome, exit_code: int, reason: str | None = None) -> None:
        """Keep what becomes of the run, and why in words."""
        super().__init__(reason or outcome)
        self.outcome = outcome
        self.exit_code = exit_code
        self.reason = reason


class SuiteEnd(NamedTuple):
    """How a run of the suite ended: its exit code, and the last sentence of what it said."""

    exit_code: int
    reason: str | None


class UsageExit(SystemExit):
    """The command line makes no sense; ends the program unless a caller in-process catches it."""

    def __init__(self, sentence: str) -> None:
        """Keep the sentence that was printed."""
        super().__init__(EXIT_USAGE)
        self.sentence = sentence


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence instead of a usage dump.

    A text or path that is empty is one of them: most likely a variable that was never set.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take what `argparse.ArgumentParser` takes; flags are written out."""
        super().__init__(*arguments, **{**named, "allow_abbrev": False})
        self.register("type", None, some_text)
        self.register("type", Path, lambda text: Path(some_text(text)))

    def error(self, message: str) -> NoReturn:
        """Print `message` and raise `UsageExit`, which leaves with exit code 2."""
        sentence = f"{message} (see {self.prog} --help)"
        print(f"{self.prog}: error: {sentence}", file=sys.stderr)
        raise UsageExit(sentence)


def present_folder() -> Path:
    """Return the folder that this was started in, for what needs it; ends where it is gone."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        sentence = "the folder that this was started in is gone: change to one that is there"
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        raise UsageExit(sentence) from None


def some_text(text: str) -> str:
    """Argument type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a value, or leave it out")
    return text


def drop_output() -> None:
    """Give up standard output where nobody reads it or it is full: Python flushes once more."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_dead_terminal(log: str) -> None:
    """Exchange a closed terminal, or a pipe whose reader has ended, for the end of a file.

    Programs that are called later fail where they cannot write.
    """
    dead = [stream for stream in (1, 2) if _is_dead(stream)]
    if not dead:
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        file = os.open(log, flags, 0o600)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for stream in dead:
        os.dup2(file, stream)
    os.close(file)


def _is_dead(stream: int) -> bool:
    """Whether nobody can read any more what is written to a terminal or a pipe."""
    poll = select.poll()
    poll.register(stream, 0)
    gone = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return any(event & gone for _, event in poll.poll(0))


def positive_int(text: str) -> int:
    """Argument type: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def non_negative_int(text: str) -> int:
    """Argument type: a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive_float(text: str) -> float:
    """Argument type: a number above 0."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def non_negative_float(text: str) -> float:
    """Argument type: a number of 0 or more."""
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return float(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def count(text: str) -> int:
    """Argument type: as many clients or repeats as some machine could run."""
    if positive_int(text) > MOST_COUNTED:
        raise argparse.ArgumentTypeError(f"{text!r} is too many: {MOST_COUNTED} at most")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Argument type: counts of clients, each once, rising, with commas between them."""
    values = tuple(count(part.strip()) for part in text.split(","))
    if list(values) != sorted(set(values)):
        raise argparse.ArgumentTypeError(f"{text!r}: give each count once, the smallest first")
    return values
