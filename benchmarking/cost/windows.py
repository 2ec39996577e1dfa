"""Windows of one co-run with the sampler on and off in turn, and what they say of its cost.

The clients run on while the sampler comes and goes, so that a window differs from its neighbor by
the sampler alone.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarking.hardware.gpu_samples import summarize_samples
from benchmarking.hardware.host_cpu import CpuReading, read_process_trees
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.records.types import Sample
from benchmarking.suite.event_log import Event
from benchmarking.suite.launcher import Client, FinishRule
from benchmarking.suite.sampler import Sampler

# From go, or from the sampler's start or end, until a window may begin.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Window:
    """One stretch of a co-run; times on CLOCK_MONOTONIC, processor time in cores used.

    `client_cores` and `busiest_thread_cores` go by client; `gpu` holds the sampler's figures of
    the window, `None` where it was off.
    """

    is_sampled: bool
    start_seconds: float
    end_seconds: float
    client_cores: tuple[float | None, ...]
    busiest_thread_cores: tuple[float | None, ...]
    suite_cores: float
    sampler_cores: float | None
    gpu: Mapping[str, Any] | None


@dataclass(frozen=True)
class UntilMeasured(FinishRule):
    """Ends the launcher's window when all windows have been measured."""

    measured: threading.Event = field(default_factory=threading.Event)

    def is_done(self, client: Client) -> bool:
        """Whether the measuring is over, the same for every client."""
        return self.measured.is_set()


class WindowMeter(threading.Thread):
    """Measures `repeats` pairs of windows of `seconds` each while the launcher keeps watch.

    The order within a pair changes from pair to pair, so that a drift cancels out. `windows` and
    `failure` are to be read after the thread has ended.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        seconds: float,
        repeats: int,
        gpu_uuid: str | None,
        folder: Path,
        measured: threading.Event,
    ) -> None:
        """Prepare to measure `clients`, which are about to go."""
        super().__init__(name="windows", daemon=True)
        self._clients = clients
        self._seconds = seconds
        self._repeats = repeats
        self._gpu_uuid = gpu_uuid
        self._folder = folder
        self._measured = measured
        self._given_up = threading.Event()
        self.windows: list[Window] = []
        self.failure: str | None = None

    def run(self) -> None:
        """Measure all windows, or as many as there is time for."""
        try:
            for number in range(2 * self._repeats):
                is_sampled = number % 4 in (1, 2)  # off on, on off, off on, ...
                self.windows += self._sampled() if is_sampled else self._unsampled()
                if self._given_up.is_set() or self.failure:
                    return
        finally:
            self._measured.set()

    def give_up(self) -> None:
        """Measure no further window."""
        self._given_up.set()

    def _unsampled(self) -> list[Window]:
        if self._given_up.wait(SETTLE_SECONDS):
            return []
        return self._measure(None)

    def _sampled(self) -> list[Window]:
        name = f"samples-{len(self.windows)}"
        output, log = self._folder / f"{name}.jsonl", self._folder / f"{name}.log"
        with Sampler(output, log, gpu=self._gpu_uuid) as sampler:
            if sampler.failure is None and not self._given_up.wait(SETTLE_SECONDS):
                windows = self._measure(sampler)
                self.failure = sampler.failure
                return windows
            self.failure = sampler.failure
        return []

    def _measure(self, sampler: Sampler | None) -> list[Window]:
        """Return the window as a list of one, of none when it was cut short."""
        pids = [*(client.pid for client in self._clients), sampler.pid if sampler else None]
        *before, sampler_before = read_process_trees(pids)
        suite_before = time.process_time()
        start = time.monotonic()
        cut_short = self._given_up.wait(self._seconds)
        end = time.monotonic()
        suite_seconds = time.process_time() - suite_before
        *after, sampler_after = read_process_trees(pids)
        if cut_short:
            return []
        length = end - start
        samples = sampler.samples_past(end) if sampler else []
        return [
            Window(
                is_sampled=sampler is not None,
                start_seconds=start,
                end_seconds=end,
                client_cores=tuple(
                    _used(old, new, length) for old, new in zip(before, after, strict=True)
                ),
                busiest_thread_cores=tuple(
                    None if old is None or new is None else new.busiest_thread_since(old) / length
                    for old, new in zip(before, after, strict=True)
                ),
                suite_cores=suite_seconds / length,
                sampler_cores=_used(sampler_before, sampler_after, length),
                gpu=(
                    msgspec.to_builtins(
                        summarize_samples(msgspec.convert(samples, list[Sample]), start, end)
                    )
                    if samples
                    else None
                ),
            )
        ]


def _used(before: CpuReading | None, after: CpuReading | None, seconds: float) -> float | None:
    if before is None or after is None:
        return None
    return after.seconds_since(before) / seconds


def mean_unit_seconds(clients: Iterable[Sequence[Event]]) -> dict[str, float]:
    """Return the mean duration of each kind of unit, over all clients' events."""
    durations: dict[str, list[float]] = {}
    for events in clients:
        for event in events:
            if event["event"] == "units":
                durations.setdefault(event["kind"], []).extend(event["duration_seconds"])
    return {kind: statistics.fmean(values) for kind, values in durations.items() if values}


def work_rate(
    events: Sequence[Event], unit_seconds: Mapping[str, float], start: float, end: float
) -> float:
    """Return a client's work a second between two moments, in mean-unit seconds.

    A unit that lies partly in the window counts by that part: with whole units only, the edges
    would cost a precision of one unit in however many there are.
    """
    work = 0.0
    for event in events:
        if event["event"] != "units":
            continue
        worth = unit_seconds[event["kind"]]
        for begin, duration in zip(event["start_seconds"], event["duration_seconds"], strict=True):
            inside = min(begin + duration, end) - max(begin, start)
            if inside > 0 and duration > 0:
                work += worth * min(1.0, inside / duration)
    return work / (end - start)


def sampler_cost_percent(rates: Sequence[tuple[bool, float]]) -> Estimate | None:
    """Return by how many percent the sampler lowers throughput, over pairs of windows.

    Args:
        rates: Whether the sampler was on, and the throughput, of each window in order; two by two
            they are pairs of one window of either sort.
    """
    pairs = [dict(rates[index : index + 2]) for index in range(0, len(rates) - 1, 2)]
    ratio = estimate(pair[True] / pair[False] for pair in pairs if pair[False] > 0)
    return ratio and ratio.map(lambda value: 100 * (1 - value))
