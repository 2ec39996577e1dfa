"""The sharing modes: what must hold before, what a client's environment needs, and the proof.

A figure never carries the name of a mode that was not in force. So each mode says what it found
(`check`), gives every client the environment that puts it under the mode (`client_environment`),
looks once while all clients are connected (`observe`), and at last judges every client by what
NVML, the MPS control daemon and the client itself said (`prove`). Nothing here changes the GPU:
where a mode is not in force, `ModeNotInForceError` names the script in `gpu-configs/` to run.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.modes.mode_evidence import (
    NOT_APPLICABLE,
    Evidence,
    Identity,
    ProcessLists,
    Proof,
    device_evidence,
    listed_evidence,
    past_mps_evidence,
    verdict_of,
    without_mps_evidence,
)
from benchmarking.planning import mig_layout
from benchmarking.planning.plan import (
    MODE_CPU_DEMO,
    MODE_EXCLUSIVE,
    MODE_MIG,
    MODE_MPS,
    MODE_TIME_SLICING,
)

SETUP_TIME_SLICING = "./gpu-configs/setup_time_slicing.sh"
ENABLE_MPS = "./gpu-configs/enable_mps.sh"
DISABLE_MPS = "./gpu-configs/disable_mps.sh"
SETUP_MIG = "sudo ./gpu-configs/setup_mig.sh"
DISABLE_MIG = "sudo ./gpu-configs/disable_mig.sh"

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
CONTROL_TIMEOUT_SECONDS = 10
DEFAULT_MPS_PIPE_DIRECTORY = Path("/tmp/nvidia-mps")

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

    @abstractmethod
    def check(self) -> list[Evidence]:
        """Look whether the mode is in force now."""

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


class WholeGpuMode(SharingMode):
    """Plain CUDA on the whole GPU: time slicing, and a job alone.

    Clients get an empty folder of the suite's own as MPS pipe directory, since asking one pipe
    directory for a daemon says nothing of another.
    """

    def __init__(
        self,
        name: str,
        describe: Callable[[], GpuFacts | None],
        no_mps_folder: Path,
        *,
        own_pid_namespace: bool,
        clients: int = 1,
    ) -> None:
        """Take the mode's name and the empty folder; `clients` is for the advice only."""
        super().__init__(describe, own_pid_namespace=own_pid_namespace)
        self.name = name
        self._no_mps_folder = no_mps_folder
        self._clients = clients

    def check(self) -> list[Evidence]:
        """MIG is off (or not there), compute mode is Default."""
        facts = self._facts()
        compute_mode = facts.get("compute_mode")
        setup = f"{SETUP_TIME_SLICING} {self._clients}"
        compute_fix = setup if compute_mode != "Exclusive_Process" else f"sudo {DISABLE_MPS}"
        return [
            _mig_is_off(facts),
            Evidence(
                "compute mode is Default", str(compute_mode), compute_mode == "Default", compute_fix
            ),
        ]

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the GPU by UUID, and a pipe directory in which no daemon answers."""
        return {
            "CUDA_VISIBLE_DEVICES": str(self._facts().get("uuid")),
            "CUDA_MPS_PIPE_DIRECTORY": str(self._no_mps_folder),
        }

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """The client's pid is a plain compute process of this GPU and no MPS client."""
        return verdict_of([
            *device_evidence(identity, self._facts().get("uuid")),
            listed_evidence(
                "NVML lists it as compute process", identity, lists.compute,
                can_match=self._can_match(pids, lists.all),
            ),
            without_mps_evidence(identity, lists.mps),
        ])  # fmt: skip


