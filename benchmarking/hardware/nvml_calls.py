"""Calls of NVML (``libnvidia-ml.so.1``, which comes with the driver), by ``pynvml`` (nvidia-ml-py).

The only module that imports it; nvml.py knows what the answers mean.
"""

from __future__ import annotations

from typing import Any

try:
    import pynvml
except ImportError:
    pynvml = None

# What to do about an NVML error, by nvmlReturn_t (nvml.h).
NOT_FOUND, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 6, 9, 12
ADVICE = {
    4: "let this account open /dev/nvidia*, in a container with --gpus all",  # no permission
    DRIVER_NOT_LOADED: "load the driver: sudo modprobe nvidia",
    15: "the GPU has left the bus: look for Xid in the kernel's log, and restart",
    16: "the GPU has to be reset: see nvidia-smi --gpu-reset, or restart",
    18: "the driver was upgraded while the old one runs: restart",
}
# These are no failures: NVML was not initialized, which is said already; an argument that does not
# fit (a plain GPU asked as a MIG instance); not supported, not found, no such function.
NO_FAILURES = frozenset((1, 2, 3, NOT_FOUND, 13))

# Each function of NVML's that has failed so far, with NVML's message. What the driver, the GPU or
# pynvml does not offer is no failure.
failures: dict[str, str] = {}


class CallError(Exception):
    """A call that failed: NVML's message, with what to do about it where that is known.

    ``code`` is nvmlReturn_t, None where it was not NVML that failed.
    """

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(f"{message} ({ADVICE[code]})" if code in ADVICE else message)
        self.code = code


def call(function: str, *arguments: Any) -> Any:
    """Call one function of pynvml; whatever goes wrong is a ``CallError``."""
    callee = getattr(pynvml, function, None)
    if callee is None or None in arguments:
        raise CallError("there is no such function, or no GPU", NOT_FOUND)
    try:
        return callee(*arguments)
    # Besides its own errors pynvml raises what ctypes and decoding raise: a name that is no UTF-8,
    # a structure of another version, a library that is not the driver's.
    except Exception as error:
        code = getattr(error, "value", None)
        try:
            message = str(error)
        except Exception:  # asks the driver for the message of an error that pynvml does not know
            message = f"error {code} without a readable message"
        raise CallError(message, code) from None


def ask(functions: str | tuple[str, ...], *arguments: Any) -> Any:
    """Return what a function of pynvml answers; None when driver, GPU or pynvml cannot answer.

    Of several functions, which came one after another in NVML's history, the first answer counts.
    """
    for function in (functions,) if isinstance(functions, str) else functions:
        try:
            return call(function, *arguments)
        except CallError as error:
            if error.code not in NO_FAILURES:
                failures.setdefault(function, str(error))
    return None
