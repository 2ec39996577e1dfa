"""Runs the scripts of gpu-configs/ against the pretended machine of fakes/gpu_machine.py.

A copy of them is run, whose state and lock of root's lie in the test's folder, not in /var, /etc.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.gpu_machine import FakeMachine
from waiting import wait_until

PROJECT_ROOT = Path(__file__).resolve().parents[1]
UUID = "GPU-00000000-1111-2222-3333-444444444444"
# For scripts that use the GPU as an unprivileged user: a real account that every system has.
NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]


def _root_prefix() -> list[str] | None:
    """What makes a command run as root here; None where nothing does."""
    if os.geteuid() == 0:
        return []
    namespace = ["unshare", "--map-root-user"]
    if shutil.which("unshare") is None:
        return None
    works = subprocess.run([*namespace, "true"], capture_output=True, check=False)
    return namespace if works.returncode == 0 else None


ROOT_PREFIX = _root_prefix()
needs_root = pytest.mark.skipif(
    ROOT_PREFIX is None, reason="neither root nor a user namespace here"
)
needs_real_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can act as another user in a test"
)


class ModeScripts:
    """One pretended machine, one state folder, and the scripts run against them.

    The folder is short (socket paths are limited) and open to other users, which pytest's is not.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.machine = FakeMachine(folder / "machine", kind)
        self.state_directory = folder / "state"
        self.root_state = folder / "var" / "lib" / "gpu-sharing-bench"
        self.root_lock = folder / "etc" / "gpu-sharing-bench" / "settings-locked"
        self.project = folder / "project"
        shutil.copytree(PROJECT_ROOT / "gpu-configs", self.project / "gpu-configs")
        common = self.project / "gpu-configs" / "lib" / "common.sh"
        text = common.read_text()
        for root in ("=/var/lib/", "=/etc/"):
            assert text.count(root) == 1
            text = text.replace(root, f"={folder}{root[1:]}")
        common.write_text(text)
        self.environment = self.machine.environment(
            GPU_SHARING_STATE_DIR=str(self.state_directory), GPU_SHARING_WAIT_SECONDS="2"
        )

    def command(self, script: str, *arguments: str) -> list[str]:
        """The command line that runs a script as root."""
        return [*(ROOT_PREFIX or []), f"./gpu-configs/{script}", *arguments]

    def run(
        self, script: str, *arguments: str, prefix: list[str] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end; `prefix` goes before it in place of what makes it root."""
        command = self.command(script, *arguments)
        if prefix is not None:
            command = [*prefix, f"./gpu-configs/{script}", *arguments]
        return subprocess.run(
            command,
            cwd=self.project,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def must(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script that has to succeed."""
        result = self.run(script, *arguments)
        assert result.returncode == 0, result.stderr
        return result

    def interrupt(
        self, script: str, *arguments: str, during: str, number: signal.Signals, group: bool
    ) -> tuple[int, str]:
        """Send a signal while the call that matches `during` is under way.

        `group`: to the whole foreground group, as Ctrl-C does, else to the script alone.
        """
        self.machine.fail(during, seconds=1.0)
        process = subprocess.Popen(
            self.command(script, *arguments),
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # pytest may itself have been started in the background, where SIGINT is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        rules = self.folder / "machine" / "rules.json"
        wait_until(lambda: '"seen"' in rules.read_text(), f"the call {during}")
        time.sleep(0.1)  # until it sleeps, with all that it writes written
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        self.machine.forget_rules()
        return process.returncode, stderr

    def saved(self, mode: str) -> dict[str, str] | None:
        """The keys and values of a state file, or None."""
        path = self.state_directory / f"{mode}-{UUID}.state"
        if not path.exists():
            return None
        return dict(line.split("=", 1) for line in path.read_text().splitlines())

    def left_behind(self) -> list[str]:
        """What lies in the state folder."""
        if not self.state_directory.exists():
            return []
        return sorted(entry.name for entry in self.state_directory.iterdir())

    def gpu(self) -> dict:
        """The first GPU of the pretended machine."""
        return self.machine.state()["gpus"][0]

    def all_files(self) -> dict[str, bytes]:
        """Every file but programs, the log, the lock and the rules that count calls."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and "programs" not in path.parts
            and path.name not in {"calls.jsonl", "lock", "rules.json"}
        }


def without_random_names(text: str) -> str:
    """The text with the random part of folder names taken out."""
    return re.sub(r"mps\.[0-9A-Za-z]{8}", "mps.RANDOM", text)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="modes.") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextlib.contextmanager
def mode_scripts(kind: str = "h100") -> Iterator[ModeScripts]:
    """A fresh ModeScripts, cleaned away at the end."""
    with open_folder() as folder:
        yield ModeScripts(folder, kind)
