#!/usr/bin/env python3
"""Measure what the suite itself costs: its sampler, its start signal, the host's cores.

    python3 benchmarking/suite_cost.py                           # 8 clients of batch inference
    python3 benchmarking/suite_cost.py --clients 4 --mode mps -- --model resnet18 --batch-size 8

The suite's own launcher starts the clients under the mode asked for, which must be in force. While
they run on, windows with the sampler off and on take turns; what differs between the two windows
of a pair is the sampler. Flags behind `--` go to every client. The result is printed and written
as `suite_cost.json`. Without a GPU it runs as a CPU demonstration.

Exit codes: 0 measured, 1 a client or the sampler failed, 2 usage, 3 no usable GPU, 4 the mode is
not in force, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cost import text as cost_text
from benchmarking.cost.windows import (
    SETTLE_SECONDS,
    UntilMeasured,
    Window,
    WindowMeter,
    mean_unit_seconds,
    sampler_cost_percent,
    work_rate,
)
from benchmarking.hardware import host_limit
from benchmarking.records.run_folder import ClientPaths, utc_now, write_json_atomic
from benchmarking.speed.process_run import Interrupted, Processes, RunFailedError
from benchmarking.suite.cli import (
    EXIT_COMPLETE,
    EXIT_INTERRUPTED,
    OneLineParser,
    SuiteError,
    positive_float,
    positive_int,
)
from benchmarking.suite.co_run_records import start_skew_ms
from benchmarking.suite.launcher import (
    OUTCOME_INTERRUPTED,
    OUTCOME_OK,
    Client,
    CoRunResult,
    Launcher,
    StopSignal,
    Timeouts,
    client_base_environment,
)
from benchmarking.suite.plan import MIXES, MODES, Plan, PlannedCoRun
from benchmarking.suite.request import Request
from benchmarking.suite.setup import Setup, no_mps_folder, prepare

SCHEMA_VERSION = 1
READY_TIMEOUT_SECONDS = 1800.0
# Starting a sampler, and reading its last sample.
SAMPLER_SECONDS = 5.0


def main() -> int:
    """Prepare, measure, print and write what was found; return the exit code."""
    options = parse_arguments()
    try:
        with StopSignal().watching() as stop_signal, no_mps_folder() as empty:
            setup = prepare(request_from(options), empty, os.environ, require_mode=True)
            found = measure(options, setup, stop_signal)
    except (SuiteError, RunFailedError) as error:
        print(f"suite_cost.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted:
        print("suite_cost.py: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    write_json_atomic(options.output_dir / "suite_cost.json", found)
    print(cost_text.summary(found))
    print(f"results: {options.output_dir / 'suite_cost.json'}")
    return EXIT_COMPLETE


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = OneLineParser(
        description="Measure the cost of the sampler, the start skew and the host's cores.",
        epilog="Flags behind -- go to every client, such as: -- --model resnet18 --batch-size 8",
    )
    add = parser.add_argument
    add("--clients", type=positive_int, default=8, help="(default: 8)")
    add("--seconds", type=positive_float, default=10.0, metavar="S",
        help="length of a window (default: 10)")  # fmt: skip
    add("--repeats", type=positive_int, default=5, metavar="R",
        help="pairs of windows, one without and one with the sampler (default: 5)")  # fmt: skip
    add("--mode", choices=MODES[:3], default=MODES[0], help="(default: %(default)s)")
    add("--mix", choices=sorted(MIXES), default="inference",
        help="the clients' jobs; short units give precise rates (default: inference)")  # fmt: skip
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    add("--output-dir", type=Path, default=Path("results/suite_cost"),
        help="folder of the result (default: results/suite_cost)")  # fmt: skip
    add("arguments", nargs="*", metavar="-- FLAGS", help="flags of every client")
    options = parser.parse_args()
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {options.output_dir}: {error.strerror}; name another folder")
    return options


def request_from(options: argparse.Namespace) -> Request:
    """Return what is asked of the suite's own preparation: one co-run, no baseline of its own."""
    return Request(
        mode=options.mode, mix=options.mix, counts=(options.clients,), gpu=options.gpu,
        device=options.device,
    )  # fmt: skip


def measure(options: argparse.Namespace, setup: Setup, stop_signal: StopSignal) -> dict[str, Any]:
    """Run the clients with the sampler on and off in turn; return the result as plain data.

    Raises:
        RunFailedError: A client or the sampler failed.
        Interrupted: Somebody asked to end; no process is left.
    """
    processes = Processes(stop_signal, READY_TIMEOUT_SECONDS)
    planned = prepare_clients(setup.plan, options.arguments, processes)
    first = shlex.join(planned.command_of(planned.clients[0]))
    say(f"{options.clients} clients get ready: {first}")
    with tempfile.TemporaryDirectory(prefix="suite-cost-") as name:
        outcome, windows = run_clients(options, setup, planned, stop_signal, Path(name))
    return describe(options, setup, outcome, windows)


def prepare_clients(plan: Plan, arguments: Sequence[str], processes: Processes) -> PlannedCoRun:
    """Give the clients their flags, and let each job find its data once."""
    plan = plan.map_clients(lambda client: client.with_arguments(arguments))
    for job_key, client in plan.jobs().items():
        say(f"resolving data and weights: {client.label}")
        answer = processes.run_for_json(
            client.command[1], [*client.command[2:], "--resolve"], client.environment
        )
        plan = plan.map_clients(
            lambda other, key=job_key, found=answer["arguments"]: (
                other.with_arguments(found) if other.job_key == key else other
            )
        )
    return plan.co_runs[0]


