"""CUDA MPS: its control daemon, and the proof that a client is a client of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarking.hardware.nvidia_tools import ask_mps_control, is_own_pipe_directory, printable
from benchmarking.modes.mode_scripts import (
    DISABLE_MPS,
    ENABLE_MPS,
    read_state,
    saved_partitions,
)
from benchmarking.modes.names import MODE_MPS
from benchmarking.modes.sharing_mode import (
    GpuFacts,
    Identity,
    ProcessLists,
    SharingMode,
    is_command,
    is_listed,
    judge,
    mig_is_off,
    own_pids,
    sees_device,
)
from benchmarking.records.types import Evidence, Proof

MODES_FOR_MPS = ("Default", "Exclusive_Process")
DEFAULT_PIPE_DIRECTORY = Path("/tmp/nvidia-mps")
PARTITION_VARIABLE = "CUDA_MPS_SM_PARTITION"


class MpsMode(SharingMode):
    """A control daemon that answers, and clients that it knows."""

    clients_of_daemon: frozenset[int] | None = None

    @functools.cached_property
    def recorded(self) -> dict[str, str]:
        """What `enable_mps.sh` saved of the daemon that it started; empty where it did not."""
        return read_state(MODE_MPS, str(self.facts().get("uuid")), self.environment)

    @functools.cached_property
    def candidates(self) -> list[str]:
        """The pipe directories to try: `enable_mps.sh`'s, the inherited one, CUDA's own."""
        tried = (
            self.recorded.get("pipe_directory"),
            self.environment.get("CUDA_MPS_PIPE_DIRECTORY"),
            # where CUDA looks by default, if this user started the daemon there
            str(DEFAULT_PIPE_DIRECTORY) if is_own_pipe_directory(DEFAULT_PIPE_DIRECTORY) else None,
        )
        return list(dict.fromkeys(filter(None, tried)))

    def pipe_directory(self) -> str | None:
        """Return the first candidate at which a daemon answers: socket files prove nothing."""
        for candidate in self.candidates:
            answer = ask_mps_control(candidate, "get_server_list")
            if answer is not None and not _is_other_protocol(answer):
                return candidate
        return None

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """A control daemon answers, and it takes clients without a static partition."""
        directory = self.pipe_directory()
        evidence = self.check_daemon(facts, directory)
        is_recorded = directory == self.recorded.get("pipe_directory")
        if self.partitions_of_daemon(directory) or (is_recorded and "partitions" in self.recorded):
            evidence.append(Evidence(
                "the daemon takes clients without a static partition",
                "no, it was started for clients with one (--mps-partitions)", False,
                f"{DISABLE_MPS} && {ENABLE_MPS}",
            ))  # fmt: skip
        return evidence

    def partitions_of_daemon(self, directory: str | None) -> list[Partition]:
        """Return the card's static partitions that the daemon lists; none where it has none."""
        answer = ask_mps_control(directory, "lspart") if directory else None
        return read_partitions(answer or "", str(self.facts().get("uuid")))

    def check_daemon(self, facts: GpuFacts, found: str | None) -> list[Evidence]:
        """A control daemon answers, and neither MIG nor the compute mode forbids clients."""
        daemon = f"yes, at {printable(found or '')}"
        if not found:
            tried = ", ".join(map(_with_obstacle, self.candidates))
            daemon = f"none ({printable(tried) or 'no pipe directory is known'})"
        compute_mode = facts.get("compute_mode")
        is_let_in = None if compute_mode is None else compute_mode in MODES_FOR_MPS
        return [
            mig_is_off(facts),
            Evidence("an MPS control daemon answers", daemon, found is not None, ENABLE_MPS),
            Evidence(
                "compute mode lets the MPS server in", str(compute_mode), is_let_in, ENABLE_MPS
            ),
        ]

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the GPU by UUID, and the pipe directory of the daemon that answers."""
        return {
            "CUDA_VISIBLE_DEVICES": str(self.facts().get("uuid")),
            "CUDA_MPS_PIPE_DIRECTORY": self.pipe_directory() or "",
        }

    def observe(self) -> None:
        """Ask the daemon for its clients, in both ways that it knows."""
        directory = self.pipe_directory()
        self.clients_of_daemon = mps_clients(directory) if directory else None

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """NVML's MPS list or the daemon names the client's pid; one of the two is enough."""
        listed = self.clients_of_daemon
        both = [
            # A client that runs without MPS is a plain compute process, so both lists are looked at
            # to tell whether pids can be matched.
            is_listed(
                "NVML lists it as MPS client", identity, lists.mps,
                can_match=self.can_match(pids, lists.all),
            ),
            # A daemon without any client needs no pids to be matched.
            is_listed(
                "the MPS daemon lists it as client", identity, listed,
                can_match=not listed or self.can_match(pids, listed),
            ),
        ]  # fmt: skip
        if any(item.ok for item in both):
            # A list that is a moment older or newer does not outweigh the one that has it.
            both = [item for item in both if item.ok]
        elif listed is not None:
            both.append(Evidence("clients that the daemon counts", str(len(listed)), None))
        return judge([
            *sees_device(identity, self.facts().get("uuid")),
            *both,
            *_bypasses_mps(identity, lists),
        ])  # fmt: skip


class PartitionedMpsMode(MpsMode):
    """MPS where client i has for itself the multiprocessors of static partition i."""

    has_own_shares = True
    # as the daemon listed them while all clients were connected
    seen: list[Partition] | None = None

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """A control daemon answers, and has a partition for every client."""
        directory = self.pipe_directory()
        listed, names = self.partitions_of_daemon(directory), saved_partitions(self.recorded)
        count = sum(find_partition(listed, name) is not None for name in names)
        fix = f"{ENABLE_MPS} --static-partitions {self.clients}"
        partitions = Evidence(
            "every client has a static partition",
            f"{count} static partitions for {self.clients} clients", count >= self.clients,
            f"{DISABLE_MPS} && {fix}" if directory else fix,
        )  # fmt: skip
        return [partitions, *self.check_daemon(facts, directory)]  # what mends the first mends both

    def client_environment(self, client: int) -> dict[str, str]:
        """Return what every MPS client gets, and the client's own partition.

        A plan made for looking at only may have more clients than there are partitions.
        """
        names = saved_partitions(self.recorded)
        own = names[client] if client < len(names) else f"(static partition {client}, not there)"
        return {**super().client_environment(client), PARTITION_VARIABLE: own}

    def observe(self) -> None:
        """Ask the daemon for its clients, and which partitions have some."""
        super().observe()
        self.seen = self.partitions_of_daemon(self.pipe_directory())

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """The client is one of the daemon's, on its own partition with its multiprocessors."""
        evidence = super().prove(client, identity, pids, lists).evidence
        own = find_partition(self.seen or [], saved_partitions(self.recorded)[client])
        is_taken = {"Yes": True, "No": False}.get(own.in_use) if own else None
        if is_command(identity):
            is_taken = is_taken or None  # it may not have begun to use the GPU
        wanted, seen = own and own.multiprocessors, identity.get("multiprocessor_count")
        return judge([
            *evidence,
            Evidence("its partition is in use", own.in_use if own else "not listed", is_taken),
            Evidence(
                "it sees its partition's multiprocessors", f"{seen} of {wanted}",
                None if wanted is None or seen is None else wanted == seen,
            ),
        ])  # fmt: skip


