#!/usr/bin/env python3
"""Sample one GPU (or MIG instance) and the host's CPU, as JSON lines, from a process of its own.

    python3 benchmarking/gpu_monitor.py                        # until Ctrl-C, with a live table
    python3 benchmarking/gpu_monitor.py --duration 60 --gpu 1 --output run.jsonl
    python3 benchmarking/gpu_monitor.py --output - --leash     # as other programs start it

The first line is ``{"record": "monitor", "ready": true, ...}`` with the facts of the card (the
keys of ``nvml.Gpu.describe``), written when the first sample is about to follow. Then come
``{"record": "sample", ...}`` lines: the keys of ``nvml.STATE_FIELDS``, ``time_seconds``
(CLOCK_MONOTONIC), ``wall_time`` (UTC), ``host_cpu_percent`` (of all cores, since the sample
before) and, about once a second, ``compute_pids`` and ``mps_pids`` (each a list of ``{"pid",
"used_memory_mib"}``). Unknown is null. An existing
output file is continued. Lines are written whole, so that a killed sampler tears none.

A function of NVML's that fails leaves its values null and the others as they are, and is named once
on stderr.

It samples at fixed deadlines, start + n * interval, and leaves out the ones it missed, so it
never drifts. It runs without a GPU too: then only the host's CPU is known.

Exit codes: 0 ended as asked (also by SIGINT, SIGTERM or the leash), 1 the output broke,
2 usage, 3 the GPU named by --gpu does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.hardware import nvml
from benchmarking.suite.cli import OneLineParser

SHORTEST_INTERVAL_SECONDS = 0.1  # NVML refreshes its GPM counters no faster
PROCESS_LIST_PERIOD_SECONDS = 1.0
DISPLAY_PERIOD_SECONDS = 1.0
SHOWN_FIELDS = {
    "utilization_gpu_percent": ("GPU utilization", "%"),
    "sm_activity_percent": ("SM activity", "%"),
    "sm_occupancy_percent": ("SM occupancy", "%"),
    "tensor_activity_percent": ("tensor activity", "%"),
    "dram_activity_percent": ("DRAM activity", "%"),
    "memory_used_mib": ("memory used", "MiB"),
    "sm_clock_mhz": ("SM clock", "MHz"),
    "power_draw_watts": ("power draw", "W"),
    "temperature_celsius": ("temperature", "°C"),
    "host_cpu_percent": ("host CPU", "%"),
}

Sample = dict[str, Any]


def main() -> int:
    """Sample until the duration is over or the end is asked for; return the exit code."""
    arguments = parse_arguments()
    try:
        with StopRequest(watch_stdin=arguments.leash) as stop:
            gpu = open_gpu(arguments.gpu)
            with open_output(arguments.output) as output, open_display(arguments, gpu) as show:
                watch(gpu, arguments, stop, output, show)
    except (nvml.GpuNotFoundError, nvml.GpuUnusableError) as error:
        print(f"gpu_monitor: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        return report_broken_output(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments; ends the process with code 2 where they make no sense."""
    parser = OneLineParser(
        description="Sample a GPU and the host's CPU as JSON lines, with a live table.",
        epilog="Without --output - a summary (mean and maximum) is printed at the end.",
    )
    parser.add_argument(
        "--gpu",
        metavar="INDEX_OR_UUID",
        help="NVML index, GPU-... or MIG-... UUID (default: the first GPU)",
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="end after this time (default 0: until stopped)",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=0.2,
        metavar="SECONDS",
        help=f"time between samples, at least {SHORTEST_INTERVAL_SECONDS} (default %(default)s)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON lines are appended here; - is standard output, with nothing else on it "
        "(default: results/gpu_monitor_<time>.jsonl)",
    )
    parser.add_argument(
        "--leash",
        action="store_true",
        help="end when standard input closes, that is, when the starting program is gone",
    )
    arguments = parser.parse_args()
    if not SHORTEST_INTERVAL_SECONDS <= arguments.interval < float("inf"):
        parser.error(
            f"--interval {arguments.interval:g}: give {SHORTEST_INTERVAL_SECONDS} seconds or more"
        )
    if not 0 <= arguments.duration < float("inf"):
        parser.error(f"--duration {arguments.duration:g}: give 0 (no end) or more seconds")
    if arguments.output is None:
        arguments.output = f"results/gpu_monitor_{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    return arguments


def open_gpu(selector: str | None) -> nvml.Gpu | None:
    """Return the GPU to sample; says once on stderr when there is none that can be asked."""
    try:
        gpu = nvml.open_gpu(selector)
        reason = nvml.unavailable_reason()
    except nvml.GpuUnusableError as error:
        if selector is not None:
            raise
        gpu, reason = None, str(error)
    if gpu is None:
        print(f"gpu_monitor: no GPU to sample, host CPU only ({reason})", file=sys.stderr)
    return gpu


