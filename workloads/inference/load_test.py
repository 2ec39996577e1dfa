#!/usr/bin/env python3
"""Load test of the inference server: concurrent clients, each sending image after image.

    python3 workloads/inference/load_test.py --server http://localhost:5000 --clients 10
    python3 workloads/inference/load_test.py --rate 500 --slo-ms 50

By default a closed loop: a client sends its next request when it has the answer to the last one,
so the load adapts to the server and a stall hides the requests that it kept from being sent. With
--rate an open loop: requests are due at times drawn up front, and latency counts from when a
request was due. Failed and timed-out requests count as infinitely late in the percentiles.
Connections are kept alive, the JPEGs (random 224x224 RGB) are encoded once, a few requests a client
before the start are not counted, proxies that the environment names are not used. Exit code 1 when
no request succeeded, 2 when the server cannot be reached or this machine is too small for the load.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console, results
from workloads.common.errors import EXIT_FAILED, UsageError, first_line
from workloads.common.files import require_writable
from workloads.inference import api_key

if TYPE_CHECKING:
    import numpy as np
    from aiohttp import ClientSession
    from yarl import URL

    from workloads.inference.load_generator import LoadGenerator, Measured

DISTINCT_IMAGES = 16
# Held, requests are drawn for so long: windows of the suite are shorter unless it is told so.
STEADY_SECONDS = 1800.0
READY_PROBE_SECONDS, PROBE_SECONDS, WAITING_LINE_SECONDS = 0.25, 5.0, 5.0
COLLECT_SECONDS = 0.2
# Units of work: a request answered with status 200; one that failed, or was past its bound without
# an answer, which has no response time.
ANSWERED, MISSED = "request", "missed_request"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of this script, from the command line where no ``arguments`` are given."""
    parser = cli.workload_parser(
        "Send images to the inference server from concurrent clients.", uses_gpu=False
    )
    flag = cli.flags(parser, "the server")
    flag("--server", "http://localhost:5000", "address of the server", metavar="URL")
    flag("--connect-seconds", 10.0, "seconds to wait for a server that is just being started",
         type=cli.non_negative_float, metavar="S")  # fmt: skip
    flag("--ready-seconds", 300.0, "seconds to wait for a server that loads its model", metavar="S")
    api_key.add_flag(flag, "the server's key, if it wants one")
    flag = cli.flags(parser, "the load")
    flag("--clients", 10, "concurrent clients", metavar="N")
    flag("--duration", 60.0, "seconds to send requests for", metavar="S")
    flag("--rate", None, "open loop: send R requests a second, whatever the answers do "
         "(default: closed loop)", type=cli.positive_float, metavar="R")  # fmt: skip
    flag("--arrival", None, "gaps of the open loop: random, as from many users, or all the same "
         "(default: poisson)", choices=("poisson", "constant"))  # fmt: skip
    flag("--upload", "multipart", "multipart: field 'image', as curl -F; raw: the JPEG as the body",
         choices=("multipart", "raw"))  # fmt: skip
    flag("--timeout", 30.0, "seconds a client waits for an answer", metavar="S")
    flag("--warm-up-requests", 2, "requests a client before the start, not counted",
         type=cli.non_negative_int, metavar="N")  # fmt: skip
    add_generator_flags(flag)
    flag = cli.flags(parser, "the report")
    flag("--slo-ms", None, "report the share of all requests that were answered within X "
         "milliseconds", type=cli.positive_float, metavar="X")  # fmt: skip
    flag("--charts", None, "draw a latency histogram and a QPS timeline next to the result "
         "(default: by hand only, not with --events)",
         action=argparse.BooleanOptionalAction)  # fmt: skip
    args = parser.parse_args(arguments)
    api_key.take(args, parser)
    args.writes_files = not args.hold
    if args.rate is not None:
        args.arrival = args.arrival or "poisson"
    elif args.arrival is not None:
        parser.error("--arrival is about the open loop; give its --rate too")
    return args