class MpsMode(SharingMode):
    """CUDA MPS: a control daemon that answers, and clients that it knows."""

    name = MODE_MPS

    def __init__(
        self,
        describe: Callable[[], GpuFacts | None],
        candidates: Sequence[str],
        *,
        own_pid_namespace: bool,
    ) -> None:
        """Take the pipe directories to try, the likeliest first."""
        super().__init__(describe, own_pid_namespace=own_pid_namespace)
        self._candidates = [candidate for candidate in dict.fromkeys(candidates) if candidate]
        self._clients_of_daemon: frozenset[int] | None = None

    def check(self) -> list[Evidence]:
        """A control daemon answers, and neither MIG nor the compute mode forbids clients."""
        facts = self._facts()
        found = self.pipe_directory()
        tried = ", ".join(self._candidates) or "no pipe directory is known"
        answer = f"yes, at {found}" if found else f"none ({tried})"
        compute_mode = facts.get("compute_mode")
        return [
            _mig_is_off(facts),
            Evidence("an MPS control daemon answers", answer, found is not None, ENABLE_MPS),
            Evidence(
                "compute mode lets the MPS server in", str(compute_mode),
                compute_mode in ("Default", "Exclusive_Process"), ENABLE_MPS,
            ),
        ]  # fmt: skip

    def pipe_directory(self) -> str | None:
        """Return the first candidate at which a daemon answers: socket files prove nothing."""
        for candidate in self._candidates:
            if ask_mps_control(candidate, "get_server_list") is not None:
                return candidate
        return None

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the GPU by UUID, and the pipe directory of the daemon that answers."""
        return {
            "CUDA_VISIBLE_DEVICES": str(self._facts().get("uuid")),
            "CUDA_MPS_PIPE_DIRECTORY": self.pipe_directory() or "",
        }

    def observe(self) -> None:
        """Ask the daemon for its clients, in both ways that it knows."""
        directory = self.pipe_directory()
        self._clients_of_daemon = mps_clients(directory) if directory else None

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """NVML's MPS list or the daemon names the client's pid; one of the two is enough."""
        listed = self._clients_of_daemon
        both = [
            # A client that runs without MPS is a plain compute process, so both lists are looked at
            # to tell whether pids can be matched.
            listed_evidence(
                "NVML lists it as MPS client", identity, lists.mps,
                can_match=self._can_match(pids, lists.all),
            ),
            # A daemon without any client needs no pids to be matched.
            listed_evidence(
                "the MPS daemon lists it as client", identity, listed,
                can_match=not listed or self._can_match(pids, listed),
            ),
        ]  # fmt: skip
        if any(item.ok for item in both):
            # A list that is a moment older or newer does not outweigh the one that has it.
            both = [item for item in both if item.ok]
        elif listed is not None:
            both.append(Evidence("clients that the daemon counts", str(len(listed)), None))
        return verdict_of([
            *device_evidence(identity, self._facts().get("uuid")),
            *both,
            *past_mps_evidence(identity, lists),
        ])  # fmt: skip


class MigMode(SharingMode):
    """MIG: client i has instance i for itself, or the instance of a layout's profile i."""

    name = MODE_MIG

    def __init__(
        self,
        describe: Callable[[], GpuFacts | None],
        no_mps_folder: Path,
        *,
        own_pid_namespace: bool,
        clients: int,
        layout: Sequence[str] = (),
    ) -> None:
        """Take how many clients need an instance, and the profiles of these where they matter."""
        super().__init__(describe, own_pid_namespace=own_pid_namespace)
        self._no_mps_folder = no_mps_folder
        self._clients = clients
        self._layout = tuple(layout)

    def instances(self) -> list[Mapping[str, Any]]:
        """Return the card's instances in NVML's order, or those of the layout in its order."""
        there = list(self._facts().get("mig_devices") or [])
        return mig_layout.in_order(self._layout, there) if self._layout else there

    def check(self) -> list[Evidence]:
        """MIG is on, and there is an instance for every client."""
        mode = (self._facts().get("mig_mode") or {}).get("current")
        count = len(self.instances())
        wanted = ",".join(self._layout)
        fix = f"{SETUP_MIG} {wanted or f'1g.5gb {self._clients}'}" if mode else None
        if self._layout:
            instances = Evidence(
                "the layout's instances are there, one for each client in its order",
                f"{self._profiles_there()} for {wanted}", count == len(self._layout), fix,
            )  # fmt: skip
        else:
            instances = Evidence(
                "every client has an instance",
                f"{count} MIG instances for {self._clients} clients", count >= self._clients, fix,
            )  # fmt: skip
        return [
            Evidence(
                "MIG mode is Enabled", mode or "not supported by this GPU", mode == "Enabled", fix
            ),
            instances,
        ]

    def _profiles_there(self) -> str:
        there = self._facts().get("mig_devices") or []
        return ",".join(str(one.get("profile") or "unknown") for one in there) or "none"

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the instance by UUID; an empty pipe directory keeps MPS away.

        A plan made for looking at only may have more clients than there are instances.
        """
        instances = self.instances()
        missing = f"(MIG instance {client}, not there)"
        return {
            "CUDA_VISIBLE_DEVICES": (
                str(instances[client]["uuid"]) if client < len(instances) else missing
            ),
            "CUDA_MPS_PIPE_DIRECTORY": str(self._no_mps_folder),
        }

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """The client sees its own instance's UUID and multiprocessors."""
        instances = self.instances()
        if client >= len(instances):
            return verdict_of([Evidence("it has an instance", f"{len(instances)} are left", False)])
        instance = instances[client]
        wanted, seen = instance.get("multiprocessor_count"), identity.get("multiprocessor_count")
        return verdict_of([
            *device_evidence(identity, instance["uuid"], card_uuid=self._facts().get("uuid")),
            Evidence(
                "it sees its instance's multiprocessors", f"{seen} of {wanted}",
                None if wanted is None or seen is None else wanted == seen,
            ),
        ])  # fmt: skip


