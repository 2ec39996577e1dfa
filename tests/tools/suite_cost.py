#!/usr/bin/env python3
"""Measure what the suite itself costs: its sampler, its start signal, the host's cores.

    python3 tests/tools/suite_cost.py                           # 8 clients of batch inference
    python3 tests/tools/suite_cost.py --clients 4 --mode mps -- --model resnet18 --batch-size 8

The suite's own launcher starts the clients under the mode asked for, which must be in force. While
they run on, windows with the sampler off and on take turns; what differs between the two windows
of a pair is the sampler. Flags behind `--` go to every client. The result is printed and written
as `suite_cost.json`. Without a GPU it runs as a CPU demonstration.

Exit codes: 0 measured, 1 a client or the sampler failed, 2 usage, 3 no usable GPU, 4 the mode is
not in force, 130 interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarking import cli
from benchmarking.drivers import program
from benchmarking.hardware.gpu_samples import summarize_samples
from benchmarking.hardware.host_cpu import read_process_trees
from benchmarking.measuring.client import Client
from benchmarking.measuring.co_run_records import start_skew_ms
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.measuring.sampler import Sampler
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.modes.names import MODES
from benchmarking.planning.request import Request
from benchmarking.records.run_folder import utc_now, write_json_atomic
from benchmarking.records.types import Sample
from benchmarking.suite.setup import Setup, prepared

TIMEOUT_SECONDS = 1800.0
# From go, or from the sampler's start or end, until a window may begin.
SETTLE_SECONDS = 1.0

Window = dict[str, Any]


def main() -> int:
    """Prepare, measure, print and write what was found; return the exit code."""
    options = parse_arguments()
    fix = "or name another --output-dir"
    return program.exit_code_of(lambda stop: run(options, stop), options.output_dir, fix)


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = cli.OneLineParser(
        description="Measure the cost of the sampler, the start skew and the host's cores.",
        epilog="Flags behind -- go to every client, such as: -- --model resnet18 --batch-size 8",
    )
    add = parser.add_argument
    add("--clients", type=cli.positive_int, default=8, help="(default: 8)")
    add("--seconds", type=cli.positive_float, default=10.0, metavar="S",
        help="length of a window (default: 10)")  # fmt: skip
    add("--repeats", type=cli.positive_int, default=5, metavar="R",
        help="pairs of windows, one without and one with the sampler (default: 5)")  # fmt: skip
    add("--mode", choices=MODES[:3], default=MODES[0], help="(default: %(default)s)")
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--output-dir", type=Path, default=Path("results/suite_cost"),
        help="folder of the result (default: results/suite_cost)")  # fmt: skip
    add("arguments", nargs="*", metavar="-- FLAGS", help="flags of every client")
    return parser.parse_args()


def run(options: argparse.Namespace, stop: StopSignal) -> int:
    """Do what `main` says; raises `SuiteError` and `RunEnded`."""
    program.make_folder("--output-dir", options.output_dir)
    # Short units give precise rates.
    request = Request(
        mode=options.mode, mix="inference", counts=(options.clients,), gpu=options.gpu
    )
    with prepared(request) as setup, tempfile.TemporaryDirectory(prefix="suite-cost-") as folder:
        seen, windows = run_clients(options, setup, stop, Path(folder))
    found = describe(options, setup, seen, windows)
    write_json_atomic(options.output_dir / "suite_cost.json", found)
    print_cost(found)
    print(f"results: {options.output_dir / 'suite_cost.json'}")
    return cli.EXIT_COMPLETE


def run_clients(
    options: argparse.Namespace, setup: Setup, stop: StopSignal, folder: Path
) -> tuple[CoRunResult, list[Window]]:
    """Start the clients by the suite's launcher and measure while they run."""
    plan = setup.plan.map_clients(lambda client: client.with_arguments(options.arguments))
    planned = program.resolve_jobs(plan, stop, say).co_runs[0]
    rule = program.UntilOver(min_seconds=0.0)
    given_up = threading.Event()
    measuring: list[Future[list[Window]]] = []
    gpu_uuid = setup.gpu["uuid"] if setup.gpu else None

    def before_go(clients: list[Client]) -> None:
        say(f"measuring {2 * options.repeats} windows of {options.seconds:g} s")
        arguments = (options, clients, gpu_uuid, folder, rule.over, given_up)
        measuring.append(pool.submit(measure, *arguments))

    with ThreadPoolExecutor(1) as pool:
        # A second of settling and five for the sampler's start and end come to each window.
        windows_seconds = 2 * options.repeats * (options.seconds + SETTLE_SECONDS + 5)
        try:
            seen = program.launch(
                planned, folder, stop, say, rule, timeout=TIMEOUT_SECONDS + windows_seconds,
                before_go=before_go,
            )  # fmt: skip
        finally:
            given_up.set()
    if seen.outcome == "interrupted":
        raise cli.RunEnded("interrupted", cli.EXIT_INTERRUPTED)
    if seen.outcome != "ok":
        tails = [c.stderr_tail[-1] for c in seen.clients if c.status != "ok" and c.stderr_tail]
        said = f" ({tails[0]})" if tails else ""
        raise cli.SuiteError(f"{seen.reason}{said}", cli.EXIT_FAILED)
    return seen, measuring[0].result()


