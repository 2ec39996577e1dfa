"""What run_experiments.py and stress_test.py share: the machine, the environment, signals, runs.

A driver is started by the system's Python, which answers wrong usage and a machine that cannot be
used. It then becomes the Python that has everything (`setup_environment.sh`), as the same process,
and calls the suite in it. A signal does not end it: it is handed to the suite, which stops its
clients and writes its records; then the driver undoes the mode that it enabled and still makes the
report of what was done. Clients of a driver that is killed end by the end-of-file of their standard
input; its mode is undone by the next start (`modes/enabling.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from benchmarking.hardware import nvidia_tools
from benchmarking.hardware.nvidia_tools import Gpu, NoAnswerError
from benchmarking.hardware.visible_devices import (
    VISIBLE,
    cards_of_nvidia_smi,
    names_none,
    visible_devices,
)
from benchmarking.modes.enabling import ModeSwitch
from benchmarking.modes.mode_scripts import ModeScriptError
from benchmarking.suite import driver_arguments
from benchmarking.suite.driver_arguments import (
    EXIT_FAILED,
    EXIT_NO_GPU,
    EXIT_USAGE,
    PROJECT_ROOT,
    Refused,
    usage_error,
)

EXIT_INTERRUPTED = 130
SUITE = PROJECT_ROOT / "benchmarking" / "benchmark_suite.py"
ANALYSIS = PROJECT_ROOT / "benchmarking" / "analyze_results.py"
PHASES_FILE, REFUSALS_FILE = "phases.jsonl", "refusals.jsonl"
# Set for the Python that has everything: its path, and the GPU as it was found before.
PYTHON_VARIABLE, GPU_VARIABLE = "GPU_SHARING_PYTHON", "GPU_SHARING_GPU"
# Under sudo the mode scripts act for the account that called sudo, but everything here runs as
# root, and an MPS daemon serves its own user's clients only.
SUDO_VARIABLES = ("SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND")
REASONS = {
    1: "a co-run failed",
    2: "the suite refused its arguments",
    3: "the suite found no usable GPU",
    4: "the GPU was not free or the mode not in force",
    5: "there is no proof that the mode was in force",
    EXIT_INTERRUPTED: "interrupted",
}


class SuiteEnd(NamedTuple):
    """How a run of the suite ended: its exit code, and why in words where that is not 0."""

    exit_code: int
    reason: str


@contextlib.contextmanager
def driving(script: str, parse_arguments: Callable[[], argparse.Namespace]) -> Iterator[Driver]:
    """Give the driver inside; whatever ends it, the mode is undone and a refusal kept."""
    command = driver_arguments.command_name(script)
    driver = None
    try:
        driver = Driver(parse_arguments(), command)
        driver.inspect_machine()
        yield driver
    except Refused as refused:
        driver_arguments.complain(refused, command)
        if driver is not None:
            driver.note_refusal(refused)
        raise SystemExit(refused.exit_code) from None
    except KeyboardInterrupt:  # before there is anything to undo
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        if driver is not None:
            driver.end()


class Driver:
    """A driver at work."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        """Take the options, and how the driver is called from the present folder."""
        self.options = options
        self.output: str = options.output or ""
        self.gpu: Gpu | None = None
        self.modes = ModeSwitch(None, options, say)
        self.interrupted: int | None = None  # the exit code that a signal asks for
        self.notes: list[str] = []  # what is to be known of a run that went well
        self._command = command
        self._python = os.environ.pop(PYTHON_VARIABLE, None)
        self._has_begun = False  # from then on the suite's records tell what was done
        self._session: Any = None
        self._stop: Any = None
        for name in SUDO_VARIABLES:
            os.environ.pop(name, None)

    # --- before anything runs -----------------------------------------------------------------

    def inspect_machine(self) -> None:
        """Choose the GPU, none for the demonstration on the CPU; raises `Refused`."""
        found = os.environ.pop(GPU_VARIABLE, None)
        if self._python is not None and found is not None:
            facts = json.loads(found)
            self.gpu = Gpu(**facts) if facts else None
        else:
            try:
                self.gpu = find_gpu(self.options.device, self.options.gpu)
            except NoAnswerError as error:
                raise Refused(EXIT_NO_GPU, str(error)) from None
        self.modes.gpu = self.gpu

    def enter_environment(self) -> None:
        """Become the Python that has everything, unless this is it, as the same process."""
        if self._python is not None:
            return
        options = self.options
        again = ["--resume", str(options.resumed)] if options.resumed else options.words
        facts = json.dumps(vars(self.gpu) if self.gpu else None)
        os.execvpe(
            "bash",
            [
                "bash", str(PROJECT_ROOT / "setup_environment.sh"),
                *(["--dry-run"] if options.dry_run else []),
                str(PROJECT_ROOT / "benchmarking" / f"{Path(options.script).stem}.py"), *again,
            ],
            {**os.environ, GPU_VARIABLE: facts},
        )  # fmt: skip

    def count_jobs(self) -> int | None:
        """Return how many clients the user's own jobs are, `None` with a mix; raises `Refused`.

        Where the environment is yet to be made, which only a dry run goes on with, a plan counts as
        one client.
        """
        plan = self.options.plan
        if not plan:
            return len(self.options.job) or None
        try:
            from benchmarking.suite.plan_file import PlanFileError, read_plan_file
        except ModuleNotFoundError:
            if not self.options.dry_run:
                raise
            say(f"{plan} is checked once there is an environment; one client is assumed here.")
            return 1
        try:
            return len(read_plan_file(Path(plan)).members)
        except PlanFileError as error:
            raise Refused(EXIT_USAGE, "\n".join(error.mistakes)) from None

    def require_layout(self, clients: int) -> None:
        """Raise `Refused` where --mig-layout lacks an instance, or the GPU a profile of it."""
        layout = self.options.mig_layout
        if not layout:
            return
        if clients > len(layout):
            raise usage_error(
                f"--mig-layout has {len(layout)} instances for {clients} jobs; name one for each"
            )
        if self.gpu is None or "N/A" in self.gpu.mig_mode:
            return
        try:
            profiles = nvidia_tools.mig_profiles(self.gpu)
        except NoAnswerError as error:
            raise Refused(EXIT_FAILED, str(error)) from None
        unknown = dict.fromkeys(name for name in layout if name not in profiles)
        if unknown:
            raise usage_error(
                f"--mig-layout: {self.gpu.title} has no profile {','.join(unknown)}; it has "
                f"{' '.join(profiles)}"
            )

    def prepare(self, name: str) -> None:
        """Make the folder of this name and the time, or take that of --resume; catch signals.

        Undoes what a driver that was killed has left. Raises `Refused`.
        """
        other = self.modes.other_driver()
        if other:
            raise Refused(EXIT_FAILED, other)
        if self.options.resumed:
            self.output = str(self.options.resumed)
            self._require_nobody_at_work()
        else:
            self._make_folder(self.output or f"results/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.modes.folder = Path(self.output)
        self._catch_signals()
        try:
            self.modes.undo_leftovers()
        except ModeScriptError as error:
            raise Refused(EXIT_FAILED, str(error)) from None
        self.gpu = self.modes.gpu

    def _make_folder(self, folder: str) -> None:
        self.output = folder
        found = [path.name for path in Path(folder).glob("[!.]*")]
        # What was refused before did not use the folder.
        if found and found != [REFUSALS_FILE]:
            raise usage_error(f"--output: {folder} is not empty; name another folder")
        command = shlex.join(["mkdir", "-p", "--", folder])
        if self.options.dry_run:
            print(f"would run: {command}", flush=True)
            return
        say(f"run: {command}")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError:
            raise Refused(
                EXIT_USAGE, f"cannot make the folder {folder}; name another by --output"
            ) from None
        try:
            driver_arguments.save_arguments(self.options, folder)
        except OSError:
            raise Refused(
                EXIT_USAGE, f"cannot write into {folder}; name another folder by --output"
            ) from None

    def _require_nobody_at_work(self) -> None:
        for lock in Path(self.output).glob("*/run.lock"):
            try:
                with lock.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(
                    EXIT_USAGE,
                    f"the suite is still at work in {lock.parent}; wait for its end, or stop it",
                ) from None

    # --- signals --------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        if self.options.dry_run:
            return
        from benchmarking.suite import session

        self._session, self._stop = session, session.StopSignal()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has it ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = 128 + number
        self._stop.request()
        self._leave_dead_terminal()
        say("Stopping: what was enabled is undone, and what was done is reported.")

    def _leave_dead_terminal(self) -> None:
        """Exchange a closed terminal, or a pipe whose reader has ended, for a file.

        Undoing and reporting are done by programs that fail where they cannot write.
        """
        dead = [stream for stream in (1, 2) if _is_dead(stream)]
        if not dead:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            file = os.open(os.path.join(self.output, "after-hangup.log"), flags, 0o600)
        except OSError:
            file = os.open(os.devnull, os.O_WRONLY)
        for stream in dead:
            os.dup2(file, stream)
        os.close(file)

    # --- runs -----------------------------------------------------------------------------------

    def mode_name(self, mode: str) -> str:
        """Return what a run under a mode may be called here."""
        return mode if self.gpu else "cpu-demo"

    def run_suite(self, run_id: str, flags: Sequence[str]) -> SuiteEnd:
        """Run the suite into a folder of the output, or go on with the run that is there.

        A run that came to its end, even to a breaking point, is left as it is.
        """
        folder = os.path.join(self.output, run_id)
        outcome = _outcome(folder) if self.options.resumed else None
        if outcome == "complete":
            return SuiteEnd(0, "")
        if outcome is not None:
            end = self._call_suite(["--resume", folder])
            if end.exit_code == EXIT_USAGE and outcome == "failed":
                return SuiteEnd(1, REASONS[1])  # not that there is nothing to go on with
            self.notes.append("it was cut off before its end and went on")
            return end
        if self.options.resumed:
            _remove_empty_run(Path(folder))
        words = [*flags, "--results-dir", self.output, "--run-id", run_id,
                 "--device", self.options.device, *self.options.suite_flags]  # fmt: skip
        if self.gpu is not None:
            words += ["--gpu", self.gpu.uuid]
        if self.options.mig_layout and "mig" in flags:
            words += ["--mig-layout", ",".join(self.options.mig_layout)]
        return self._call_suite(words)

    def _call_suite(self, words: list[str]) -> SuiteEnd:
        if not self._announce([str(SUITE), *words]):
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
            self._leave_dead_terminal()  # its reader may have ended a moment after the signal
        if code == 0:
            return SuiteEnd(0, "")
        usual = REASONS.get(code, f"the suite ended with status {code}")
        return SuiteEnd(code, without_controls(reason) if reason else usual)

    def analyze(self) -> str | None:
        """Make the report of all runs; return why it failed, `None` where it did not.

        In a process of its own: a chart that crashes does not take the driver along.
        """
        words = [str(ANALYSIS), "--results-dir", self.output, "--each-run"]
        if not self._announce(words):
            return None
        process = subprocess.Popen(
            [str(self._python), *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        sentence = ""
        for line in process.stderr or ():
            say(line.rstrip("\n"))
            sentence = line.partition(f"{ANALYSIS.name}: error: ")[2].strip() or sentence
        code = process.wait()
        return (
            without_controls(sentence) or f"the analysis ended with status {code}" if code else None
        )

    def _announce(self, words: Sequence[str]) -> bool:
        """Print a command of the Python that has everything; whether it is run."""
        command = shlex.join([str(self._python), *words])
        if self.options.dry_run:
            print(f"would run: {command}", flush=True)
            return False
        self._leave_dead_terminal()
        say(f"run: {command}")
        return True

    # --- the end --------------------------------------------------------------------------------

    def leave_interrupted(self) -> None:
        """End an interrupted driver, naming how to go on: what is done is not lost."""
        if self.interrupted is not None:
            say(f"Interrupted; to go on: {self.resume_command()}")
            raise SystemExit(self.interrupted)

    def resume_command(self) -> str:
        """Return what goes on with what was cut off."""
        return shlex.join([self._command, "--resume", self.output])

    def note_refusal(self, refused: Refused) -> None:
        """Keep what was refused before the suite was started, which else no record would tell.

        Wrong usage apart; what cannot be written was said on the terminal. A folder that somebody
        else made is not written to.
        """
        if self.options.dry_run or self._has_begun or refused.exit_code == EXIT_USAGE:
            return
        folder = str(self.options.resumed or self.output or "results")
        row = {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [without_controls(word) for word in (self._command, *self.options.words)],
            "exit_code": refused.exit_code,
            "sentence": without_controls(str(refused)),
        }
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.lstat(folder).st_uid == os.geteuid():
                append_line(Path(folder, REFUSALS_FILE), row)

    def end(self) -> None:
        """Undo what is still enabled."""
        try:
            self.modes.undo()
        except ModeScriptError as error:
            say(f"error: {error}")
        self._leave_dead_terminal()


def say(text: str) -> None:
    """Print a line on standard error, also in the midst of a print; nobody may be there to read."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def find_gpu(device: str, selector: str | None) -> Gpu | None:
    """Return the GPU to use, `None` for the demonstration on the CPU.

    Only a machine without a GPU gets the demonstration unasked. Raises `Refused`, `NoAnswerError`.
    """
    if device == "cpu":
        say("CPU demonstration, as asked for (--device cpu).")
    elif device == "auto" and not selector and _hides_gpus():
        say("CPU demonstration: CUDA_VISIBLE_DEVICES hides every GPU.")
    elif nvidia_tools.lists_a_gpu():
        gpu = nvidia_tools.select(selector or _first_visible(), say)
        say(gpu.title)
        return gpu
    elif device == "cuda" or selector:
        raise Refused(
            EXIT_NO_GPU,
            "no NVIDIA GPU was found; without --device cuda and --gpu the CPU demonstration runs",
        )
    else:
        say("No NVIDIA GPU was found: this is the CPU demonstration, no sharing mode is in force.")
    return None


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line, whole or not at all, and not to a last line that was cut off.

    Links are not followed. Raises `OSError`.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o644), "r+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        is_cut_off = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
        line = f"{json.dumps(row, separators=(',', ':'))}\n".encode()
        line = b"\n" + line if is_cut_off else line
        if stream.write(line) != len(line):
            stream.truncate(size)
            raise OSError("no room for a whole line")


