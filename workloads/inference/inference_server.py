#!/usr/bin/env python3
"""Inference server: image classification over HTTP, requests batched on one GPU thread.

    python3 workloads/inference/inference_server.py --model resnet50 --port 5000
    curl -X POST http://localhost:5000/predict -F "image=@your_image.jpg"

Endpoints: ``/health``, ``/predict``, ``/batch_predict``, ``/stats`` (see http_app.py). The pieces:
image_input.py decodes, batcher.py gathers requests on the thread that owns the GPU, classifier.py
is the model, http_app.py the interface, serving.py the HTTP server with its limits. SIGTERM and
Ctrl-C stop accepting, answer what has arrived, write the result file and leave with exit code 0;
a second one leaves at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.inference.inference_model import (
    add_model_flags,
    resolve_model_flags,
    weights_notes,
)

if TYPE_CHECKING:
    import numpy as np

MAX_PORT = 65535
MIB = 2**20
POLL_SECONDS = 0.2
GPU_THREAD_END_SECONDS = 5.0


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser("Serve image classification over HTTP.")
    add_model_flags(parser)
    parser.add_argument(
        "--port", type=cli.non_negative_int, default=5000,
        help="port to listen on; 0 takes a free one (default: 5000)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="0.0.0.0", help="address to listen on (default: 0.0.0.0, all)"
    )
    batching = parser.add_argument_group("batching")
    batching.add_argument(
        "--max-batch", type=cli.positive_int, default=32,
        help="most images in one forward pass (default: 32)",
    )  # fmt: skip
    batching.add_argument(
        "--max-delay-ms", type=cli.non_negative_float, default=2.0,
        help="longest that a batch waits for requests still being decoded (default: 2)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue-size", type=cli.positive_int, default=256,
        help="requests that may wait for the GPU; more get 503 at once (default: 256)",
    )  # fmt: skip
    limits.add_argument(
        "--threads", type=cli.positive_int, default=64,
        help="requests decoded or waited for at the same time (default: 64)",
    )  # fmt: skip
    limits.add_argument(
        "--max-body-mib", type=cli.positive_float, default=16.0,
        help="largest request body in MiB (default: 16)",
    )  # fmt: skip
    limits.add_argument(
        "--max-pixels", type=cli.positive_int, default=50_000_000,
        help="largest image, width x height (default: 50000000)",
    )  # fmt: skip
    limits.add_argument(
        "--max-batch-predict", type=cli.positive_int, default=1024,
        help="largest batch_size of /batch_predict (default: 1024)",
    )  # fmt: skip
    limits.add_argument(
        "--max-connections", type=cli.positive_int, default=1000,
        help="open connections (default: 1000)",
    )  # fmt: skip
    limits.add_argument(
        "--request-seconds", type=cli.positive_float, default=30.0,
        help="deadline for a whole request to arrive, and for its answer (default: 30)",
    )  # fmt: skip
    limits.add_argument(
        "--drain-seconds", type=cli.non_negative_float, default=30.0,
        help="longest that a shutdown waits for requests in flight (default: 30)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.port > MAX_PORT:
        parser.error(f"--port {args.port} is above {MAX_PORT}")
    return args


class InferenceServer(client.Workload):
    """Serves until it is told to stop; a unit of work is one answered request."""

    name = "inference_server"
    title = "Inference server"

    def load(self) -> None:
        """Listen, answering 503, and load the model meanwhile."""
        from workloads.inference.batcher import Batcher, GpuThread
        from workloads.inference.http_app import ServiceState, create_app
        from workloads.inference.server_stats import ServerStats
        from workloads.inference.serving import HttpLimits, HttpServer

        args = self.args
        self._stop = threading.Event()
        self._recorder: client.Recorder | None = None
        self._serving: Future[None] | None = None
        self._unanswered = 0
        self._gpu_thread = GpuThread()
        self._batcher = Batcher(
            lambda pieces: self._classifier.infer(pieces),
            max_batch=args.max_batch,
            max_delay_seconds=args.max_delay_ms / 1e3,
            queue_size=args.queue_size,
        )
        self._state = ServiceState(
            batcher=self._batcher,
            stats=ServerStats(),
            max_batch=args.max_batch,
            max_pixels=args.max_pixels,
            max_batch_predict=args.max_batch_predict,
            answer_seconds=args.request_seconds,
            on_request=self._record,
        )
        max_body_bytes = int(args.max_body_mib * MIB)
        self._http = HttpServer(
            create_app(self._state, max_body_bytes),
            args.host,
            args.port,
            HttpLimits(
                threads=args.threads,
                max_admitted=args.queue_size + args.max_batch,
                max_body_bytes=max_body_bytes,
                max_connections=args.max_connections,
                request_seconds=args.request_seconds,
            ),
            on_refused=self._state.stats.record_refusal,
        )
        self._http.start()
        console.note(f"listening on {args.host}:{self._http.port}, loading {args.model}")
        self._gpu_thread.call(self._load_model)
        self._state.facts = self

    def _load_model(self) -> None:
        from workloads.common.device import open_device
        from workloads.inference.classifier import Classifier

        args = self.args
        self.device = open_device(args)
        self._classifier = Classifier(
            self.device, args.model, args.weights, args.seed, args.max_batch
        )
        self.warnings += weights_notes(args.model, args.weights, self._classifier.weights.kind)
        # Once: /health is asked during the capture too, when no other thread may call CUDA.
        identity = self.device.identity()
        self._device_facts = {
            name: identity[name] for name in ("device", "gpu_name", "engine", "precision")
        }

    def warm_up(self) -> None:
        """Autotune and capture, then begin to answer."""
        self._state.status = "warming up"
        self._gpu_thread.call(self._classifier.warm_up)
        self._serving = self._gpu_thread.start(self._batcher.serve)
        self._state.status = "ok"
        console.note(f"ready on port {self._http.port}")

    def run_job(self, recorder: client.Recorder) -> dict:
        """Serve until a stop or a signal, drain, and return the statistics."""
        self._recorder = recorder
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, frame: object) -> None:
            self._stop.set()
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, stop)
        while not (recorder.stop_requested or self._serving.done()):
            if self._stop.wait(POLL_SECONDS):
                break
        self._drain()
        for number, handler in previous.items():
            signal.signal(number, handler)
        return {**self._state.stats.snapshot(), "unanswered_requests": self._unanswered}

    def reset(self) -> None:
        """End the client: a server that was told to stop by a signal does not start again."""
        raise client.StopRequested

    def _drain(self) -> None:
        """Answer what has arrived and end the threads.

        Raises:
            Exception: What ended the GPU thread, if it did not end by itself.
        """
        failed = self._serving.done()
        self._state.status = "failed" if failed else "shutting down"
        console.note("stopping: answering what has arrived")
        self._unanswered = self._http.drain(0.0 if failed else self.args.drain_seconds)
        if self._unanswered:
            self.warn(
                f"{self._unanswered} requests were cut off after {self.args.drain_seconds:g} s; "
                "give them more with --drain-seconds"
            )
        self._batcher.close()
        self._serving.result(GPU_THREAD_END_SECONDS)

    def close(self) -> None:
        """Stop listening and end the GPU thread, also after a failure half-way."""
        if hasattr(self, "_http"):
            self._http.drain(0.0)
            self._batcher.close()
            self._gpu_thread.close(GPU_THREAD_END_SECONDS)

    def _record(self, kind: str, start_seconds: float, end_seconds: float) -> None:
        if self._recorder is not None:
            self._recorder.unit(kind, start_seconds, end_seconds, latency=True)

    def describe_device(self) -> dict:
        """Return what ``/health`` shows of the device."""
        return self._device_facts

    def describe_model(self) -> dict:
        """Return model and weights, as said in every answer."""
        return {"model": self.args.model, "weights": self._classifier.weights.kind}

    def describe_top(self, outputs: np.ndarray) -> list[dict]:
        """Return the top classes of one picture's outputs."""
        from workloads.inference.classifier import describe_top

        return describe_top(outputs, self._classifier.weights.class_names)

    def identity(self) -> dict:
        """Return the device's identity, the port and what is served there."""
        return {
            **self.device.identity(self.args.max_batch),
            "port": self._http.port,
            **self.describe_model(),
        }

    def resolve(self) -> list[str]:
        """Find or download the weights."""
        arguments, self.warnings = resolve_model_flags(self.args.model, self.args.weights)
        return arguments

    def settings(self) -> dict:
        """Return what was served, and how."""
        args = self.args
        return {
            **self.describe_model(),
            "weights_source": self._classifier.weights.source,
            "host": args.host,
            "port": self._http.port,
            "max_batch": args.max_batch,
            "max_delay_ms": args.max_delay_ms,
            "queue_size": args.queue_size,
            "threads": args.threads,
            "max_body_mib": args.max_body_mib,
            "max_pixels": args.max_pixels,
            "max_connections": args.max_connections,
            "request_seconds": args.request_seconds,
            "drain_seconds": args.drain_seconds,
            "seed": args.seed,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        weights = self._classifier.weights
        rows = [
            ("Model", f"{self.args.model}, weights {weights.kind} ({weights.source})"),
            ("Requests served", f"{figures['total_requests']}"),
        ]
        if figures["successful_requests"]:
            rows += [
                ("Success rate", f"{figures['success_rate_percent']:.1f} %"),
                ("Average latency", f"{figures['average_latency_ms']:.1f} ms"),
                ("Latency p50 / p95 / p99", f"{figures['p50_ms']:.1f} / {figures['p95_ms']:.1f} / "
                 f"{figures['p99_ms']:.1f} ms"),
                ("Throughput", f"{figures['qps']:.1f} requests/s"),
            ]  # fmt: skip
        return rows


if __name__ == "__main__":
    cli.run_main(client.main_of(InferenceServer, parse_arguments))
