#!/usr/bin/env python3
"""The inference service as one job: a server, and its users at a fixed rate.

    python3 workloads/inference/serving_client.py --rate 300 --duration 30
    python3 workloads/inference/serving_client.py                # half of the server's capacity

Starts inference_server.py on a free port of this machine and sends it requests as load_test.py
does: an open loop with Poisson arrivals, so that the same is offered whatever the answers do, and
a busy neighbor on the GPU shows as latency and not as fewer requests. Latency counts from when a
request was due. Without --rate the server's capacity is measured first, alone, by clients that
send as soon as they are answered, and half of it is offered; the benchmark suite does so once, in
the job's baseline, and fixes the rate for everything after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.errors import JobFailedError, OutOfGpuMemoryError, WorkloadError
from workloads.inference import load_test
from workloads.inference.inference_server import add_workers_flag
from workloads.inference.models import add_model_flags, resolve_model_flags

SERVER = Path(__file__).with_name("inference_server.py")
POLL_SECONDS = 0.05
# A stop drains what has arrived. A process that is killed with kernels in flight can harm the other
# clients of an MPS server, so that comes last; all together stay under the suite's own time limit.
STOP_SECONDS = 35.0
TERMINATE_SECONDS = 15.0
# Of the closed-loop capacity: busy enough to feel a neighbor, and far from a queue that only grows.
OFFERED_SHARE = 0.5
CALIBRATION_SECONDS = 3.0
# Requests are drawn for so long under the suite, whose windows are shorter unless it is told so.
STEADY_SECONDS = 1800.0
# Up to this a person feels an answer as immediate (J. Nielsen, Usability Engineering, 1993).
DEFAULT_SLO_MS = 100.0
LOAD_FLAGS: tuple[load_test.NumberFlag, ...] = (
    ("--rate", cli.positive_float, None, "R",
     "requests a second, on average (default: half of the capacity, measured first)"),
    ("--duration", cli.positive_float, 30.0, "S", "seconds of requests that make one job"),
    ("--slo-ms", cli.positive_float, DEFAULT_SLO_MS, "X",
     "bound on the latency of an answer, in milliseconds"),
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser(__doc__)
    add_model_flags(parser)
    load = parser.add_argument_group("the load")
    load_test.add_number_flags(load, LOAD_FLAGS + load_test.GENERATOR_FLAGS)
    flag = cli.flags(parser, "the server (its other flags keep their defaults)")
    flag("--max-batch", 32, "most images in one forward pass")
    add_workers_flag(flag)
    return parser.parse_args()


class HeldServer:
    """The inference server on a free port of this machine, driven as the suite drives any client.

    Its events come in a file, commands go to its standard input, whose end-of-file means stop: it
    never outlives us. What waits for it raises what ended it, the WorkloadError of its exit code.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it with ``arguments``; it begins to load."""
        self._folder = tempfile.TemporaryDirectory(prefix="inference-server-")
        self._events_path = Path(self._folder.name) / "events.jsonl"
        self._events: dict[str, dict] = {}
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we end it in order.
        self._process = subprocess.Popen(
            (sys.executable, str(SERVER), *arguments, "--host", "127.0.0.1", "--port", "0",
             "--events", str(self._events_path), "--hold"),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True,
        )  # fmt: skip

    @property
    def peak_memory_mib(self) -> float | None:
        """The most GPU memory that it took, once it has stopped; None where nobody knows."""
        return self._events.get("done", {}).get("peak_memory_mib")

    def wait_until_loaded(self) -> None:
        """Block until the model is on the device."""
        self._wait_for("loaded")

    def start_serving(self) -> dict:
        """Let it tune and capture; return its identity, ``port`` included, when it answers."""
        self._say("warm")
        identity = self._wait_for("ready")["identity"]
        self._say("go")
        return identity

    def require_alive(self) -> None:
        """Raise what ended it, if it has ended."""
        code = self._process.poll()
        if code is None:
            return
        self._read_events()
        error = self._events.get("error", {})
        message = error.get("message") or f"exited with code {code}; look above for its message"
        message = f"the inference server: {message}"
        kinds = {kind.exit_code: kind for kind in WorkloadError.__subclasses__()}
        kind = kinds.get(code, JobFailedError)
        if kind is OutOfGpuMemoryError:
            raise OutOfGpuMemoryError(message, error.get("memory"))
        raise kind(message)

    def stop(self) -> None:
        """Let it answer what has arrived and end; may be called twice."""
        self._process.stdin.close()
        # Also when somebody interrupts the wait.
        try:
            self._wait_for_end()
        finally:
            self._read_events()
            self._folder.cleanup()

    def _wait_for_end(self) -> None:
        for limit_seconds, insist in (
            (STOP_SECONDS, self._process.terminate),
            (TERMINATE_SECONDS, self._process.kill),
        ):
            try:
                self._process.wait(limit_seconds)
                return
            except subprocess.TimeoutExpired:
                insist()
        self._process.wait()

    def _say(self, command: str) -> None:
        """Send a command; that it may have ended already is found where its events are read."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}\n".encode())

    def _wait_for(self, event: str) -> dict:
        while event not in self._events:
            self.require_alive()
            time.sleep(POLL_SECONDS)
            self._read_events()
        return self._events[event]

    def _read_events(self) -> None:
        """Keep the last event of each name; the end of the file may be half a line."""
        if self._events_path.exists():
            lines = self._events_path.read_text().rpartition("\n")[0].splitlines()
            self._events = {event["event"]: event for event in map(json.loads, lines)}


