"""What a sharing mode is, and what speaks for and against a client having run under one.

A figure never carries the name of a mode that was not in force. So each mode says what it found
(`check`), gives every client the environment that puts it under the mode (`client_environment`),
looks once while all clients are connected (`observe`), and at last judges every client by what
NVML, the MPS control daemon and the client itself said (`prove`). Nothing here changes the GPU:
where a mode is not in force, `ModeNotInForceError` names the script in `gpu-configs/` to run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarking.cli import EXIT_MODE_NOT_IN_FORCE, SuiteError
from benchmarking.modes.mode_scripts import DISABLE_MIG
from benchmarking.records.types import Evidence, Proof, Verdict

GPU_ANSWERS = "the driver answers for the GPU"
GPU_LOST_FIX = (
    "look for Xid in the kernel's log, then reset the GPU with nvidia-smi --gpu-reset, or restart"
)

# The inode that Linux gives the first pid namespace; in a container's own one, pids are others.
INITIAL_PID_NAMESPACE = "pid:[4026531836]"

GpuFacts = Mapping[str, Any]
# What a client says of itself. A command says nothing: its identity holds `processes`, the pids
# that it started.
Identity = Mapping[str, Any]


class ModeNotInForceError(SuiteError):
    """The mode asked for is not in force; the message names the script to run."""


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


@dataclass
class SharingMode(ABC):
    """One mode on one GPU; nothing is asked before a method is called.

    Args:
        name: The mode's.
        describe: Asks the driver for the GPU's facts (as `nvml.describe_gpu`) at each call.
        no_mps_folder: An empty folder of the caller's own, in which no MPS daemon answers.
        clients: The largest number of clients.
        environment: The caller's variables (state folder, inherited pipe directory).
        layout: The profiles of the clients' MIG instances where they matter.
        own_pid_namespace: Whether pids here may differ from the driver's.

    `has_own_shares`: whether every client has a part of the GPU's multiprocessors for itself, on
    which its job is measured alone, too.
    """

    has_own_shares: ClassVar[bool] = False

    name: str
    describe: Callable[[], GpuFacts | None]
    no_mps_folder: Path
    clients: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    layout: Sequence[str] = ()
    own_pid_namespace: bool = field(default_factory=is_own_pid_namespace)

    def check(self) -> list[Evidence]:
        """Look whether the mode is in force now; of a GPU that is lost nothing else is asked."""
        facts = self.facts()
        if not facts.get("uuid"):
            return [Evidence(GPU_ANSWERS, f"no ({GPU_LOST_FIX})", False)]
        return [Evidence(GPU_ANSWERS, "yes", True), *self.check_settings(facts)]

    @abstractmethod
    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """Look whether what the mode needs of a GPU with these facts is in force."""

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
            said = f"{self.name} is not in force: {what}{advice}"
            raise ModeNotInForceError(said, EXIT_MODE_NOT_IN_FORCE)
        return found

    def facts(self) -> GpuFacts:
        """Return what the driver says of the GPU now; nothing where it does not answer."""
        return self.describe() or {}

    def can_match(self, pids: frozenset[int], listed: frozenset[int]) -> bool:
        """Whether pids in a list mean the same processes as pids here.

        Certain when one of the clients' is in it. Else not in a pid namespace of one's own, nor
        where no listed process exists here: a virtual machine or a sandbox passes on the host's
        pids without a namespace to be seen.
        """
        if pids & listed:
            return True
        # NVML's pids are unsigned, which the kernel's are not.
        is_one_here = any(pid < 2**31 and psutil.pid_exists(pid) for pid in listed)
        return not self.own_pid_namespace and is_one_here


# --- evidence -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessLists:
    """Pids that NVML listed on the GPU over a span of time; `None` where it gave no list."""

    compute: frozenset[int] | None
    mps: frozenset[int] | None

    @property
    def all(self) -> frozenset[int]:
        """Every pid that NVML listed."""
        return (self.compute or frozenset()) | (self.mps or frozenset())

    @classmethod
    def from_samples(
        cls, samples: Sequence[Mapping[str, Any]], start_seconds: float, end_seconds: float
    ) -> ProcessLists:
        """Unite the lists of all sampler lines between two times (CLOCK_MONOTONIC)."""

        def united(key: str) -> frozenset[int] | None:
            lists = [sample[key] for sample in span if sample.get(key) is not None]
            return frozenset(one["pid"] for some in lists for one in some) if lists else None

        span = [s for s in samples if start_seconds <= s["time_seconds"] <= end_seconds]
        return cls(united("compute_pids"), united("mps_pids"))


def own_pids(identity: Identity) -> frozenset[int]:
    """Pids under which a client may use the GPU: its own, or those that its command started."""
    if is_command(identity):
        return frozenset(identity["processes"])
    return frozenset([identity["pid"]] if "pid" in identity else [])


def is_command(identity: Identity) -> bool:
    """Whether a client is a command, which says nothing of itself."""
    return "processes" in identity


def judge(evidence: Sequence[Evidence]) -> Proof:
    """One thing against the mode is enough; one unknown leaves it unverified."""
    answers = [item.ok for item in evidence]
    verdict: Verdict = "unverified" if None in answers else "verified"
    return Proof("invalid" if False in answers else verdict, list(evidence))


def mig_mode(facts: GpuFacts) -> str | None:
    """Return a GPU's MIG mode in words, `None` where it was not told."""
    mode = facts.get("mig_mode")
    return mode["current"] if mode else "not supported by this GPU"


