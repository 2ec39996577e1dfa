#!/usr/bin/env python3
"""Run real jobs side by side on one GPU under a sharing mode; flags: planning/flags.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.suite.session import run_suite


def main() -> int:
    """Run the suite as the command line says; return the exit code."""
    return run_suite(sys.argv[1:]).exit_code


if __name__ == "__main__":
    sys.exit(main())
