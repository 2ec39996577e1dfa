"""The scripts of `gpu-configs/`, which alone change a GPU: run, timed, and what they saved.

Every run of a script is a line of `mode_scripts.jsonl`, so that a report can say what it costs to
put a mode in force and to undo it. Whether a *run* may carry a mode's name is not judged here but
by the modes themselves. Standard library alone: a dry run of a driver has no environment yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarking.modes.names import MODE_MPS_PARTITIONS
from benchmarking.records.writing import append_text

SCRIPTS = Path(__file__).resolve().parents[2] / "gpu-configs"
RECORD_FILE = "mode_scripts.jsonl"

# As a user types them.
SETUP_TIME_SLICING = "./gpu-configs/setup_time_slicing.sh"
ENABLE_MPS = "./gpu-configs/enable_mps.sh"
DISABLE_MPS = "./gpu-configs/disable_mps.sh"
SETUP_MIG = "sudo ./gpu-configs/setup_mig.sh"
DISABLE_MIG = "sudo ./gpu-configs/disable_mig.sh"

# Root's own, as in gpu-configs/lib/common.sh; which kinds of state each mode has, and which are
# settings of the card that root puts back.
STATE_OF_ROOT = Path("/var/lib/gpu-sharing-bench")
LOCK_OF_ROOT = Path("/etc/gpu-sharing-bench/settings-locked")
LOCK_VARIABLE = "GPU_SETTINGS_LOCKED"
STATE_KINDS = {
    "time-slicing": ("time-slicing", "time-slice"),
    "mps": ("mps", "compute-mode"),
    MODE_MPS_PARTITIONS: ("mps", "compute-mode"),
    "mig": ("mig",),
}
KINDS_OF_ROOT = frozenset({"time-slice", "compute-mode", "mig"})


class ModeScriptError(Exception):
    """A mode was not put in force, or not undone; the message is the script's own, with the fix."""


@contextlib.contextmanager
def in_force(setup: Sequence[str], undo: str, gpu_uuid: str, folder: Path) -> Iterator[None]:
    """Put a mode or a setting in force inside the block and undo it after it, whatever happens.

    Args:
        setup: A script of `gpu-configs/` with its arguments.
        undo: The script that takes it back.
        gpu_uuid: The card.
        folder: Where both runs are recorded, in `mode_scripts.jsonl`.

    Raises:
        ModeScriptError: It could not be made (the script has put everything back), or not be
            undone.
    """
    run_script(setup, gpu_uuid, folder)
    try:
        yield
    finally:
        run_script([undo], gpu_uuid, folder)


def run_script(
    words: Sequence[str],
    gpu_uuid: str,
    folder: Path,
    *,
    as_root: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Run a script to its end and record it; in a session of its own Ctrl-C does not reach it.

    Args:
        words: A script of `gpu-configs/` with its arguments.
        gpu_uuid: The card.
        folder: Where it is recorded, in `mode_scripts.jsonl`, with its last words as `message`
            where it failed.
        as_root: Whether by sudo; without it where sudo asks for no password.
        say: Gets each line that it says, as soon as it does.

    Returns the lines that it said.

    Raises:
        ModeScriptError: It ended with another code than 0.
    """
    started_at, started = datetime.now(timezone.utc), time.monotonic()
    try:
        code, said = _run_and_listen(command_of(words, gpu_uuid, as_root=as_root), say)
    except OSError as error:
        code, said = 126, [f"error: cannot run {SCRIPTS / words[0]} ({error.strerror})"]
    record = {
        "script": words[0],
        "arguments": words[1:],
        "gpu_uuid": gpu_uuid,
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
        "exit_code": code,
        "message": _reason(said, code) if code else None,
    }
    # What cannot be written down must not keep a mode from being undone.
    with contextlib.suppress(OSError):
        append_text(folder / RECORD_FILE, json.dumps(record))
    if code != 0:
        raise ModeScriptError(f"{words[0]}: {record['message']}")
    return said


def command_of(words: Sequence[str], gpu_uuid: str, *, as_root: bool | None = None) -> list[str]:
    """Return the command line of a script with its arguments, on a card."""
    prefix = ["sudo", "-n"] if (may_use_sudo() if as_root is None else as_root) else []
    return [*prefix, str(SCRIPTS / words[0]), *words[1:], "--gpu", gpu_uuid]


def may_use_sudo() -> bool:
    """Whether this user becomes root by sudo without a password; else a script itself complains.

    Asked in a session of its own: a password that was typed a while ago does not count, since it
    may have to be typed again when a mode is to be undone.
    """
    if os.geteuid() == 0 or shutil.which("sudo") is None:
        return False
    asked = subprocess.run(
        ["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False,
        start_new_session=True,
    )  # fmt: skip
    return asked.returncode == 0


def _run_and_listen(command: Sequence[str], say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a command to its end; return its exit code and what it said on either stream.

    It writes to memory, not to a pipe or a disk: a caller that is killed, or a disk that is full,
    must not end it half-way.
    """
    with open(os.memfd_create("said"), "rb", buffering=0) as memory:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=memory, stderr=memory, start_new_session=True
        )
        said: list[str] = []
        begun, offset = b"", 0
        while True:
            code = process.poll()
            new = os.pread(memory.fileno(), 2**20, offset)
            offset += len(new)
            *lines, begun = (begun + new).split(b"\n")
            if code is not None and not new and begun:
                lines, begun = [*lines, begun], b""
            for line in lines:
                said.append(line.decode(errors="replace"))
                say(said[-1])
            if code is not None and not new:
                return code, said
            time.sleep(0 if new else 0.02)


