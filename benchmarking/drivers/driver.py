"""What run_experiments.py and stress_test.py share: the machine, the environment, signals, runs.

A driver is started by the system's Python, which answers wrong usage and a machine that cannot be
used. It then becomes the Python that has everything (`environment.py`), as the same process,
and calls the suite in it. A signal does not end it: it is handed to the suite, which stops its
clients and writes its records; then the driver undoes the mode that it enabled and still makes the
report of what was done. Clients of a driver that is killed end by the end-of-file of their standard
input; its mode is undone by the next start (`modes/enabling.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MODE_NOT_IN_FORCE,
    EXIT_USAGE,
    SuiteEnd,
    SuiteError,
    leave_dead_terminal,
    present_folder,
)
from benchmarking.drivers.driver_arguments import (
    PROJECT_ROOT,
    SAVED_ARGUMENTS,
    UsageError,
    command_name,
    save_arguments,
    suite_flags,
)
from benchmarking.hardware.nvidia_tools import Gpu, NoGpuError, find_gpu, mig_profiles
from benchmarking.modes.enabling import ModeSwitch
from benchmarking.modes.mode_scripts import ModeScriptError
from benchmarking.modes.names import MODE_MPS_PARTITIONS
from benchmarking.planning.redaction import hidden_in_command_line
from benchmarking.records.writing import (
    REFUSALS_FILE,
    append_refusal,
    is_held,
    one_line,
    remove_unbegun,
)

SUITE = PROJECT_ROOT / "benchmarking" / "benchmark_suite.py"
ANALYSIS = PROJECT_ROOT / "benchmarking" / "analyze_results.py"
WENT_ON = "it was cut off before its end and went on"
# Set for the Python that has everything: its path, and the GPU as it was found before.
PYTHON_VARIABLE, GPU_VARIABLE = "GPU_SHARING_PYTHON", "GPU_SHARING_GPU"
# Under sudo the mode scripts act for the account that called sudo, but everything here runs as
# root, and an MPS daemon serves its own user's clients only.
SUDO_VARIABLES = ("SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND")
REASONS = {
    1: "a co-run failed",
    5: "there is no proof that the mode was in force",
    EXIT_INTERRUPTED: "interrupted",
}


@contextlib.contextmanager
def driving(script: str, parse_arguments: Callable[[], argparse.Namespace]) -> Iterator[Driver]:
    """Give the driver inside; whatever ends it, the mode is undone and a refusal kept."""
    command = command_name(script)
    driver = None
    try:
        driver = Driver(parse_arguments(), command)
        driver.inspect_machine()
        yield driver
    except (SuiteError, NoGpuError, ModeScriptError) as error:
        code = getattr(error, "exit_code", EXIT_FAILED)
        say("\n".join(f"error: {line}" for line in str(error).splitlines()))
        if isinstance(error, UsageError):
            say(f"Try '{command} --help'.")
        if driver is not None:
            driver.note_refusal(code, str(error))
        raise SystemExit(code) from None
    except KeyboardInterrupt:  # before there is anything to undo
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        if driver is not None:
            driver.undo_mode()
            driver.held.close()
            driver.leave_dead_terminal()


class Driver:
    """A driver at work; what it cannot do raises `SuiteError`, `NoGpuError`, `ModeScriptError`."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        """Take the options, and how the driver is called from the present folder."""
        self.options = options
        self.output: str = options.output or ""
        self.modes = ModeSwitch(None, options, say)
        self.interrupted: int | None = None  # the exit code that a signal asks for
        self.notes: list[str] = []  # what is to be known of a run that went well
        self.held = contextlib.ExitStack()  # the card's lock, over all runs of the suite
        self._command = command
        self._python = os.environ.pop(PYTHON_VARIABLE, None)
        self._has_begun = False  # from then on the suite's records tell what was done
        self._session: Any = None
        self._stop: Any = None
        for name in SUDO_VARIABLES:
            os.environ.pop(name, None)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU, `None` for the demonstration on the CPU."""
        return self.modes.found

    # --- before anything runs -----------------------------------------------------------------

    def inspect_machine(self) -> None:
        """Choose the GPU, none for the demonstration on the CPU."""
        found = json.loads(os.environ.pop(GPU_VARIABLE, "null"))
        if self._python is None:
            self.modes.found = find_gpu(self.options.device, self.options.gpu, say)
        elif found is not None:
            self.modes.found = Gpu(**found)

    def enter_environment(self) -> None:
        """Become the Python that has everything, unless this is it, as the same process."""
        if self._python is not None:
            return
        options = self.options
        command = [sys.executable, "-I", str(PROJECT_ROOT / "benchmarking/environment.py"), "run"]
        command += ["--dry-run"] if options.dry_run else []
        command += [str(PROJECT_ROOT / "benchmarking" / f"{Path(options.script).stem}.py")]
        command += ["--resume", str(options.resumed)] if options.resumed else options.words
        gpu = json.dumps(vars(self.gpu) if self.gpu else None)
        os.execve(sys.executable, command, {**os.environ, GPU_VARIABLE: gpu})

    def count_jobs(self, modes: Sequence[str]) -> int | None:
        """Return how many clients the user's own jobs are, `None` with a mix.

        Raises `SuiteError` for a plan that cannot be used under one of the modes.

        Where the environment is yet to be made, which only a dry run goes on with, a plan counts as
        one client.
        """
        plan = self.options.plan
        if not plan:
            return len(self.options.job) or None
        try:
            from benchmarking.planning.plan_file import read_plan_file
        except ModuleNotFoundError:
            if not self.options.dry_run:
                raise
            say(f"{plan} is checked once there is an environment; one client is assumed here.")
            return 1
        plan_file = read_plan_file(Path(plan))
        if MODE_MPS_PARTITIONS in modes:
            plan_file.require_no_percentage()
        return len(plan_file.members)

    def require_layout(self, clients: int) -> None:
        """Refuse a --mig-layout without an instance for each client, or with unknown profiles."""
        if not self.options.mig_layout:
            return
        layout = self.options.mig_layout.split(",")
        if clients > len(layout):
            raise UsageError(
                f"--mig-layout has {len(layout)} instances for {clients} jobs; name one for each"
            )
        if self.gpu is None or self.gpu.lacks_mig:
            return
        profiles = mig_profiles(self.gpu)
        unknown = ",".join(dict.fromkeys(name for name in layout if name not in profiles))
        if unknown:
            raise UsageError(
                f"--mig-layout: {self.gpu.title} has no profile {unknown}; it has "
                f"{' '.join(profiles)}"
            )

    def prepare(self, name: str) -> None:
        """Make the folder of this name and the time, or take that of --resume; catch signals.

        Undoes what a driver that was killed has left.
        """
        other = self.modes.other_driver()
        if other:
            raise SuiteError(other, EXIT_MODE_NOT_IN_FORCE)
        self._hold_card()
        if self.options.resumed:
            self.output = str(self.options.resumed)
            for folder in filter(is_held, sorted(Path(self.output).glob("*/"))):
                raise SuiteError(
                    f"the suite is still at work in {folder}; wait for its end, or stop it"
                )
        else:
            self.output = self.output or f"results/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            if not os.path.isabs(self.output):
                present_folder()
            self._make_folder()
        self.modes.folder = Path(self.output)
        self._catch_signals()
        self.modes.undo_what_was_left()

    def _hold_card(self) -> None:
        """Refuse to start while another run is at work on the card, or on the CPU."""
        if self.options.dry_run or self.options.allow_contention:
            return
        from benchmarking.measuring import locks

        self.held.enter_context(locks.hold(self.gpu.uuid if self.gpu else None))

    def _make_folder(self) -> None:
        folder = Path(self.output)
        # What was refused before did not use the folder.
        there = glob.glob(
            "*", root_dir=folder
        )  # where pathlib's raises for a name that is too long
        if set(there) - {REFUSALS_FILE}:
            raise UsageError(f"--output: {self.output} is not empty; name another folder")
        command = shlex.join(["mkdir", "-p", "--", self.output])
        if self.options.dry_run:
            print(f"would run: {command}", flush=True)
            return
        say(f"run: {command}")
        failure = f"cannot make the folder {self.output}; name another by --output"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            failure = f"cannot write into {self.output}; name another folder by --output"
            save_arguments(self.options, self.output)
        except OSError:
            raise SuiteError(failure) from None

    # --- signals --------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        if self.options.dry_run:
            return
        from benchmarking.suite import session

        self._session, self._stop = session, session.StopSignal()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = 128 + number
        self._stop.request()
        self.leave_dead_terminal()
        say("Stopping: what was enabled is undone, and what was done is reported.")

    def leave_dead_terminal(self) -> None:
        """Where nobody can read any more, write into the folder; with nothing to undo, nowhere."""
        log = os.path.join(self.output, "after-hangup.log") if self._stop else os.devnull
        leave_dead_terminal(log)

    # --- runs -----------------------------------------------------------------------------------

    def mode_name(self, mode: str) -> str:
        """Return what a run under a mode may be called here."""
        return mode.replace(":", "-") if self.gpu else "cpu-demo"

    def run_suite(self, run_id: str, flags: Sequence[str]) -> SuiteEnd:
        """Run the suite into a folder of the output, or go on with the run that is there.

        A run that came to its end, even to a breaking point, is left as it is.
        """
        outcome = _outcome(Path(self.output, run_id)) if self.options.resumed else None
        if outcome == "complete":
            return SuiteEnd(0, "")
        if outcome is not None:
            end = self._call_suite(["--resume", os.path.join(self.output, run_id)])
            if end.exit_code == EXIT_USAGE and outcome == "failed":
                return SuiteEnd(1, REASONS[1])  # not that there is nothing to go on with
            self.notes.append(WENT_ON)
            return end
        return self._call_suite(self._words(run_id, flags))

    def run_round(self, run_id: str, flags: Sequence[str], number: int) -> SuiteEnd:
        """Run one round of the suite into a folder of the output; what it has already is kept."""
        outcome = _outcome(Path(self.output, run_id)) if self.options.resumed else None
        if outcome not in (None, "complete", "failed"):
            self.notes.append(WENT_ON)
        return self._call_suite([*self._words(run_id, flags), "--round", str(number)])

    def estimate(self, run_id: str, flags: Sequence[str]) -> float | None:
        """Return about how many seconds one repeat of a run takes, `None` where nobody can tell."""
        return self._session.estimate_repeat_seconds(self._words(run_id, flags))

    def manifest_of_rounds(self) -> dict[str, Any]:
        """Return the manifest of a run here whose rounds take turns, empty where there is none."""
        found = (_manifest(folder) or {} for folder in sorted(Path(self.output).glob("*/")))
        return next((manifest for manifest in found if manifest.get("session")), {})

    def session_name(self) -> str:
        """Return what the runs of this driver have in common, also after it was cut off.

        A folder that was renamed or copied meanwhile keeps the name that its runs have.
        """
        if manifest := self.manifest_of_rounds():
            return str(manifest["session"])
        with contextlib.suppress(OSError):
            begun = os.stat(os.path.join(self.output, SAVED_ARGUMENTS)).st_mtime
            stamp = datetime.fromtimestamp(begun, timezone.utc).strftime("%Y%m%d-%H%M%S")
            return f"{Path(self.output).resolve().name}-{stamp}"
        return "new"

    def _words(self, run_id: str, flags: Sequence[str]) -> list[str]:
        """Return the suite's arguments for a run of that name."""
        folder = Path(self.output, run_id)
        if self.options.resumed:
            remove_unbegun(folder)
        words = [*flags, "--results-dir", self.output, "--run-id", run_id]
        words += suite_flags(self.options)
        words += ["--gpu", self.gpu.uuid] if self.gpu else []
        if self.options.mig_layout and "mig" in flags:
            words += ["--mig-layout", self.options.mig_layout]
        return words

    def _call_suite(self, words: list[str]) -> SuiteEnd:
        if not self._announce(SUITE, words):
            return SuiteEnd(0, "")
        self._has_begun = True
        try:
            result = self._session.run_suite(words, self._stop, from_driver=True)
            code, reason = result.exit_code, result.reason
        except (Exception, SystemExit) as error:  # the other phases still have their turn
            with contextlib.suppress(OSError):
                traceback.print_exc()
            code, reason = EXIT_FAILED, f"the suite crashed ({type(error).__name__}: {error})"
        if self.interrupted is not None:
            code, reason = EXIT_INTERRUPTED, None
            self.leave_dead_terminal()  # its reader may have ended a moment after the signal
        if code == 0:
            return SuiteEnd(0, "")
        usual = REASONS.get(code, f"the suite ended with status {code}")
        return SuiteEnd(code, one_line(reason or usual))

    def has_runs(self) -> bool:
        """Whether there is something to report."""
        return self.options.dry_run or any(Path(self.output).glob("*/manifest.json"))

    def analyze(self) -> str | None:
        """Make the report of all runs; return why it failed, `None` where it did not.

        In a process of its own: a chart that crashes does not take the driver along.
        """
        words = ["--results-dir", self.output, "--each-run"]
        if not self._announce(ANALYSIS, words):
            return None
        process = subprocess.Popen(
            [str(self._python), str(ANALYSIS), *words], stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        )  # fmt: skip
        sentence = ""
        for line in process.stderr or ():
            say(line.rstrip("\n"))
            sentence = line.partition(f"{ANALYSIS.name}: error: ")[2].strip() or sentence
        code = process.wait()
        if code == 0:
            return None
        return one_line(sentence) or f"the analysis ended with status {code}"

    def _announce(self, program: Path, words: Sequence[str]) -> bool:
        """Print a command of the Python that has everything; return whether it is run."""
        shown = hidden_in_command_line([str(self._python), str(program), *words])
        command = shlex.join(shown)
        if self.options.dry_run:
            print(f"would run: {command}", flush=True)
            return False
        self.leave_dead_terminal()
        say(f"run: {command}")
        return True

    # --- the end --------------------------------------------------------------------------------

    def undo_mode(self) -> str | None:
        """Undo what is enabled, if anything; return why that failed, which is said, too."""
        try:
            self.modes.undo()
        except ModeScriptError as error:
            say(f"error: {error}")
            return str(error)
        return None

    def leave_interrupted(self) -> None:
        """End an interrupted driver, naming how to go on: what is done is not lost."""
        if self.interrupted is not None:
            say(f"Interrupted; to go on: {self.resume_command()}")
            raise SystemExit(self.interrupted)

    def resume_command(self) -> str:
        """Return what goes on with what was cut off."""
        # Going on is done where the run was started, which need not be where its user is.
        here = str(PROJECT_ROOT / self.options.script) if self.options.resumed else self._command
        return shlex.join([here, "--resume", self.output])

    def note_refusal(self, exit_code: int, sentence: str) -> None:
        """Keep what was refused before the suite was started, which else no record would tell.

        Wrong usage apart; what cannot be written was said on the terminal. A folder that somebody
        else made is not written to.
        """
        if self.options.dry_run or self._has_begun or exit_code == EXIT_USAGE:
            return
        folder = str(self.options.resumed or self.output or "results")
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.lstat(folder).st_uid == os.geteuid():
                command = hidden_in_command_line([self._command, *self.options.words])
                append_refusal(Path(folder), command, exit_code, sentence)


def say(text: str) -> None:
    """Print a line on standard error, also in the midst of a print; nobody may be there to read."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def _outcome(folder: Path) -> str | None:
    """Return how the run in a folder ended by its manifest, `None` where there is no run."""
    manifest = _manifest(folder)
    return None if manifest is None else str(manifest.get("outcome", ""))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a run, empty where it cannot be read, `None` where there is none."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
