"""A run that a driver script has started ends when that script dies, however that comes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

# Set by the drivers to their own pid.
DRIVER_VARIABLE = "GPU_SHARING_DRIVER_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_driver(environment: Mapping[str, str]) -> None:
    """Ask the kernel for a SIGTERM when the driver script dies that started this process.

    Without one, or where the variable was only inherited, nothing is asked for. To be called once
    SIGTERM ends a run in an orderly way.
    """
    driver = environment.get(DRIVER_VARIABLE, "")
    if not driver.isdecimal() or os.getppid() != int(driver):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(driver):  # it died just before
        os.kill(os.getpid(), signal.SIGTERM)
