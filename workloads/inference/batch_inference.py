#!/usr/bin/env python3
"""Batch inference benchmark: latency and throughput of a classifier on random tensors.

    python3 workloads/inference/batch_inference.py --model resnet50 --batch-size 32

Each batch is one launch of the forward pass and a wait for its end, timed on the host: what a
caller waits for. The time on the device between two events and the copy of an input to the device
are reported apart. The input lies on the device beforehand; batch norm is folded into the
convolutions and the model cast once to the precision (see models.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console, torch
from workloads.common.device import ComputeDevice, clients_on_gpu, open_device
from workloads.common.engine import capture_forward
from workloads.common.results import sample_note, summarize_latency_ms
from workloads.inference.models import (
    add_model_flags,
    load_inference_model,
    require_finite,
    resolve_model_flags,
    weights_notes,
)

IMAGE_SHAPE = (3, 224, 224)
COPY_REPEATS = 10
WARM_UP_BATCHES = 5


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser("Measure latency and throughput of batch inference.")
    flag = cli.flags(parser, "the job")
    add_model_flags(flag)
    flag("--batch-size", 32, "images a batch")
    flag("--num-batches", 100, "batches to run")
    return parser.parse_args()


class BatchInference(client.Workload):
    """Runs a fixed number of batches, one after the other; a unit of work is one batch."""

    name = "batch_inference"
    title = "Batch inference"
    device: ComputeDevice

    def load(self) -> None:
        """Load the model and put one random batch on the device."""
        args = self.args
        self.device = open_device(args)
        self._model, self._weights = load_inference_model(
            self.device, args.model, args.weights, args.seed
        )
        self.warnings += weights_notes(args.model, args.weights, self._weights.kind)
        random = torch.Generator().manual_seed(args.seed)
        batch = torch.randn(args.batch_size, *IMAGE_SHAPE, generator=random)
        batch = batch.to(self.device.model_dtype, memory_format=torch.channels_last)
        self._host_batch = batch.pin_memory() if self.device.is_cuda else batch
        self._batch = batch.to(self.device.torch_device, copy=True)

    def warm_up(self) -> None:
        """Autotune, capture, and measure the copy of the input."""
        self._forward = capture_forward(self.device, lambda: self._model(self._batch))
        if self.device.is_cuda:
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(WARM_UP_BATCHES if self.device.is_cuda else 1):
            self._run_batch()
        # Each batch has the same input, so the same output.
        outputs = self._forward().float().cpu().numpy()
        require_finite(outputs, self.device, self.args.model, self._weights)
        repeats = COPY_REPEATS if self.device.is_cuda else 0
        self._copy_seconds = [self._copy_input() for _ in range(repeats)]

    def run_job(self, recorder: client.Recorder) -> dict:
        """Run all batches and return the figures."""
        args = self.args
        # Next to others the time between two events holds their slices too.
        has_own_device = self.device.is_cuda and clients_on_gpu() == 1
        latencies: list[float] = []
        device_seconds: list[float] = []
        with console.progress(args.num_batches, "batches") as bar:
            for _ in range(args.num_batches):
                recorder.check_stop()
                start_seconds, end_seconds = self._run_batch()
                recorder.unit("batch", start_seconds, end_seconds, latency=True)
                latencies.append(end_seconds - start_seconds)
                if has_own_device:
                    device_seconds.append(self._begin.elapsed_time(self._end) / 1e3)
                bar.advance()
        elapsed_seconds = sum(latencies)
        images = args.batch_size * args.num_batches
        return {
            **{f"latency_{name}": ms for name, ms in summarize_latency_ms(latencies).items()},
            "samples_per_second": images / elapsed_seconds,
            "batches": args.num_batches,
            "batch_size": args.batch_size,
            "images": images,
            "elapsed_seconds": elapsed_seconds,
            **{f"device_{name}": ms for name, ms in summarize_latency_ms(device_seconds).items()},
            "input_copy_median_ms": summarize_latency_ms(self._copy_seconds)["median_ms"],
        }

    def _run_batch(self) -> tuple[float, float]:
        """Return start and end on the host clock; on a GPU the events have its own."""
        start_seconds = time.monotonic()
        if not self.device.is_cuda:
            self._forward()
        else:
            self._begin.record()
            self._forward()
            self._end.record()
            self.device.synchronize()
        return start_seconds, time.monotonic()

    def _copy_input(self) -> float:
        start_seconds = time.monotonic()
        self._batch.copy_(self._host_batch, non_blocking=True)
        self.device.synchronize()
        return time.monotonic() - start_seconds

    def resolve(self) -> list[str]:
        """Find or download the weights."""
        arguments, self.warnings = resolve_model_flags(self.args.model, self.args.weights)
        return arguments

    def settings(self) -> dict:
        """Return what was run."""
        names = ("model", "batch_size", "num_batches", "seed")
        return {
            **{name: getattr(self.args, name) for name in names},
            "weights": self._weights.kind,
            "weights_source": self._weights.source,
            "image_shape": list(IMAGE_SHAPE),
            "engine": self.device.engine,
            "precision": self.device.precision,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""

        def ms(*names: str) -> str:
            return " / ".join(f"{figures[f'{name}_ms']:.2f}" for name in names) + " ms"

        rows = [
            ("Model", f"{self.args.model}, weights {self._weights.kind} ({self._weights.source})"),
            ("Batches", f"{figures['batches']} of {self.args.batch_size} images"),
            ("Latency a batch, mean", ms("latency_mean")),
            ("Median (P50)", ms("latency_median")),
            ("Min / max", ms("latency_min", "latency_max")),
            ("P95 / P99", f"{ms('latency_p95', 'latency_p99')} {sample_note(figures['batches'])}"),
            ("Throughput", f"{figures['samples_per_second']:.1f} samples/s"),
        ]  # fmt: skip
        if figures["latency_std_ms"] is not None:
            rows.insert(4, ("Standard deviation", ms("latency_std")))
        if figures["device_median_ms"] is not None:
            copy = f"{ms('input_copy_median')}, not part of the latency"
            rows += [("On the device, median", ms("device_median")),
                     ("Copy of the input, median", copy)]  # fmt: skip
        return rows


if __name__ == "__main__":
    cli.run_main(client.main_of(BatchInference, parse_arguments))
