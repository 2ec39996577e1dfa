#!/usr/bin/env python3
"""Load test of the inference server: concurrent clients, each sending image after image.

    python3 workloads/inference/load_test.py --server http://localhost:5000 --clients 10

A closed loop: a client sends its next request when it has the answer to the last one, so the load
adapts to the server. Connections are kept alive, the JPEGs (random 224x224 RGB) are encoded once,
a few requests a client before the start are not counted. Exit code 1 when no request succeeded,
2 when the server cannot be reached.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.latency import summarize_latency_ms

if TYPE_CHECKING:
    from workloads.inference.load_generator import Measured

READY_PROBE_SECONDS = 0.25
COLLECT_SECONDS = 0.2


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser(
        "Send images to the inference server from concurrent clients.", uses_gpu=False
    )
    parser.add_argument(
        "--server", default="http://localhost:5000", metavar="URL",
        help="address of the server (default: http://localhost:5000)",
    )  # fmt: skip
    parser.add_argument(
        "--clients", type=cli.positive_int, default=10, help="concurrent clients (default: 10)"
    )
    parser.add_argument(
        "--duration", type=cli.positive_float, default=60.0,
        help="seconds to send requests for (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--upload", choices=("multipart", "raw"), default="multipart",
        help="multipart: field 'image', as curl -F; raw: the JPEG as the body (default: multipart)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=cli.positive_float, default=30.0,
        help="seconds a client waits for an answer (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up-requests", type=cli.non_negative_int, default=2,
        help="requests a client before the start, not counted (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--connect-seconds", type=cli.non_negative_float, default=10.0,
        help="seconds to wait for a server that is just being started (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--ready-seconds", type=cli.positive_float, default=300.0,
        help="seconds to wait for a server that loads its model (default: 300)",
    )  # fmt: skip
    return parser.parse_args()


class LoadTest(client.Workload):
    """Sends requests for a while; a unit of work is one successful request."""

    name = "load_test"
    title = "Load test"
    nothing_succeeded = False

    def load(self) -> None:
        """Wait for the server and start the client processes."""
        from workloads.inference.load_generator import LoadGenerator, LoadPlan

        args = self.args
        self._wait_for_server()
        self._plan = LoadPlan(
            url=f"{args.server.rstrip('/')}/predict",
            clients=args.clients,
            upload=args.upload,
            seed=args.seed,
            timeout_seconds=args.timeout,
            warm_up_requests=args.warm_up_requests,
        )
        self._new_generator = LoadGenerator
        self._generator = LoadGenerator(self._plan)

    def _wait_for_server(self) -> None:
        """Wait until ``/health`` answers with anything but 503.

        Raises:
            UsageError: Nobody answers, or the server does not get ready.
        """
        import urllib3

        args = self.args
        try:
            address = urllib3.util.parse_url(args.server)
        except urllib3.exceptions.LocationParseError:
            address = urllib3.util.Url()
        if address.scheme not in ("http", "https") or not address.host:
            raise cli.UsageError(
                f"--server {args.server} is no address; write it as http://localhost:5000"
            )
        pool = urllib3.connection_from_url(args.server, retries=False)
        path = f"{(address.path or '').rstrip('/')}/health"
        started_seconds = time.monotonic()
        answered = False
        while True:
            try:
                answered = pool.request("GET", path, timeout=5.0).status != 503
                waiting_for, limit_seconds = "does not get ready", args.ready_seconds
            except urllib3.exceptions.HTTPError:
                waiting_for, limit_seconds = "does not answer", args.connect_seconds
            if answered:
                pool.close()
                return
            if time.monotonic() - started_seconds > limit_seconds:
                raise cli.UsageError(
                    f"the server {args.server} {waiting_for}; start it with "
                    "python3 workloads/inference/inference_server.py, or name another with --server"
                )
            time.sleep(READY_PROBE_SECONDS)

    def warm_up(self) -> None:
        """Wait until every client has sent its uncounted requests."""
        self._generator.wait_until_prepared()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Send for ``--duration`` seconds and return the figures."""
        from workloads.inference.load_generator import Measured

        total = Measured()
        start_seconds = time.monotonic()
        self._generator.begin()
        with console.progress(int(self.args.duration), "seconds") as bar:
            reported = 0
            while (elapsed := time.monotonic() - start_seconds) < self.args.duration:
                if recorder.stop_requested:
                    break
                measured = self._generator.collect(
                    min(COLLECT_SECONDS, self.args.duration - elapsed)
                )
                self._take(total, measured, recorder)
                bar.advance(int(elapsed) - reported, f"{len(total.start_seconds)} requests")
                reported = int(elapsed)
        self._take(total, self._generator.end(), recorder)
        if elapsed < self.args.duration:
            recorder.check_stop()
        self.nothing_succeeded = not total.start_seconds
        return self._figures(total, time.monotonic() - start_seconds)

    @staticmethod
    def _take(total: Measured, measured: Measured, recorder: client.Recorder) -> None:
        total.add(measured)
        for start, duration in zip(measured.start_seconds, measured.duration_seconds, strict=True):
            recorder.unit("request", start, start + duration, latency=True)

    def _figures(self, total: Measured, elapsed_seconds: float) -> dict:
        succeeded = len(total.duration_seconds)
        failed = sum(total.failures.values())
        latency = summarize_latency_ms(total.duration_seconds)
        return {
            "total_requests": succeeded + failed,
            "successful_requests": succeeded,
            "failed_requests": failed,
            "success_rate_percent": 100.0 * succeeded / (succeeded + failed)
            if succeeded + failed
            else None,
            "mean_latency_ms": latency["mean_ms"],
            "median_latency_ms": latency["median_ms"],
            "std_latency_ms": latency["std_ms"],
            "min_latency_ms": latency["min_ms"],
            "max_latency_ms": latency["max_ms"],
            "p50_latency_ms": latency["p50_ms"],
            "p95_latency_ms": latency["p95_ms"],
            "p99_latency_ms": latency["p99_ms"],
            # Of successful requests: a refused connection fails in no time and is no throughput.
            "qps": succeeded / elapsed_seconds,
            "requests_per_minute": 60.0 * succeeded / elapsed_seconds,
            "elapsed_seconds": elapsed_seconds,
            "errors": dict(total.failures),
            "generator_processes": self._generator.processes,
            "generator_cpu_cores": total.cpu_seconds / elapsed_seconds,
        }

    def reset(self) -> None:
        """Start fresh clients for the next job."""
        self._generator.close()
        self._generator = self._new_generator(self._plan)
        self._generator.wait_until_prepared()

    def close(self) -> None:
        """End the client processes."""
        if hasattr(self, "_generator"):
            self._generator.close()

    def settings(self) -> dict:
        """Return what was sent, and where to."""
        args = self.args
        return {
            "server": args.server,
            "clients": args.clients,
            "duration_seconds": args.duration,
            "upload": args.upload,
            "timeout_seconds": args.timeout,
            "warm_up_requests": args.warm_up_requests,
            "seed": args.seed,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        rows = [
            ("Server", f"{self.args.server}, {self.args.clients} clients"),
            ("Total requests", f"{figures['total_requests']}"),
            ("Successful / failed",
             f"{figures['successful_requests']} / {figures['failed_requests']}"),
        ]  # fmt: skip
        if figures["total_requests"]:
            rows.append(("Success rate", f"{figures['success_rate_percent']:.1f} %"))
        if figures["successful_requests"]:
            rows += [
                ("Mean latency", f"{figures['mean_latency_ms']:.1f} ms"),
                ("Median (P50) latency", f"{figures['median_latency_ms']:.1f} ms"),
                ("P95 / P99 latency",
                 f"{figures['p95_latency_ms']:.1f} / {figures['p99_latency_ms']:.1f} ms"),
                ("Max latency", f"{figures['max_latency_ms']:.1f} ms"),
            ]  # fmt: skip
        rows += [
            ("Queries per second", f"{figures['qps']:.1f}"),
            ("Requests per minute", f"{figures['requests_per_minute']:.0f}"),
        ]
        rows += [(f"Failed: {kind}", str(n)) for kind, n in sorted(figures["errors"].items())]
        return rows


def main() -> int:
    """Run the load test; exit code 1 when no request succeeded."""
    workload = LoadTest(parse_arguments())
    code = client.run(workload)
    return cli.EXIT_FAILED if workload.nothing_succeeded else code


if __name__ == "__main__":
    cli.run_main(main)
