"""Everything the project asks NVML, with every quirk of NVML kept inside this one module.

What a driver, a GPU or a MIG instance does not offer is None here, never 0 and never an exception:
drivers lack functions, GPUs lack sensors, and containers lack permissions, each in its own way.

Units are those of the names: ``_percent`` 0 to 100, ``_mib``, ``_watts``, ``_joules``, ``_mhz``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarking.hardware.nvml_calls import (
    ADVICE,
    DRIVER_NOT_LOADED,
    LIBRARY_NOT_FOUND,
    CallError,
    ask,
    call,
    failures,
    pynvml,
)
from benchmarking.hardware.visible_devices import VISIBLE, Card, names_none, visible_devices

MEBIBYTE = 1024**2
# sizeof and revision of nvmlMemory_v2_t. Only version 2 counts used memory as nvidia-smi does:
# version 1 adds what the driver reserves (480 MiB on an idle H100).
MEMORY_INFO_VERSION_2 = 0x02000028
COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
MIG_MODES = {0: "Disabled", 1: "Enabled"}
# nvidia-smi's names for the bits (clocks_event_reasons.* of its --query-gpu), the lowest first.
CLOCKS_EVENT_REASONS = (
    "gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost",
    "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
    "display_clock_setting", "board_limit", "reliability",
)  # fmt: skip
# GPM (GPU performance monitoring, Hopper and newer): the field of a sample -> NVML's metric id.
GPM_METRICS = {
    "graphics_engine_active_percent": 1,  # NVML_GPM_METRIC_GRAPHICS_UTIL
    "sm_activity_percent": 2,  # NVML_GPM_METRIC_SM_UTIL
    "sm_occupancy_percent": 3,  # NVML_GPM_METRIC_SM_OCCUPANCY
    "tensor_activity_percent": 5,  # NVML_GPM_METRIC_ANY_TENSOR_UTIL
    "dram_activity_percent": 10,  # NVML_GPM_METRIC_DRAM_BW_UTIL
}


class GpuNotFoundError(Exception):
    """The GPU that was named does not exist; the message is one sentence for the user."""


class GpuUnusableError(Exception):
    """A GPU is there but cannot be asked; the message is one sentence that names the fix."""


class GpuHiddenError(Exception):
    """CUDA_VISIBLE_DEVICES hides every GPU, as the message says."""


def unavailable_reason() -> str | None:
    """Return why there is no GPU to ask, or None when there is one."""
    return _initialized()[0]


@functools.cache
def _initialized() -> tuple[str | None, bool]:
    """Initialize NVML once; return why there is no GPU to ask, and whether none is to be missed."""
    if pynvml is None:
        return "the Python package nvidia-ml-py is not installed", True
    try:
        call("nvmlInit")
        count = call("nvmlDeviceGetCount")
    except CallError as error:
        return f"NVML says: {error}", error.code in (LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED)
    return (None if count else "the driver answers but lists no GPU"), not count


def open_gpu(selector: str | None = None) -> Gpu | None:
    """Return the GPU or MIG instance that ``selector`` names, None when this machine has none.

    ``selector`` is NVML's index, a ``GPU-...`` or ``MIG-...`` UUID; None: the first GPU not lost.

    Raises:
        GpuNotFoundError: a GPU was named that does not exist.
        GpuUnusableError: there is one, but the driver cannot use it.
    """
    reason, is_absent = _initialized()
    if reason is not None:
        if not is_absent:
            raise GpuUnusableError(reason)
        if selector is None:
            return None
        raise GpuNotFoundError(f"GPU {selector} cannot be found: {reason}; leave --gpu out.")
    name = str(next(iter(_handles()[0]), 0)) if selector is None else selector
    try:
        # NVML takes 32 bits: a longer number would be another GPU's.
        if re.fullmatch("[0-9]{1,9}", name):
            return Gpu(call("nvmlDeviceGetHandleByIndex", int(name)))
        return Gpu(call("nvmlDeviceGetHandleByUUID", name))
    except CallError as error:
        known = ", ".join(
            f"{index} ({ask('nvmlDeviceGetUUID', handle)})"
            for index, handle in _handles()[0].items()
        )
        if error.code in ADVICE or not known:
            raise GpuUnusableError(f"NVML says: {error}") from None
        raise GpuNotFoundError(
            f"GPU {selector} cannot be found ({error}): choose one of {known}."
        ) from None


def visible_gpu(environment: Mapping[str, str]) -> str | None:
    """Return the UUID of the GPU or MIG device that CUDA would take first.

    None where CUDA_VISIBLE_DEVICES is not set, or where there is no GPU to ask.

    Raises:
        GpuHiddenError: The variable hides every GPU.
    """
    if VISIBLE not in environment:
        return None
    if unavailable_reason() is not None and not names_none(environment[VISIBLE]):
        return None
    visible = visible_devices(environment, _cards())
    if not visible:
        raise GpuHiddenError(f"{VISIBLE} hides every GPU")
    return visible[0]


def lost_gpus() -> list[str]:
    """Return a sentence for each GPU of the machine that cannot be asked while others can."""
    return [] if unavailable_reason() is not None else _handles()[1]


def describe_gpu(selector: str) -> dict[str, Any] | None:
    """Return the facts of one GPU (``Gpu.describe``), None when it cannot be asked."""
    gpu = _open_or_none(selector)
    return None if gpu is None else gpu.describe()


def compute_processes(selector: str) -> list[dict[str, Any]] | None:
    """Return the compute processes of one GPU (``Gpu.compute_processes``), None when unknown."""
    gpu = _open_or_none(selector)
    return None if gpu is None else gpu.compute_processes()


def _open_or_none(selector: str) -> Gpu | None:
    with contextlib.suppress(GpuNotFoundError, GpuUnusableError):
        return open_gpu(selector)
    return None


def _handles() -> tuple[dict[int, Any], list[str]]:
    """Return the handles of all GPUs by index, and a sentence for each that is lost."""
    handles, lost = {}, []
    for index in range(ask("nvmlDeviceGetCount") or 0):
        try:
            handles[index] = call("nvmlDeviceGetHandleByIndex", index)
        except CallError as error:
            lost.append(f"GPU {index} cannot be used: NVML says: {error}")
    return handles, lost


def _cards() -> list[Card]:
    """Return the GPUs that tell their UUID, as the reader of CUDA_VISIBLE_DEVICES wants them."""
    cards = []
    for handle in _handles()[0].values():
        capability = ask("nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        uuid = ask("nvmlDeviceGetUUID", handle)
        mig_uuids = [ask("nvmlDeviceGetUUID", one) for one in _mig_handles(handle)]
        name = ask("nvmlDeviceGetName", handle) or ""
        speed = (*capability, getattr(memory, "total", 0))
        if uuid is not None:
            cards.append(Card(uuid, name, tuple(filter(None, mig_uuids)), speed))
    return cards


class Gpu:
    """One GPU, or one MIG instance of it.

    Under MIG the sensors belong to the card: power, energy, clock, temperature and the reasons
    for a lowered clock are the whole card's also for an instance. Memory, processes and GPM
    figures are the instance's own.
    """

    def __init__(self, handle: Any) -> None:
        """Wrap NVML's handle of a GPU or a MIG instance; None: no GPU, all of it is unknown."""
        self._handle = handle
        card = ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        is_mig = getattr(ask("nvmlDeviceIsMigDeviceHandle", handle), "value", 0)
        self._is_instance = bool(is_mig) and card is not None
        self._card = card if self._is_instance else handle
        self.index: int | None = ask("nvmlDeviceGetIndex", self._card)
        self.uuid: str | None = ask("nvmlDeviceGetUUID", handle)
        self._mig_handles = [] if self._is_instance else _mig_handles(self._card)
        support = ask("nvmlGpmQueryDeviceSupport", self._card)
        self.gpm_supported: bool | None = support and bool(support.isSupportedDevice)

    def describe(self) -> dict[str, Any]:
        """Return what does not change while jobs run.

        ``uuid`` is the MIG instance's where one was named, ``index`` the card's; ``mig_mode``
        (None: the GPU has no MIG; with None in it: not told) and ``compute_mode`` are in
        nvidia-smi's words; versions are texts as "13.0"; ``mig_devices`` lists the card's
        instances.
        """
        modes = ask("nvmlDeviceGetMigMode", self._card)
        if modes is None and "nvmlDeviceGetMigMode" in failures:
            modes = (None, None)
        mig = [MIG_MODES.get(mode) for mode in modes or ()]
        capability = ask("nvmlDeviceGetCudaComputeCapability", self._card)
        cuda = ask(("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"))
        return {
            "index": self.index,
            "uuid": self.uuid,
            "name": ask("nvmlDeviceGetName", self._handle),
            "memory_total_mib": self._memory_mib()[1],
            "driver_version": ask("nvmlSystemGetDriverVersion"),
            # 13000 is 13.0
            "cuda_driver_version": cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
            "mig_mode": {"current": mig[0], "pending": mig[1]} if mig else None,
            "compute_mode": COMPUTE_MODES.get(ask("nvmlDeviceGetComputeMode", self._card)),
            "compute_capability": capability and f"{capability[0]}.{capability[1]}",
            "mig_devices": self._card and [*map(_describe_mig_device, _mig_handles(self._card))],
            "gpm_supported": self.gpm_supported,
        }

    def read_state(self) -> dict[str, Any]:
        """Return the values of this moment: the GPU's fields of a ``Sample`` but for processes.

        ``utilization_gpu_percent`` is NVML's (some kernel ran), and GPM's graphics engine
        figure where NVML has none (MIG); ``utilization_source`` says which. GPM figures cover the
        time since the call before, so they are None in the first. ``power_draw_watts`` is what
        the driver calls current, on many GPUs a mean over the last second; ``energy_joules`` is a
        counter since the driver was loaded, of which only differences mean something.
        """
        gpm = self._read_gpm()
        utilization = ask("nvmlDeviceGetUtilizationRates", self._handle)
        used_mib, total_mib = self._memory_mib()
        millijoules = ask("nvmlDeviceGetTotalEnergyConsumption", self._card)
        percent, source = gpm["graphics_engine_active_percent"], "gpm"
        if utilization is not None:
            percent, source = float(utilization.gpu), "nvml"
        return {
            "gpu_index": self.index,
            "gpu_uuid": self.uuid,
            "utilization_gpu_percent": percent,
            "utilization_source": None if percent is None else source,
            **gpm,
            "memory_used_mib": used_mib,
            "memory_total_mib": total_mib,
            "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", self._card, 1),  # 1: NVML_CLOCK_SM
            "power_draw_watts": _scaled(ask("nvmlDeviceGetPowerUsage", self._card), 1000),
            "energy_joules": _scaled(millijoules, 1000),
            "throttle_reasons": self._throttle_reasons(),
            "temperature_celsius": ask(
                ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"), self._card, 0
            ),
        }

    def compute_processes(self) -> list[dict[str, Any]] | None:
        """Return ``{"pid", "used_memory_mib"}`` of each compute process; None when unknown.

        MPS clients and the server are in it. In a container it may name the host's pids, or none.
        """
        return self._processes("nvmlDeviceGetComputeRunningProcesses")

    def mps_processes(self) -> list[dict[str, Any]] | None:
        """Return ``{"pid", "used_memory_mib"}`` of each MPS client; None when unknown."""
        return self._processes("nvmlDeviceGetMPSComputeRunningProcesses")

    @functools.cached_property
    def _gpm_readers(self) -> list[tuple[int, _GpmReader]]:
        """A reader, or one for each GPU instance of a card under MIG, with its multiprocessors."""
        # Made on first use: who only asks for facts arms no counters.
        if not self.gpm_supported:
            return []
        weights: Counter[int | None] = Counter()
        for handle in [self._handle] if self._is_instance else self._mig_handles:
            device = _describe_mig_device(handle)
            # Compute instances of one GPU instance share its counters.
            weights[device["gpu_instance_id"]] += device["multiprocessor_count"] or 1
        weights = weights or Counter({None: 1})
        return [(weight, _GpmReader(self._card, key)) for key, weight in weights.items()]

    def _read_gpm(self) -> dict[str, float | None]:
        """Return the GPM figures, as a mean over multiprocessors where there are instances."""
        readings = [(weight, reader.read()) for weight, reader in self._gpm_readers]
        figures: dict[str, float | None] = dict.fromkeys(GPM_METRICS)
        for field in figures if readings else ():
            parts = [n * value for n, read in readings if (value := read[field]) is not None]
            if len(parts) == len(readings):
                figures[field] = round(sum(parts) / sum(weight for weight, _ in readings), 3)
        return figures

    def _memory_mib(self) -> tuple[float | None, float | None]:
        """Return used and total memory, used as nvidia-smi counts it where the driver can."""
        memory = ask("nvmlDeviceGetMemoryInfo", self._handle, MEMORY_INFO_VERSION_2)
        if memory is None:
            memory = ask("nvmlDeviceGetMemoryInfo", self._handle)
        used, total = getattr(memory, "used", None), getattr(memory, "total", None)
        return _scaled(used, MEBIBYTE, 1), _scaled(total, MEBIBYTE, 1)

    def _throttle_reasons(self) -> list[str] | None:
        """Return the names of what lowers the clock now (an empty list: nothing does)."""
        # The second is what the function was called before driver 535.
        bits = ask(("nvmlDeviceGetCurrentClocksEventReasons",
                     "nvmlDeviceGetCurrentClocksThrottleReasons"), self._card)  # fmt: skip
        if bits is None:
            return None
        names = [name for bit, name in enumerate(CLOCKS_EVENT_REASONS) if bits & 1 << bit]
        unnamed = bits >> len(CLOCKS_EVENT_REASONS) << len(CLOCKS_EVENT_REASONS)
        return [*names, f"unknown_{unnamed:#x}"] if unnamed else names

    def _processes(self, function: str) -> list[dict[str, Any]] | None:
        # Asking a card under MIG needs a privilege that asking its instances does not.
        processes: list[dict[str, Any]] = []
        for handle in self._mig_handles or [self._handle]:
            listed = _list_processes(function, handle)
            if listed is None:
                return None
            processes += (
                {"pid": process.pid, "used_memory_mib": _scaled(process.usedGpuMemory, MEBIBYTE, 1)}
                for process in listed
            )
        return processes


