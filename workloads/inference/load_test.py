#!/usr/bin/env python3
"""Load test of the inference server: concurrent clients, each sending image after image.

    python3 workloads/inference/load_test.py --server http://localhost:5000 --clients 10
    python3 workloads/inference/load_test.py --rate 500 --slo-ms 50

By default a closed loop: a client sends its next request when it has the answer to the last one,
so the load adapts to the server and a stall hides the requests that it kept from being sent. With
--rate an open loop: requests are due at times drawn up front, and latency counts from when a
request was due. Connections are kept alive, the JPEGs (random 224x224 RGB) are encoded once, a few
requests a client before the start are not counted. Exit code 1 when no request succeeded, 2 when
the server cannot be reached.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.errors import EXIT_FAILED, UsageError
from workloads.inference import api_key

if TYPE_CHECKING:
    import numpy as np
    import urllib3

    from workloads.inference.load_figures import Requests
    from workloads.inference.load_generator import Measured
    from workloads.inference.load_messages import WorkerPlan

DISTINCT_IMAGES = 16
READY_PROBE_SECONDS = 0.25
COLLECT_SECONDS = 0.2
# Units of work: a request answered with status 200; one that failed, or was past its bound without
# an answer, which has no response time.
ANSWERED, MISSED = "request", "missed_request"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of this script, from the command line where no ``arguments`` are given."""
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
        "--rate", type=cli.positive_float, default=None, metavar="R",
        help="open loop: send R requests a second, whatever the answers do (default: closed loop)",
    )  # fmt: skip
    parser.add_argument(
        "--arrival", choices=("poisson", "constant"), default=None,
        help="gaps of the open loop: random, as from many users, or all the same "
        "(default: poisson)",
    )  # fmt: skip
    parser.add_argument(
        "--slo-ms", type=cli.positive_float, default=None, metavar="X",
        help="report the share of all requests that were answered within X milliseconds",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=cli.positive_int, default=None, metavar="N",
        help="processes that send (default: as the load needs, half the cores at most)",
    )  # fmt: skip
    parser.add_argument(
        "--max-connections", type=cli.positive_int, default=256, metavar="N",
        help="open loop: requests in flight at most; further ones wait, which counts "
        "(default: 256)",
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
    parser.add_argument(
        "--charts", action=argparse.BooleanOptionalAction, default=None,
        help="draw a latency histogram and a QPS timeline next to the result (default: by hand "
        "only, not with --events)",
    )  # fmt: skip
    api_key.add_flag(parser, "the server's key, if it wants one")
    args = parser.parse_args(arguments)
    api_key.take(args, parser)
    if args.arrival is not None and args.rate is None:
        parser.error("--arrival is about the open loop; give its --rate too")
    args.arrival = args.arrival or "poisson"
    return args


class LoadTest(client.Workload):
    """Sends requests for a while; a unit of work is one request."""

    name = "load_test"
    title = "Load test"
    nothing_succeeded = False

    def load(self) -> None:
        """Wait for the server and start the client processes."""
        from workloads.inference.load_generator import (
            LoadGenerator,
            default_processes,
            split_plan,
        )

        args = self.args
        self._wait_for_server()
        processes = args.processes or default_processes(args.clients, args.rate)
        self._offsets = self._schedule()
        self._generator = LoadGenerator(split_plan(self._plan(), processes, self._offsets))

    def _plan(self) -> WorkerPlan:
        from workloads.inference.load_messages import WorkerPlan
        from workloads.inference.load_requests import encode_images, encode_requests

        args = self.args
        url = f"{args.server.rstrip('/')}/predict"
        images = encode_images(DISTINCT_IMAGES, args.seed)
        return WorkerPlan(
            url=url,
            requests=encode_requests(url, images, args.upload, args.api_key),
            clients=args.clients,
            threads=args.clients if args.rate is None else max(args.clients, args.max_connections),
            duration_seconds=args.duration,
            timeout_seconds=args.timeout,
            warm_up_requests=args.warm_up_requests,
            offsets=None,
        )

    def _schedule(self) -> np.ndarray | None:
        """Return when the open loop intends to send; None for a closed loop.

        Raises:
            UsageError: Rate and duration give no request at all.
        """
        from workloads.inference.load_schedule import arrival_offsets

        args = self.args
        if args.rate is None:
            return None
        offsets = arrival_offsets(args.rate, args.arrival, args.duration, args.seed)
        if not len(offsets):
            raise UsageError(
                f"--rate {args.rate:g} for --duration {args.duration:g} seconds draws no request; "
                "raise one of them"
            )
        return offsets

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
            raise UsageError(
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
                self._require_key(pool, f"{(address.path or '').rstrip('/')}/stats")
                pool.close()
                return
            if time.monotonic() - started_seconds > limit_seconds:
                raise UsageError(
                    f"the server {args.server} {waiting_for}; start it with "
                    "python3 workloads/inference/inference_server.py, or name another with --server"
                )
            time.sleep(READY_PROBE_SECONDS)

    def _require_key(self, pool: urllib3.HTTPConnectionPool, path: str) -> None:
        """Raise UsageError where the server wants another API key than ours, or any."""
        key = self.args.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if pool.request("GET", path, headers=headers, timeout=5.0).status == 401:
            given = "does not take this API key" if key else "wants an API key"
            raise UsageError(
                f"the server {self.args.server} {given}; give its own by {api_key.VARIABLE}"
            )

    def warm_up(self) -> None:
        """Wait until every client has sent its uncounted requests."""
        self._generator.wait_until_prepared()

    def look_after(self) -> None:
        """Called a few times a second while requests are sent; may raise what ends the job."""

    def run_job(self, recorder: client.Recorder) -> dict:
        """Send for ``--duration`` seconds, wait for the last answers, return the figures."""
        start_seconds = self._generator.begin()
        with console.progress(int(self.args.duration), "seconds") as bar:
            reported = finished = 0
            while self._generator.busy:
                finished += self.collect(recorder, start_seconds)
                elapsed = int(min(time.monotonic() - start_seconds, self.args.duration))
                bar.advance(elapsed - reported, f"{finished} requests")
                reported = elapsed
        return self.figures(self._generator.measured, start_seconds)

    def collect(self, recorder: client.Recorder, start_seconds: float) -> int:
        """Record the requests that finish within a moment; return how many there were.

        Args:
            recorder: Where they are recorded.
            start_seconds: When the generator began.

        Raises:
            StopRequested: The suite asked to stop; the generator has stopped.
        """
        self.look_after()
        if recorder.stop_requested:
            self._record(self._generator.stop(), recorder)
            self._record_unanswered(recorder, start_seconds)
            recorder.check_stop()
        batches = self._generator.collect(COLLECT_SECONDS)
        self._record(batches, recorder)
        return sum(len(batch) for batch in batches)

    @staticmethod
    def _record(batches: list[np.ndarray], recorder: client.Recorder) -> None:
        for batch in batches:
            for intended, _, _, end, ok in batch.tolist():
                recorder.unit(ANSWERED if ok else MISSED, intended, end, latency=bool(ok))

    def _record_unanswered(self, recorder: client.Recorder, start_seconds: float) -> None:
        """After a stop: those due so long ago that they have missed the bound, still unanswered.

        Each is recorded at its intended time and without a duration, so that it lies in the window
        that the stop has ended: a backlog must not look better than answers that came late.
        """
        import numpy as np

        if self._offsets is None or self.args.slo_ms is None:
            return
        due = start_seconds + self._offsets
        past_bound = due[due < time.monotonic() - self.args.slo_ms / 1e3]
        for intended in np.setdiff1d(past_bound, self._generator.measured.table()[:, 0]).tolist():
            recorder.unit(MISSED, intended, intended)

    def figures(
        self, measured: Measured, start_seconds: float, duration_seconds: float | None = None
    ) -> dict:
        """Return the figures of a job that began at ``start_seconds``, of ``--duration`` if unsaid.

        The units are part of the names.
        """
        from workloads.inference import load_figures as figures_of

        args = self.args
        duration_seconds = duration_seconds or args.duration
        self._start_seconds = start_seconds
        self._requests = requests = figures_of.Requests.of(measured.table())
        last_seconds = requests.end.max() - start_seconds if len(requests.end) else 0.0
        elapsed_seconds = max(duration_seconds, float(last_seconds))
        figures = figures_of.outcome_figures(requests)
        succeeded = figures["successful_requests"]
        self.nothing_succeeded = not succeeded
        figures |= figures_of.latency_figures(requests.latency_seconds[requests.ok], "latency")
        figures |= {
            # Of successful requests: a refused connection fails in no time and is no throughput.
            "qps": succeeded / elapsed_seconds,
            "requests_per_minute": 60.0 * succeeded / elapsed_seconds,
            "elapsed_seconds": elapsed_seconds,
            "errors": dict(measured.failures),
            "connections_opened": measured.connections_opened,
        }
        if args.slo_ms is not None:
            figures["slo_attainment_percent"] = figures_of.slo_attainment_percent(
                requests, args.slo_ms
            )
        if args.rate is not None:
            figures |= figures_of.open_loop_figures(requests, start_seconds, duration_seconds)
            figures |= figures_of.latency_figures(requests.service_seconds[requests.ok], "service")
        figures |= self._generator_figures(measured, elapsed_seconds, figures)
        return figures | self._file_names()

    def _generator_figures(
        self, measured: Measured, elapsed_seconds: float, figures: dict
    ) -> dict[str, object]:
        """Return what the generator used, and flag the run if that was its limit."""
        from workloads.inference.load_figures import generator_limit

        busiest_percent = 100.0 * max(measured.cpu_seconds) / elapsed_seconds
        limit = generator_limit(figures.get("late_by_generator_percent"), busiest_percent)
        if limit is not None and not self.warnings:
            self.warn(limit)
        return {
            "generator_processes": self._generator.processes,
            "generator_cpu_cores": sum(measured.cpu_seconds) / elapsed_seconds,
            "generator_busiest_process_percent": busiest_percent,
            "generator_limited": limit is not None,
            "generator_limited_reason": limit,
        }

    def _file_names(self) -> dict[str, str]:
        """Return the files that ``write_files`` will write, by what they hold."""
        args = self.args
        stem = f"{self.name}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"
        # Under the suite every latency is in the event log, and nobody looks at a client's charts.
        self._files = {} if args.hold else {"raw_file": f"{stem}_requests.npy"}
        if self._draws_charts() and not self.nothing_succeeded:
            self._files["latency_chart"] = f"{stem}_latency.png"
            self._files["qps_chart"] = f"{stem}_qps.png"
        return self._files

    def _draws_charts(self) -> bool:
        args = self.args
        by_default = args.events is None if args.charts is None else args.charts
        return by_default and not args.hold

    def write_files(self) -> None:
        """Write the raw latencies and draw the charts, beside the result."""
        from workloads.inference.load_figures import save_raw

        requests: Requests | None = getattr(self, "_requests", None)
        if requests is None or not self._files:
            return
        folder = self.args.results_dir
        save_raw(folder / self._files["raw_file"], requests, self._start_seconds)
        if "latency_chart" not in self._files:
            return
        from workloads.inference import load_charts

        load_charts.draw_latency_histogram(
            folder / self._files["latency_chart"], 1e3 * requests.latency_seconds[requests.ok]
        )
        load_charts.draw_qps_timeline(
            folder / self._files["qps_chart"], requests.end - self._start_seconds, requests.ok,
            self.args.duration, self.args.rate,
        )  # fmt: skip

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
            "loop": "closed" if args.rate is None else "open",
            "rate": args.rate,
            "arrival": None if args.rate is None else args.arrival,
            "max_connections": None if args.rate is None else args.max_connections,
            "slo_ms": args.slo_ms,
            "upload": args.upload,
            "timeout_seconds": args.timeout,
            "warm_up_requests": args.warm_up_requests,
            "seed": args.seed,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        from workloads.inference.load_summary import load_in_words, summary_rows

        where = f"{self.args.server}, {load_in_words(self.args)}"
        return [("Server", where), *summary_rows(figures, self.args)]


def main() -> int:
    """Run the load test; exit code 1 when no request succeeded."""
    workload = LoadTest(parse_arguments())
    code = client.run(workload)
    workload.write_files()
    return EXIT_FAILED if workload.nothing_succeeded else code


if __name__ == "__main__":
    cli.run_main(main)