def mig_is_off(facts: GpuFacts) -> Evidence:
    """Look whether MIG is off, or not there."""
    mode = mig_mode(facts)
    is_off = None if mode is None else mode != "Enabled"
    return Evidence("MIG mode is Disabled", mode or "unknown", is_off, DISABLE_MIG)


def is_listed(
    check: str, identity: Identity, listed: frozenset[int] | None, *, can_match: bool
) -> Evidence:
    """Whether a client is in a list that it must be in.

    A command that is not listed may have left the GPU alone, or used it for less than the second
    between two lists, so that speaks neither for nor against it.
    """
    if listed is None:
        return Evidence(check, "no process list was given", None)
    own = own_pids(identity)
    if own & listed:
        return Evidence(check, f"pid {min(own & listed)} is listed", True)
    if is_command(identity):
        return Evidence(check, f"none of its {len(own)} processes is listed", None)
    pid = identity.get("pid")
    if not can_match:
        return Evidence(check, f"pid {pid} cannot be matched with {sorted(listed)}", None)
    return Evidence(check, f"pid {pid} is not among {sorted(listed)}", False)


def sees_device(
    identity: Identity, wanted: str | None, card_uuid: str | None = None
) -> list[Evidence]:
    """Whether CUDA sees the device that the client was given.

    UUIDs are compared without their prefix, which CUDA does not tell. `card_uuid` is the card of a
    wanted MIG instance: a driver that answers it for the instance leaves it open which one it is.
    Nothing is known of a command: it is on this card if the driver lists it there, but on which
    instance stays open.
    """
    check, seen = f"CUDA sees {wanted}", identity.get("gpu_uuid")
    if is_command(identity):
        unknown = Evidence(check, "a command does not say what it sees", None)
        return [] if card_uuid is None else [unknown]
    if identity.get("device") != "cuda":
        return [Evidence(check, f"it ran on {identity.get('device')}", False)]
    if seen is None or wanted is None:
        return [Evidence(check, f"it says {seen}", None)]
    if _bare_uuid(seen) == _bare_uuid(wanted):
        return [Evidence(check, "yes", True)]
    is_card = card_uuid is not None and _bare_uuid(seen) == _bare_uuid(card_uuid)
    return [Evidence(check, f"it sees {seen}", None if is_card else False)]


def _bare_uuid(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()
