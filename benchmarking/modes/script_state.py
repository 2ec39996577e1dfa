"""What the scripts of `gpu-configs/` left about the modes that they have set up."""

from __future__ import annotations

import os
import pwd
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
    """Return the `key=value` lines that a mode script left for a GPU; empty when there are none."""
    for folder in state_folders(environment):
        try:
            text = (folder / f"{mode}-{gpu_uuid}.state").read_text(encoding="utf-8")
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, separator, value in pairs if separator}
    return {}
