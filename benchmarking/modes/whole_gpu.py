"""Plain CUDA on the whole GPU: time slicing, and a job alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarking.modes.mode_evidence import (
    Evidence,
    Identity,
    ProcessLists,
    Proof,
    device_evidence,
    listed_evidence,
    verdict_of,
    without_mps_evidence,
)
from benchmarking.modes.mode_scripts import DISABLE_MPS, SETUP_TIME_SLICING, read_state
from benchmarking.modes.sharing_mode import GpuFacts, SharingMode, mig_is_off
from benchmarking.suite.plan import MODE_TIME_SLICING


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

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """MIG is off (or not there), compute mode is Default."""
        compute_mode = facts.get("compute_mode")
        setup = f"{SETUP_TIME_SLICING} {self._clients}"
        compute_fix = setup if compute_mode != "Exclusive_Process" else f"sudo {DISABLE_MPS}"
        is_default = None if compute_mode is None else compute_mode == "Default"
        return [
            mig_is_off(facts),
            Evidence("compute mode is Default", str(compute_mode), is_default, compute_fix),
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


def time_slicing_warning(clients: int, gpu_uuid: str, environment: Mapping[str, str]) -> str | None:
    """Warn when more clients are asked for than `setup_time_slicing.sh` was told."""
    recorded = read_state(MODE_TIME_SLICING, gpu_uuid, environment).get("clients", "")
    if recorded.isdecimal() and clients > int(recorded):
        return (
            f"{clients} clients share the GPU, but time slicing was set up for {recorded}: "
            f"run {SETUP_TIME_SLICING} {clients}"
        )
    return None
