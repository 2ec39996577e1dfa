"""What the workload scripts share: flags, device, engine, data, results, client contract.

``torch`` is imported when it is first used: a script can name it at its top, and yet ``--help``
answers at once and ``device.open_device`` sets what CUDA reads at its start before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


class _ImportedLater:
    """Stands for a module until something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
else:
    torch = _ImportedLater("torch")
