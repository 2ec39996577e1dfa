"""MIG: hardware instances, and the proof that a client saw its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.modes.mode_scripts import SETUP_MIG
from benchmarking.modes.sharing_mode import (
    Evidence,
    GpuFacts,
    Identity,
    ProcessLists,
    Proof,
    SharingMode,
    device_evidence,
    verdict_of,
)
from benchmarking.suite import limits
from benchmarking.suite.plan import MODE_MIG


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
        return limits.instances_in_order(self._layout, there) if self._layout else there

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """MIG is on, and there is an instance for every client."""
        mode = (facts.get("mig_mode") or {}).get("current")
        count = len(self.instances())
        wanted = ",".join(self._layout)
        fix = f"{SETUP_MIG} {wanted or f'1g.5gb {self._clients}'}" if mode else None
        if self._layout:
            there = facts.get("mig_devices") or []
            profiles = ",".join(str(one.get("profile") or "unknown") for one in there)
            instances = Evidence(
                "the layout's instances are there, one for each client in its order",
                f"{profiles or 'none'} for {wanted}", count == len(self._layout), fix,
            )  # fmt: skip
        else:
            instances = Evidence(
                "every client has an instance",
                f"{count} MIG instances for {self._clients} clients", count >= self._clients, fix,
            )  # fmt: skip
        found = mode or "not supported by this GPU"
        return [Evidence("MIG mode is Enabled", found, mode == "Enabled", fix), instances]

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
