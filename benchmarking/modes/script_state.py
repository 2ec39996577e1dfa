"""What the scripts of `gpu-configs/` left about the modes that they have set up."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path


def state_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return where the mode scripts may have kept their state, the likeliest folder first.

    Under sudo that is the home of the account that called it. A script that was run by sudo did
    not see `XDG_STATE_HOME`, so the default is looked into as well.
    """
    explicit = environment.get("GPU_SHARING_STATE_DIR")
    if explicit:
        return [Path(explicit)]
    caller = environment.get("SUDO_USER")
    home = Path(pwd.getpwnam(caller).pw_dir) if caller and os.geteuid() == 0 else Path.home()
    default = home / ".local" / "state"
    chosen = environment.get("XDG_STATE_HOME")
    bases = [Path(chosen), default] if chosen else [default]
    return [base / "gpu-sharing-bench" for base in bases]


def read_state(mode: str, gpu_uuid: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the `key=value` lines that a mode script left for a GPU; empty when there are none.

    A file that somebody else put there, or may write, counts as none, as for the scripts.
    """
    for folder in state_folders(environment):
        path = folder / f"{mode}-{gpu_uuid}.state"
        try:
            if not _is_trusted(path, environment):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, separator, value in pairs if separator}
    return {}


def _is_trusted(path: Path, environment: Mapping[str, str]) -> bool:
    """Whether only this user, the one who called sudo, or root can have written a state file."""
    owners = {0, os.geteuid()}
    if os.geteuid() == 0 and environment.get("SUDO_USER"):
        owners.add(pwd.getpwnam(environment["SUDO_USER"]).pw_uid)
    file, folder = path.lstat(), path.parent.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISREG(file.st_mode) and all(
        status.st_uid in owners and not status.st_mode & others for status in (file, folder)
    )