class Users(load_test.LoadTest):
    """The load test of a server that is ours, and whose end is ours too."""

    def __init__(
        self, args: argparse.Namespace, server: HeldServer, job_seconds: float | None = None
    ) -> None:
        """Send to ``server`` as the load test's ``args`` say.

        With ``job_seconds`` users do not pause between jobs: a job is so long a stretch of one
        long run of requests. A pause until the last answer has come would give a server that falls
        behind time to catch up, and less would be offered the slower it is.
        """
        super().__init__(args)
        self._server = server
        self._job_seconds = job_seconds

    def look_after(self) -> None:
        """Raise what ended the server, if it has ended."""
        self._server.require_alive()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Return the figures of a whole run, or of what finishes within the next stretch."""
        if self._job_seconds is None:
            return super().run_job(recorder)
        if not self._generator.running:
            if self._start_seconds is not None:  # the last run is over
                self.reset()
            self._start_seconds = self._generator.begin()
        reports_before = len(self._generator.reports)
        start_seconds = time.monotonic()
        end_seconds = start_seconds + self._job_seconds
        while self._generator.running and time.monotonic() < end_seconds:
            self.collect(recorder)
        measured = self._generator.measured(since=reports_before)
        figures = self.figures(measured, start_seconds, self._job_seconds)
        # Those that finished are not those that were due where answers are late.
        due = self._start_seconds + self._offsets
        offered = ((due >= start_seconds) & (due < end_seconds)).sum()
        return figures | {"offered_rate": int(offered) / self._job_seconds}


class ServingClient(client.Workload):
    """Server and users; a unit of work is one request.

    To the suite its identity is the server's, pid included: only the server uses the GPU.
    """

    name = "serving"
    title = "Inference service"
    _server: HeldServer | None = None
    _users: Users | None = None
    _identity: dict | None = None
    _capacity: float | None = None

    def load(self) -> None:
        """Start the server and wait until its model is on the device."""
        self._server = HeldServer(self._server_arguments())
        self._server.wait_until_loaded()

    def _server_arguments(self) -> list[str]:
        names = ("model", "weights", "seed", "device", "engine", "precision", "gpu", "max-batch",
                 "workers")  # fmt: skip
        chosen = {name: getattr(self.args, name.replace("-", "_")) for name in names}
        return [f"--{name}={value}" for name, value in chosen.items() if value is not None]

    def warm_up(self) -> None:
        """Let the server get ready, settle the rate, and open the users' connections."""
        self._identity = self._server.start_serving()
        self._rate = self.args.rate or self._settle_rate()
        self._users = self._make_users()
        self._users.load()
        self._users.warm_up()

    def _settle_rate(self) -> float:
        """Measure the server's capacity in a closed loop; return half of it.

        Raises:
            JobFailedError: It answered nothing.
        """
        # One batch comes together while the other is computed.
        args = self._load_arguments(clients=2 * self.args.max_batch, duration=CALIBRATION_SECONDS)
        users = Users(args, self._server)
        try:
            users.load()
            users.warm_up()
            figures = users.run_job(client.Recorder())
        finally:
            users.close()
        self._require_answers(figures)
        self._capacity = figures["qps"]
        rate = float(f"{OFFERED_SHARE * self._capacity:.3g}")
        console.note(
            f"closed-loop capacity {self._capacity:.1f} requests a second; offering {rate:g} "
            f"(the same again: --rate {rate:g})"
        )
        return rate

    def _make_users(self) -> Users:
        args = self.args
        load_arguments = self._load_arguments(
            rate=self._rate,
            arrival="poisson",
            slo_ms=args.slo_ms,
            duration=max(STEADY_SECONDS, args.duration) if args.hold else args.duration,
            max_connections=args.max_connections,
        )
        return Users(load_arguments, self._server, args.duration if args.hold else None)

    def _load_arguments(self, **flags: object) -> argparse.Namespace:
        """Return the load test's flags: these, those of every load here, else its defaults."""
        args = load_test.parse_arguments([])
        args.server = f"http://127.0.0.1:{self._identity['port']}"
        args.upload = "raw"
        # Its files would repeat what this job's result holds.
        args.hold = True
        for name in ("seed", "client_index", "processes"):
            setattr(args, name, getattr(self.args, name))
        vars(args).update(flags)
        return args

    def _require_answers(self, figures: dict) -> None:
        if not figures["successful_requests"]:
            errors = ", ".join(f"{kind} ({n})" for kind, n in figures["errors"].items())
            raise JobFailedError(
                f"the inference server answered no request ({errors or 'none was sent'}); look "
                "above for its message, and lower --rate or raise --duration if it is only slow"
            )

    def run_job(self, recorder: client.Recorder) -> dict:
        """Offer requests for ``--duration`` seconds and return the figures.

        Raises:
            StopRequested: The suite asked to stop.
            JobFailedError: Nothing was answered, or the server has ended.
        """
        figures = self._users.run_job(recorder)
        self._require_answers(figures)
        self.warnings += [text for text in self._users.warnings if text not in self.warnings]
        return figures | {
            "request_rate": self._rate,
            "closed_loop_capacity": self._capacity,
            "slo_ms": self.args.slo_ms,
        }

    def close(self) -> None:
        """End the users, then the server; called again, and after a failure, without harm."""
        if self._users is not None:
            self._users.close()
        if self._server is not None:
            self._server.stop()

    def identity(self) -> dict:
        """Return the server's identity: what uses the GPU is its process."""
        return self._identity

    def peak_memory_mib(self) -> float | None:
        """Return the GPU memory that the server took; it tells when it ends, so this ends it."""
        self.close()
        return self._server.peak_memory_mib

    def resolve(self) -> list[str]:
        """Find or download the weights."""
        arguments, self.warnings = resolve_model_flags(self.args.model, self.args.weights)
        return arguments

    def settings(self) -> dict:
        """Return what was served, and the load."""
        names = ("slo_ms", "max_connections", "max_batch", "workers", "seed")
        return {
            **{name: getattr(self.args, name) for name in names},
            "model": self._identity["model"],
            "weights": self._identity["weights"],
            "rate": self._rate,
            "arrival": "poisson",
            "duration_seconds": self.args.duration,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        from workloads.inference.load_report import summary_rows

        identity = self._identity
        capacity = figures["closed_loop_capacity"]
        measured = "" if capacity is None else f", half of the capacity of {capacity:.1f}"
        where = identity["gpu_name"] or f"CPU ({identity['host_threads']} threads)"
        return [
            ("Model", f"{identity['model']}, {identity['weights']} weights, on {where}"),
            ("Offered", f"{figures['request_rate']:g} requests a second{measured}"),
            *summary_rows(figures, self.args.slo_ms),
        ]


main = client.main_of(ServingClient, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
