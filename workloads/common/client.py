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
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TextIO

from workloads.common import cli, console, errors, files, results

if TYPE_CHECKING:
    from workloads.common.device import ComputeDevice

FLUSH_PERIOD_SECONDS = 0.5
# What the summary says of figures that every workload may have.
SUMMARY_TEXTS = {
    "startup_seconds": ("Start-up", "{startup_seconds:.1f} s (imports, data, warm-up)"),
    "gpu_utilization_percent": (
        "GPU utilization",
        "{gpu_utilization_percent:.0f} % ({gpu_utilization_source})",
    ),
    "gpu_sm_activity_percent": ("SM activity", "{gpu_sm_activity_percent:.0f} %"),
    "gpu_memory_used_mib": ("GPU memory in use", "{gpu_memory_used_mib:.0f} MiB"),
}


class StopRequested(Exception):
    """The suite asked this client to stop; raised at a step boundary."""


class Recorder:
    """A client's side of the contract: events go to a file, commands come from a stream.

    Commands are read by a thread, so that work never waits for them. Units of work are collected in
    memory and written in batches, so that recording costs nothing; ``unit`` may be called by any
    thread.
    """

    def __init__(self, events: Path | None = None, commands: TextIO | None = None) -> None:
        """Append to ``events`` (None: keep nothing) and obey ``commands`` (None: never stop)."""
        self._file: TextIO | None = None
        if events is not None:
            try:
                # Line buffering: one write a line, so a reader never waits for half of one.
                self._file = events.open("a", buffering=1)
                # A run by hand that was cut off may have left half a line.
                if events.is_file() and events.stat().st_size:
                    with events.open("rb") as earlier:
                        earlier.seek(-1, os.SEEK_END)
                        self._file.write("" if earlier.read() == b"\n" else "\n")
            except OSError as error:
                raise errors.UsageError(
                    f"cannot append to --events {events} ({error.strerror}); name a file in an "
                    "existing, writable folder"
                ) from error
        self._lock = threading.Lock()
        self._buffers: dict[tuple[str, bool | str], tuple[list[float], list[float]]] = {}
        self._last_flush_seconds = time.monotonic()
        self._stop = threading.Event()
        self._arrived = {"warm": threading.Event(), "go": threading.Event()}
        if commands is not None:
            threading.Thread(target=self._read, args=(commands,), daemon=True).start()

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
                raise errors.CannotWriteError(self._file.name, error) from error

    def unit(
        self,
        kind: str,
        start_seconds: float,
        end_seconds: float,
        *,
        latency: bool | Literal["apart"] = False,
    ) -> None:
        """Record one finished unit of work, its times on CLOCK_MONOTONIC.

        Units of one ``kind`` are comparable with each other; ``latency`` says whether the duration
        is a response time that a user feels, ``"apart"`` one that has percentiles of its own.
        """
        with self._lock:
            starts, durations = self._buffers.setdefault((kind, latency), ([], []))
            starts.append(round(start_seconds, 6))
            durations.append(round(end_seconds - start_seconds, 7))
        if end_seconds - self._last_flush_seconds >= FLUSH_PERIOD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the units that have been collected."""
        with self._lock:
            self._last_flush_seconds = time.monotonic()
            buffers, self._buffers = self._buffers, {}
        for (kind, latency), (starts, durations) in buffers.items():
            self.write(
                "units", kind=kind, latency=latency,
                start_seconds=starts, duration_seconds=durations,
            )  # fmt: skip

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

    def wait_for(self, command: str) -> None:
        """Block until ``command`` has arrived.

        Raises:
            StopRequested: ``stop`` or end-of-file came first.
        """
        self._arrived[command].wait()
        self.check_stop()

    def _read(self, commands: TextIO) -> None:
        # What cannot be read or decoded ends the stream, or nobody could end this client.
        with contextlib.suppress(OSError, ValueError):
            for line in commands:
                command = line.strip()
                if command == "stop":
                    break
                if command in self._arrived:
                    self._arrived[command].set()
        for awaited in (self._stop, *self._arrived.values()):
            awaited.set()


class StepTimes:
    """What a ``Pacer`` books steps with whose times are needed here, such as those of one cell."""

    def __init__(self, recorder: Recorder, latency: bool = False) -> None:
        """Take stops from ``recorder``; with ``latency`` it records each step as one, too."""
        self._recorder, self._latency = recorder, latency
        self.check_stop = recorder.check_stop
        self.seconds: list[float] = []

    @property
    def stop_requested(self) -> bool:
        """Whether the suite wants this client to end."""
        return self._recorder.stop_requested

    def unit(self, kind: str, start_seconds: float, end_seconds: float) -> None:
        """Note one finished step."""
        self.seconds.append(end_seconds - start_seconds)
        if self._latency:
            self._recorder.unit(kind, start_seconds, end_seconds, latency=True)


class Workload(ABC):
    """One job that can be run, repeated from the same state, and described."""

    name: str  # prefix of the result file
    title: str  # heading of the summary
    # None for a workload that uses none; one that does declares it as `ComputeDevice`
    device: ComputeDevice | None = None
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


def main_of(
    workload_class: Callable[[argparse.Namespace], Workload],
    parse_arguments: Callable[[], argparse.Namespace],
) -> Callable[[], int]:
    """Return the ``main`` of a workload script: parse the flags, run the workload."""
    return lambda: run(workload_class(parse_arguments()))


def run(workload: Workload) -> int:
    """Run ``workload`` as its flags say and return the exit code.

    Raises:
        KeyboardInterrupt: A job by hand was interrupted; its result tells what was finished.
    """
    args = workload.args
    if args.resolve:
        with console.stage("looking for data and weights"):
            answer: dict[str, object] = {"arguments": workload.resolve()}
        answer |= {"environment": results.describe_environment(), "notes": workload.warnings}
        print(json.dumps(answer), flush=True)
        return errors.EXIT_OK
    if not args.hold:
        # Before hours of work, not after.
        files.require_writable(args.results_dir)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    recorder = Recorder(args.events, sys.stdin if args.hold else None)
    try:
        outcome = (_repeat_until_stopped if args.hold else _work_once)(workload, recorder)
    except Exception as error:
        _tell_and_raise(recorder, error)
    finally:
        workload.close()
    if outcome is not None:
        _report(workload, {"started_at": started, "command": sys.argv, **outcome})
    return errors.EXIT_OK


def _work_once(workload: Workload, recorder: Recorder) -> dict:
    begin_seconds = time.monotonic()
    interrupted = False
    with console.stage("loading"):
        _load(workload, recorder)
    with results.GpuMonitor(workload.device) as monitor:
        with console.stage("warming up"):
            workload.warm_up()
        startup_seconds = time.monotonic() - begin_seconds
        recorder.write("ready", identity=workload.identity())
        monitor.begin()
        try:
            figures = _run_one_job(workload, recorder, index=0)
        except KeyboardInterrupt:
            recorder.flush()
            finished = workload.partial_figures()
            if finished is None:
                raise
            figures = finished
            _wait_for_device(workload)
            interrupted = True
    figures |= monitor.figures() | {"startup_seconds": startup_seconds}
    identity = workload.identity()
    if not interrupted:
        _write_done(workload, recorder, jobs=1)
    return {"interrupted": interrupted, "figures": figures, "identity": identity}


def _repeat_until_stopped(workload: Workload, recorder: Recorder) -> None:
    jobs = 0
    try:
        _load(workload, recorder)
        recorder.wait_for("warm")
        workload.warm_up()
        recorder.write("ready", identity=workload.identity())
        recorder.wait_for("go")
        recorder.wait_for_stop(workload.start_delay_seconds)
        recorder.check_stop()
        while True:
            _run_one_job(workload, recorder, index=jobs)
            jobs += 1
            recorder.check_stop()
            workload.reset()
    except StopRequested:
        recorder.flush()
        _wait_for_device(workload)
        workload.check_unfinished()
    except KeyboardInterrupt:
        recorder.flush()
        # Leaving an MPS server with work in flight may harm the other clients.
        _wait_for_device(workload)
        raise
    _write_done(workload, recorder, jobs)


def _wait_for_device(workload: Workload) -> None:
    if workload.device is not None:
        workload.device.synchronize()


def _load(workload: Workload, recorder: Recorder) -> None:
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
    cli.raise_lost_interrupt()
    recorder.write("loaded", startup_seconds=time.monotonic() - begin_seconds)


def _run_one_job(workload: Workload, recorder: Recorder, index: int) -> dict:
    start_seconds = time.monotonic()
    figures = workload.run_job(recorder)
    end_seconds = time.monotonic()
    figures["job_seconds"] = end_seconds - start_seconds
    recorder.flush()
    recorder.write(
        "job", index=index, start_seconds=start_seconds, end_seconds=end_seconds, figures=figures
    )
    return figures


def _write_done(workload: Workload, recorder: Recorder, jobs: int) -> None:
    # First: where it ends a process of the job's, the time of that one is known only afterwards.
    peak_memory_mib = workload.peak_memory_mib()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    recorder.write(
        "done", jobs=jobs, host_cpu_seconds=sum(u.ru_utime + u.ru_stime for u in usages),
        peak_memory_mib=peak_memory_mib,
    )  # fmt: skip


def _tell_and_raise(recorder: Recorder, error: Exception) -> NoReturn:
    """Write an error down with its cause and pass it on, as the known one that it may be."""
    known = errors.as_known(error)
    fields: dict[str, object] = {
        "status": "failed", "message": f"{type(error).__name__}: {error}", "cause": None,
    }  # fmt: skip
    if known is not None:
        fields |= {"message": str(known), "cause": known.cause}
    if isinstance(known, errors.OutOfGpuMemoryError):
        fields |= {"status": "oom", "memory": known.memory}
    with contextlib.suppress(errors.CannotWriteError):  # what went wrong first is what counts
        recorder.flush()
        recorder.write("error", **fields)
    if known in (None, error):
        raise error
    raise known from error


def _report(workload: Workload, outcome: dict) -> None:
    """Write the result file and print the summary."""
    figures, identity, device = outcome["figures"], outcome["identity"], workload.device
    figures["peak_memory_mib"] = workload.peak_memory_mib()
    about = {
        "settings": workload.settings(),
        "warnings": workload.warnings,
        "environment": results.describe_environment(),
    }
    path = results.write_result(workload.args.results_dir, workload.name, outcome | about)
    rows = workload.summary(figures)
    for name, (label, text) in SUMMARY_TEXTS.items():
        if figures.get(name) is not None:
            rows.append((label, text.format_map(figures)))
    if device is not None:
        where = identity["gpu_name"] or f"CPU ({identity['host_threads']} threads)"
        rows.append(("Device", f"{where}, engine {device.engine}, {device.precision}"))
    title = workload.title
    if outcome["interrupted"]:
        title += " (interrupted: what was finished)"
    width = max(len(label) for label, _ in rows)
    lines = ["", title, "-" * len(title)]
    lines += [f"{label:<{width}}  {text}" for label, text in rows]
    lines += [f"NOTE: {warning}" for warning in workload.warnings]
    print(errors.printable("\n".join([*lines, "", f"result: {path}"])), flush=True)
    if outcome["interrupted"]:
        raise KeyboardInterrupt
