"""A sharing mode put in force for a driver, and undone whatever ends the driver.

A mode that is set up already is used and left so; what a driver sets up is the driver's to undo. So
it notes, next to the mode's own state, that it is at work with it: after a SIGKILL the next start
undoes the mode, or `gpu_status.sh --restore`, which leaves it alone while the driver lives
(gpu-configs/gpu_status.sh, restore). Standard library alone, for dry runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarking.hardware.nvidia_tools import (
    Gpu,
    NoGpuError,
    ask_mps_control,
    is_own_pipe_directory,
    mig_instances,
    printable,
    refresh,
    time_slice,
    why_no_static_partitions,
)
from benchmarking.modes import mode_scripts
from benchmarking.modes.mode_scripts import (
    KINDS_OF_ROOT,
    STATE_KINDS,
    ModeScriptError,
    saved_partitions,
)
from benchmarking.modes.names import MODE_MPS_PARTITIONS
from benchmarking.records.writing import append_text, write_text_atomic

LOG_FILE = "mode-scripts.log"
NOTE = "driver"  # the kind of state that a driver's note is
UNDO_SCRIPTS = {
    "time-slicing": "reset_time_slicing.sh",
    "mps": "disable_mps.sh",
    MODE_MPS_PARTITIONS: "disable_mps.sh",
    "mig": "disable_mig.sh",
}


class ModeSwitch:
    """Puts modes in force on a GPU for a driver, one at a time, and undoes them.

    `options` are the driver's: `timeslice`, `exclusive`, `mig` (whether it may be switched on),
    `mig_profile`, `mig_layout`, `dry_run`. `say` prints a line.
    """

    def __init__(
        self, gpu: Gpu | None, options: argparse.Namespace, say: Callable[[str], None]
    ) -> None:
        """Take the GPU; where there is none, no mode can be used."""
        self.found = gpu
        self.folder = Path()  # for the records of what the scripts did
        self._options = options
        self._say = say
        # The mode that is to be undone, and how.
        self._enabled: str | None = None
        self._undo_words: Sequence[str] = ()
        self._as_root = False

    @property
    def gpu(self) -> Gpu:
        """The GPU; raises `NoGpuError` where there is none."""
        if self.found is None:
            raise NoGpuError("there is no NVIDIA GPU")
        return self.found

    def why_not(self, mode: str, clients: int) -> str | None:
        """Return why a mode cannot be used here for so many clients, `None` where it can."""
        if self.found is None:
            return "no NVIDIA GPU"
        is_on = self.gpu.mig_mode == "Enabled"
        if mode != "mig" and is_on:
            return "MIG is on, so there is no whole GPU to use"
        if mode == MODE_MPS_PARTITIONS:
            return why_no_static_partitions() or self._why_not_this_daemon(clients)
        if mode != "mig":
            return None
        if self.gpu.lacks_mig:
            return f"{self.gpu.name} has no MIG"
        if self.gpu.mig_mode.startswith("["):
            return f"whether MIG is on could not be asked: {self.gpu.mig_mode}"
        if self._options.mig:
            return None
        if not is_on:
            return "MIG is off; --mig allows switching it on"
        try:
            instances = mig_instances(self.gpu)
        except NoGpuError as error:
            return str(error)
        if self._suffice(instances, clients):
            return None
        layout = self._options.mig_layout
        found = f"{len(instances)} MIG instances for {clients} clients"
        missing = f"the instances {layout} are not there" if layout else found
        return f"{missing}; --mig allows making them"

    def _why_not_this_daemon(self, clients: int) -> str | None:
        """Why a daemon that is the user's own has no partitions for so many clients."""
        state = self._state("mps")
        there = len(saved_partitions(state))
        if self.has_note() or there == clients or not _answers(state.get("pipe_directory", "")):
            return None
        return (
            f"MPS is set up with {there or 'no'} static partitions, not {clients}; "
            f"{self._command([UNDO_SCRIPTS['mps']])} ends it"
        )

    def enable(self, mode: str, clients: int) -> list[str]:
        """Put a mode in force, unless it is; return what its script says is to be known of it.

        Raises:
            ModeScriptError: That failed; the message is the script's own. What may have to be put
                back all the same is left to `undo`.
        """
        if self._is_in_force(mode, clients):
            self._say(f"{mode} is set up already; it is used as it is and left so.")
            return []
        left = self._state(NOTE).get("mode")
        if left:  # else its note, by which the next start undoes it, would be lost
            raise ModeScriptError(f"{left} was not undone, so nothing else is set up before it is")
        had_state = self._is_set_up(mode)
        words = self._choose_scripts(mode, clients)
        self._write_note(mode)  # before the change: a signal can come between the two
        self._enabled = mode
        try:
            said = self._run(words)
        except ModeScriptError as error:
            # The script has put its changes back, but for MIG mode that waits for a restart.
            if had_state or not self._is_set_up(mode):
                self._enabled = None
                self._remove_note()
            raise ModeScriptError(str(error).removeprefix(f"{words[0]}: ")) from None
        return [line.removeprefix("note: ") for line in said if line.startswith("note: ")]

    def undo(self) -> None:
        """Undo what `enable` did, if anything; raises `ModeScriptError` naming what to run."""
        mode, self._enabled = self._enabled, None
        if mode is None:
            return
        try:
            self._run(self._undo_words)
        except ModeScriptError:
            command = self._command(self._undo_words)
            raise ModeScriptError(f"{mode} could not be undone; run {command}") from None
        self._remove_note()

    # --- notes of drivers ----------------------------------------------------------------------

    def has_note(self) -> bool:
        """Whether a driver is at work with a mode, or was killed before it undid it."""
        return bool(self._state(NOTE))

    def other_driver(self) -> str | None:
        """Return who else is at work with a mode on this GPU, in words."""
        note = self._state(NOTE)
        pid = note.get("pid", "")
        # The start time tells it from a later process with its pid.
        if not pid.isdecimal() or note.get("started") != _start_ticks(int(pid)):
            return None
        return (
            f"another run is at work with {note.get('mode') or 'a mode'} on {self.gpu.title}: "
            f"pid {pid}, into {note.get('output', '?')}; wait for its end, or stop it"
        )

    def undo_what_was_left(self) -> None:
        """Undo the mode of a driver that was killed; raises `ModeScriptError`."""
        if not self.has_note():
            return
        mode = self._state(NOTE).get("mode")
        if mode not in UNDO_SCRIPTS or not self._is_set_up(mode):
            self._remove_note()
            return
        self._say(f"{mode} was left in force when the script was cut off; it is undone first.")
        kinds_of_root = KINDS_OF_ROOT.intersection(STATE_KINDS[mode])
        self._as_root = any(map(self._state, kinds_of_root)) and self._may_become_root()
        self._undo_words = [UNDO_SCRIPTS[mode]]
        self._enabled = mode
        self.undo()
        self.found = refresh(self.gpu)

    def _write_note(self, mode: str) -> None:
        if self._options.dry_run:
            return
        file = self._note_file()
        note = (
            f"gpu_uuid={self.gpu.uuid}\nmode={mode}\npid={os.getpid()}\n"
            f"started={_start_ticks(os.getpid())}\n"
            f"output={printable(str(self.folder.resolve()))}\n"
        )
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text_atomic(file, note, mode=0o600)
        except OSError:
            raise ModeScriptError(
                f"cannot write {file}; set GPU_SHARING_STATE_DIR to a folder that you may write"
            ) from None

    def _remove_note(self) -> None:
        if self._options.dry_run:
            return
        try:
            self._note_file().unlink(missing_ok=True)
        except OSError:
            self._say(f"warning: cannot remove {self._note_file()}")

    def _note_file(self) -> Path:
        folder = mode_scripts.state_folders(NOTE, os.environ)[0]
        return folder / f"{NOTE}-{self.gpu.uuid}.state"

    # --- scripts ------------------------------------------------------------------------------

    def _choose_scripts(self, mode: str, clients: int) -> list[str]:
        """Return what sets a mode up as the options ask for it; sets what undoes it."""
        options = self._options
        self._undo_words = [UNDO_SCRIPTS[mode]]
        if mode == "mig":
            profiles = [options.mig_layout or options.mig_profile]
            words = ["setup_mig.sh", *profiles, *([] if options.mig_layout else [str(clients)])]
        elif mode in ("mps", MODE_MPS_PARTITIONS):
            words = ["enable_mps.sh", *(["--exclusive"] if options.exclusive else [])]
            words += ["--static-partitions", str(clients)] if mode == MODE_MPS_PARTITIONS else []
            if options.exclusive and self._is_set_up("mps"):
                self._say(
                    "warning: MPS is set up without --exclusive; it is switched off altogether at "
                    "the end"
                )
        else:
            words = ["setup_time_slicing.sh", str(clients)]
            if options.timeslice:
                words += ["--timeslice", options.timeslice]
                self._undo_words = self._saved_time_slicing() or self._undo_words
        changes_card = {"time-slicing": options.timeslice, "mig": True}
        self._as_root = bool(changes_card.get(mode, options.exclusive)) and self._may_become_root()
        return words

    def _saved_time_slicing(self) -> list[str] | None:
        """Return what sets up again the time slicing that the user had, with its length."""
        clients = self._state("time-slicing").get("clients")
        length = time_slice(vars(self.gpu))
        if not clients or not length:
            return None
        return ["setup_time_slicing.sh", clients, "--timeslice", length.lower()]

    def _may_become_root(self) -> bool:
        return not mode_scripts.lock_reason(os.environ) and mode_scripts.may_use_sudo()

    def _command(self, words: Sequence[str]) -> str:
        command = mode_scripts.command_of(words, self.gpu.uuid, as_root=self._as_root)
        return shlex.join(command)

    def _run(self, words: Sequence[str]) -> list[str]:
        """Run a script and return what it said, which is kept too; raises `ModeScriptError`."""
        if self._options.dry_run:
            print(f"would run: {self._command(words)}", flush=True)
            return []
        self._say(f"run: {self._command(words)}")
        return mode_scripts.run_script(
            words, self.gpu.uuid, self.folder, as_root=self._as_root, say=self._say_and_keep
        )

    def _say_and_keep(self, line: str) -> None:
        self._say(line)
        with contextlib.suppress(OSError):
            append_text(self.folder / LOG_FILE, line)

    # --- what is in force ---------------------------------------------------------------------

    def _state(self, kind: str) -> dict[str, str]:
        return mode_scripts.read_state(kind, self.gpu.uuid, os.environ) if self.found else {}

    def _is_set_up(self, mode: str) -> bool:
        return mode_scripts.is_set_up(mode, self.gpu.uuid, os.environ)

    def _is_in_force(self, mode: str, clients: int) -> bool:
        """Whether a mode is set up already, and in the way that the options ask for."""
        options = self._options
        if mode == "mig":
            with contextlib.suppress(NoGpuError):
                is_on = self.gpu.mig_mode == "Enabled"
                return is_on and self._suffice(mig_instances(self.gpu), clients)
            return False
        if mode in ("mps", MODE_MPS_PARTITIONS):
            state = self._state("mps")
            is_started_so = "partitions" not in state
            if mode == MODE_MPS_PARTITIONS:
                # More would leave a part of the card to nobody.
                is_started_so = len(saved_partitions(state)) == clients
            is_exclusive = not options.exclusive or self._is_exclusive()
            return is_started_so and is_exclusive and self._finds_daemon()
        if options.timeslice:
            # A saved one that a driver reload has reset since does not count.
            wanted = options.timeslice.capitalize()
            return self._state("time-slice").get("set") == wanted == time_slice(vars(self.gpu))
        # A daemon of the user's need not go: time slicing needs no script then, the suite keeps
        # its clients away from the daemon.
        return self._is_set_up("time-slicing") or self._finds_daemon()

    def _is_exclusive(self) -> bool:
        with contextlib.suppress(NoGpuError):  # the script says so, too
            return refresh(self.gpu).compute_mode == "Exclusive_Process"
        return False

    def _suffice(self, instances: Sequence[str], clients: int) -> bool:
        if self._options.mig_layout:
            return not Counter(self._options.mig_layout.split(",")) - Counter(instances)
        return len(instances) >= clients

    def _finds_daemon(self) -> bool:
        """Whether an MPS daemon of this user answers: one that enable_mps.sh started, or another.

        The other one is where CUDA itself would look, and the suite is told of it.
        """
        recorded = self._state("mps").get("pipe_directory")
        if recorded and _answers(recorded):
            return True
        usual = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
        if not is_own_pipe_directory(Path(usual)) or not _answers(usual):
            return False
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = usual
        return True


def _start_ticks(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot; `None` where it has ended.

    It has to be what gpu-configs/gpu_status.sh (restore) reads.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(") ")[2].split()  # a program's name may hold anything
    return None if state == "Z" else fields[18]


def _answers(pipe_directory: str) -> bool:
    """Whether a daemon answers there: files prove nothing."""
    answer = ask_mps_control(pipe_directory, "get_default_active_thread_percentage") or ""
    return answer.strip().replace(".", "", 1).isdecimal()