def lock_reason(environment: Mapping[str, str]) -> str | None:
    """Return what forbids to change a card's settings on this machine; None where nothing does."""
    if LOCK_OF_ROOT.exists():
        return str(LOCK_OF_ROOT)
    return f"{LOCK_VARIABLE}=1" if environment.get(LOCK_VARIABLE) == "1" else None


def is_set_up(mode: str, gpu_uuid: str, environment: Mapping[str, str]) -> bool:
    """Whether a mode script has left anything to undo."""
    return any(read_state(kind, gpu_uuid, environment) for kind in STATE_KINDS[mode])


def read_state(kind: str, gpu_uuid: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the `key=value` lines that a mode script left for a GPU; empty when there are none.

    A file that somebody else put there, or may write, counts as none, as for the scripts.
    """
    for folder in state_folders(kind, environment):
        path = folder / f"{kind}-{gpu_uuid}.state"
        try:
            if not _is_trusted(kind, path, environment):
                continue
            text = os.fsdecode(path.read_bytes())  # names of folders, which may be no text
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.split("\n"))
        return {key.strip(): value.strip() for key, separator, value in pairs if separator}
    return {}


def saved_partitions(state: Mapping[str, str]) -> list[str]:
    """Return the static partitions of a saved MPS daemon, each as `GPU-.../NAME`."""
    return list(filter(None, state.get("partitions", "").split(",")))


def state_folders(kind: str, environment: Mapping[str, str]) -> list[Path]:
    """Return where the scripts may have kept state of a kind, the likeliest folder first.

    Under sudo a user's state is in the home of the account that called it. A script that was run by
    sudo did not see `XDG_STATE_HOME`, so the default is looked into as well.
    """
    explicit = environment.get("GPU_SHARING_STATE_DIR")
    caller = _caller_of_sudo(environment)
    if kind in KINDS_OF_ROOT:
        is_roots = os.geteuid() == 0 and caller is None
        return [Path(explicit) if explicit and is_roots else STATE_OF_ROOT]
    if explicit:
        return [Path(explicit)]
    bases = [Path(environment["XDG_STATE_HOME"])] if environment.get("XDG_STATE_HOME") else []
    with contextlib.suppress(RuntimeError):  # a user without an account and without HOME
        bases.append((Path(caller.pw_dir) if caller else Path.home()) / ".local" / "state")
    return [base / "gpu-sharing-bench" for base in bases]


def _is_trusted(kind: str, path: Path, environment: Mapping[str, str]) -> bool:
    """Whether only root, this user, or the one who called sudo can have written a state file."""
    owners = {0}
    if kind not in KINDS_OF_ROOT:
        caller = _caller_of_sudo(environment)
        owners |= {os.geteuid()} | ({caller.pw_uid} if caller else set())
    file, folder = path.lstat(), path.parent.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISREG(file.st_mode) and all(
        status.st_uid in owners and not status.st_mode & others for status in (file, folder)
    )


def _caller_of_sudo(environment: Mapping[str, str]) -> pwd.struct_passwd | None:
    uid = environment.get("SUDO_UID", "")
    if os.geteuid() != 0 or not uid.isdecimal() or int(uid) == 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(int(uid))
    return None


def _reason(said: Sequence[str], code: int) -> str:
    lines = [line for line in said if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]
