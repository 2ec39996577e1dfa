"""MIG: hardware instances, and the proof that a client saw its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.modes.mode_scripts import SETUP_MIG
from benchmarking.modes.sharing_mode import (
    GpuFacts,
    Identity,
    ProcessLists,
    SharingMode,
    judge,
    mig_mode,
    sees_device,
)
from benchmarking.records.types import Evidence, Proof


class MigMode(SharingMode):
    """Client i has instance i for itself, or the instance of the layout's profile i."""

    has_own_shares = True

    def instances(self) -> list[Mapping[str, Any]]:
        """Return the card's instances in NVML's order, or those of the layout in its order."""
        there = list(self.facts().get("mig_devices") or [])
        return instances_in_order(self.layout, there) if self.layout else there

    def check_settings(self, facts: GpuFacts) -> list[Evidence]:
        """MIG is on, and there is an instance for every client."""
        mode = mig_mode(facts)
        count, wanted = len(self.instances()), ",".join(self.layout)
        has_mig = bool(facts.get("mig_mode"))
        fix = f"{SETUP_MIG} {wanted or f'1g.5gb {self.clients}'}" if has_mig else None
        if self.layout:
            there = facts.get("mig_devices") or []
            profiles = ",".join(str(one.get("profile") or "unknown") for one in there)
            check = "the layout's instances are there, one for each client in its order"
            found, is_enough = f"{profiles or 'none'} for {wanted}", count == len(self.layout)
        else:
            check = "every client has an instance"
            found = f"{count} MIG instances for {self.clients} clients"
            is_enough = count >= self.clients
        return [
            Evidence("MIG mode is Enabled", mode or "unknown", mode == "Enabled", fix),
            Evidence(check, found, is_enough, fix),
        ]

    def client_environment(self, client: int) -> dict[str, str]:
        """Return the instance by UUID; an empty pipe directory keeps MPS away.

        A plan made for looking at only may have more clients than there are instances.
        """
        instances = self.instances()
        is_there = client < len(instances)
        return {
            "CUDA_VISIBLE_DEVICES": (
                str(instances[client]["uuid"])
                if is_there
                else f"(MIG instance {client}, not there)"
            ),
            "CUDA_MPS_PIPE_DIRECTORY": str(self.no_mps_folder),
        }

    def prove(
        self, client: int, identity: Identity, pids: frozenset[int], lists: ProcessLists
    ) -> Proof:
        """The client sees its own instance's UUID and multiprocessors."""
        instances = self.instances()
        if client >= len(instances):
            return judge([Evidence("it has an instance", f"{len(instances)} are left", False)])
        instance = instances[client]
        wanted, seen = instance.get("multiprocessor_count"), identity.get("multiprocessor_count")
        return judge([
            *sees_device(identity, instance["uuid"], card_uuid=self.facts().get("uuid")),
            Evidence(
                "it sees its instance's multiprocessors", f"{seen} of {wanted}",
                None if wanted is None or seen is None else wanted == seen,
            ),
        ])  # fmt: skip


def instances_in_order(
    layout: Sequence[str], instances: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return one instance for each profile of the layout, in its order.

    `instances` are a card's as NVML describes them, each with its `profile`. Ends before the first
    profile that no unused instance has: what follows would belong to other clients.
    """
    unused = list(instances)
    ordered: list[Mapping[str, Any]] = []
    for wanted in layout:
        found = next((one for one in unused if one.get("profile") == wanted), None)
        if found is None:
            return ordered
        unused.remove(found)
        ordered.append(found)
    return ordered
