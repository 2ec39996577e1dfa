"""The life of a workload, by hand or as a client of the benchmark suite.

By hand a workload runs its documented job once, prints a summary and writes a result file. The
suite starts the same script with ``--events PATH --hold``: the workload then appends JSON lines
to PATH and obeys one-word commands on standard input. CONTRIBUTING.md ("The client contract") lists
what these lines carry. All times are CLOCK_MONOTONIC, which every process of the machine shares.

End-of-file on standard input means stop: no client survives the one who started it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import os
import resource
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn, TextIO

from workloads.common import console
from workloads.common.device import ComputeDevice
from workloads.common.errors import (
    EXIT_OK,
    CannotWriteError,
    OutOfGpuMemoryError,
    UsageError,
    WorkloadError,
    as_out_of_memory,
    printable,
)
from workloads.common.results import (
    GpuMonitor,
    describe_environment,
    print_summary,
    require_writable,
    write_result,
)

FLUSH_PERIOD_SECONDS = 0.5
SUMMARY_ROWS = (
    ("startup_seconds", "Start-up", "{startup_seconds:.1f} s (imports, data, warm-up)"),
    (
        "gpu_utilization_percent",
        "GPU utilization",
        "{gpu_utilization_percent:.0f} % ({gpu_utilization_source})",
    ),
    ("gpu_sm_activity_percent", "SM activity", "{gpu_sm_activity_percent:.0f} %"),
    ("gpu_memory_used_mib", "GPU memory in use", "{gpu_memory_used_mib:.0f} MiB"),
)


class StopRequested(Exception):
    """The suite asked this client to stop; raised at a step boundary."""


class EventLog:
    """Appends events as whole JSON lines to a file, or drops them where there is none."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        if path is not None:
            try:
                # Line buffering: one write a line, so a reader never waits for half of one.
                self._file = path.open("a", buffering=1)
            except OSError as error:
                raise UsageError(
                    f"cannot append to --events {path} ({error.strerror}); name a file in an "
                    "existing, writable folder"
                ) from error

    def write(self, event: str, **fields: object) -> None:
        """Append one event with the present time.

        Raises:
            CannotWriteError: The disk is full.
        """
        if self._file is None:
            return
        line = json.dumps({"event": event, "time_seconds": time.monotonic(), **fields})
        with self._lock:
            try:
                self._file.write(line + "\n")
            except OSError as error:
                raise CannotWriteError(self._file.name, error) from error


class ControlChannel:
    """Commands from standard input, read by a thread so that work never waits for them."""

    def __init__(self, stream: TextIO) -> None:
        self.stop = threading.Event()
        self._arrived = {"warm": threading.Event(), "go": threading.Event()}
        threading.Thread(target=self._read, args=(stream,), name="control", daemon=True).start()

    def wait_for(self, command: str) -> None:
        """Block until ``command`` has arrived.

        Raises:
            StopRequested: ``stop`` or end-of-file came first.
        """
        self._arrived[command].wait()
        if self.stop.is_set():
            raise StopRequested

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            command = line.strip()
            if command == "stop":
                break
            if command in self._arrived:
                self._arrived[command].set()
        self.stop.set()
        for waited_for in self._arrived.values():
            waited_for.set()


class Recorder:
    """Collects units of work in memory and writes them in batches, so that recording costs nothing.

    Used by one thread, except ``unit``, which any thread may call.
    """

    def __init__(self, events: EventLog, control: ControlChannel | None = None) -> None:
        """Write to ``events`` and take stops from ``control`` (None: never stop)."""
        self._events = events
        self._stop = control.stop if control else threading.Event()
        self._lock = threading.Lock()
        self._buffers: dict[tuple[str, bool], tuple[list[float], list[float]]] = {}
        self._last_flush_seconds = time.monotonic()

    @property
    def stop_requested(self) -> bool:
        """Whether the suite wants this client to end."""
        return self._stop.is_set()

    def check_stop(self) -> None:
        """Raise ``StopRequested`` if the suite wants this client to end."""
        if self.stop_requested:
            raise StopRequested

    def wait_for_stop(self, timeout_seconds: float) -> bool:
        """Sleep for ``timeout_seconds``, less if a stop arrives; return whether one has."""
        return self._stop.wait(timeout_seconds)

    def unit(
        self, kind: str, start_seconds: float, end_seconds: float, *, latency: bool = False
    ) -> None:
        """Record one finished unit of work, its times on CLOCK_MONOTONIC.

        Units of one ``kind`` are comparable with each other; ``latency`` says whether the duration
        is a response time that a user feels.
        """
        with self._lock:
            starts, durations = self._buffers.setdefault((kind, latency), ([], []))
            starts.append(round(start_seconds, 6))
            durations.append(round(end_seconds - start_seconds, 7))
        if end_seconds - self._last_flush_seconds >= FLUSH_PERIOD_SECONDS:
            self.flush()

    def processes(self, pids: list[int]) -> None:
        """Name processes that do the job's work too; any of them can prove a sharing mode."""
        self._events.write("processes", pids=pids)

    def flush(self) -> None:
        """Write what has been collected."""
        with self._lock:
            self._last_flush_seconds = time.monotonic()
            buffers, self._buffers = self._buffers, {}
        for (kind, latency), (starts, durations) in buffers.items():
            self._events.write(
                "units", kind=kind, latency=latency,
                start_seconds=starts, duration_seconds=durations,
            )  # fmt: skip


