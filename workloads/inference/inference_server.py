#!/usr/bin/env python3
"""Inference server: image classification over HTTP, requests batched on one GPU thread.

    python3 workloads/inference/inference_server.py --model resnet50 --port 5000
    curl -X POST http://localhost:5000/predict -F "image=@your_image.jpg"

Endpoints: ``/health``, ``/predict``, ``/batch_predict``, ``/stats``, ``/metrics`` (http_app.py).
A front end (front_end.py) reads requests (http_protocol.py) and decodes pictures (image_service.py,
image_input.py) into memory shared with the GPU process (shared_block.py), where batcher.py gathers
them for classifier.py. Front ends are processes with ``--frontends N``, else one is a thread of the
GPU process. SIGTERM and Ctrl-C stop accepting, answer what has arrived, write the result file and
leave with exit code 0; a second one leaves at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.environment import usable_cores
from workloads.inference import api_key
from workloads.inference.inference_model import (
    add_model_flags,
    resolve_model_flags,
    weights_notes,
)

if TYPE_CHECKING:
    import socket

    from workloads.inference.batcher import Batcher
    from workloads.inference.front_ends import FrontEnds

MAX_PORT = 65535
MAX_FRONT_ENDS = 64
# More decoding threads than this in one process wait for the interpreter, not for a core.
MIN_THREADS, MAX_THREADS = 2, 4
MIB = 2**20
POLL_SECONDS = 0.2
# After a failure, when no shutdown has a time to keep to.
GPU_THREAD_END_SECONDS = 5.0
# This much of a shutdown's time is for the result file.
LAST_SHARE, MAX_LAST_SECONDS = 0.1, 1.0
# However short a shutdown: a batch under way on a GPU takes milliseconds, and leaving it may harm
# other clients of an MPS server.
MIN_DEVICE_SECONDS = 0.5
# What one answered request is called in the event log.
UNIT_KINDS = {"predict": "request", "batch_predict": "batch_request"}


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
    scale = parser.add_argument_group("processes and threads")
    scale.add_argument(
        "--frontends", type=cli.non_negative_int, default=0, metavar="N",
        help="processes that speak HTTP and decode; 0: all in one process, enough for about a "
        "thousand pictures a second; beyond that a third to a half of the cores (default: 0)",
    )  # fmt: skip
    scale.add_argument(
        "--threads", type=cli.positive_int, default=None,
        help="pictures that each front end decodes at the same time (default: its share of the "
        f"cores, {MIN_THREADS} to {MAX_THREADS})",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue-size", type=cli.positive_int, default=256,
        help="requests that may wait for the GPU; more get 503 at once (default: 256)",
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
        help="open connections; when all are in use, those that send nothing or too slowly are "
        "ended for others (default: 1000)",
    )  # fmt: skip
    limits.add_argument(
        "--request-seconds", type=cli.positive_float, default=30.0,
        help="deadline for a whole request to arrive, and for its answer (default: 30)",
    )  # fmt: skip
    limits.add_argument(
        "--drain-seconds", type=cli.non_negative_float, default=30.0,
        help="longest that a shutdown takes, but for the interpreter's own end of a second; its "
        "last four seconds (from 10 s down: two fifths) are for ending, the rest is for requests "
        "in flight; with 0 it is cut off, and ending takes four seconds at most (default: 30)",
    )  # fmt: skip
    api_key.add_flag(limits, "answer only who knows this key, but for /health")
    args = parser.parse_args()
    api_key.take(args, parser)
    if args.port > MAX_PORT:
        parser.error(f"--port {args.port} is above {MAX_PORT}")
    if args.frontends > MAX_FRONT_ENDS:
        parser.error(f"--frontends {args.frontends} is above {MAX_FRONT_ENDS}")
    if args.threads is None:
        share = usable_cores() // max(1, args.frontends)
        args.threads = min(MAX_THREADS, max(MIN_THREADS, share))
    return args


class InferenceServer(client.Workload):
    """Serves until it is told to stop; a unit of work is one answered request.

    Attributes:
        device_at_work: Whether the device had not finished when a shutdown's time was over.
    """

    name = "inference_server"
    title = "Inference server"
    device_at_work = False

    def load(self) -> None:
        """Listen, answering 503, and load the model meanwhile."""
        from workloads.inference.allocator import return_large_blocks
        from workloads.inference.batcher import GpuThread
        from workloads.inference.connections import listening_socket
        from workloads.inference.http_app import ServerState
        from workloads.inference.server_stats import ServerStats
        from workloads.inference.shared_block import BlockShape, SharedBlock

        args = self.args
        return_large_blocks()
        # First: where the port is taken, nothing else needs to be begun.
        listener = listening_socket(args.host, args.port)
        self._stop = threading.Event()
        self._serving: Future[None] | None = None
        self._signal_handlers: dict[int, object] = {}
        self._unanswered = 0
        self._warned_losses = 0
        self._state = ServerState()
        self._gpu_thread = GpuThread()
        max_inside = args.queue_size + args.max_batch
        self._block = SharedBlock(BlockShape(max(1, args.frontends), max_inside, args.max_batch))
        self._stats = ServerStats(self._block)
        self._batcher = self._make_batcher()
        self._front_ends = self._start_front_ends(listener, max_inside)
        console.note(f"listening on {args.host}:{self._front_ends.port}, loading {args.model}")
        self._gpu_thread.call(self._load_model)

    def _make_batcher(self) -> Batcher:
        from workloads.inference.batcher import Batcher
        from workloads.inference.shared_block import FrontEndRegion

        args = self.args
        return Batcher(
            self._block.engine,
            max_batch=args.max_batch,
            max_delay_seconds=args.max_delay_ms / 1e3,
            queue_size=args.queue_size,
            decoding=lambda: self._block.gauge(FrontEndRegion.DECODING),
        )

    def _start_front_ends(self, listener: socket.socket, max_inside: int) -> FrontEnds:
        from workloads.inference.front_end import FrontEndSettings
        from workloads.inference.front_ends import FrontEnds

        args = self.args
        settings = FrontEndSettings(
            threads=args.threads,
            max_inside=max_inside,
            max_body_bytes=int(args.max_body_mib * MIB),
            max_pixels=args.max_pixels,
            max_batch=args.max_batch,
            max_batch_predict=args.max_batch_predict,
            request_seconds=args.request_seconds,
            api_key=args.api_key,
        )
        return FrontEnds(
            listener, args.frontends, self._block, self._batcher, settings, args.max_connections
        )

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
        self._state.device = {
            name: identity[name] for name in ("device", "gpu_name", "engine", "precision")
        }
        self._state.model = self._model_facts()
        self._state.class_names = list(self._classifier.weights.class_names)
        self._tell("loading")

    def warm_up(self) -> None:
        """Autotune and capture, then begin to answer."""
        self._tell("warming up")
        self._gpu_thread.call(self._classifier.warm_up)
        self._serving = self._gpu_thread.start(lambda: self._batcher.serve(self._classifier))
        if not self.args.hold:
            # Before anybody is answered: from then on a signal means a drain.
            self._stop_on_signals()
        self._tell("ok")
        console.note(f"ready on port {self._front_ends.port}")

    def _tell(self, status: str) -> None:
        self._state = replace(self._state, status=status)
        self._front_ends.set_state(self._state)

    def run_job(self, recorder: client.Recorder) -> dict:
        """Serve until a stop or a signal, drain, and return the statistics."""
        self._stop_on_signals()
        # What was answered before the start belongs to no job.
        self._stats.new_requests()
        while not (recorder.stop_requested or self._serving.done() or self._front_ends.failure):
            self._look_after(recorder)
            if self._stop.wait(POLL_SECONDS):
                break
        self._drain()
        self._look_after(recorder)
        self._restore_signals()
        return {
            **self._stats.snapshot(),
            "unanswered_requests": self._unanswered,
            "lost_front_ends": len(self._front_ends.losses),
        }

    def _stop_on_signals(self) -> None:
        """Let the next signal begin the drain, and the one after it end everything."""

        def stop(number: int, frame: object) -> None:
            self._stop.set()
            self._restore_signals()

        if not self._signal_handlers:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._signal_handlers[number] = signal.signal(number, stop)

    def _restore_signals(self) -> None:
        for number, handler in self._signal_handlers.items():
            signal.signal(number, handler)

    def _look_after(self, recorder: client.Recorder) -> None:
        """Record the requests answered since the last time; tell of front ends that ended."""
        for endpoint, start_seconds, end_seconds in self._stats.new_requests():
            recorder.unit(UNIT_KINDS[endpoint], start_seconds, end_seconds, latency=True)
        for loss in self._front_ends.losses[self._warned_losses :]:
            self._warned_losses += 1
            self.warn(loss)

    def reset(self) -> None:
        """End the client: a server that was told to stop by a signal does not start again."""
        raise client.StopRequested

    def _drain(self) -> None:
        """Answer what has arrived and end the threads.

        Raises:
            Exception: What ended the GPU thread, if it did not end by itself.
            RuntimeError: No front end is left.
        """
        failed = self._serving.done() or self._front_ends.failure is not None
        drain_seconds = self.args.drain_seconds
        end_seconds = time.monotonic() + drain_seconds
        self._tell("failed" if failed else "shutting down")
        console.note("stopping: answering what has arrived")
        self._unanswered = self._front_ends.drain(0.0 if failed else drain_seconds)
        if self._unanswered:
            self.warn(
                f"{self._unanswered} requests were cut off by the end; give them more than "
                f"{drain_seconds:g} s with --drain-seconds"
            )
        self._batcher.close()
        left_seconds = end_seconds - time.monotonic()
        left_seconds -= min(MAX_LAST_SECONDS, LAST_SHARE * drain_seconds)
        self._end_device_work(GPU_THREAD_END_SECONDS if failed else left_seconds)
        if self._front_ends.failure is not None:
            raise RuntimeError(self._front_ends.failure)

    def _end_device_work(self, timeout_seconds: float) -> None:
        try:
            self._serving.result(max(MIN_DEVICE_SECONDS, timeout_seconds))
        except FutureTimeoutError:
            if self._serving.done():
                raise
            self.device_at_work = True
            self.warn(
                "the device was still at work on a batch that nobody waits for any more; give it "
                f"more than {self.args.drain_seconds:g} s with --drain-seconds"
            )

    def close(self) -> None:
        """Stop listening and end the front ends and the GPU thread, also after a failure."""
        if hasattr(self, "_front_ends"):
            self._front_ends.drain(0.0)
            self._batcher.close()
            self._gpu_thread.close(0.0 if self.device_at_work else GPU_THREAD_END_SECONDS)

    def leave(self, code: int) -> NoReturn:
        """End the process; without the interpreter's own end where a thread is still at work.

        That would take the libraries away under it, which aborts the process.
        """
        if self.device_at_work:
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def _model_facts(self) -> dict:
        return {"model": self.args.model, "weights": self._classifier.weights.kind}

    def identity(self) -> dict:
        """Return the device's identity, the port and what is served there."""
        return {
            **self.device.identity(self.args.max_batch),
            "port": self._front_ends.port,
            "front_ends": self.args.frontends,
            **self._model_facts(),
        }

    def resolve(self) -> list[str]:
        """Find or download the weights."""
        arguments, self.warnings = resolve_model_flags(self.args.model, self.args.weights)
        return arguments

    def settings(self) -> dict:
        """Return what was served, and how."""
        args = self.args
        return {
            **self._model_facts(),
            "weights_source": self._classifier.weights.source,
            "host": args.host,
            "port": self._front_ends.port,
            "max_batch": args.max_batch,
            "max_delay_ms": args.max_delay_ms,
            "queue_size": args.queue_size,
            "front_ends": args.frontends,
            "threads": args.threads,
            "max_body_mib": args.max_body_mib,
            "max_pixels": args.max_pixels,
            "max_connections": args.max_connections,
            "request_seconds": args.request_seconds,
            "drain_seconds": args.drain_seconds,
            "wants_api_key": args.api_key is not None,
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


def main() -> NoReturn:
    """Serve until the end, whatever that is."""
    server = InferenceServer(parse_arguments())
    cli.run_main(lambda: client.run(server), server.leave)


if __name__ == "__main__":
    main()
