#!/usr/bin/env python3
"""Measure what the card can do at most: copy bandwidth and bf16 matrix rate, as JSON.

    python3 benchmarking/hardware/card_rates.py

A copy within the device's memory (bytes read and bytes written both count) and a product of two
8192 x 8192 matrices in bf16, each timed by CUDA events ten times; the best of each counts, since
a floor is what the card can do. It takes about a second on the GPU, which should be idle.

Exit codes: 0, 2 usage, 3 no GPU that PyTorch can use.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarking.cli import EXIT_NO_GPU, OneLineParser

REPEATS = 10
WARM_UP_REPEATS = 3
MATRIX_SIZE = 8192
LARGEST_COPY_BYTES = 2**31


def main() -> int:
    """Measure and print; return the exit code."""
    parser = OneLineParser(
        description="Measure a GPU's copy bandwidth and bf16 matrix rate, as JSON."
    )
    parser.add_argument("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    arguments = parser.parse_args()
    if arguments.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpu
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    rates = measure_rates()
    if rates is None:
        print("card_rates.py: error: PyTorch sees no GPU to measure", file=sys.stderr)
        return EXIT_NO_GPU
    print(json.dumps(rates))
    return 0


def measure_rates() -> dict[str, Any] | None:
    """Return the rates of the first visible GPU; None where PyTorch sees none.

    Returns:
        ``gpu_name``, ``copy_bytes_per_second``, ``matrix_operations_per_second`` (a
        multiplication and an addition are two), ``copy_bytes`` and ``matrix_size``.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free_bytes, _ = torch.cuda.mem_get_info()
    # Far above the cache in any case, and never more than the card has to spare.
    count = min(LARGEST_COPY_BYTES, free_bytes // 8)
    source = torch.ones(count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: target.copy_(source))
    # Random numbers: a card draws less power for zeros, and is faster than on real data.
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(left)
    matrix_seconds = _best_seconds(lambda: torch.matmul(left, right, out=product))
    return {
        "gpu_name": torch.cuda.get_device_name(),
        "copy_bytes_per_second": 2 * count / copy_seconds,
        "matrix_operations_per_second": 2 * MATRIX_SIZE**3 / matrix_seconds,
        "copy_bytes": count,
        "matrix_size": MATRIX_SIZE,
    }


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time on the device that ``work`` took."""
    import torch

    for _ in range(WARM_UP_REPEATS):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)) / 1e3


if __name__ == "__main__":
    sys.exit(main())
