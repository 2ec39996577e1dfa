#!/usr/bin/env python3
"""Sample one GPU (or MIG instance) and the host's CPU, as JSON lines, from a process of its own.

    python3 benchmarking/gpu_monitor.py                        # until Ctrl-C, with a live table
    python3 benchmarking/gpu_monitor.py --duration 60 --gpu 1 --output run.jsonl
    python3 benchmarking/gpu_monitor.py --output - --stdin-control   # as other programs start it
    python3 benchmarking/gpu_monitor.py --prometheus 9400 --output /dev/null   # for a dashboard

The first line is ``{"record": "monitor", "ready": true, ...}`` with the facts of the card (the
keys of ``nvml.Gpu.describe``), written when the first sample is about to follow. Then come
``{"record": "sample", ...}`` lines, as ``records/types.py`` describes them: the keys of
``nvml.Gpu.read_state``, ``time_seconds`` (CLOCK_MONOTONIC), ``wall_time`` (UTC),
``host_cpu_percent`` (of all cores, since the sample before) and, about once a second,
``compute_pids`` and ``mps_pids``. Unknown is null. An existing output file is continued. Lines are
written whole, so that a killed sampler truncates none.

A function of NVML's that fails leaves its values null and the others as they are, and is named once
on stderr.

With ``--prometheus PORT`` the newest sample is served at http://127.0.0.1:PORT/metrics under the
names of NVIDIA's DCGM exporter (DCGM_FI_DEV_GPU_UTIL, DCGM_FI_PROF_SM_ACTIVE, ...).

It samples at fixed deadlines, start + n * interval, and leaves out the ones it missed, so it
never drifts. It runs without a GPU too: then only the host's CPU is known.

Exit codes: 0 ended as asked (also by SIGINT, SIGTERM or the end of standard input), 1 the output
broke, 2 usage (a port that is taken included), 3 the GPU named by --gpu does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking import closed_streams
from benchmarking.cli import OneLineParser, drop_output
from benchmarking.hardware import nvml, nvml_calls
from benchmarking.hardware.exporter import Exporter
from benchmarking.records.writing import is_cut_off

# isort: split
import psutil  # here, where one that is missing is said in one sentence

if TYPE_CHECKING:
    from rich.live import Live

SHORTEST_INTERVAL_SECONDS = 0.1  # NVML refreshes its GPM counters no faster
LONGEST_INTERVAL_SECONDS = 86400
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
        stop = StopSignal(watch_stdin=arguments.stdin_control)
        gpu = find_gpu(arguments.gpu)
        with open_output(arguments.output) as output, open_display(output, gpu) as screen:
            watch(gpu, arguments, stop, output, [screen, open_exporter(arguments, gpu)])
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
        "--stdin-control",
        "--leash",
        action="store_true",
        help="end when standard input closes, that is, when the starting program is gone",
    )
    parser.add_argument(
        "--prometheus",
        type=int,
        metavar="PORT",
        help="serve the newest sample at /metrics under DCGM exporter names (0: a free port)",
    )
    parser.add_argument(
        "--prometheus-address",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where --prometheus listens; other machines reach it at 0.0.0.0 (default %(default)s)",
    )
    arguments = parser.parse_args()
    if not 0 <= (arguments.prometheus or 0) <= 65535:
        parser.error(f"--prometheus {arguments.prometheus}: give a port from 0 to 65535")
    if not SHORTEST_INTERVAL_SECONDS <= arguments.interval <= LONGEST_INTERVAL_SECONDS:
        parser.error(
            f"--interval {arguments.interval:g}: give {SHORTEST_INTERVAL_SECONDS} to "
            f"{LONGEST_INTERVAL_SECONDS} seconds"
        )
    if not 0 <= arguments.duration < float("inf"):
        parser.error(f"--duration {arguments.duration:g}: give 0 (no end) or more seconds")
    if arguments.stdin_control and "stdin" in closed_streams:
        parser.error("--stdin-control: standard input is closed")
    if arguments.output == "-" and "stdout" in closed_streams:
        parser.error("--output -: standard output is closed; name a file")
    return arguments


class StopSignal:
    """Knows whether the end was asked for: by SIGINT, SIGTERM or the end of standard input.

    A signal writes to a pipe (``signal.set_wakeup_fd``), so that waiting ends at once and no
    signal interrupts a line that is being written.
    """

    def __init__(self, watch_stdin: bool) -> None:
        """Catch the signals from now on; ``watch_stdin``: standard input is a control channel."""
        self._requested = False
        self._wakeup, wakeup_end = os.pipe()
        os.set_blocking(wakeup_end, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakeup_end)
        self._watched = [self._wakeup, *([sys.stdin.fileno()] if watch_stdin else [])]

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


def find_gpu(selector: str | None) -> nvml.Gpu:
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
    return gpu or nvml.Gpu(None)


def watch(
    gpu: nvml.Gpu,
    arguments: argparse.Namespace,
    stop: StopSignal,
    output: TextIO,
    viewers: Sequence[Display | Exporter | None],
) -> None:
    """Write the ready line, then a sample at each deadline until the end."""
    facts = gpu.describe()
    # Percentages are since the reading before: this is the first one's.
    read_sample(gpu)
    stop.wait_until(time.monotonic() + arguments.interval)
    start, lists_due = time.monotonic(), 0.0
    monitor = {"record": "monitor", "ready": True, **timestamp(start), **facts}
    write_line(output, {**monitor, "interval_seconds": arguments.interval, "pid": os.getpid()})
    said: set[str] = set()
    for deadline in deadlines(start, arguments.interval, arguments.duration):
        if stop.wait_until(deadline):
            return
        sample = read_sample(gpu)
        if sample["time_seconds"] >= lists_due:
            lists_due = sample["time_seconds"] + PROCESS_LIST_PERIOD_SECONDS
            sample |= {"compute_pids": gpu.compute_processes(), "mps_pids": gpu.mps_processes()}
        say_failures(said)
        write_line(output, sample)
        for viewer in viewers:
            if viewer is not None:
                viewer.show(sample)


def deadlines(start: float, interval: float, duration: float) -> Iterator[float]:
    """Yield start, start + interval, ... up to the duration (0: endless), without those missed."""
    index = 0
    while not duration or index * interval <= duration + 1e-9:
        yield start + index * interval
        index = max(index + 1, int((time.monotonic() - start) / interval))


def read_sample(gpu: nvml.Gpu) -> Sample:
    """Return a sample line of this moment, without process lists."""
    sample = {"record": "sample", **timestamp(time.monotonic()), **gpu.read_state()}
    sample["host_cpu_percent"] = None
    with contextlib.suppress(OSError):  # no /proc/stat
        sample["host_cpu_percent"] = psutil.cpu_percent()
    return sample


def say_failures(said: set[str]) -> None:
    """Say on stderr, once for each function of NVML's, that it failed; ``said`` grows by them."""
    for function, message in nvml_calls.failures.items():
        if function not in said:
            said.add(function)
            print(
                f"gpu_monitor: {function} failed: {message}; what it would tell is unknown",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def timestamp(now: float) -> dict[str, Any]:
    """Return ``time_seconds`` and the wall time of this moment."""
    wall_time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"time_seconds": round(now, 6), "wall_time": wall_time}