class CpuDemoMode(SharingMode):
    """No GPU: the same flow on the CPU, in which no sharing mode can be in force."""

    name = MODE_CPU_DEMO

    def __init__(self) -> None:
        """There is nothing to ask."""
        super().__init__(lambda: None, own_pid_namespace=False)

    def check(self) -> list[Evidence]:
        """Say that there is no GPU in use; that is no error here."""
        return [Evidence("a GPU is shared", "no: CPU demonstration, no sharing mode", None)]

    def client_environment(self, client: int) -> dict[str, str]:
        """Hide GPUs from clients, so that a demonstration is one."""
        return {"CUDA_VISIBLE_DEVICES": ""}

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """There is nothing to prove."""
        return Proof(NOT_APPLICABLE, tuple(self.check()))


def _mig_is_off(facts: GpuFacts) -> Evidence:
    mode = (facts.get("mig_mode") or {}).get("current") or "not supported by this GPU"
    return Evidence("MIG mode is Disabled", mode, mode != "Enabled", DISABLE_MIG)


# --- asking -----------------------------------------------------------------------------------


def ask_mps_control(pipe_directory: str, command: str) -> str | None:
    """Return what the MPS control daemon of a pipe directory answers, `None` when none does."""
    try:
        answer = subprocess.run(
            [CONTROL_PROGRAM], input=f"{command}\n", capture_output=True, text=True, check=False,
            env={**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipe_directory},
            timeout=CONTROL_TIMEOUT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def mps_clients(pipe_directory: str) -> frozenset[int] | None:
    """Return the pids of a daemon's clients by `ps` and `get_client_list`, `None` if it is mute.

    `ps` prints a table whose first column is the client's pid, `get_client_list SERVER` one pid a
    line. Lines that begin with anything else ("Server not found", a heading) name no client.
    """
    servers = ask_mps_control(pipe_directory, "get_server_list")
    if servers is None:
        return None
    answers = [ask_mps_control(pipe_directory, "ps")]
    for server in _first_numbers(servers):
        answers.append(ask_mps_control(pipe_directory, f"get_client_list {server}"))
    return frozenset(pid for answer in answers for pid in _first_numbers(answer or ""))


def _first_numbers(text: str) -> list[int]:
    first_words = (line.split()[0] for line in text.splitlines() if line.split())
    return [int(word) for word in first_words if word.isdecimal()]


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
        return not is_first or (proc / "2/comm").read_text().strip() != "kthreadd"
    except OSError:
        return True


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


def own_default_pipe_directory() -> str:
    """Return where CUDA looks for a daemon by default, if this user started the one there.

    Empty otherwise: another user's daemon takes no client of ours.
    """
    try:
        owner = (DEFAULT_MPS_PIPE_DIRECTORY / "control").stat().st_uid
    except OSError:
        return ""
    return str(DEFAULT_MPS_PIPE_DIRECTORY) if owner == os.geteuid() else ""


def time_slicing_warning(clients: int, gpu_uuid: str, environment: Mapping[str, str]) -> str | None:
    """Warn when more clients are asked for than `setup_time_slicing.sh` was told."""
    recorded = read_state(MODE_TIME_SLICING, gpu_uuid, environment).get("clients", "")
    if recorded.isdecimal() and clients > int(recorded):
        return (
            f"{clients} clients share the GPU, but time slicing was set up for {recorded}: "
            f"run {SETUP_TIME_SLICING} {clients}"
        )
    return None


def make_mode(
    name: str,
    describe: Callable[[], GpuFacts | None],
    *,
    clients: int,
    no_mps_folder: Path,
    environment: Mapping[str, str],
    layout: Sequence[str] = (),
) -> SharingMode:
    """Return the mode called `name` for the GPU that `describe` describes.

    `clients` is the largest number of clients, `no_mps_folder` an empty folder of the caller's
    own, `environment` the caller's environment (state folder, inherited pipe directory), `layout`
    the profiles of the clients' MIG instances where they matter.
    """
    own_pid_namespace = is_own_pid_namespace()
    if name == MODE_CPU_DEMO:
        return CpuDemoMode()
    if name == MODE_MPS:
        uuid = str((describe() or {}).get("uuid"))
        recorded = read_state(MODE_MPS, uuid, environment).get("pipe_directory", "")
        inherited = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
        return MpsMode(
            describe, [recorded, inherited, own_default_pipe_directory()],
            own_pid_namespace=own_pid_namespace,
        )  # fmt: skip
    if name == MODE_MIG:
        return MigMode(
            describe, no_mps_folder, own_pid_namespace=own_pid_namespace, clients=clients,
            layout=layout,
        )  # fmt: skip
    if name not in (MODE_TIME_SLICING, MODE_EXCLUSIVE):
        raise ValueError(f"there is no sharing mode {name!r}")
    return WholeGpuMode(
        name, describe, no_mps_folder, own_pid_namespace=own_pid_namespace, clients=clients
    )
