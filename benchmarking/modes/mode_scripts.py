"""The scripts of `gpu-configs/`, which alone change a GPU: run, timed, and what they saved.

Every run of a script is a line of `mode_scripts.jsonl`, so that a report can say what it costs to
put a mode in force and to undo it. Whether a *run* may carry a mode's name is not judged here but
by the modes themselves.
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
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarking.suite.plan import MODE_MIG, MODE_MPS, MODE_TIME_SLICING

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
    MODE_TIME_SLICING: ("time-slicing", "time-slice"),
    MODE_MPS: ("mps", "compute-mode"),
    MODE_MIG: ("mig",),
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


def run_script(words: Sequence[str], gpu_uuid: str, folder: Path) -> None:
    """Run a script to its end and record it; in a session of its own Ctrl-C does not reach it.

    The record's `message` is the last thing that the script said where it failed.

    Raises:
        ModeScriptError: It ended with another code than 0.
    """
    started_at, started = datetime.now(timezone.utc), time.monotonic()
    done = subprocess.run(
        [*_as_root(), str(SCRIPTS / words[0]), *words[1:], "--gpu", gpu_uuid],
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        check=False, start_new_session=True,
    )  # fmt: skip
    record = {
        "script": words[0],
        "arguments": words[1:],
        "gpu_uuid": gpu_uuid,
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
        "exit_code": done.returncode,
        "message": _reason(done) if done.returncode else None,
    }
    # What cannot be written down must not keep a mode from being undone.
    with contextlib.suppress(OSError), (folder / RECORD_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if done.returncode != 0:
        raise ModeScriptError(f"{words[0]}: {record['message']}")


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
    for folder in _state_folders(kind, environment):
        path = folder / f"{kind}-{gpu_uuid}.state"
        try:
            if not _is_trusted(kind, path, environment):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, separator, value in pairs if separator}
    return {}


def _state_folders(kind: str, environment: Mapping[str, str]) -> list[Path]:
    """Return where the scripts may have kept state of a kind, the likeliest folder first.

    Under sudo a user's state is in the home of the account that called it. A script that was run by
    sudo did not see `XDG_STATE_HOME`, so the default is looked into as well.
    """
    explicit = environment.get("GPU_SHARING_STATE_DIR")
    caller = _caller_of_sudo(environment)
    if kind in KINDS_OF_ROOT:
        is_roots_wish = explicit and os.geteuid() == 0 and caller is None
        return [Path(explicit) if is_roots_wish else STATE_OF_ROOT]
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


def _as_root() -> list[str]:
    """What runs a script as root; where sudo asks for a password the script itself says so."""
    asks = ["sudo", "-n", "true"]
    if os.geteuid() == 0 or shutil.which("sudo") is None:
        return []
    done = subprocess.run(asks, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return asks[:2] if done.returncode == 0 else []


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said or [f"exit code {done.returncode}"])[-1]
