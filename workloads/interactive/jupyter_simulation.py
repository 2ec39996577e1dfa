#!/usr/bin/env python3
"""Experiment 6: a notebook session, bursts of GPU work between pauses for thought.

    Matrix -> Idle -> Preprocess -> Idle -> Train -> Idle -> Inference -> Idle -> Matrix -> ...

One cell repeats its documented operation, because on a fast GPU a single one takes milliseconds
and the session would be nothing but idle. The repeats are calibrated once, alone, so that a cell
lasts --burst-seconds; the result shows them as `cell_repeats`, and --cell-repeats makes them fixed
work for later runs. The time of each documented operation is recorded too.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.device import ComputeDevice, open_device
from workloads.common.engine import Pacer, prepare_step, step_pool
from workloads.inference.models import load_inference_model, resolve_model_flags, weights_notes
from workloads.interactive import notebook_operations as operations

WORKFLOW = ("matrix", "preprocess", "train", "inference")
INFERENCE_MODEL = "resnet18"
# Eleven cells of this length and ten pauses of 3.5 s on average: 70 s, half of them active.
GPU_BURST_SECONDS = 3.2
CALIBRATION_SECONDS = 0.5
MOST_START_DELAY_SECONDS = 3.0

SIZES = {
    "matrix_size": "rows and columns of the matrices: 1000-2000",
    "matrix_iterations": "multiplications: 100",
    "preprocess_iterations": "normalizations and interpolations: 30-50",
    "train_epochs": "epochs of the small network: 5-10",
    "inference_images": "images for ResNet18: 50-100",
    "image_size": "their height and width: 224",
}

EPILOG = """examples:
  jupyter_simulation.py --num-operations 11
  jupyter_simulation.py --cell-repeats matrix=2100,preprocess=1500,train=600,inference=1300
