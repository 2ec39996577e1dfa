"""The demonstration on the CPU, in which no sharing mode can be in force."""

from __future__ import annotations

from benchmarking.modes.sharing_mode import (
    NOT_APPLICABLE,
    Evidence,
    Identity,
    ProcessLists,
    Proof,
    SharingMode,
)
from benchmarking.suite.plan import MODE_CPU_DEMO


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
