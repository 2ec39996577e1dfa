"""The command line of a program that another one starts with open descriptors as its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def descriptors(arguments: Sequence[str], count: int, starter: str) -> list[int]:
    """Return the ``count`` open descriptors that a program was started with.

    Args:
        arguments: The program's arguments, without its name.
        count: How many there have to be.
        starter: The script that starts it, for whoever runs it by hand.

    Raises:
        SystemExit: They are not that; its sentence names ``starter``. Code 0 where help was asked
            for, else 2.
    """
    sentence = f"usage: python3 {starter}, which starts this program with open descriptors"
    if set(arguments) & {"-h", "--help"}:
        print(sentence)
        raise SystemExit(0)
    try:
        numbers = [int(argument) for argument in arguments]
        for number in numbers:
            os.fstat(number)
    except (ValueError, OverflowError, OSError):
        numbers = []
    if len(numbers) != count:
        print(sentence, file=sys.stderr)
        raise SystemExit(2)
    return numbers
