"""Plain CUDA on the whole GPU, for time slicing and a job alone; and no GPU at all."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarking.modes.mode_scripts import DISABLE_MPS, SETUP_TIME_SLICING, read_state
from benchmarking.modes.names import MODE_TIME_SLICING
from benchmarking.modes.sharing_mode import (
    GpuFacts,
    Identity,
    ProcessLists,
    SharingMode,
    is_listed,
    judge,
    mig_is_off,
    own_pids,
    sees_device,
)
from benchmarking.records.types import Evidence, Proof


class WholeGpuMode(SharingMode):
    """Time slicing, and a job alone.

    Clients get an empty folder of the suite's own as MPS pipe directory, since asking one pipe
    directory for a daemon says nothing of another.
    """

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """MIG is off (or not there), compute mode is Default."""
        compute_mode = facts.get("compute_mode")
        is_default = None if compute_mode is None else compute_mode == "Default"
        fix = f"{SETUP_TIME_SLICING} {self.clients}"
        if compute_mode == "Exclusive_Process":
            fix = f"sudo {DISABLE_MPS}"
        return [
            mig_is_off(facts),
            Evidence("compute mode is Default", str(compute_mode), is_default, fix),
        ]

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the GPU by UUID, and a pipe directory in which no daemon answers."""
        return {
            "CUDA_VISIBLE_DEVICES": str(self.facts().get("uuid")),
            "CUDA_MPS_PIPE_DIRECTORY": str(self.no_mps_folder),
        }

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """The client's pid is a plain compute process of this GPU and no MPS client."""
        return judge([
            *sees_device(identity, self.facts().get("uuid")),
            is_listed(
                "NVML lists it as compute process", identity, lists.compute,
                can_match=self.can_match(pids, lists.all),
            ),
            _is_no_mps_client(identity, lists.mps),
        ])  # fmt: skip


class CpuDemoMode(SharingMode):
    """No GPU: the same flow on the CPU, in which no sharing mode can be in force."""

    def check(self) -> list[Evidence]:
        """Say that there is no GPU in use; that is no error here."""
        return [Evidence("a GPU is shared", "no: CPU demonstration, no sharing mode", None)]

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """There is nothing to set."""
        return []

    def client_environment(self, client: int) -> dict[str, str]:
        """Hide GPUs from clients, so that a demonstration is one."""
        return {"CUDA_VISIBLE_DEVICES": ""}

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """There is nothing to prove."""
        return Proof("not_applicable", self.check())


def time_slicing_warning(clients: int, gpu_uuid: str, environment: Mapping[str, str]) -> str | None:
    """Warn when more clients are asked for than `setup_time_slicing.sh` was told."""
    recorded = read_state(MODE_TIME_SLICING, gpu_uuid, environment).get("clients", "")
    if recorded.isdecimal() and clients > int(recorded):
        return (
            f"{clients} clients share the GPU, but time slicing was set up for {recorded}: "
            f"run {SETUP_TIME_SLICING} {clients}"
        )
    return None


def _is_no_mps_client(identity: Identity, mps: frozenset[int] | None) -> Evidence:
    check = "it is no MPS client"
    if mps is None:
        return Evidence(check, "unknown; its MPS pipe directory is empty", True)
    is_one = bool(own_pids(identity) & mps)
    return Evidence(check, "it is one" if is_one else "it is none", not is_one)