def add_generator_flags(flag: Callable[..., None]) -> None:
    """Add the flags of the generator, which the serving client has too."""
    flag("--processes", None, "processes that send (default: as the load needs, half the cores at "
         "most)", type=cli.positive_int, metavar="N")  # fmt: skip
    flag("--max-connections", 256, "open loop: requests in flight at most; further ones wait, "
         "which counts", metavar="N")  # fmt: skip


class LoadTest(client.Workload):
    """Sends requests for a while; a unit of work is one request.

    By hand the job is one run of the generator. Held, a job is the next stretch of one long run: a
    pause until the last answer has come would give a server that falls behind time to catch up, and
    less would be offered the slower it is.
    """

    name = "load_test"
    title = "Load test"
    nothing_succeeded = False
    _url: URL
    _generator: LoadGenerator

    def __init__(
        self, args: argparse.Namespace, look_after: Callable[[], None] = lambda: None
    ) -> None:
        """Keep the parsed flags; ``look_after`` is called all along and may raise what ends all."""
        super().__init__(args)
        self._look_after = look_after
        # What is written next to the result, by its key in the result.
        self.files: dict[str, Path] = {}

    def wait_for_server(self) -> None:
        """Wait until the server is ready; this is no start-up of ours."""
        self._url = server_url(self.args.server)
        asyncio.run(wait_until_ready(self._url, self.args))

    def load(self) -> None:
        """Start the processes of the load generator."""
        from workloads.inference import load_generator, load_requests

        args = self.args
        if not hasattr(self, "_url"):
            self.wait_for_server()
        seconds = max(STEADY_SECONDS, args.duration) if args.hold else args.duration
        self.offsets = self.draw_offsets(seconds)
        images = load_requests.encode_images(DISTINCT_IMAGES, args.seed)
        bodies, content_type = load_requests.encode_bodies(images, args.upload)
        plan = load_generator.LoadPlan(
            url=str(self._url / "predict"),
            headers={"Content-Type": content_type, **api_key.headers(args.api_key)},
            bodies=bodies,
            clients=args.clients,
            connections=max(args.clients, args.max_connections if args.rate else 0),
            duration_seconds=seconds,
            timeout_seconds=args.timeout,
            warm_up_requests=args.warm_up_requests,
            offsets=None if self.offsets is None else self.offsets.tolist(),
        )
        processes = args.processes or load_generator.default_processes(args.clients, args.rate)
        self._generator = load_generator.LoadGenerator(plan, processes)
        self._has_begun = False

    def draw_offsets(self, seconds: float) -> np.ndarray | None:
        """Return when the open loop intends to send, in seconds; None for a closed loop.

        Raises:
            UsageError: Rate and duration give no request at all.
        """
        from workloads.inference.load_requests import arrival_offsets

        args = self.args
        if args.rate is None:
            return None
        offsets = arrival_offsets(args.rate, args.arrival, seconds, self.order_seed)
        if not len(offsets):
            raise UsageError(
                f"--rate {args.rate:g} for --duration {args.duration:g} seconds draws no request; "
                "raise one of them"
            )
        return offsets

    def warm_up(self) -> None:
        """Wait until every client has sent its uncounted requests."""
        self._generator.wait_until_prepared()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Send for ``--duration`` seconds; by hand, wait for the last answers; return the figures.

        Raises:
            StopRequested: The suite asked to stop.
        """
        args = self.args
        if self._has_begun and not self._generator.running:
            self.close()  # a generator runs once
            self.load()
            self.warm_up()
        if not self._has_begun:
            self._start_seconds = self._generator.begin()
            self._has_begun = True
        begin_seconds = time.monotonic() if args.hold else self._start_seconds
        end_seconds = begin_seconds + args.duration
        reports: list[Measured] = []
        with console.progress(int(args.duration), "seconds") as bar:
            shown = finished = 0
            while self._generator.running:
                arrived = self.collect(recorder)
                reports += arrived
                finished += sum(len(report.requests) for report in arrived)
                elapsed = int(min(time.monotonic() - begin_seconds, args.duration))
                bar.advance(elapsed - shown, f"{finished} requests")
                shown = elapsed
                if args.hold and reports and time.monotonic() >= end_seconds:
                    break
        if not reports:  # the job before had the last ones, and only the end was still to come
            return self.run_job(recorder)
        return self._figures(reports, begin_seconds)

    def collect(self, recorder: client.Recorder) -> list[Measured]:
        """Record the requests that finish within a moment, and return them.

        Raises:
            StopRequested: The suite asked to stop; the generator has stopped.
        """
        self._look_after()
        generator, stops = self._generator, recorder.stop_requested
        reports = generator.stop() if stops else generator.collect(COLLECT_SECONDS)
        for report in reports:
            for intended, _, _, end, failure in report.requests.tolist():
                kind = MISSED if failure else ANSWERED
                recorder.unit(kind, intended, end, latency=kind == ANSWERED)
        if stops:
            self._record_unanswered(recorder)
            recorder.check_stop()
        return reports

    def _record_unanswered(self, recorder: client.Recorder) -> None:
        """After a stop: those due so long ago that they have missed the bound, still unanswered.

        Each is recorded at its intended time and without a duration, so that it lies in the window
        that the stop has ended: a backlog must not look better than answers that came late.
        """
        import numpy as np

        if self.offsets is None or self.args.slo_ms is None:
            return
        due = self._start_seconds + self.offsets
        past_bound = due[due < time.monotonic() - self.args.slo_ms / 1e3]
        finished = [report.requests["intended"] for report in self._generator.reports]
        for intended in np.setdiff1d(past_bound, np.concatenate([past_bound[:0], *finished])):
            recorder.unit(MISSED, float(intended), float(intended))

    def _figures(self, reports: list[Measured], begin_seconds: float) -> dict:
        from workloads.inference import load_generator, load_report

        args = self.args
        measured = load_generator.Measured.together(reports)
        figures = load_report.load_figures(
            measured, begin_seconds, args.duration, args.slo_ms, args.rate is not None
        )
        self.nothing_succeeded = not figures["successful_requests"]
        limit = figures["generator_limited_reason"]
        if limit is not None and not self.warnings:
            self.warn(limit)
        # Under the suite every latency is in the event log, and nobody looks at a client's charts.
        if args.writes_files:
            self._write_files(measured.requests, figures)
        if args.hold and self.offsets is not None:
            # Those that finished are not those that were due where answers are late.
            due = self._start_seconds + self.offsets - begin_seconds
            offered = int(((due >= 0) & (due < args.duration)).sum())
            figures["offered_rate"] = offered / args.duration
        return figures

    def _write_files(self, requests: np.ndarray, figures: dict) -> None:
        """Write the raw latencies and draw the charts, next to the result, and name them there."""
        from workloads.inference import load_report

        args, start_seconds = self.args, self._start_seconds
        stem = results.stem_of(self.name)
        self.files["raw_file"] = args.results_dir / f"{stem}_requests.npy"
        load_report.save_raw(self.files["raw_file"], requests, start_seconds)
        draws_charts = args.events is None if args.charts is None else args.charts
        if draws_charts and not self.nothing_succeeded:
            latency, qps = (args.results_dir / f"{stem}_{what}.png" for what in ("latency", "qps"))
            try:
                load_report.draw_charts(latency, qps, requests, figures, start_seconds, args.rate)
                self.files |= {"latency_chart": latency, "qps_chart": qps}
            # Whatever ails matplotlib, and whoever does not wait for it: the figures are there.
            except (Exception, KeyboardInterrupt) as error:
                self.warn(
                    f"the charts could not be drawn ({first_line(error)}); all figures are in the "
                    "result"
                )
        figures |= {key: path.name for key, path in self.files.items()}

    def close(self) -> None:
        """End the processes."""
        if hasattr(self, "_generator"):
            self._generator.close()

    def settings(self) -> dict:
        """Return what was sent, and where to."""
        args, is_open = self.args, self.args.rate is not None
        names = ("server", "clients", "rate", "arrival", "slo_ms", "upload", "warm_up_requests",
                 "seed")  # fmt: skip
        return {
            **{name: getattr(args, name) for name in names},
            "duration_seconds": args.duration,
            "timeout_seconds": args.timeout,
            "loop": "open" if is_open else "closed",
            "max_connections": args.max_connections if is_open else None,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        from workloads.inference.load_report import summary_rows

        args = self.args
        load = f"{args.clients} clients"
        if args.rate is not None:
            load = f"open loop, {args.rate:g} requests a second, {args.arrival} arrivals"
        return [("Server", f"{self._url}, {load}"), *summary_rows(figures, args.slo_ms)]


def server_url(text: str) -> URL:
    """Return the address of a server, percent-encoded.

    Raises:
        UsageError: It is none, or holds a password, which would get into the result.
    """
    from yarl import URL

    try:
        url = URL(text)
        # The resolver raises for what is no name, such as one with an empty label.
        is_address = url.scheme in ("http", "https") and (url.host or "").encode("idna")
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--server {text} is no address; write it as http://localhost:5000")
    if url.user is not None or url.password is not None:
        raise UsageError(
            "--server takes no user name and password, which would be written into the result; "
            f"give the server's key by {api_key.VARIABLE}"
        )
    return url.with_query(None).with_fragment(None)


async def wait_until_ready(url: URL, args: argparse.Namespace) -> None:
    """Wait until ``/health`` answers with anything but 503.

    Raises:
        UsageError: Nobody answers, the server does not get ready, or wants another API key.
    """
    import aiohttp

    started_seconds, next_line_seconds = time.monotonic(), 0.0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_SECONDS)) as session:
        while True:
            try:
                async with session.get(url / "health") as response:
                    is_ready = response.status != 503
                if is_ready:
                    await _require_key(session, url, args)
                    return
                state, limit_seconds = "does not get ready", args.ready_seconds
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                reason = first_line(getattr(error, "os_error", error))
                state, limit_seconds = f"does not answer ({reason})", args.connect_seconds
            waited_seconds = time.monotonic() - started_seconds
            if waited_seconds > limit_seconds:
                raise UsageError(
                    f"the server {args.server} {state}; start it with "
                    "python3 workloads/inference/inference_server.py, or name another with --server"
                )
            if waited_seconds >= next_line_seconds:
                next_line_seconds += WAITING_LINE_SECONDS
                so_far = f"{waited_seconds:.0f} of {limit_seconds:g} s"
                console.note(f"waiting for the server at {url} ... ({state} yet, {so_far})")
            await asyncio.sleep(READY_PROBE_SECONDS)


async def _require_key(session: ClientSession, url: URL, args: argparse.Namespace) -> None:
    async with session.get(url / "stats", headers=api_key.headers(args.api_key)) as response:
        if response.status == 401:
            given = "does not take this API key" if args.api_key else "wants an API key"
            raise UsageError(
                f"the server {args.server} {given}; give its own by {api_key.VARIABLE}"
            )


def main() -> int:
    """Run the load test; exit code 1 when no request succeeded."""
    workload = LoadTest(parse_arguments())
    args = workload.args
    if not (args.resolve or args.hold):
        require_writable(args.results_dir)
        workload.wait_for_server()
    code = client.run(workload)
    for key, path in workload.files.items():
        print(f"{key.replace('_', ' ')}: {path}", flush=True)
    return EXIT_FAILED if workload.nothing_succeeded else code


if __name__ == "__main__":
    cli.run_main(main)