def write_line(output: TextIO, record: dict[str, Any]) -> None:
    """Write one whole line now."""
    output.write(json.dumps(record) + "\n")
    output.flush()


@contextlib.contextmanager
def open_output(name: str | None) -> Iterator[TextIO]:
    """Yield where the lines go: standard output for ``-``, else the end of a file."""
    if name == "-":
        yield sys.stdout
        return
    usual = f"results/gpu_monitor_{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    try:
        Path(name or usual).parent.mkdir(parents=True, exist_ok=True)
        file = new_file(usual) if name is None else open(name, "a", encoding="utf-8")  # noqa: SIM115
        if Path(file.name).is_file():
            with open(file.name, "rb") as earlier:
                file.write("\n" if is_cut_off(earlier.fileno()) else "")
    except OSError as error:
        print(
            f"gpu_monitor: --output {name or usual}: {error.strerror}; name a file that can be "
            "written",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    with file:
        yield file


def new_file(name: str) -> TextIO:
    """Return a file of this call's own: two samplers may begin in one second."""
    path, numbers = Path(name), itertools.count(2)
    while True:
        with contextlib.suppress(FileExistsError):
            return open(path, "x", encoding="utf-8")
        path = Path(name).with_stem(f"{Path(name).stem}-{next(numbers)}")


def report_broken_output(error: OSError) -> int:
    """Return the exit code for an output that cannot be written any more."""
    if isinstance(error, BrokenPipeError):
        drop_output()  # whoever read the lines has had enough
        return 0
    print(f"gpu_monitor: the samples cannot be written: {error}", file=sys.stderr)
    return 1


def open_exporter(arguments: argparse.Namespace, gpu: nvml.Gpu) -> Exporter | None:
    """Listen where that is asked for; ends the process with code 2 where it cannot."""
    if arguments.prometheus is None:
        return None
    try:
        exporter = Exporter(arguments.prometheus_address, arguments.prometheus, gpu.describe())
    except (OSError, UnicodeError) as error:
        where = f"{arguments.prometheus_address} port {arguments.prometheus}"
        print(
            f"gpu_monitor: --prometheus: cannot listen on {where} "
            f"({getattr(error, 'strerror', None) or error}); choose another port or "
            "--prometheus-address",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    print(f"gpu_monitor: serving {exporter.url}", file=sys.stderr, flush=True)
    return exporter


def open_display(output: TextIO, gpu: nvml.Gpu) -> Display | contextlib.nullcontext[None]:
    """Return what shows the samples; nothing does where that would be no place for it."""
    if output is sys.stdout:
        return contextlib.nullcontext()
    return Display("no GPU" if gpu.uuid is None else f"GPU {gpu.index} {gpu.uuid}", output.name)


class Display:
    """Shows now, mean and maximum of ``SHOWN_FIELDS``: a live table, or lines and a summary."""

    def __init__(self, title: str, output_name: str) -> None:
        """Show nothing yet; ``output_name`` is told at the end."""
        self._title, self._output_name = title, output_name
        self._last: Sample = {}
        # Counts, sums and maxima, not samples: it may run for days.
        self._samples = 0
        self._counts: Counter[str] = Counter()
        self._sums = dict.fromkeys(SHOWN_FIELDS, 0.0)
        self._largest: dict[str, float] = {}
        self._refresh_due = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Display:
        """Begin: with an empty table on a terminal, else with the title."""
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()
        else:
            print(self._title, flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last table, or print the summary."""
        if self._live is not None:
            self._refresh()
            self._live.stop()
        if kind is not None:
            return
        if self._live is None:
            print(f"{'summary':<16} {'mean':>12} {'max':>12}")
            for label, _, mean, largest in self._rows():
                print(f"{label:<16} {mean:>12} {largest:>12}")
        print(f"{self._samples} samples: {self._output_name}")

    def show(self, sample: Sample) -> None:
        """Take one sample in, and show it where the last one shown is a second old."""
        self._samples += 1
        self._last = sample
        for field in SHOWN_FIELDS:
            value = sample[field]
            if value is not None:
                self._counts[field] += 1
                self._sums[field] += value
                self._largest[field] = max(value, self._largest.get(field, value))
        if sample["time_seconds"] >= self._refresh_due:
            self._refresh_due = sample["time_seconds"] + DISPLAY_PERIOD_SECONDS
            self._refresh()

    def _refresh(self) -> None:
        rows = self._rows()
        if self._live is None:
            known = (f"{label} {last}" for label, last, _, _ in rows if last != "-")
            print(", ".join(known), flush=True)
            return
        from rich.table import Table

        table = Table("figure", "now", "mean", "max", title=self._title)
        for row in rows:
            table.add_row(*row)
        self._live.update(table, refresh=True)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return label, last, mean and maximum of each field as texts; "-" is unknown."""
        rows = []
        for field, (label, unit) in SHOWN_FIELDS.items():
            count = self._counts[field]
            mean = self._sums[field] / count if count else None
            values = (self._last.get(field), mean, self._largest.get(field))
            texts = ("-" if value is None else f"{value:.1f} {unit}" for value in values)
            rows.append((label, *texts))
        return rows


if __name__ == "__main__":
    sys.exit(main())
