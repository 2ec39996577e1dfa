"""What a sharing mode is: what must hold before, what a client's environment needs, the proof.

A figure never carries the name of a mode that was not in force. So each mode says what it found
(`check`), gives every client the environment that puts it under the mode (`client_environment`),
looks once while all clients are connected (`observe`), and at last judges every client by what
NVML, the MPS control daemon and the client itself said (`prove`). Nothing here changes the GPU:
where a mode is not in force, `ModeNotInForceError` names the script in `gpu-configs/` to run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarking.modes.mode_scripts import DISABLE_MIG
from benchmarking.modes.sharing_mode import Evidence, Identity, ProcessLists, Proof

GPU_ANSWERS = "the driver answers for the GPU"
GPU_LOST_FIX = (
    "look for Xid in the kernel's log, then reset the GPU with nvidia-smi --gpu-reset, or restart"
)

# The inode that Linux gives the first pid namespace; in a container's own one, pids are others.
INITIAL_PID_NAMESPACE = "pid:[4026531836]"

GpuFacts = Mapping[str, Any]


class ModeNotInForceError(Exception):
    """The mode asked for is not in force; the message names the script to run."""


class SharingMode(ABC):
    """One mode on one GPU.

    `describe` asks the driver for the GPU's facts (as `nvml.describe_gpu`) each time it is
    called, `own_pid_namespace` says whether pids here may differ from the driver's.
    """

    name: str

    def __init__(self, describe: Callable[[], GpuFacts | None], *, own_pid_namespace: bool) -> None:
        """Keep the ways to ask; nothing is asked yet."""
        self._describe = describe
        self._own_pid_namespace = own_pid_namespace

    def check(self) -> list[Evidence]:
        """Look whether the mode is in force now; of a GPU that is lost nothing else is asked."""
        facts = self._facts()
        is_there = bool(facts.get("uuid"))
        found = "yes" if is_there else f"no ({GPU_LOST_FIX})"
        answer = Evidence(GPU_ANSWERS, found, is_there)
        return [answer, *self.check_settings(facts)] if is_there else [answer]

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """Look whether what the mode needs of a GPU with these facts is in force."""
        return []

    @abstractmethod
    def client_environment(self, client: int) -> dict[str, str]:
        """Return what puts client number `client` under the mode, on its part of the GPU."""

    def observe(self) -> None:
        """Look once while all clients are connected and idle."""

    @abstractmethod
    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """Judge one client by its identity and the process lists; `pids` are all clients'."""

    def require(self) -> list[Evidence]:
        """Check, and raise `ModeNotInForceError` naming what is wrong and the script to run."""
        found = self.check()
        wrong = [item for item in found if item.ok is False]
        if wrong:
            what = "; ".join(f"{item.check}: {item.found}" for item in wrong)
            fix = next((item.fix for item in wrong if item.fix), None)
            advice = f"; run {fix}" if fix else ""
            raise ModeNotInForceError(f"{self.name} is not in force: {what}{advice}")
        return found

    def _facts(self) -> GpuFacts:
        return self._describe() or {}

    def _can_match(self, pids: frozenset[int], listed: frozenset[int]) -> bool:
        """Whether pids in a list mean the same processes as pids here.

        Certain when one of the clients' is in it. Else not in a pid namespace of one's own, nor
        where no listed process exists here: a virtual machine or a sandbox passes on the host's
        pids without a namespace to be seen.
        """
        if pids & listed:
            return True
        return not self._own_pid_namespace and any(map(process_exists, listed))


def mig_is_off(facts: GpuFacts) -> Evidence:
    """Look whether MIG is off, or not there."""
    mode = (facts.get("mig_mode") or {}).get("current") or "not supported by this GPU"
    return Evidence("MIG mode is Disabled", mode, mode != "Enabled", DISABLE_MIG)


def process_exists(pid: int) -> bool:
    """Whether a pid is in use here."""
    return Path(f"/proc/{pid}").exists()


def is_own_pid_namespace(proc: Path = Path("/proc")) -> bool:
    """Whether pids here may differ from the driver's, as in most containers.

    In the first pid namespace process 2 is the kernel's thread daemon; the inode alone can be
    imitated by a sandbox that brings its own kernel.
    """
    try:
        is_first = os.readlink(proc / "self/ns/pid") == INITIAL_PID_NAMESPACE
        return not is_first or (proc / "2/comm").read_bytes().strip() != b"kthreadd"
    except OSError:
        return True
