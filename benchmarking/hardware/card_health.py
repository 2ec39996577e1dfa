#!/usr/bin/env python3
"""Look for 20 s how fast an idle card is, and what slows it down or has broken in it, as JSON.

    python3 benchmarking/hardware/card_health.py --gpu UUID

The copies and matrix products of `card_rates.py` again and again, and meanwhile clocks, power,
temperature and throttle reasons four times a second; the median of the rates counts, since a card
may be fast until it is warm. Power limits and ECC errors are nvidia-smi's, Xids the kernel log's,
which many machines show to root alone. What cannot be read is null, never 0.

Exit codes: 0, 2 usage, 3 no GPU that can be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarking.cli import EXIT_NO_GPU, OneLineParser, positive_float
from benchmarking.hardware import nvidia_tools, nvml
from benchmarking.hardware.card_rates import measure_rates

SECONDS = 20.0
SAMPLE_SECONDS = 0.25
# A field of nvidia-smi's -> its name in the answer.
FIELDS = {
    "pci.bus_id": "pci_bus_id",
    "power.limit": "power_limit_watts",
    "power.default_limit": "power_default_limit_watts",
    "clocks.max.sm": "sm_clock_max_mhz",
    "ecc.errors.corrected.volatile.total": "ecc_corrected_errors",
    "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected_errors",
}
BUS_ID, NUMBER = re.compile(r"[0-9A-F]+:[0-9A-F]+:[0-9A-F.]+"), re.compile(r"\d+(\.\d+)?")
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:]+)[^)]*\): (\d+)")


def main() -> int:
    """Look and print; return the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", required=True, metavar="UUID", help="which GPU")
    parser.add_argument("--seconds", type=positive_float, default=SECONDS, metavar="S",
                        help="how long to load it (default: 20)")  # fmt: skip
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpu
    reason = "PyTorch sees no GPU to measure"
    try:
        found = look(arguments.gpu, arguments.seconds, measure_rates)
    except (nvml.GpuNotFoundError, nvml.GpuUnusableError) as error:
        found, reason = None, str(error)
    if found is None:
        print(f"card_health.py: error: {reason}", file=sys.stderr)
        return EXIT_NO_GPU
    print(json.dumps(found))
    return 0


def look(
    gpu_uuid: str, seconds: float, measure: Callable[[], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Return the card's health, `None` where `measure`, as `measure_rates`, has no GPU."""
    rates: list[dict[str, Any]] = []
    with _sampled(gpu_uuid) as samples:
        end = time.monotonic() + seconds
        while not rates or time.monotonic() < end:
            rate = measure()
            if rate is None:
                return None
            rates.append(rate)
    settings = _settings(gpu_uuid)
    return {
        "seconds": seconds,
        "repeats": len(rates),
        "copy_bytes_per_second": _median(rates, "copy_bytes_per_second"),
        "matrix_operations_per_second": _median(rates, "matrix_operations_per_second"),
        "sm_clock_mhz": _median(samples, "sm_clock_mhz"),
        "power_draw_watts": _median(samples, "power_draw_watts"),
        "temperature_celsius_max": max(_known(samples, "temperature_celsius"), default=None),
        "throttle_reasons": _throttle_reasons(samples),
        **settings,
        "xids": _xids(settings["pci_bus_id"]),
    }


@contextlib.contextmanager
def _sampled(gpu_uuid: str) -> Iterator[list[dict[str, Any]]]:
    """Give a list to which the card's state is added as long as the block lasts."""
    samples: list[dict[str, Any]] = []
    over = threading.Event()
    gpu = nvml.open_gpu(gpu_uuid)

    def sample() -> None:
        while gpu is not None and not over.wait(SAMPLE_SECONDS):
            samples.append(gpu.read_state())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _known(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows if row[name] is not None]


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    known = _known(rows, name)
    return statistics.median(known) if known else None


def _throttle_reasons(samples: list[dict[str, Any]]) -> list[str] | None:
    """Return what lowered the clock at any time, but for having nothing to do."""
    known = _known(samples, "throttle_reasons")
    return sorted({name for names in known for name in names} - {"gpu_idle"}) if known else None


def _settings(gpu_uuid: str) -> dict[str, Any]:
    """Return what nvidia-smi says of the card, by the names of `FIELDS`.

    Asked one by one: an older nvidia-smi refuses all where it does not know one. Warnings of other
    cards may stand around an answer.
    """
    found: dict[str, Any] = {}
    for field, name in FIELDS.items():
        query = (f"--query-gpu={field}", "--format=csv,noheader,nounits")
        lines = nvidia_tools.ask("-i", gpu_uuid, *query)[0].splitlines()
        shape = BUS_ID if field == "pci.bus_id" else NUMBER
        answer = next(filter(shape.fullmatch, lines), None)
        found[name] = float(answer) if answer and shape is NUMBER else answer
    return found


def _xids(bus_id: str | None) -> list[int] | None:
    """Return the driver's error numbers of the card since the host started, where it tells them."""
    try:
        log = subprocess.run(
            ["dmesg"], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            errors="replace", check=True, timeout=nvidia_tools.QUESTION_SECONDS,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    # nvidia-smi: 00000000:18:00.0; the log: 0000:18:00
    return [int(number) for place, number in XID.findall(log)
            if bus_id and place.lower() in bus_id.lower()]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
