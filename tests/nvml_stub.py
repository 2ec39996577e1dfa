"""A scripted GPU for tests: puts a stand-in for NVML's library on the path and writes its state.

Any subprocess that imports ``pynvml`` sees the card::

    library = build_nvml_stub(tmp_path)
    state = write_state(tmp_path / "card.txt", utilization_gpu_percent=97, pids={4711: 2228})
    subprocess.run(command, env=stub_environment(library, state))

The state is read again at each NVML call, so ``write_state`` with the same path changes the card
while the process runs. ``write_state`` starts from ``H100`` each time; a value of None takes the
key away, and a GPU without a key answers "not supported" where the key is needed.

Keys beyond those of ``H100`` (``KEY_1`` is GPU 1's own value where there are several):

energy_joules        the counter, or "clock": power_draw_watts times CLOCK_MONOTONIC
clocks_event_reasons NVML's bits, as "0x4"
compute_mode         0 default, 2 prohibited, 3 exclusive process
pids, mps_pids       {pid: used MiB or None}, or {pid: (used MiB, gpu_instance_id)} for MIG
mig_mode_current     0 or 1; mig_mode_pending likewise, else as current
mig_devices          list of (uuid, gpu_instance_id, multiprocessors, MiB, used MiB) and, where the
                     name is to hold it, a sixth, "1g.10gb"; None is a hole in NVML's numbering
gpm                  1 when GPM is supported; its figures with "_gi7" behind are GPU instance 7's
larger_process_entries  1: as drivers 535.43 to 535.86 list processes, in larger entries (version 3)
lost                 1: the GPU has left the bus
fail                 {"nvmlDeviceGetPowerUsage": 3}: functions that return this NVML code
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).resolve().parent / "fakes" / "nvml" / "pynvml.py"
GPU_UUID = "GPU-00000000-1111-2222-3333-444444444444"
H100: dict[str, Any] = {
    "count": 1,
    "driver_version": "580.159.04",
    "cuda_driver_version": 13000,
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": GPU_UUID,
    "memory_total_mib": 81559,
    "memory_used_mib": 0,
    "memory_reserved_mib": 480,
    "utilization_gpu_percent": 0,
    "sm_clock_mhz": 1980,
    "temperature_celsius": 50,
    "power_draw_watts": 119.25,
    "energy_joules": "clock",
    "clocks_event_reasons": "0x1",
    "compute_mode": 0,
    "compute_capability": "9.0",
    "pids": {},
    "mps_pids": {},
    "mig_mode_current": 0,
    "gpm": 1,
    "gpm_graphics_util": 0,
    "gpm_sm_util": 0,
    "gpm_sm_occupancy": 0,
    "gpm_any_tensor_util": 0,
    "gpm_dram_bw_util": 0,
}
# What cards for games lack: MIG (data-center cards since Ampere) and GPM (those since Hopper).
# Where a source is named, nvidia-smi showed these values there; others lie within the card's range.
_CONSUMER_CARD: dict[str, Any] = {
    "memory_reserved_mib": 0, "mig_mode_current": None, "gpm": None,
    **{key: None for key in H100 if key.startswith("gpm_")},
}  # fmt: skip
# Memory, power and temperature: github.com/PromtEngineer/localGPT/issues/14. Cards before Volta
# tell their power but have no energy counter: github.com/mlco2/codecarbon/issues/1316.
GTX_1080_TI: dict[str, Any] = {
    **_CONSUMER_CARD, "name": "NVIDIA GeForce GTX 1080 Ti", "driver_version": "531.14",
    "cuda_driver_version": 12010, "compute_capability": "6.1", "memory_total_mib": 11264,
    "memory_used_mib": 1585, "power_draw_watts": 65, "temperature_celsius": 63,
    "utilization_gpu_percent": 1, "sm_clock_mhz": 1481, "energy_joules": None,
}  # fmt: skip
# Memory under a driver that is older than MIG, than GPM and than the process lists that pynvml asks
# for: github.com/Ricks-Lab/gpu-utils/issues/88.
RTX_2080: dict[str, Any] = {
    **_CONSUMER_CARD, "name": "GeForce RTX 2080", "driver_version": "440.100",
    "cuda_driver_version": 10020, "compute_capability": "7.5", "memory_total_mib": 7982,
    "power_draw_watts": 42, "temperature_celsius": 41, "sm_clock_mhz": 1515,
}  # fmt: skip
DRIVER_440_LACKS = (
    "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetTemperatureV", "nvmlDeviceGetMigMode",
    "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetDeviceHandleFromMigDeviceHandle",
    "nvmlDeviceIsMigDeviceHandle", "nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetAttributes_v2",
    "nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet",
    "nvmlGpmMigSampleGet", "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
)  # fmt: skip


def build_nvml_stub(tmp_dir: Path, without: tuple[str, ...] = ()) -> Path:
    """Return a folder for ``PYTHONPATH`` whose ``pynvml`` calls the stand-in.

    Args:
        tmp_dir: an existing folder of the test.
        without: functions that the library shall lack, as an old driver's does.
    """
    folder = tmp_dir / "nvml_stub"
    folder.mkdir(exist_ok=True)
    if not (folder / STAND_IN.name).exists():
        (folder / STAND_IN.name).symlink_to(STAND_IN)
    (folder / "lacks").write_text("\n".join(without))
    return folder


def write_state(path: Path, **state: Any) -> Path:
    """Script the card: ``H100`` with ``state`` laid over it; replaces the file in one step."""
    known = {key: value for key, value in {**H100, **state}.items() if value is not None}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(known))
    temporary.replace(path)
    return path


def stub_environment(
    library: Path, state: Path, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return ``base`` with the two variables that make a subprocess see the scripted card.

    Without CUDA's own, which a workload that was opened in this process may have set.
    """
    base = {name: value for name, value in base.items() if not name.startswith("CUDA_")}
    search_path = [str(library), *filter(None, [base.get("PYTHONPATH")])]
    return {**base, "PYTHONPATH": os.pathsep.join(search_path), "NVML_STUB_STATE": str(state)}
