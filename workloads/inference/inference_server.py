#!/usr/bin/env python3
"""Inference server: image classification over HTTP, requests batched on one GPU.

    python3 workloads/inference/inference_server.py --model resnet50 --port 5000
    curl -X POST http://localhost:5000/predict -F "image=@your_image.jpg"

This process owns the device: model, micro-batching and statistics (batching.py). HTTP and decoding
happen in ``--workers`` processes that gunicorn keeps alive (web_worker.py, web_app.py, which lists
the endpoints). SIGTERM, Ctrl-C and the end of the terminal stop accepting, answer what has arrived,
write the result file and leave with exit code 0; a second one leaves at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.device import ComputeDevice, open_device, usable_cores
from workloads.common.errors import MIB, JobFailedError, UsageError
from workloads.common.results import sample_note
from workloads.inference import api_key
from workloads.inference.models import add_model_flags, resolve_model_flags, weights_notes

MAX_PORT = 65535
CORES_PER_WORKER, MIN_WORKERS, MAX_WORKERS = 4, 2, 4
MAX_BACKLOG = 4096
WEB_WORKER = Path(__file__).resolve().with_name("web_worker.py")
# Read by gunicorn, gevent, Flask or systemd's socket activation; only our own settings count.
FOREIGN_VARIABLES = (
    "GUNICORN_", "WEB_CONCURRENCY", "SENDFILE", "SCRIPT_NAME", "GEVENT", "LIBEV_", "FLASK_",
    "LISTEN_",
)  # fmt: skip
POLL_SECONDS = 0.1
SAME_SIGNAL_SECONDS = 1.0
WEB_SERVER_START_SECONDS = 60.0
# After a drain: for the web server's own end, and for a batch that is under way, since leaving that
# may harm other clients of an MPS server.
WEB_SERVER_END_SECONDS, DEVICE_END_SECONDS = 2.0, 1.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of this script, from the command line where no ``arguments`` are given."""
    parser = cli.workload_parser(__doc__)
    flag = cli.flags(parser, "the model, its batches and its address")
    add_model_flags(flag)
    flag("--host", "0.0.0.0", "address to listen on (default: 0.0.0.0, all)")
    flag("--port", 5000, "port to listen on; 0 takes a free one", type=cli.non_negative_int)
    flag("--max-batch", 32, "most images in one forward pass")
    flag("--max-delay-ms", 0.5, "longest that a batch waits for requests still being decoded",
         type=cli.non_negative_float)  # fmt: skip
    flag = cli.flags(parser, "processes and threads")
    add_workers_flag(flag)
    flag("--threads", 1, "large pictures that each worker decodes at the same time")
    flag = cli.flags(parser, "limits")
    flag("--queue-size", 256, "requests that may wait for the GPU; more get 503 at once")
    flag("--max-body-mib", 16.0, "largest request body in MiB")
    flag("--max-pixels", 50_000_000, "largest image, width x height")
    flag("--max-batch-predict", 1024, "largest batch_size of /batch_predict")
    flag("--max-connections", 1000, "open connections, shared out to the workers; when all are in "
         "use, those that send nothing are ended for others")  # fmt: skip
    flag("--max-connections-per-address", None, "connections of one client address (IPv6: of one "
         "/64), but for this machine's own; more get 503 (default: half of --max-connections)",
         type=cli.positive_int, metavar="N")  # fmt: skip
    flag("--request-seconds", 30.0, "deadline for a whole request to arrive, and for its answer")
    flag("--drain-seconds", 30.0, "longest that a shutdown waits for requests in flight",
         type=cli.non_negative_float)  # fmt: skip
    api_key.add_flag(flag, "answer only who knows this key, but for / and /health")
    args = parser.parse_args(arguments)
    api_key.take(args, parser)
    if args.port > MAX_PORT:
        parser.error(f"--port {args.port} is above {MAX_PORT}")
    args.max_connections_per_address = (
        args.max_connections_per_address or (args.max_connections + 1) // 2
    )
    return args


