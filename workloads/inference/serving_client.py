#!/usr/bin/env python3
"""The inference service as one job: a server, and its users at a fixed rate.

    python3 workloads/inference/serving_client.py --rate 300 --duration 30
    python3 workloads/inference/serving_client.py                # half of the server's capacity

This is inference_server.py on a free port of this machine, and processes that send it requests as
load_test.py does: an open loop with Poisson arrivals, so that the same is offered whatever the
answers do, and a busy neighbor on the GPU shows as latency and not as fewer requests. Latency
counts from when a request was due. Without --rate the server's capacity is measured first, alone,
by clients that send as soon as they are answered, and half of it is offered; the benchmark suite
does so once, in the job's baseline, and fixes the rate for everything after.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.errors import JobFailedError
from workloads.inference import inference_server, load_test
from workloads.inference.models import add_model_flags

# Of the closed-loop capacity: busy enough to feel a neighbor, and far from a queue that only grows.
OFFERED_SHARE = 0.5
CALIBRATION_SECONDS = 3.0
# Up to this a person feels an answer as immediate (J. Nielsen, Usability Engineering, 1993).
DEFAULT_SLO_MS = 100.0


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script, and the server's other flags at their defaults."""
    parser = cli.workload_parser(__doc__)
    flag = cli.flags(parser, "the load")
    flag("--rate", None, "requests a second, on average (default: half of the capacity, measured "
         "first)", type=cli.positive_float, metavar="R")  # fmt: skip
    flag("--duration", 30.0, "seconds of requests that make one job", metavar="S")
    flag("--slo-ms", DEFAULT_SLO_MS, "bound on the latency of an answer, in milliseconds",
         metavar="X")  # fmt: skip
    load_test.add_generator_flags(flag)
    flag = cli.flags(parser, "the server (its other flags keep their defaults)")
    add_model_flags(flag)
    flag("--max-batch", 32, "most images in one forward pass", metavar="N")
    inference_server.add_workers_flag(flag)
    args = parser.parse_args()
    server = inference_server.parse_arguments(["--host", "127.0.0.1", "--port", "0"])
    # Two flags of one name: the server's is about its own clients.
    args.requests_in_flight = args.__dict__.pop("max_connections")
    return argparse.Namespace(**vars(server) | vars(args))


class ServingClient(inference_server.InferenceServer):
    """Server and users; a unit of work is one request."""

    name = "serving"
    title = "Inference service"
    _users: load_test.LoadTest
    _capacity: float | None = None

    def warm_up(self) -> None:
        """Let the server get ready, settle the rate, and open the users' connections."""
        super().warm_up()
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
        self._users = self._load_test(clients=2 * self.args.max_batch, duration=CALIBRATION_SECONDS)
        self._users.load()
        self._users.warm_up()
        figures = self._run_users(client.Recorder())
        self._users.close()
        self._capacity = figures["qps"]
        rate = float(f"{OFFERED_SHARE * self._capacity:.3g}")
        console.note(
            f"closed-loop capacity {self._capacity:.1f} requests a second; offering {rate:g} "
            f"(the same again: --rate {rate:g})"
        )
        return rate

    def _make_users(self) -> load_test.LoadTest:
        args = self.args
        return self._load_test(
            rate=self._rate, arrival="poisson", slo_ms=args.slo_ms, duration=args.duration,
            max_connections=args.requests_in_flight, hold=args.hold,
        )  # fmt: skip

    def _load_test(self, **flags: object) -> load_test.LoadTest:
        """Return a load test with these flags, those of every load here, else its defaults."""
        args = load_test.parse_arguments([])
        args.server, args.upload = f"http://127.0.0.1:{self._port}", "raw"
        for name in ("seed", "client_index", "processes"):
            setattr(args, name, getattr(self.args, name))
        vars(args).update(flags)
        # Its files would repeat what this job's result holds.
        args.writes_files = False
        return load_test.LoadTest(args, self.require_working)

    def run_job(self, recorder: client.Recorder) -> dict:
        """Offer requests for ``--duration`` seconds and return the figures.

        Raises:
            StopRequested: The suite asked to stop.
            JobFailedError: Nothing was answered, or the server has ended.
        """
        figures = self._run_users(recorder)
        self.warnings += [text for text in self._users.warnings if text not in self.warnings]
        return figures | {
            "request_rate": self._rate,
            "closed_loop_capacity": self._capacity,
            "slo_ms": self.args.slo_ms,
        }

    def _run_users(self, recorder: client.Recorder) -> dict:
        figures = self._users.run_job(recorder)
        if not figures["successful_requests"]:
            errors = ", ".join(f"{kind} ({n})" for kind, n in figures["errors"].items())
            raise JobFailedError(
                f"the inference server answered no request ({errors or 'none was sent'}); look "
                "above for its message, and lower --rate or raise --duration if it is only slow"
            )
        return figures

    def _stop_on_signals(self) -> None:
        """Nothing: a signal ends all at once."""

    def reset(self) -> None:
        """Nothing: the next job is the next stretch of requests."""

    def close(self) -> None:
        """End the users, then the server; called again, and after a failure, without harm."""
        if hasattr(self, "_users"):
            self._users.close()
        super().close()

    def peak_memory_mib(self) -> float | None:
        """Return the most GPU memory that the job took; its processes end first, and count."""
        self.close()
        return super().peak_memory_mib()

    def settings(self) -> dict:
        """Return what was served, and the load."""
        args = self.args
        names = ("model", "slo_ms", "max_batch", "workers", "seed")
        return {
            **{name: getattr(args, name) for name in names},
            "max_connections": args.requests_in_flight,
            "weights": self._classifier.weights.kind,
            "rate": self._rate,
            "arrival": "poisson",
            "duration_seconds": args.duration,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        from workloads.inference.load_report import summary_rows

        capacity = figures["closed_loop_capacity"]
        measured = "" if capacity is None else f", half of the capacity of {capacity:.1f}"
        return [
            ("Model", f"{self.args.model}, {self._classifier.weights.kind} weights"),
            ("Offered", f"{figures['request_rate']:g} requests a second{measured}"),
            *summary_rows(figures, self.args.slo_ms),
        ]


if __name__ == "__main__":
    inference_server.serve(ServingClient(parse_arguments()))
