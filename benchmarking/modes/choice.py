"""The mode of a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarking.modes.mig import MigMode
from benchmarking.modes.mps import MpsMode, PartitionedMpsMode
from benchmarking.modes.names import (
    MODE_CPU_DEMO,
    MODE_EXCLUSIVE,
    MODE_MIG,
    MODE_MPS,
    MODE_MPS_PARTITIONS,
    MODE_TIME_SLICING,
)
from benchmarking.modes.sharing_mode import GpuFacts, SharingMode
from benchmarking.modes.whole_gpu import CpuDemoMode, WholeGpuMode

MODE_CLASSES: Mapping[str, type[SharingMode]] = {
    MODE_TIME_SLICING: WholeGpuMode,
    MODE_EXCLUSIVE: WholeGpuMode,
    MODE_MPS: MpsMode,
    MODE_MPS_PARTITIONS: PartitionedMpsMode,
    MODE_MIG: MigMode,
    MODE_CPU_DEMO: CpuDemoMode,
}


def make_mode(
    name: str,
    describe: Callable[[], GpuFacts | None],
    *,
    clients: int,
    no_mps_folder: Path,
    environment: Mapping[str, str],
    layout: Sequence[str] = (),
) -> SharingMode:
    """Return the mode called `name`; the arguments are the fields of `SharingMode`.

    A variant has a class of its own and its mode's name.
    """
    mode = name.partition(":")[0]
    return MODE_CLASSES[name](mode, describe, no_mps_folder, clients, environment, layout)