def add_workers_flag(flag: Callable[..., None]) -> None:
    """Add ``--workers``; its former name is kept, whose 0 meant no process but the engine's."""
    default = min(MAX_WORKERS, max(MIN_WORKERS, usable_cores() // CORES_PER_WORKER))
    how = {"type": lambda text: max(1, cli.non_negative_int(text)), "metavar": "N"}
    flag("--workers", default, "processes that speak HTTP and decode (default: a quarter of the "
         f"cores, {MIN_WORKERS} to {MAX_WORKERS}; here {default})", **how)  # fmt: skip
    flag("--frontends", None, "former name of --workers", dest="workers", **how)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; ``::`` takes IPv4 as well.

    Raises:
        UsageError: The address is not available.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(
            address[:2], family=family, backlog=MAX_BACKLOG, dualstack_ipv6=both
        )
    except (OSError, UnicodeError) as error:
        # Python adds the address once more, as it keeps it.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UsageError(
            f"cannot listen on {host} port {port} ({reason}); name another with --host and --port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """Return the address at which a person on this machine reaches ``listener``."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class InferenceServer(client.Workload):
    """Serves until it is told to stop; a unit of work is one answered request."""

    name = "inference_server"
    title = "Inference server"
    device: ComputeDevice
    _web_server: subprocess.Popen[bytes]
    _is_device_busy = False
    # Not an Event: its lock, taken when a second signal interrupts the first, is never free.
    _stop_seconds: float | None = None

    def load(self) -> None:
        """Listen, answering 503, and load the model meanwhile."""
        from workloads.inference.batching import Engine

        args = self.args
        # First: where the port is taken, nothing else needs to be begun.
        self._listener = listen(args.host, args.port)
        host, self._port = self._listener.getsockname()[:2]
        is_local = host == "::1" or host.startswith("127.")
        self._facts: dict[str, object] = {}
        self._started_seconds = time.monotonic()
        self._engine = Engine(args, self._tell)
        self._engine.start()
        self._start_web_server(is_local)
        if args.api_key is None and not is_local:
            console.note(
                f"anybody who reaches {args.host} port {self._port} may use this server; to keep "
                f"others out set {api_key.VARIABLE}, or listen on --host 127.0.0.1"
            )
        console.note(f"listening on {url_of(self._listener)}, loading {args.model}")
        self._load_model()

    def _start_web_server(self, is_local: bool) -> None:
        inherited = self._listener.fileno(), self._engine.worker_door.fileno()
        settings = {
            **vars(self.args),
            **dict(zip(("listener", "door"), inherited, strict=True)),
            "local_only": is_local,
            "max_body_bytes": int(self.args.max_body_mib * MIB),
        }
        self._web_server = subprocess.Popen(
            (sys.executable, str(WEB_WORKER)), stdin=subprocess.PIPE, pass_fds=inherited,
            # A session of its own: Ctrl-C in a terminal reaches us alone, and we end it in order.
            start_new_session=True, cwd=WEB_WORKER.parent,
            env={k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)},
        )  # fmt: skip
        # Not by the command line or the environment: the key is among them.
        if self._web_server.stdin is not None:
            with self._web_server.stdin as stdin:
                stdin.write(json.dumps(settings, default=str).encode())
        self._engine.worker_door.close()

    def _load_model(self) -> None:
        from workloads.inference.models import Classifier

        args = self.args
        self.device = open_device(args)
        self._classifier = Classifier(
            self.device, args.model, args.weights, args.seed, args.max_batch
        )
        weights = self._classifier.weights
        self.warnings += weights_notes(args.model, args.weights, weights.kind)
        # Once: /health is asked during the capture too, when no other thread may call CUDA.
        identity = self.device.identity()
        device = {name: identity[name] for name in ("device", "gpu_name", "engine", "precision")}
        self._facts = {**device, "model": args.model, "weights": weights.kind}

    def warm_up(self) -> None:
        """Autotune and capture, then begin to answer."""
        self._engine.status = "warming up"
        self._classifier.warm_up()
        if not self.args.hold:
            # Before anybody is answered: from then on a signal means a drain.
            self._stop_on_signals()
        self._engine.model = self._classifier
        self._wait_for_web_server()
        self._engine.status = "ok"
        url = url_of(self._listener)
        console.note(f"ready on port {self._port}: {url}")
        console.note(f'try: curl -X POST {url}/predict -F "image=@your_image.jpg"')

    def _wait_for_web_server(self) -> None:
        deadline_seconds = time.monotonic() + WEB_SERVER_START_SECONDS
        while self._engine.gauges()["workers"] < self.args.workers:
            if self._web_server.poll() is not None or time.monotonic() > deadline_seconds:
                raise JobFailedError("the web server did not start; look above for its message")
            time.sleep(POLL_SECONDS / 10)

    def _tell(self, what: str) -> bytes:
        """Return what a web worker asks for; called on a thread of its own."""
        if what == "metrics":
            return self._engine.statistics.metrics()
        if what.startswith("name "):
            return self._classifier.weights.class_names[int(what[5:])].encode()
        content = {"status": self._engine.status, **self._facts}
        if what == "stats":
            content = self._engine.statistics.snapshot() | self._engine.gauges()
        uptime_seconds = round(time.monotonic() - self._started_seconds, 3)
        return json.dumps({**content, "uptime_seconds": uptime_seconds}).encode() + b"\n"

    def run_job(self, recorder: client.Recorder) -> dict:
        """Serve until a stop or a signal, drain, and return the statistics."""
        self._stop_on_signals()
        statistics = self._engine.statistics
        # What was answered before the start belongs to no job.
        list(statistics.take_units())
        while self._stop_seconds is None and not (recorder.stop_requested or self._failure()):
            self._record_units(recorder)
            time.sleep(POLL_SECONDS)
        self._drain()
        self._record_units(recorder)
        return {
            **statistics.snapshot(),
            "unanswered_requests": self._engine.unanswered,
            "lost_workers": len(self._engine.lost_workers),
        }

    def _record_units(self, recorder: client.Recorder) -> None:
        for unit in self._engine.statistics.take_units():
            recorder.unit(*unit, latency=True)

    def _failure(self) -> Exception | None:
        """Return what ended the device's work or the web server, None while both go on."""
        if self._engine.failure is None and self._web_server.poll() is not None:
            return JobFailedError("the web server has ended; look above for its message")
        return self._engine.failure

    def require_working(self) -> None:
        """Raise what ended the device's work or the web server, if anything has."""
        if (failure := self._failure()) is not None:
            raise failure

    def _stop_on_signals(self) -> None:
        """Let the next signal begin the drain, and the one after it end everything."""

        def stop(number: int, frame: object) -> None:
            now_seconds = time.monotonic()
            if self._stop_seconds is None:
                self._stop_seconds = now_seconds
            # One that comes at once is the same, sent to the process and to its group.
            elif now_seconds > self._stop_seconds + SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # nohup
                signal.signal(number, stop)

    def reset(self) -> None:
        """End the client: a server that was told to stop by a signal does not start again."""
        raise client.StopRequested

    def _drain(self) -> None:
        """Answer what has arrived and end the web server.

        Raises:
            Exception: What ended the device's work, or the web server, before it was told to.
        """
        failure, seconds = self._failure(), self.args.drain_seconds
        self._engine.status = "shutting down" if failure is None else "failed"
        console.note("stopping: answering what has arrived")
        # Connections that no worker has accepted yet are to be few when they stop accepting.
        self._listener.listen(0)
        self._end_web_server(WEB_SERVER_END_SECONDS + (seconds if failure is None else 0.0))
        self._is_device_busy = not self._engine.close(DEVICE_END_SECONDS)
        for pid in self._engine.lost_workers:
            self.warn(f"web worker {pid} exited prematurely, with the requests in it")
        if self._engine.unanswered:
            self.warn(
                f"{self._engine.unanswered} requests were cut off by the end; give them more than "
                f"{seconds:g} s with --drain-seconds"
            )
        if self._is_device_busy:
            self.warn(
                "the device was still at work on a batch that nobody waits for any more; give it "
                f"more than {seconds:g} s with --drain-seconds"
            )
        if failure is not None:
            raise failure

    def _end_web_server(self, timeout_seconds: float) -> None:
        self._web_server.send_signal(signal.SIGTERM)
        try:
            self._web_server.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            # Its workers end with it.
            self._web_server.kill()
            self._web_server.wait()

    def close(self) -> None:
        """End the web server and the engine, also after a failure."""
        if hasattr(self, "_web_server"):
            self._end_web_server(0.0)
            seconds = 0.0 if self._is_device_busy else DEVICE_END_SECONDS
            self._is_device_busy = not self._engine.close(seconds)

    def leave(self, code: int) -> NoReturn:
        """End the process; without the interpreter's own end where the device is still at work.

        That would take the libraries away under it, which aborts the process.
        """
        if self._is_device_busy:
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def identity(self) -> dict:
        """Return the device's identity, the port and what is served there."""
        return {
            **self.device.identity(self.args.max_batch),
            "port": self._port,
            "workers": self.args.workers,
            "model": self.args.model,
            "weights": self._classifier.weights.kind,
        }

    def resolve(self) -> list[str]:
        """Find or download the weights."""
        arguments, self.warnings = resolve_model_flags(self.args.model, self.args.weights)
        return arguments

    def settings(self) -> dict:
        """Return what was served, and how."""
        args, weights = self.args, self._classifier.weights
        names = ("model", "host", "max_batch", "max_delay_ms", "queue_size", "workers", "threads",
                 "max_body_mib", "max_pixels", "max_connections", "max_connections_per_address",
                 "request_seconds", "drain_seconds", "seed")  # fmt: skip
        return {
            **{name: getattr(args, name) for name in names},
            "weights": weights.kind,
            "weights_source": weights.source,
            "port": self._port,
            "wants_api_key": args.api_key is not None,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        weights = self._classifier.weights
        rows = [
            ("Model", f"{self.args.model}, weights {weights.kind} ({weights.source})"),
            ("Requests served", f"{figures['total_requests']}"),
        ]
        if figures["successful_requests"]:
            latencies = "{p50_ms:.1f} / {p95_ms:.1f} / {p99_ms:.1f} ms".format_map(figures)
            note = sample_note(figures["latency_responses"])
            rows += [
                ("Success rate", f"{figures['success_rate_percent']:.1f} %"),
                ("Average latency", f"{figures['average_latency_ms']:.1f} ms"),
                ("Latency p50 / p95 / p99", f"{latencies} {note}"),
                ("Throughput", f"{figures['qps']:.1f} requests/s"),
            ]
        return rows


def serve(server: InferenceServer) -> NoReturn:
    """Run ``server`` until the end, whatever that is."""
    cli.run_main(lambda: client.run(server), server.leave)


if __name__ == "__main__":
    serve(InferenceServer(parse_arguments()))
