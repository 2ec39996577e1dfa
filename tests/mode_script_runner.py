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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes.gpu_machine import FakeMachine
from waiting import wait_until

PROJECT_ROOT = Path(__file__).resolve().parents[1]
UUID = "GPU-00000000-1111-2222-3333-444444444444"
# For scripts that use the GPU as an unprivileged user: a real account that every system has.
NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
# Root may write everywhere; anybody else already is the user that some tests need.
AS_USER = AS_NOBODY if os.geteuid() == 0 else []


def require_reachable() -> None:
    """Skip where another user cannot come to this project, as in root's own home."""
    folders = (PROJECT_ROOT, *PROJECT_ROOT.parents)
    if not all(folder.stat().st_mode & 0o001 for folder in folders):
        pytest.skip(f"another user cannot read {PROJECT_ROOT}")


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
            command, cwd=self.project, env={**self.environment, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def must(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script that has to succeed."""
        result = self.run(script, *arguments)
        assert result.returncode == 0, result.stderr
        return result

    def start(self, script: str, *arguments: str, stderr: int) -> subprocess.Popen[str]:
        """Start a script in a group of its own."""
        return subprocess.Popen(
            self.command(script, *arguments), cwd=self.project, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip

    def interrupt(
        self, script: str, *arguments: str, during: str, number: signal.Signals, group: bool
    ) -> tuple[int, str]:
        """Send a signal while the call that matches `during` is under way."""
        self.machine.fail(during, seconds=1.0)
        process = self.start(script, *arguments, stderr=subprocess.PIPE)
        rules = self.folder / "machine" / "rules"
        wait_until(lambda: b"seen" in rules.read_bytes(), f"the call {during}")
        time.sleep(0.1)  # until it sleeps, with all that it writes written
        send(process, number, group)
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
        """What lies in the state folder, but for the folder by which scripts take turns."""
        if not self.state_directory.exists():
            return []
        names = {entry.name for entry in self.state_directory.iterdir()}
        return sorted(names - {"lock"})

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
            and path.name not in {"calls", "lock", "rules"}
        }


def send(process: subprocess.Popen[str], number: signal.Signals, group: bool) -> None:
    """Send a signal to the whole foreground group, as Ctrl-C does, else to the script alone."""
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


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


# --- rows: steps that lead somewhere, a command, what it says, what is in force -------------------

SECOND = "GPU-55555555-6666-7777-8888-999999999999"
TS, RESET, MPS_ON, MPS_OFF, MIG_ON, MIG_OFF, STATUS = (
    "setup_time_slicing.sh", "reset_time_slicing.sh", "enable_mps.sh", "disable_mps.sh",
    "setup_mig.sh", "disable_mig.sh", "gpu_status.sh",
)  # fmt: skip
# Each script with arguments under which it does its work.
SCRIPTS = {TS: ["4"], RESET: [], MPS_ON: [], MPS_OFF: [], MIG_ON: ["1g.10gb", "4"], MIG_OFF: [],
           STATUS: []}  # fmt: skip
UNDO = {TS: RESET, MPS_ON: MPS_OFF, MIG_ON: MIG_OFF}

Step = Callable[[ModeScripts], object] | tuple[str, ...]


def gpu(**fields: object) -> Step:
    return lambda scripts: scripts.machine.change_gpu(**fields)


def machine(**fields: object) -> Step:
    return lambda scripts: scripts.machine.change(**fields)


def rule(match: str, **fields: object) -> Step:
    return lambda scripts: scripts.machine.fail(match, **fields)


def process(**fields: object) -> Step:
    return lambda scripts: scripts.machine.add_process(pid=4242, **fields)


def daemon(**fields: object) -> Step:
    return lambda scripts: scripts.machine.add_mps_daemon("/nonexistent/pipe", **fields)


def client(scripts: ModeScripts) -> None:
    scripts.machine.add_mps_client(938)


def instance(scripts: ModeScripts) -> None:
    """MIG mode as an administrator has left it, with an instance."""
    made = {"gi": 11, "ci": 0, "profile": "1g.10gb", "profile_id": 19, "start": 4, "size": 1,
            "uuid": "MIG-of-another"}  # fmt: skip
    scripts.machine.change_gpu(mig_current="Enabled", mig_pending="Enabled", instances=[made])


def forgotten_ids(scripts: ModeScripts) -> None:
    """As if the script had been killed between creating instances and saving their ids."""
    (path,) = scripts.state_directory.glob("*.state")
    path.write_text(path.read_text().replace("gpu_instances=7,8", "gpu_instances="))


def saved_before_a_restart(scripts: ModeScripts) -> None:
    for path in scripts.state_directory.glob("*.state"):
        path.write_text(re.sub("boot=.*", "boot=another", path.read_text()))


def killed_during(call: str, *command: str) -> Step:
    """Kill a script while a call of its is under way, which then changes nothing."""
    return lambda scripts: scripts.interrupt(
        *command, during=call, number=signal.SIGKILL, group=True
    )


def without(name: str) -> Step:
    """A PATH on which one program is missing."""

    def leave_out(scripts: ModeScripts) -> None:
        folder, fakes = scripts.folder / "programs", Path(__file__).parent / "fakes"
        folder.mkdir()
        for program in (*Path("/usr/bin").iterdir(), *fakes.glob("nvidia-*")):
            if program.name != name:
                (folder / program.name).symlink_to(program)
        scripts.environment["PATH"] = str(folder)

    return leave_out


def damaged(kind: str, text: str = "pipe_dir", suffix: str = "") -> Step:
    def damage(scripts: ModeScripts) -> None:
        scripts.state_directory.mkdir(exist_ok=True, mode=0o700)
        (scripts.state_directory / f"{kind}-{UUID}.state{suffix}").write_text(text)

    return damage


def as_delivered(scripts: ModeScripts) -> None:
    card = scripts.gpu()
    assert (card["mig_current"], card["mig_pending"], card["instances"]) in (
        ("Disabled", "Disabled", []), ("[N/A]", "[N/A]", []),
    )  # fmt: skip
    assert card["compute_mode"] == "Default"
    assert card["timeslice"] in ("Default", None)
    assert scripts.machine.state()["mps"] == {}
    assert scripts.left_behind() == []


def untouched(scripts: ModeScripts) -> None:
    """Filled in by `check`: nothing was asked to change, and no file is another."""


def has(**fields: object) -> Callable[[ModeScripts], None]:
    """The first GPU has these fields; `daemons`, `profiles` and `gis` are looked up."""

    def look(scripts: ModeScripts) -> None:
        card = scripts.gpu()
        found = {
            **card,
            "daemons": len(scripts.machine.state()["mps"]),
            "profiles": sorted(i["profile"] for i in card["instances"] if i["ci"] is not None),
            "gis": [i["gi"] for i in card["instances"]],
        }
        assert {name: found[name] for name in fields} == fields

    return look


@dataclass(frozen=True)
class Row:
    """Steps `before`, a command, and what it says and leaves.

    Then what stood in the way goes (rules and processes), the scripts of `undo` succeed, and `last`
    holds: what was put in force is undone unless that is said otherwise.
    """

    name: str
    command: tuple[str, ...]
    code: int = 0
    says: tuple[str, ...] = ()
    after: Callable[[ModeScripts], object] | None = None
    before: tuple[Step, ...] = ()
    undo: tuple[Step, ...] | None = None
    last: Callable[[ModeScripts], object] = as_delivered
    kind: str = "h100"
    environment: dict[str, str] = field(default_factory=dict)
    silent_on: tuple[str, ...] = ()


def rows(*table: Row) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


def take(scripts: ModeScripts, steps: tuple[Step, ...]) -> None:
    for step in steps:
        if callable(step):
            step(scripts)
        else:
            scripts.must(*step)


def check(row: Row) -> None:
    with mode_scripts(row.kind) as scripts:
        take(scripts, row.before)
        scripts.machine.forget_calls()
        files = scripts.all_files()
        result = scripts.run(*row.command, **row.environment)
        said = result.stdout + result.stderr
        assert result.returncode == row.code, said
        for text in row.says:
            assert text in said
        for text in row.silent_on:
            assert text not in said
        if row.after is untouched:
            assert scripts.machine.changing_calls() == []
            assert scripts.all_files() == files
        elif row.after is not None:
            assert row.after(scripts) is not False
        undo = row.undo
        if undo is None and row.code == 0 and row.command[0] in UNDO:
            undo = ((UNDO[row.command[0]],),)
        if undo is not None:
            scripts.machine.forget_rules()
            for pid in (938, 4242):
                scripts.machine.remove_process(pid)
            take(scripts, undo)
            assert row.last(scripts) is not False


def refused(result: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert result.returncode == code, result.stderr
    for words in says:
        assert words in result.stderr