class Partition(NamedTuple):
    """A row of the daemon's table; `name` is the beginning of the partition's name."""

    name: str
    multiprocessors: int | None
    in_use: str  # Yes or No


def read_partitions(table: str, gpu_uuid: str) -> list[Partition]:
    """Return a card's partitions by `lspart`; whatever else a daemon answers names none.

    The columns: GPU (the beginning of its UUID), partition, free and used chunks, free and used
    multiprocessors, whether there are clients. The card's own row has no partition.
    """
    rows = [line.split() for line in table.splitlines()]
    return [
        Partition(row[1], int(row[5]) if row[5].isdecimal() else None, row[6])
        for row in rows
        if len(row) == 7 and row[0].startswith("GPU-") and gpu_uuid.startswith(row[0])
        and row[1] != "-"
    ]  # fmt: skip


def find_partition(listed: Sequence[Partition], full_name: str) -> Partition | None:
    """Return the row that `GPU-.../NAME` can be, the longest; `None` for none, or several alike."""
    name = full_name.partition("/")[2]
    found = sorted(
        (one for one in listed if name.startswith(one.name)), key=lambda one: len(one.name)
    )
    is_only = len(found) == 1 or (found and len(found[-1].name) > len(found[-2].name))
    return found[-1] if is_only else None


def mps_clients(pipe_directory: str) -> frozenset[int] | None:
    """Return the pids of a daemon's clients by `ps` and `get_client_list`, `None` if either fails.

    `ps` prints a table whose first column is the client's pid, `get_client_list SERVER` one pid a
    line. Lines that begin with anything else ("Server not found", a heading) name no client.
    """
    servers = ask_mps_control(pipe_directory, "get_server_list")
    if servers is None:
        return None
    questions = ["ps", *(f"get_client_list {server}" for server in _first_numbers(servers))]
    pids: set[int] = set()
    for question in questions:
        answer = ask_mps_control(pipe_directory, question)
        if answer is None:
            return None
        pids.update(_first_numbers(answer))
    return frozenset(pids)


def _first_numbers(text: str) -> list[int]:
    first_words = (line.split()[0] for line in text.splitlines() if line.split())
    return [int(word) for word in first_words if word.isdecimal()]


def _is_other_protocol(servers: str) -> bool:
    """Whether a daemon that was asked for its servers answers otherwise than with pids.

    MPS since CUDA 13 has a protocol 3 with other commands, by NVIDIA's manual.
    """
    return any(not line.strip().isdecimal() for line in servers.splitlines() if line.strip())


def _with_obstacle(pipe_directory: str) -> str:
    """Return a pipe directory as an error names it: one that is shut may hide a daemon."""
    if _is_other_protocol(ask_mps_control(pipe_directory, "get_server_list") or ""):
        return f"{pipe_directory}: a daemon that answers in other words (MPS protocol 3?)"
    try:
        os.stat(Path(pipe_directory) / "control")
    except PermissionError:
        return f"{pipe_directory}: no permission, have its owner give it back"
    except OSError:
        pass  # nothing there, which is what the error says already
    return pipe_directory


def _bypasses_mps(identity: Identity, lists: ProcessLists) -> list[Evidence]:
    """What speaks against a command under MPS: the driver lists it, but never as an MPS client.

    One pid that is in only one of the lists means nothing: they are asked for one after the other,
    and a command's processes come and go. Nor does an MPS list without any entry: not every driver
    fills it.
    """
    own = own_pids(identity)
    listed = own & (lists.compute or frozenset())
    if not is_command(identity) or not lists.mps or own & lists.mps or not listed:
        return []
    return [Evidence("it runs under MPS", f"pid {min(listed)} runs without", False)]
