"""The optional key of the inference server: how both sides get it, and the check.

It travels as ``Authorization: Bearer KEY`` (RFC 6750). A flag shows in the list of processes, so
the environment variable is the better place; neither gets into a result file.
"""

from __future__ import annotations

import argparse
import hmac
import os
import re
import sys
from collections.abc import Callable

VARIABLE = "INFERENCE_API_KEY"
# What RFC 6750 (2.1) calls b64token; nothing in it can end a header.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]{8,512}=*")


def add_flag(flag: Callable[..., None], what: str) -> None:
    """Add ``--api-key`` by ``flag`` of ``cli.flags``; ``what`` says what the key does here."""
    text = f"{what}; better given by {VARIABLE}, since flags show in the list of processes"
    flag("--api-key", None, text, type=_key, metavar="KEY")


def take(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in ``args.api_key`` from the environment, and hide it in this process's arguments."""
    if args.api_key is None and os.environ.get(VARIABLE):
        try:
            args.api_key = _key(os.environ[VARIABLE])
        except argparse.ArgumentTypeError as error:
            parser.error(f"{VARIABLE}: {error}")
    if args.api_key is not None:
        sys.argv[:] = [word.replace(args.api_key, "(hidden)") for word in sys.argv]


def admits(key: str | None, authorization: str) -> bool:
    """Return whether a request with this ``Authorization`` header may pass; in constant time."""
    if key is None:
        return True
    scheme, _, given = authorization.partition(" ")
    is_equal = hmac.compare_digest(given.strip().encode("latin-1"), key.encode("ascii"))
    return is_equal and scheme.lower() == "bearer"


def headers(key: str | None) -> dict[str, str]:
    """Return the header that carries the key, none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def _key(text: str) -> str:
    """Argument type: a key that a header can carry; its text is in no message."""
    if not _KEY.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "a key has 8 to 512 letters, digits and . _ ~ + / - (such as openssl rand -hex 16)"
        )
    return text
