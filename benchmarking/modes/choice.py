"""Which sharing mode a name stands for on a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarking.modes.cpu_demo import CpuDemoMode
from benchmarking.modes.mig import MigMode
from benchmarking.modes.mode_scripts import read_state
from benchmarking.modes.mps import MpsMode, own_default_pipe_directory
from benchmarking.modes.sharing_mode import GpuFacts, SharingMode, is_own_pid_namespace
from benchmarking.modes.whole_gpu import WholeGpuMode
from benchmarking.suite.plan import (
    MODE_CPU_DEMO,
    MODE_EXCLUSIVE,
    MODE_MIG,
    MODE_MPS,
    MODE_TIME_SLICING,
)


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