def watch(
    gpu: nvml.Gpu | None,
    arguments: argparse.Namespace,
    stop: StopRequest,
    output: TextIO,
    show: Callable[[Sample], None],
) -> None:
    """Write the ready line, then a sample at each deadline until the end."""
    sampler, complaints = Sampler(gpu), Complaints()
    facts = dict.fromkeys(nvml.DESCRIPTION_FIELDS) if gpu is None else gpu.describe()
    # The sampler took its first reading just now; percentages need a second one.
    stop.wait_until(time.monotonic() + arguments.interval)
    start = time.monotonic()
    monitor = {"record": "monitor", "ready": True, **timestamp(start), **facts}
    write_line(output, {**monitor, "interval_seconds": arguments.interval, "pid": os.getpid()})
    for deadline in deadlines(start, arguments.interval, arguments.duration):
        if stop.wait_until(deadline):
            return
        sample = sampler.read()
        complaints.say_new()
        write_line(output, sample)
        show(sample)


def deadlines(start: float, interval: float, duration: float) -> Iterator[float]:
    """Yield start, start + interval, ... up to the duration (0: endless), without those missed."""
    index = 0
    while not duration or index * interval <= duration + 1e-9:
        yield start + index * interval
        index = max(index + 1, int((time.monotonic() - start) / interval))


class Complaints:
    """Says on stderr, once for each function of NVML's, that it failed."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._said: set[str] = set()

    def say_new(self) -> None:
        """Say what has not been said yet."""
        for function, words in nvml.failures().items():
            if function not in self._said:
                self._said.add(function)
                print(
                    f"gpu_monitor: {function} failed: {words}; what it would tell is unknown",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


class Sampler:
    """Takes samples of the GPU and the host, each relative to the one before."""

    def __init__(self, gpu: nvml.Gpu | None) -> None:
        """Take the first reading, from which the first sample counts; no GPU: the host alone."""
        self._gpu = gpu
        if gpu is not None:
            gpu.read_state()
        self._host_cpu_ticks = read_host_cpu_ticks()
        self._process_lists_due = 0.0

    def read(self) -> Sample:
        """Return one sample line for this moment."""
        now = time.monotonic()
        state = dict.fromkeys(nvml.STATE_FIELDS) if self._gpu is None else self._gpu.read_state()
        sample = {"record": "sample", **timestamp(now), **state}
        sample["host_cpu_percent"] = self._host_cpu_percent()
        if now >= self._process_lists_due:
            self._process_lists_due = now + PROCESS_LIST_PERIOD_SECONDS
            sample["compute_pids"] = self._gpu and self._gpu.compute_processes()
            sample["mps_pids"] = self._gpu and self._gpu.mps_processes()
        return sample

    def _host_cpu_percent(self) -> float | None:
        before, self._host_cpu_ticks = self._host_cpu_ticks, read_host_cpu_ticks()
        if before is None or self._host_cpu_ticks is None:
            return None
        busy, total = (b - a for a, b in zip(before, self._host_cpu_ticks, strict=True))
        return round(100 * busy / total, 1) if total > 0 else None


def read_host_cpu_ticks() -> tuple[int, int] | None:
    """Return busy and all clock ticks of all cores since boot; None where /proc/stat is missing."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            # user nice system idle iowait irq softirq steal; guest time is in user already.
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


class StopRequest:
    """Knows whether the end was asked for: by SIGINT, by SIGTERM or by the leash.

    A signal writes to a pipe (``signal.set_wakeup_fd``), so that waiting ends at once and no
    signal interrupts a line that is being written.
    """

    def __init__(self, watch_stdin: bool) -> None:
        """Prepare; ``watch_stdin`` makes the end of standard input a request too."""
        self._requested = False
        self._wakeup, self._wakeup_end = os.pipe()
        os.set_blocking(self._wakeup_end, False)
        self._watched = [self._wakeup]
        if watch_stdin:
            self._watched.append(sys.stdin.fileno())

    def __enter__(self) -> StopRequest:
        """Catch the signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_end)
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the pipe; the signals stay caught, since the process is about to end."""
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)
        os.close(self._wakeup_end)

    def wait_until(self, deadline: float) -> bool:
        """Sleep until ``deadline`` (CLOCK_MONOTONIC); return True at once when asked to end."""
        while not self._requested:
            remaining = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select(self._watched, [], [], remaining)
            if not readable:
                return False
            # Words on standard input mean nothing; its end does.
            self._requested = any(
                number == self._wakeup or not os.read(number, 4096) for number in readable
            )
        return True