class Workload(ABC):
    """One job that can be run, repeated from the same state, and described."""

    name: str  # prefix of the result file
    title: str  # heading of the summary
    device: ComputeDevice | None = None  # None for a workload that uses none
    start_delay_seconds = 0.0  # between `go` and the first job

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        # What a reader of the result must know; shown and recorded.
        self.warnings: list[str] = []

    @property
    def order_seed(self) -> int:
        """The seed of pauses and orders: each client's own, while ``--seed`` fixes the work."""
        return (self.args.seed + self.args.client_index) % 2**63

    @abstractmethod
    def load(self) -> None:
        """Import, resolve data, put the model on the device."""

    def warm_up(self) -> None:
        """Autotune, capture, restore; the device is idle afterwards."""

    @abstractmethod
    def run_job(self, recorder: Recorder) -> dict:
        """Run the whole job once and return its figures (units in the names).

        Raises:
            StopRequested: The suite asked to stop in the middle.
        """

    def reset(self) -> None:
        """Return to the state before the job, outside every timing."""

    def partial_figures(self) -> dict | None:
        """Return the figures of what is finished of a job that was interrupted; None: nothing."""
        return None

    def check_unfinished(self) -> None:
        """Raise ``NotFiniteError`` where a job stopped in the middle would have ended with it."""

    def close(self) -> None:
        """Let go of what ``load`` took; called once, also after a failure."""

    @abstractmethod
    def settings(self) -> dict:
        """Return what the job was run with, as recorded in the result."""

    @abstractmethod
    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines (label, text with unit) of the terminal summary."""

    def identity(self) -> dict:
        """Return who this client is; the evidence that a sharing mode is checked by."""
        if self.device is None:
            return {"pid": os.getpid(), "device": None}
        return self.device.identity(getattr(self.args, "batch_size", None))

    def peak_memory_mib(self) -> float | None:
        """Return the most GPU memory that the job took, in MiB; None where nobody knows."""
        return None if self.device is None else self.device.peak_memory_mib()

    def resolve(self) -> list[str]:
        """Find or download data and weights; return the flags of a run that never downloads."""
        return []

    def warn(self, text: str) -> None:
        """Warn now and in the result; each thing once, however often a job is repeated."""
        if text not in self.warnings:
            self.warnings.append(text)
            console.loud_warning(text)

    def tell(self, text: str) -> None:
        """Print a line about what has just been finished, for a person who waits for the job."""
        if not self.args.hold:
            console.note(text)


def run(workload: Workload) -> int:
    """Run ``workload`` as its flags say and return the exit code."""
    if workload.args.resolve:
        with console.stage("looking for data and weights"):
            arguments = workload.resolve()
        environment, notes = describe_environment(), workload.warnings
        answer = {"arguments": arguments, "environment": environment, "notes": notes}
        print(json.dumps(answer), flush=True)
        return EXIT_OK
    if workload.args.hold:
        return _run_held(workload)
    return _run_by_hand(workload)


def _run_by_hand(workload: Workload) -> int:
    # Before hours of work, not after.
    require_writable(workload.args.results_dir)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin_seconds = time.monotonic()
    events = EventLog(workload.args.events)
    interruption = None
    with _errors_told(workload, Recorder(events), events) as recorder:
        with console.stage("loading"):
            _load(workload, events)
        with GpuMonitor(workload.device) as monitor:
            with console.stage("warming up"):
                workload.warm_up()
            startup_seconds = time.monotonic() - begin_seconds
            events.write("ready", identity=workload.identity())
            monitor.begin()
            try:
                figures = _run_one_job(workload, recorder, events, index=0)
            except KeyboardInterrupt as error:
                figures = workload.partial_figures()
                if figures is None:
                    raise
                _wait_for_device(workload)
                interruption = error
        figures |= monitor.figures()
        identity = workload.identity()
        if interruption is None:
            _write_done(workload, events, jobs=1)
    figures["startup_seconds"] = startup_seconds
    figures["peak_memory_mib"] = workload.peak_memory_mib()
    path = write_result(
        workload.args.results_dir,
        workload.name,
        {
            "started_at": started,
            "command": sys.argv,
            "interrupted": interruption is not None,
            "settings": workload.settings(),
            "figures": figures,
            "warnings": workload.warnings,
            "identity": identity,
            "environment": describe_environment(),
        },
    )
    title = workload.title + (" (interrupted: what was finished)" if interruption else "")
    print_summary(title, _summary_rows(workload, figures, identity), workload.warnings)
    print(printable(f"result: {path}"), flush=True)
    if interruption is not None:
        raise interruption
    return EXIT_OK


def _run_held(workload: Workload) -> int:
    events = EventLog(workload.args.events)
    control = ControlChannel(sys.stdin)
    jobs = 0
    with _errors_told(workload, Recorder(events, control), events) as recorder:
        try:
            _load(workload, events)
            control.wait_for("warm")
            workload.warm_up()
            events.write("ready", identity=workload.identity())
            control.wait_for("go")
            recorder.wait_for_stop(workload.start_delay_seconds)
            recorder.check_stop()
            while True:
                _run_one_job(workload, recorder, events, index=jobs)
                jobs += 1
                recorder.check_stop()
                workload.reset()
        except StopRequested:
            recorder.flush()
            _wait_for_device(workload)
            workload.check_unfinished()
        except KeyboardInterrupt:
            # Leaving an MPS server with work in flight may harm the other clients.
            _wait_for_device(workload)
            raise
        _write_done(workload, events, jobs)
    return EXIT_OK


@contextlib.contextmanager
def _errors_told(workload: Workload, recorder: Recorder, events: EventLog) -> Iterator[Recorder]:
    """Write an error down with its cause and pass it on; close the workload in every case."""
    try:
        yield recorder
    except Exception as error:
        with contextlib.suppress(CannotWriteError):  # what went wrong first is what counts
            recorder.flush()
        _tell_and_raise(events, error)
    finally:
        workload.close()


def _wait_for_device(workload: Workload) -> None:
    if workload.device is not None:
        workload.device.synchronize()


def _load(workload: Workload, events: EventLog) -> None:
    """Load without garbage collection: what is made here stays.

    The collector would look through it again and again, for a sixth of the time that importing
    transformers takes and for 0.2 s at every capture of a graph.
    """
    begin_seconds = time.monotonic()
    gc.disable()
    try:
        workload.load()
    finally:
        gc.freeze()
        gc.enable()
        # At exit some libraries look for what they leaked, and frozen objects look like it.
        atexit.register(gc.unfreeze)
    events.write("loaded", startup_seconds=time.monotonic() - begin_seconds)


def _run_one_job(workload: Workload, recorder: Recorder, events: EventLog, index: int) -> dict:
    start_seconds = time.monotonic()
    figures = workload.run_job(recorder)
    end_seconds = time.monotonic()
    figures["job_seconds"] = end_seconds - start_seconds
    recorder.flush()
    events.write(
        "job", index=index, start_seconds=start_seconds, end_seconds=end_seconds, figures=figures
    )
    return figures


def _tell_and_raise(events: EventLog, error: Exception) -> NoReturn:
    """Write an error down and pass it on; out of memory gets its sentence here."""
    known = as_out_of_memory(error) or error
    fields: dict[str, object] = {"status": "failed"}
    if isinstance(known, WorkloadError):
        fields |= {"message": str(known), "cause": known.cause}
    else:
        fields |= {"message": f"{type(error).__name__}: {error}", "cause": None}
    if isinstance(known, OutOfGpuMemoryError):
        fields |= {"status": "oom", "memory": known.memory}
    with contextlib.suppress(CannotWriteError):  # what went wrong first is what counts
        events.write("error", **fields)
    if known is error:
        raise error
    raise known from error


def _write_done(workload: Workload, events: EventLog, jobs: int) -> None:
    # First: where it ends a process of the job's, the time of that one is known only afterwards.
    peak_memory_mib = workload.peak_memory_mib()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    events.write(
        "done", jobs=jobs, host_cpu_seconds=sum(u.ru_utime + u.ru_stime for u in usages),
        peak_memory_mib=peak_memory_mib,
    )  # fmt: skip


def _summary_rows(workload: Workload, figures: dict, identity: dict) -> list[tuple[str, str]]:
    rows = workload.summary(figures)
    for name, label, text in SUMMARY_ROWS:
        if figures.get(name) is not None:
            rows.append((label, text.format_map(figures)))
    if workload.device is not None:
        where = identity["gpu_name"] or f"CPU ({identity['host_threads']} threads)"
        rows.append(
            ("Device", f"{where}, engine {workload.device.engine}, {workload.device.precision}")
        )
    return rows


def main_of(
    workload_class: Callable[[argparse.Namespace], Workload],
    parse_arguments: Callable[[], argparse.Namespace],
) -> Callable[[], int]:
    """Return the ``main`` of a workload script: parse the flags, run the workload."""
    return lambda: run(workload_class(parse_arguments()))
