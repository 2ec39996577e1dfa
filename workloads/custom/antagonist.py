#!/usr/bin/env python3
"""A neighbor that presses one resource of the card, for a set share of the time.

    python3 workloads/custom/antagonist.py --kind hbm --duty 1
    python3 workloads/custom/antagonist.py --kind sm --duty 0.5

    hbm     copies within the card's memory
    sm      multiplies large matrices
    pcie    copies from page-locked host memory to the card

Every launch takes about half a millisecond alone and is waited for before the next one: launches
that queue up behind each other would keep the card busy whatever the duty says. After each launch
the process idles until its busy time is the asked share of all time, so next to others, where a
launch takes longer, it idles longer too. What share was reached, and at which rate, is in the
result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console, torch
from workloads.common.device import ComputeDevice, open_device
from workloads.common.errors import UsageError

# Unit and scale of what a launch moves or computes a second.
RATES = {"hbm": ("GB/s", 1e9), "sm": ("TFLOP/s", 1e12), "pcie": ("GB/s", 1e9)}
# A launch of a fixed size is over in microseconds on one card and not on another: sizes (bytes, or
# rows of a square matrix) are doubled until one takes about so long, to the largest.
LAUNCH_SECONDS = 0.5e-3
SIZES = {
    "cuda": {"hbm": (2**26, 2**31), "sm": (8192, 16_384), "pcie": (2**24, 2**28)},
    "cpu": {"hbm": (2**20, 2**26), "sm": (256, 1024)},
}
WARM_UP_LAUNCHES = 20


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser("Press one resource of the card for a share of the time.")
    flag = cli.flags(parser, "the job")
    flag("--kind", None, "the resource", choices=tuple(RATES), required=True)
    flag("--duty", 1.0, "share of the time in which it is pressed", type=_share, metavar="0..1")
    flag("--duration", 10.0, "seconds of one job", metavar="S")
    return parser.parse_args()


def _share(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    value = cli.non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


class Antagonist(client.Workload):
    """Presses one resource; a unit of work is one launch."""

    name = "antagonist"
    title = "Antagonist"
    device: ComputeDevice

    def load(self) -> None:
        """Allocate what a launch works on."""
        self.device = open_device(self.args)
        if self.args.kind == "pcie" and not self.device.is_cuda:
            raise UsageError("--kind pcie needs a GPU: there is no bus to a CPU")

    def warm_up(self) -> None:
        """Find the size of a launch that takes about half a millisecond."""
        kind = self.args.kind
        prepare = {"hbm": self._copy, "sm": self._multiply, "pcie": self._copy_from_host}[kind]
        size, largest = SIZES[self.device.torch_device.type][kind]
        while True:
            self._launch, self._amount = prepare(size)
            self._alone_seconds = min(self._timed()[1] for _ in range(WARM_UP_LAUNCHES))
            if self._alone_seconds >= LAUNCH_SECONDS or size >= largest:
                break
            size *= 2

    def _copy(self, size: int) -> tuple[Callable[[], object], float]:
        source = torch.zeros(size, dtype=torch.uint8, device=self.device.torch_device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * size  # read and written

    def _copy_from_host(self, size: int) -> tuple[Callable[[], object], float]:
        source = torch.zeros(size, dtype=torch.uint8).pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device=self.device.torch_device)
        return lambda: target.copy_(source, non_blocking=True), float(size)

    def _multiply(self, size: int) -> tuple[Callable[[], object], float]:
        # Zeros and ones flip few bits: with random numbers an H200 ran into its power limit and
        # did 607 of the 813 TFLOP/s of its best moment, so it does 691 of 796.
        device, dtype = self.device.torch_device, self.device.model_dtype
        a, b = (torch.randint(2, (size, size), device=device, dtype=dtype) for _ in range(2))
        result = torch.empty_like(a)
        return lambda: torch.matmul(a, b, out=result), 2.0 * size**3

    def _timed(self) -> tuple[float, float]:
        """Launch once and wait; return start (CLOCK_MONOTONIC) and seconds."""
        start_seconds = time.monotonic()
        self._launch()
        self.device.synchronize()
        return start_seconds, time.monotonic() - start_seconds

    def run_job(self, recorder: client.Recorder) -> dict:
        """Press the resource for a while and return how much of the time that was."""
        args = self.args
        begin_seconds = time.monotonic()
        end_seconds = begin_seconds + args.duration
        busy_seconds, launches = 0.0, 0
        with console.progress(int(args.duration), "seconds") as bar:
            shown = 0
            while (now := time.monotonic()) < end_seconds:
                recorder.check_stop()
                bar.advance(int(now - begin_seconds) - shown)
                shown = int(now - begin_seconds)
                if args.duty == 0:
                    recorder.wait_for_stop(min(0.1, end_seconds - now))
                    continue
                start_seconds, seconds = self._timed()
                recorder.unit("launch", start_seconds, start_seconds + seconds)
                busy_seconds += seconds
                launches += 1
                next_seconds = min(begin_seconds + busy_seconds / args.duty, end_seconds)
                if next_seconds > time.monotonic():
                    recorder.wait_for_stop(next_seconds - time.monotonic())
        elapsed_seconds = time.monotonic() - begin_seconds
        scale = RATES[args.kind][1]
        return {
            "achieved_duty_percent": 100 * busy_seconds / elapsed_seconds,
            "launches": launches,
            "rate": self._amount * launches / elapsed_seconds / scale,
            "rate_while_busy": self._amount * launches / busy_seconds / scale if launches else None,
            "rate_unit": RATES[args.kind][0],
            "elapsed_seconds": elapsed_seconds,
        }

    def settings(self) -> dict:
        """Return what was run."""
        args = self.args
        return {
            "kind": args.kind,
            "duty": args.duty,
            "duration_seconds": args.duration,
            "launch_seconds_alone": self._alone_seconds,
            "precision": self.device.precision,
            "seed": args.seed,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        busy = figures["rate_while_busy"]
        rows = [
            ("Presses", f"{self.args.kind}, asked for {100 * self.args.duty:.0f} % of the time"),
            ("Achieved duty", f"{figures['achieved_duty_percent']:.1f} %"),
            ("Rate", f"{figures['rate']:.1f} {figures['rate_unit']}"),
        ]
        if busy is not None:
            rows.append(("Rate while busy", f"{busy:.1f} {figures['rate_unit']}"))
        return rows


if __name__ == "__main__":
    cli.run_main(client.main_of(Antagonist, parse_arguments))
