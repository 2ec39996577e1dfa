"""Imports a library without optional packages that only other parts of it need."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def packages_hidden(*names: str) -> Iterator[None]:
    """Make packages that are not imported yet look as if they were not installed.

    ``None`` in ``sys.modules`` makes an import fail with ModuleNotFoundError (The Python Language
    Reference, 5.3.1), and ``importlib.util.find_spec`` find nothing. Afterwards they can be
    imported again. Modules imported inside keep what they concluded.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