class _GpmReader:
    """GPM figures between one reading and the next, of a GPU or of one MIG GPU instance.

    NVML wants more than 100 ms between two readings, since it refreshes its counters that often.
    """

    def __init__(self, card: Any, gpu_instance_id: int | None) -> None:
        # two samples, which take turns at being the earlier one
        self._take = functools.partial(ask, "nvmlGpmSampleGet", card)
        if gpu_instance_id is not None:
            self._take = functools.partial(ask, "nvmlGpmMigSampleGet", card, gpu_instance_id)
        self._earlier = ask("nvmlGpmSampleAlloc")
        self._later = ask("nvmlGpmSampleAlloc")
        self._earlier_is_filled = False

    def read(self) -> dict[str, float | None]:
        """Return the figures since the last call; None for each that is not known."""
        figures = dict.fromkeys(GPM_METRICS)
        is_taken = self._earlier is not None and self._take(self._later) is not None
        if is_taken:
            figures = self._compare_samples() if self._earlier_is_filled else figures
            self._earlier, self._later = self._later, self._earlier
        self._earlier_is_filled = is_taken
        return figures

    def _compare_samples(self) -> dict[str, float | None]:
        request = pynvml.c_nvmlGpmMetricsGet_t()
        request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(GPM_METRICS)
        request.sample1, request.sample2 = self._earlier, self._later
        for position, metric_id in enumerate(GPM_METRICS.values()):
            request.metrics[position].metricId = metric_id
        if ask("nvmlGpmMetricsGet", request) is None:
            return dict.fromkeys(GPM_METRICS)
        # The call as a whole succeeds also where single metrics fail, or divide 0 by 0.
        return {
            field: one.value if one.nvmlReturn == 0 and math.isfinite(one.value) else None
            for field, one in zip(GPM_METRICS, request.metrics, strict=False)
        }