def measure(
    options: argparse.Namespace, clients: Sequence[Client], gpu_uuid: str | None, folder: Path,
    over: threading.Event, given_up: threading.Event,
) -> list[Window]:  # fmt: skip
    """Measure pairs of windows, then set `over`; times on CLOCK_MONOTONIC, cores that were used.

    The order within a pair changes from pair to pair, so that a drift cancels out. Raises
    `SuiteError` where the sampler fails.
    """
    windows: list[Window] = []
    try:
        for number in range(2 * options.repeats):
            is_sampled = number % 4 in (1, 2)  # off on, on off, off on, ...
            output, log = folder / f"samples-{number}.jsonl", folder / f"samples-{number}.log"
            with Sampler(output, log, gpu=gpu_uuid) if is_sampled else nullcontext() as sampler:
                given_up.wait(SETTLE_SECONDS)
                pids = [*(client.pid for client in clients), sampler.pid if sampler else None]
                before, own_before = read_process_trees(pids), time.process_time()
                start = time.monotonic()
                if given_up.wait(options.seconds):
                    return windows  # of clients that have failed, or were told to stop
                end = time.monotonic()
                own_seconds, after = time.process_time() - own_before, read_process_trees(pids)
                samples = sampler.samples_past(end) if sampler else []
            if sampler and sampler.failure:
                raise cli.SuiteError(sampler.failure, cli.EXIT_FAILED)
            *client_cores, sampler_cores = [
                new.seconds_since(old) / (end - start) if old and new else None
                for old, new in zip(before, after, strict=True)
            ]
            windows.append({
                "is_sampled": is_sampled,
                "start_seconds": start,
                "end_seconds": end,
                "client_cores": client_cores,
                "suite_cores": own_seconds / (end - start),
                "sampler_cores": sampler_cores,
                "gpu": summarize_samples(msgspec.convert(samples, list[Sample]), start, end)
                if samples else None,
            })  # fmt: skip
        return windows
    finally:
        over.set()


# --- figures --------------------------------------------------------------------------------------


def describe(
    options: argparse.Namespace, setup: Setup, seen: CoRunResult, windows: Sequence[Window]
) -> dict[str, Any]:
    """Return everything that was found as plain data for JSON."""
    for window, rates in zip(windows, work_rates(seen, windows), strict=True):
        window["work_rates"] = rates
    cost = sampler_cost_percent(windows)
    return {
        "schema_version": 2,
        "created_at": utc_now(),
        "command": sys.argv,
        "mode": setup.mode.name,
        "gpu": setup.gpu and dict(setup.gpu),
        "host_cores": setup.cores,
        "client_command": list(seen.planned.command_of(seen.planned.clients[0])),
        "window_seconds": options.seconds,
        "sampler_cost_percent": cost and vars(cost),
        "go_skew_ms": seen.go_skew_ms,
        "start_skew_ms": start_skew_ms(seen.clients),
        "client_cores": mean(cores for window in windows for cores in window["client_cores"]),
        "suite_cores": mean(window["suite_cores"] for window in windows),
        "sampler_cores": mean(window["sampler_cores"] for window in windows),
        "windows": msgspec.to_builtins(windows),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values, `None` without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def work_rates(seen: CoRunResult, windows: Sequence[Window]) -> list[list[float]]:
    """Return each client's work a second by window, in mean-unit seconds of its kind of unit.

    A unit that lies partly in the window counts by that part: with whole units only, the edges
    would cost a precision of one unit in however many there are.
    """
    units: list[list[tuple[str, float, float]]] = [
        [
            (event["kind"], begin, duration)
            for event in client.events if event["event"] == "units"
            for begin, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True)
        ]
        for client in seen.clients
    ]  # fmt: skip
    durations: dict[str, list[float]] = {}
    for kind, _, duration in (unit for own in units for unit in own):
        durations.setdefault(kind, []).append(duration)
    worth = {kind: statistics.fmean(values) for kind, values in durations.items()}

    def rate(own: Sequence[tuple[str, float, float]], start: float, end: float) -> float:
        work = 0.0
        for kind, begin, duration in own:
            inside = min(begin + duration, end) - max(begin, start)
            if inside > 0:
                work += worth[kind] * min(1.0, inside / duration)
        return work / (end - start)

    return [[rate(own, w["start_seconds"], w["end_seconds"]) for own in units] for w in windows]


def sampler_cost_percent(windows: Sequence[Window]) -> Estimate | None:
    """Return by how many percent the sampler lowers throughput; two by two, windows are pairs."""
    rates = [(window["is_sampled"], sum(window["work_rates"])) for window in windows]
    pairs = [dict(pair) for pair in zip(rates[::2], rates[1::2], strict=True)]
    ratio = estimate(pair[True] / pair[False] for pair in pairs if pair[False] > 0)
    if ratio is None:
        return None
    average, low, high, *raw = (
        100 * (1 - value) for value in (ratio.mean, ratio.high, ratio.low, *ratio.values)
    )
    return Estimate(average, low, high, tuple(raw), ratio.is_interval)


def print_cost(found: dict[str, Any]) -> None:
    """Print what matters of `suite_cost.json`, next to what the suite may cost."""
    cost = found["sampler_cost_percent"]
    spread = "an unknown part"
    if cost:
        spread = "{mean:.2f} % ({low:.2f} to {high:.2f}, n = {0})".format(
            len(cost["values"]), **cost
        )
    print(f"sampler costs {spread} of throughput (aim: under 0.5 %, by the whole interval)")
    print(f"go sent within {found['go_skew_ms']:.3g} ms, first units within "
          f"{found['start_skew_ms']:.3g} ms (aim: 50 ms)")  # fmt: skip
    cores = {name: found[f"{name}_cores"] for name in ("client", "suite", "sampler")}
    used = ", ".join(f"{name} {'?' if n is None else f'{n:.3g}'}" for name, n in cores.items())
    print(f"cores used: {used}, of {found['host_cores']}")


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[cost] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