def without_controls(text: str) -> str:
    """Return text for a record: on one line, and UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text).encode(errors="replace").decode()


def _hides_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU; asked of the driver only where it has to be."""
    value = os.environ.get(VISIBLE)
    if value is None:
        return False
    if names_none(value):
        return True
    return nvidia_tools.lists_a_gpu() and not visible_devices(os.environ, _cards())


def _first_visible() -> str | None:
    """Return the UUID of the first GPU that CUDA would see, `None` where nothing restricts it."""
    if VISIBLE not in os.environ:
        return None
    found = visible_devices(os.environ, _cards())
    if not found:
        value = nvidia_tools.printable(os.environ[VISIBLE])
        raise Refused(
            EXIT_NO_GPU,
            f"CUDA_VISIBLE_DEVICES='{value}' hides every GPU; unset it, name a GPU by --gpu, or "
            "choose --device cpu",
        )
    if found[0].startswith("MIG-"):
        raise Refused(
            EXIT_USAGE,
            f"CUDA_VISIBLE_DEVICES names the MIG device {found[0]}, which is not the whole card: "
            "name the card with --gpu, each client gets an instance of it",
        )
    return found[0]


def _cards() -> Sequence[Any]:
    cards = cards_of_nvidia_smi()
    if not cards:
        raise NoAnswerError("nvidia-smi lists no GPU, so none can be chosen")
    return cards


def _outcome(folder: str) -> str | None:
    """Return how the run in a folder ended by its manifest, `None` where there is no run."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""
    return str(manifest.get("outcome", "")) if isinstance(manifest, dict) else ""


def _remove_empty_run(folder: Path) -> None:
    """Remove what a run that was cut off before its first word has left."""
    with contextlib.suppress(OSError):
        (folder / "run.lock").unlink(missing_ok=True)
        folder.rmdir()


def _is_dead(stream: int) -> bool:
    """Whether nobody can read any more what is written to a terminal or a pipe."""
    poll = select.poll()
    poll.register(stream, 0)
    gone = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return any(event & gone for _, event in poll.poll(0))
