#!/usr/bin/env python3
"""Run any command as a job: by hand once, under the benchmark suite again and again.

    python3 workloads/custom/command_client.py --command "./train.sh --epochs 3"
    python3 workloads/custom/command_client.py --shell --command "make data && ./train.sh"

One run of the command is one job and one unit of work, of kind `command`. It counts when it exits
with 0. Nothing is known of what happens inside: the command's own start-up belongs to its time,
and the client is ready at once. In a plan file of the suite (`benchmark_suite.py --plan FILE`) a
client with a `command` is run by this script.

When the suite says stop, the run in hand may end by itself for a few seconds; then everything that
the command has started gets SIGTERM, and what still runs after a long grace gets SIGKILL.

Exit codes: 0 done, 1 the command failed, 2 usage, 12 it ran out of GPU memory (its exit code is 12,
or it failed and said so), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli
from workloads.common.client import Recorder, StopRequested, Workload, main_of
from workloads.common.device import sharing_environment
from workloads.common.errors import EXIT_OUT_OF_MEMORY, JobFailedError, OutOfGpuMemoryError

# isort: split
import psutil  # here, where one that is missing is said in one sentence

UNIT_KIND = "command"
LOOK_PERIOD_SECONDS = 0.25
# A command that is about to end needs no signal at all.
FINISH_SECONDS = 5.0
# A process that dies with kernels in flight can harm the other clients of an MPS server, and one
# that heeds SIGTERM may have a checkpoint of many gigabytes to write. Together with FINISH_SECONDS
# this stays under the minute after which the suite ends this script itself.
GRACE_SECONDS = 40.0
KILL_SECONDS = 5.0
POLL_SECONDS = 0.05
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# What a command leaves in the background may hold its standard error open for long.
COPY_SECONDS = 1.0
TAIL_BYTES = 16384
MOST_CHARACTERS = 500  # of its last line
# As CUDA, PyTorch, TensorFlow and JAX say it.
OUT_OF_MEMORY_TEXT = re.compile(
    r"out of memory|OutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|RESOURCE_EXHAUSTED|"
    r"CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def parse_arguments() -> argparse.Namespace:
    """Return the checked flags, the command split into words under `words`."""
    parser = cli.workload_parser(__doc__, uses_gpu=False)
    flag = cli.flags(parser, "the command")
    line = "the command line; split into words as a shell does, but run without one"
    flag("--command", None, line, type=str, required=True, metavar="LINE")
    flag("--shell", False, "run LINE by /bin/sh: pipes, variables and && work")
    folder = "folder to run it in (default: the present one)"
    flag("--working-directory", Path(), folder, metavar="DIR")
    waited = "a run's duration is a response time that somebody waits for: percentiles are kept"
    flag("--latency", False, waited)
    args = parser.parse_args()
    if not args.command.strip():
        parser.error("--command is empty: give a program and its arguments")
    try:
        # What a shell takes, only a shell can say.
        args.words = ["/bin/sh", "-c", args.command] if args.shell else shlex.split(args.command)
    except ValueError as error:
        parser.error(f"--command {args.command!r} cannot be split into words ({error}): quote it")
    if not args.working_directory.is_dir():
        parser.error(f"--working-directory {args.working_directory} is no folder: name one")
    return args


class CommandWorkload(Workload):
    """One command line, run again and again."""

    name = "command"
    title = "Command"
    last_run: _Run | None = None

    def load(self) -> None:
        """Become the parent of whatever loses its own (prctl(2)); the command loads in its run.

        It may be a shell script that starts a launcher that starts the process with the GPU work,
        and some of these put themselves into sessions of their own: all stay descendants.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot become a subreaper")

    def run_job(self, recorder: Recorder) -> dict:
        """Run the command once; its duration is the one figure.

        Raises:
            StopRequested: The suite asked to stop; the command has been ended.
            JobFailedError: It could not be started or did not exit with 0.
            OutOfGpuMemoryError: It did not exit with 0 and says that memory ran out.
        """
        recorder.check_stop()
        self.last_run = run = _Run(self.args.words, self.args.working_directory)
        try:
            self._watch(run, recorder)
        except StopRequested:
            latency, start_seconds = self.args.latency, run.start_seconds
            recorder.write(
                "unfinished", kind=UNIT_KIND, latency=latency, start_seconds=start_seconds
            )
            raise
        _require_success(run)
        recorder.unit(UNIT_KIND, run.start_seconds, run.end_seconds, latency=self.args.latency)
        return {"command_seconds": run.end_seconds - run.start_seconds}

    def _watch(self, run: _Run, recorder: Recorder) -> None:
        """Wait for the end, and note every process on the way: the driver lists these, not us."""
        noted: set[int] = set()
        stop_seconds: float | None = None
        while not run.ended.wait(LOOK_PERIOD_SECONDS):
            present = {process.pid for process in descendants()}
            if present - noted:
                recorder.write("processes", pids=sorted(present - noted))
                noted |= present
            if recorder.stop_requested:
                stop_seconds = stop_seconds or time.monotonic()
                if time.monotonic() >= stop_seconds + FINISH_SECONDS:
                    end_descendants()
                    raise StopRequested
        if stop_seconds:
            # The job that ended meanwhile lies past the window, and failing now harms nobody.
            raise StopRequested

    def close(self) -> None:
        """End what a run has left behind in the background, however this ends."""
        end_descendants()
        if self.last_run:  # what it said last, before this ends
            self.last_run.copier.join(COPY_SECONDS)

    reset = close

    def settings(self) -> dict:
        """Return the command and how it is run."""
        return {
            "command": self.args.command,
            "shell": self.args.shell,
            "working_directory": str(self.args.working_directory.resolve()),
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the command and its duration."""
        return [
            ("Command", self.args.command),
            ("Duration", f"{figures['command_seconds']:.2f} s"),
        ]

    def identity(self) -> dict:
        """Return what can be said from outside: the pid, and the variables that set the mode."""
        nothing = dict.fromkeys(
            ("device", "gpu_name", "gpu_uuid", "multiprocessor_count", "memory_total_mib",
             "engine", "precision", "batch_size")
        )  # fmt: skip
        sharing = sharing_environment()
        return nothing | {"pid": os.getpid(), "sharing_environment": sharing, "versions": {}}


class _Run:
    """One run of the command; `ended` is set once it is over.

    Its errors go to this script's standard error, and their end is kept in `stderr_tail`.
    """

    def __init__(self, words: list[str], folder: Path) -> None:
        self.ended = threading.Event()
        self.stderr_tail = b""
        self.start_seconds = time.monotonic()
        try:
            self._process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise JobFailedError(
                f"cannot start {words[0]} in {folder}: {error.strerror}; check --command, "
                "--working-directory and, of a script, its first line (#!)"
            ) from error
        threading.Thread(target=self._wait, daemon=True).start()
        stderr = self._process.stderr
        self.copier = threading.Thread(target=self._copy_stderr, args=(stderr,), daemon=True)
        self.copier.start()

    def _wait(self) -> None:
        # A thread of its own takes the time at once, whatever the others are doing.
        self.exit_code = self._process.wait()
        self.end_seconds = time.monotonic()
        self.ended.set()

    def _copy_stderr(self, stderr: IO[bytes]) -> None:
        with stderr:
            while chunk := os.read(stderr.fileno(), 65536):
                self._say(chunk)
        if self.stderr_tail[-1:] not in (b"", b"\n"):
            self._say(b"\n")  # or what this script says would stand behind a progress bar

    def _say(self, text: bytes) -> None:
        # The command is not to be held up where nobody takes what it says.
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(text)
            sys.stderr.buffer.flush()
        self.stderr_tail = (self.stderr_tail + text)[-TAIL_BYTES:]


def descendants() -> set[psutil.Process]:
    """Return all living descendants of this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def end_descendants() -> None:
    """End every descendant: SIGTERM, and SIGKILL for what still runs after ``GRACE_SECONDS``.

    An interruption cuts the grace short, but never leaves a process behind.
    """
    try:
        _signal_until_gone(signal.SIGTERM, GRACE_SECONDS)
    finally:
        _signal_until_gone(signal.SIGKILL, KILL_SECONDS)
        # Their exit status, or they stay as zombies while this runs.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _signal_until_gone(number: signal.Signals, seconds: float) -> None:
    """Signal each descendant once, those that appear meanwhile too, until none is left."""
    deadline = time.monotonic() + seconds
    told: set[psutil.Process] = set()
    while (left := descendants()) and time.monotonic() < deadline:
        for process in left - told:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        told |= left
        time.sleep(POLL_SECONDS)


def _require_success(run: _Run) -> None:
    code = run.exit_code
    if code == 0:
        return
    run.copier.join(COPY_SECONDS)
    text = run.stderr_tail.decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    names = {one.value: one.name for one in signal.Signals}  # not of every real-time signal
    how = f"exit code {code}" if code > 0 else f"signal {names.get(-code, -code)}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # a shell's word for it
        how += " (the host may have run out of memory)"
    said = [line[:MOST_CHARACTERS] for line in lines[-1:]]
    message = ": ".join([f"the command ended with {how}", *said])
    if code == EXIT_OUT_OF_MEMORY or OUT_OF_MEMORY_TEXT.search(text):
        raise OutOfGpuMemoryError(f"out of GPU memory: {message}")
    raise JobFailedError(message)


if __name__ == "__main__":
    cli.run_main(main_of(CommandWorkload, parse_arguments))
