#!/usr/bin/env python3
"""Run real jobs side by side on one GPU under a sharing mode; its flags are in suite/flags.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.command_line.driver_words import tell_driver
from benchmarking.suite.session import run_suite
from benchmarking.suite.stop_signal import DRIVER_VARIABLE, StopSignal, end_with_driver


def main() -> int:
    """Run the suite as the command line says; return the exit code."""
    # The three lines about a driver go once drivers call run_suite themselves.
    is_driven = DRIVER_VARIABLE in os.environ
    with StopSignal().watching() as stop:
        end_with_driver(os.environ)
        result = run_suite(sys.argv[1:], stop, from_driver=is_driven)
    tell_driver(result.reason or "")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