def run_clients(
    options: argparse.Namespace,
    setup: Setup,
    planned: PlannedCoRun,
    stop_signal: StopSignal,
    folder: Path,
) -> tuple[CoRunResult, list[Window]]:
    """Start the clients by the suite's launcher and measure while they run."""
    rule = UntilMeasured(min_seconds=0.0)
    meter: WindowMeter | None = None

    def before_go(clients: list[Client]) -> None:
        nonlocal meter
        say(f"measuring {2 * options.repeats} windows of {options.seconds:g} s")
        meter = WindowMeter(
            clients, seconds=options.seconds, repeats=options.repeats, folder=folder,
            gpu_uuid=setup.gpu["uuid"] if setup.gpu else None, measured=rule.measured,
        )  # fmt: skip
        meter.start()

    window_seconds = options.seconds + SETTLE_SECONDS + SAMPLER_SECONDS
    launcher = Launcher(
        client_base_environment(os.environ),
        timeouts=Timeouts(timeout=READY_TIMEOUT_SECONDS + 2 * options.repeats * window_seconds),
        stop_signal=stop_signal, say=say,
    )  # fmt: skip
    outcome = launcher.run(planned, lambda _, client: client_paths(folder, client), rule, before_go)
    if meter is not None:
        meter.give_up()
        meter.join()
    if outcome.outcome == OUTCOME_INTERRUPTED:
        raise Interrupted
    if outcome.outcome != OUTCOME_OK or meter is None or meter.failure:
        raise RunFailedError((meter and meter.failure) or what_failed(outcome))
    return outcome, meter.windows


def client_paths(folder: Path, client: int) -> ClientPaths:
    """Return where a client's output goes."""
    kinds = ("events.jsonl", "stdout.log", "stderr.log")
    return ClientPaths(*(folder / f"{client}.{kind}" for kind in kinds))


def what_failed(outcome: CoRunResult) -> str:
    """Return the reason of a co-run that did not end well, with a client's last words."""
    tails = [client.stderr_tail[-1] for client in outcome.clients
             if client.status != "ok" and client.stderr_tail]  # fmt: skip
    return f"{outcome.reason} ({tails[0]})" if tails else str(outcome.reason)


def describe(
    options: argparse.Namespace, setup: Setup, outcome: CoRunResult, windows: Sequence[Window]
) -> dict[str, Any]:
    """Return everything that was found as plain data for JSON."""
    events = [client.events for client in outcome.clients]
    unit_seconds = mean_unit_seconds(events)
    rates = [
        [work_rate(e, unit_seconds, window.start_seconds, window.end_seconds) for e in events]
        for window in windows
    ]
    cost = sampler_cost_percent(
        [(window.is_sampled, sum(row)) for window, row in zip(windows, rates, strict=True)]
    )
    clients = [
        describe_client(number, setup, outcome, windows, [row[number] for row in rates])
        for number in range(len(events))
    ]
    gpu_figures = [window.gpu for window in windows if window.gpu is not None]
    limits = [warning for figures in gpu_figures
              for warning in host_limit.warnings(figures, clients, setup.cores)]  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": utc_now(),
        "command": sys.argv,
        "mode": setup.mode.name,
        "gpu": setup.gpu and dict(setup.gpu),
        "host_cores": setup.cores,
        "clients": clients,
        "window_seconds": options.seconds,
        "pairs": options.repeats,
        "sampler_cost_percent": cost and {
            "mean": cost.mean, "low": cost.low, "high": cost.high, "values": list(cost.values),
            "is_interval": cost.is_interval, "text": cost.text(2, " %"),
        },
        "go_skew_ms": outcome.go_skew_ms,
        "start_skew_ms": start_skew_ms(outcome.clients),
        "suite_cores": statistics.fmean(window.suite_cores for window in windows),
        "sampler_cores": mean_of_known([window.sampler_cores for window in windows]),
        "clients_cores": mean_of_known(
            [sum_of_known(window.client_cores) for window in windows]
        ),
        "host_limits": list(dict.fromkeys(limits)),
        "windows": [
            {**vars(window), "work_rates": row}
            for window, row in zip(windows, rates, strict=True)
        ],
    }  # fmt: skip


def describe_client(
    number: int,
    setup: Setup,
    outcome: CoRunResult,
    windows: Sequence[Window],
    rates: Sequence[float],
) -> dict[str, Any]:
    """Return what was seen of one client over all windows."""
    client = outcome.clients[number]
    return {
        "client": client.planned.client,
        "label": client.planned.label,
        "command": list(outcome.planned.command_of(client.planned)),
        "identity": client.identity,
        "host_threads": client.planned.environment.get("OMP_NUM_THREADS"),
        "work_rate": statistics.fmean(rates),
        "window_host_cpu_fraction": mean_of_known([w.client_cores[number] for w in windows]),
        "busiest_thread_cpu_fraction": mean_of_known(
            [w.busiest_thread_cores[number] for w in windows]
        ),
    }


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, `None` without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def sum_of_known(values: Sequence[float | None]) -> float | None:
    """Return the sum, `None` when a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[cost] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