"""


class Cell(NamedTuple):
    """One cell of the session and the pause after it."""

    kind: str
    idle_after_seconds: float


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = cli.workload_parser("Simulate an interactive notebook session.", EPILOG)
    flag = cli.flags(parser, "the session")
    flag("--num-operations", 11, "cells to run", metavar="N")
    flag(
        "--burst-seconds", None,
        "how long a cell shall last alone; its repeats are calibrated once (default: "
        f"{GPU_BURST_SECONDS} on a GPU; on the CPU every operation runs once)",
        type=cli.positive_float, metavar="S",
    )  # fmt: skip
    repeats = "repeats a cell of each kind instead of calibrating"
    flag("--cell-repeats", None, repeats, type=cell_repeats, metavar="KIND=N,...")
    seconds = functools.partial(flag, type=cli.non_negative_float, metavar="S")
    seconds("--idle-min", 2.0, "shortest pause")
    seconds("--idle-max", 5.0, "longest pause")
    flag = cli.flags(parser, "the operations (drawn from the guide's ranges by --seed)")
    for name, guide in SIZES.items():
        flag(f"--{name.replace('_', '-')}", None, guide, type=cli.positive_int, metavar="N")
    weights = "ResNet18's weights; auto: ImageNet, else random with a warning"
    flag("--weights", "auto", weights, metavar="auto|imagenet|none|FILE")
    args = parser.parse_args()
    if args.idle_min > args.idle_max:
        parser.error("--idle-min is more than --idle-max; give a smaller --idle-min")
    missing = set(WORKFLOW[: args.num_operations]) - set(args.cell_repeats or WORKFLOW)
    if missing:
        parser.error(f"--cell-repeats lacks {', '.join(sorted(missing))}; add KIND=N for each")
    return args


def cell_repeats(text: str) -> dict[str, int]:
    """Parse ``matrix=100,preprocess=50,train=20,inference=40``; the type of ``--cell-repeats``."""
    repeats = {}
    for part in text.split(","):
        kind, _, number = part.strip().partition("=")
        if kind not in WORKFLOW or kind in repeats:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not KIND=N with KIND one of {', '.join(WORKFLOW)}, each once"
            )
        repeats[kind] = int(cli.positive_int(number))
    return repeats


def plan_session(
    num_operations: int, idle_min: float, idle_max: float, seed: int, client_index: int = 0
) -> list[Cell]:
    """Return the cells in the guide's order; pauses come from the seed, none after the last.

    Another client runs the same cells, beginning ``client_index`` cells later in the list, between
    the same pauses in another order: the same work, at other times.
    """
    generator = random.Random(seed)
    pauses = [generator.uniform(idle_min, idle_max) for _ in range(num_operations - 1)]
    kinds = [WORKFLOW[index % len(WORKFLOW)] for index in range(num_operations)]
    if client_index:
        random.Random(seed + client_index).shuffle(pauses)
        first = client_index % num_operations
        kinds = kinds[first:] + kinds[:first]
    return [Cell(kind, pause) for kind, pause in zip(kinds, [*pauses, 0.0], strict=True)]


def start_delay(idle_min: float, idle_max: float, seed: int, client_index: int) -> float:
    """Return how much later than the first client this one begins, in seconds.

    Whoever begins with a cell at the same moment stays almost in step for several cells. Anything
    up to two mean pauses, which is about one cell and its pause, but within the time after ``go``
    that the suite does not count.
    """
    if not client_index:
        return 0.0
    most = min(MOST_START_DELAY_SECONDS, idle_min + idle_max)
    return random.Random(seed + client_index).uniform(0, most)


class JupyterSimulation(client.Workload):
    """The session: cells of fixed work, pauses of fixed length; a unit is one cell."""

    name = "jupyter_simulation"
    title = "Jupyter session"
    device: ComputeDevice
    finished: Sequence[dict] = ()

    def load(self) -> None:
        """Open the device, plan the session, load ResNet18 if the session comes to it."""
        args = self.args
        self.device = open_device(args)
        pauses = (args.idle_min, args.idle_max, args.seed, args.client_index)
        self.cells = plan_session(args.num_operations, *pauses)
        self.start_delay_seconds = start_delay(*pauses)
        self.kinds = WORKFLOW[: args.num_operations]
        self.sizes = operations.draw_sizes(args.seed, **{name: vars(args)[name] for name in SIZES})
        self.burst_seconds = args.burst_seconds
        if args.burst_seconds is None and self.device.is_cuda:
            self.burst_seconds = GPU_BURST_SECONDS
        if args.cell_repeats is not None:
            self.burst_seconds = None
        self.model = self.weights = None
        if "inference" in self.kinds:
            self.model, self.weights = load_inference_model(
                self.device, INFERENCE_MODEL, args.weights, args.seed
            )
            self.warnings += weights_notes(INFERENCE_MODEL, args.weights, self.weights.kind)

    def warm_up(self) -> None:
        """Prepare each operation, settle how often a cell repeats it, and run each kind once."""
        make = {
            "matrix": operations.matrix_operation,
            "preprocess": operations.preprocess_operation,
            "train": operations.train_operation,
        }
        work = (self.device, self.sizes, self.args.seed)
        pool = step_pool(self.device)
        self.operations: dict[str, Callable[[], object]] = {
            kind: prepare_step(self.device, make[kind](*work), pool=pool)
            for kind in self.kinds
            if kind in make
        }
        if self.model is not None:
            self.operations["inference"] = operations.inference_operation(*work, self.model)
        self.repeats = {kind: self._settle_repeats(kind) for kind in self.kinds}
        self.device.synchronize()

    def _settle_repeats(self, kind: str) -> int:
        """Return how often a cell repeats its operation; runs it, as a cell would, on the way.

        To calibrate, the operation runs alone for a while; otherwise once.
        """
        for_seconds = CALIBRATION_SECONDS if self.burst_seconds else 0.0
        pacer = Pacer(self.device, client.Recorder())
        start_seconds = time.monotonic()
        count = 0
        while not count or time.monotonic() - start_seconds < for_seconds:
            pacer.run(kind, self.operations[kind])
            count += 1
        pacer.drain()
        seconds_an_operation = (time.monotonic() - start_seconds) / count
        if self.args.cell_repeats is not None:
            return self.args.cell_repeats[kind]
        return max(1, round((self.burst_seconds or 0.0) / seconds_an_operation))

    def run_job(self, recorder: client.Recorder) -> dict:
        """Run the session once and return what the guide measures."""
        self.finished = []
        self.operation_seconds: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        self.session_start_seconds = time.monotonic()
        with console.progress(len(self.cells), "session") as progress:
            for number, cell in enumerate(self.cells, 1):
                self._run_cell(cell, recorder)
                progress.advance(detail=cell.kind)
                seconds = self.finished[-1]["duration_seconds"]
                self.tell(f"cell {number}/{len(self.cells)}: {cell.kind}, {seconds:.2f} s")
                if cell.idle_after_seconds:
                    start_seconds = time.monotonic()
                    try:
                        recorder.wait_for_stop(cell.idle_after_seconds)
                    finally:  # a session may be interrupted in its pause, which has been one
                        idle_seconds = time.monotonic() - start_seconds
                        self.finished[-1]["idle_after_seconds"] = idle_seconds
                    recorder.check_stop()
        return self.partial_figures() or {}

    def _run_cell(self, cell: Cell, recorder: client.Recorder) -> None:
        times = client.StepTimes(recorder)
        started_at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        start_seconds = time.monotonic()
        pacer = Pacer(self.device, times)
        try:
            for _ in range(self.repeats[cell.kind]):
                pacer.run(cell.kind, self.operations[cell.kind])
        except client.StopRequested:
            recorder.write("unfinished", kind=cell.kind, latency=True, start_seconds=start_seconds)
            raise
        # A cell ends when its result is there.
        pacer.drain()
        end_seconds = time.monotonic()
        recorder.unit(cell.kind, start_seconds, end_seconds, latency=True)
        recorder.flush()
        self.operation_seconds[cell.kind] += times.seconds
        finished = {
            "index": len(self.finished),
            "kind": cell.kind,
            "started_at": started_at,
            "start_offset_seconds": start_seconds - self.session_start_seconds,
            "duration_seconds": end_seconds - start_seconds,
            "idle_after_seconds": 0.0,
        }
        self.finished = [*self.finished, finished]

    def partial_figures(self) -> dict | None:
        """Return the figures of the finished cells."""
        if not self.finished:
            return None
        session_seconds = time.monotonic() - self.session_start_seconds

        import numpy as np

        active_seconds = sum(cell["duration_seconds"] for cell in self.finished)
        idle_seconds = sum(cell["idle_after_seconds"] for cell in self.finished)
        # Time in cells is GPU time only where nobody shares the GPU.
        is_alone = self.device.is_cuda and not self.args.hold
        return {
            "operations": list(self.finished),
            "operation_seconds": {
                kind: {
                    "count": len(durations),
                    "mean_seconds": float(np.mean(durations)),
                    "p50_seconds": float(np.percentile(durations, 50)),
                    "p95_seconds": float(np.percentile(durations, 95)),
                }
                for kind, durations in self.operation_seconds.items()
                if durations
            },
            "active_seconds": active_seconds,
            "idle_seconds": idle_seconds,
            "session_seconds": session_seconds,
            "active_percent": 100 * active_seconds / session_seconds,
            "idle_percent": 100 * idle_seconds / session_seconds,
            "gpu_active_seconds": active_seconds if is_alone else None,
            "cell_repeats": ",".join(f"{kind}={n}" for kind, n in self.repeats.items()),
        }

    def settings(self) -> dict:
        """Return what the session was run with."""
        args = self.args
        return {
            "num_operations": args.num_operations,
            "burst_seconds": self.burst_seconds,
            "cell_repeats": dict(self.repeats),
            "idle_min_seconds": args.idle_min,
            "idle_max_seconds": args.idle_max,
            **vars(self.sizes),
            "inference_model": INFERENCE_MODEL if self.weights else None,
            "weights": self.weights.kind if self.weights else None,
            "seed": args.seed,
            "engine": self.device.engine,
            "precision": self.device.precision,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the terminal summary, a cell a line."""
        rows = [
            (f"{cell['start_offset_seconds']:6.1f} s  {cell['kind']}",
             f"{cell['duration_seconds']:.2f} s, then {cell['idle_after_seconds']:.1f} s idle")
            for cell in figures["operations"]
        ]  # fmt: skip
        for kind, seconds in figures["operation_seconds"].items():
            mean, p50, p95 = (1e3 * seconds[f"{name}_seconds"] for name in ("mean", "p50", "p95"))
            times = f"mean {mean:.2f} ms, P50 {p50:.2f} ms, P95 {p95:.2f} ms"
            rows.append((f"One {kind} operation", f"{times} ({self.repeats[kind]} a cell)"))
        active = "GPU active time" if self.device.is_cuda else "Active time"
        return [
            *rows,
            (active, f"{figures['active_seconds']:.1f} s ({figures['active_percent']:.0f} %)"),
            ("Idle time", f"{figures['idle_seconds']:.1f} s ({figures['idle_percent']:.0f} %)"),
            ("Session", f"{figures['session_seconds']:.1f} s"),
            ("Same work again", f"--cell-repeats {figures['cell_repeats']}"),
        ]

    def resolve(self) -> list[str]:
        """Find or download ResNet18's weights once."""
        arguments, self.warnings = resolve_model_flags(INFERENCE_MODEL, self.args.weights)
        return arguments


if __name__ == "__main__":
    cli.run_main(client.main_of(JupyterSimulation, parse_arguments))