def _list_processes(function: str, handle: Any) -> list[Any] | None:
    """Return NVML's processes of a GPU or an instance, by the newest version that tells them.

    Drivers 535.43 to 535.86 fill version 3 with entries larger than those that pynvml reads, so
    the second pid is 0 and others are no pids either (github.com/XuehaiPan/nvitop/pull/79).
    """
    for version in ("v3", "v2"):
        processes = ask(f"{function}_{version}", handle)
        if processes is not None and all(process.pid for process in processes):
            return processes
    return None


def _mig_handles(card: Any) -> list[Any]:
    """Return the handles of a card's MIG instances; their indices have holes."""
    count = ask("nvmlDeviceGetMaxMigDeviceCount", card) or 0
    handles = [ask("nvmlDeviceGetMigDeviceHandleByIndex", card, index) for index in range(count)]
    return [handle for handle in handles if handle is not None]


def _describe_mig_device(handle: Any) -> dict[str, Any]:
    attributes = ask("nvmlDeviceGetAttributes_v2", handle)
    # An instance is called "NVIDIA H100 80GB HBM3 MIG 1g.10gb".
    profile = (ask("nvmlDeviceGetName", handle) or "").partition(" MIG ")[2]
    return {
        "uuid": ask("nvmlDeviceGetUUID", handle),
        "profile": profile or None,
        "gpu_instance_id": ask("nvmlDeviceGetGpuInstanceId", handle),
        "multiprocessor_count": getattr(attributes, "multiprocessorCount", None),
        "memory_mib": getattr(attributes, "memorySizeMB", None),
    }


def _scaled(number: int | None, divisor: int, digits: int = 3) -> float | None:
    """Return a number of NVML's in units that are `divisor` times as large."""
    return None if number is None else round(number / divisor, digits)