def timestamp(now: float) -> dict[str, Any]:
    """Return ``time_seconds`` and the wall time of this moment."""
    wall_time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"time_seconds": round(now, 6), "wall_time": wall_time}


def write_line(output: TextIO, record: dict[str, Any]) -> None:
    """Write one whole line now."""
    output.write(json.dumps(record) + "\n")
    output.flush()


@contextlib.contextmanager
def open_output(name: str) -> Iterator[TextIO]:
    """Yield where the lines go: standard output for ``-``, else the end of a file."""
    if name == "-":
        yield sys.stdout
        return
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        file = open(name, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        print(
            f"gpu_monitor: --output {name}: {error.strerror}; name a file that can be written",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    with file:
        yield file


def report_broken_output(error: OSError) -> int:
    """Return the exit code for an output that cannot be written any more."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the lines has had enough. Python would flush, and fail, once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"gpu_monitor: the samples cannot be written: {error}", file=sys.stderr)
    return 1


@dataclass
class RunningFigure:
    """The last value, the mean and the maximum of one field; unknown values don't count."""

    count: int = 0
    total: float = 0.0
    largest: float | None = None
    last: float | None = None

    def add(self, value: float | None) -> None:
        """Take the value of one sample in."""
        self.last = value
        if value is not None:
            self.count += 1
            self.total += value
            self.largest = value if self.largest is None else max(self.largest, value)

    def texts(self, unit: str) -> tuple[str, ...]:
        """Return last, mean and maximum with the unit; "-" is unknown."""
        mean = self.total / self.count if self.count else None
        values = (self.last, mean, self.largest)
        return tuple("-" if value is None else f"{value:.1f} {unit}" for value in values)


class RunningFigures:
    """What the display shows: a running figure of each of ``SHOWN_FIELDS``."""

    def __init__(self) -> None:
        """Start with no sample."""
        self.samples = 0
        self._figures = {field: RunningFigure() for field in SHOWN_FIELDS}

    def add(self, sample: Sample) -> None:
        """Take one sample in."""
        self.samples += 1
        for field, figure in self._figures.items():
            figure.add(sample[field])

    def rows(self) -> list[tuple[str, ...]]:
        """Return label, last, mean and maximum of each field as texts."""
        return [
            (label, *self._figures[field].texts(unit))
            for field, (label, unit) in SHOWN_FIELDS.items()
        ]


@contextlib.contextmanager
def open_display(
    arguments: argparse.Namespace, gpu: nvml.Gpu | None
) -> Iterator[Callable[[Sample], None]]:
    """Yield a function that shows a sample: nothing for ``-``, a live table, or plain lines."""
    if arguments.output == "-":
        yield lambda sample: None
        return
    figures = RunningFigures()
    title = "no GPU" if gpu is None else f"GPU {gpu.index} {gpu.uuid}"
    show_rows = show_live_table if sys.stdout.isatty() else show_plain_lines
    with show_rows(title, figures) as refresh:
        refresh_due = 0.0

        def show(sample: Sample) -> None:
            nonlocal refresh_due
            figures.add(sample)
            if sample["time_seconds"] >= refresh_due:
                refresh_due = sample["time_seconds"] + DISPLAY_PERIOD_SECONDS
                refresh()

        yield show
    print(f"{figures.samples} samples: {arguments.output}")


@contextlib.contextmanager
def show_live_table(title: str, figures: RunningFigures) -> Iterator[Callable[[], None]]:
    """Yield a function that redraws the table; the last drawing stays as the summary."""
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        drawing = Table("figure", "now", "mean", "max", title=title)
        for row in figures.rows():
            drawing.add_row(*row)
        return drawing

    with Live(table(), auto_refresh=False) as live:
        yield lambda: live.update(table(), refresh=True)
        live.update(table(), refresh=True)


@contextlib.contextmanager
def show_plain_lines(title: str, figures: RunningFigures) -> Iterator[Callable[[], None]]:
    """Yield a function that prints what is known now as one line; prints a summary at the end."""
    print(title, flush=True)

    def print_line() -> None:
        known = (f"{label} {last}" for label, last, _, _ in figures.rows() if last != "-")
        print(", ".join(known), flush=True)

    yield print_line
    print(f"{'summary':<16} {'mean':>12} {'max':>12}")
    for label, _, mean, maximum in figures.rows():
        print(f"{label:<16} {mean:>12} {maximum:>12}")


if __name__ == "__main__":
    sys.exit(main())
