"""Everything the project asks NVML, with every quirk of NVML kept inside this one module.

NVML (``libnvidia-ml.so.1``) comes with the driver; ``pynvml`` (package nvidia-ml-py) calls it.
What a driver, a GPU or a MIG instance does not offer is None here, never 0 and never an exception:
drivers lack functions, GPUs lack sensors, and containers lack permissions, each in its own way.

Units are those of the names: ``_percent`` 0 to 100, ``_mib``, ``_watts``, ``_joules``, ``_mhz``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarking.hardware.visible_devices import VISIBLE, Card, names_none, visible_devices

try:
    import pynvml
except ImportError:
    pynvml = None
    NVML_ERRORS: tuple[type[Exception], ...] = ()
else:
    # A name that is no UTF-8, a library without a symbol, a structure of another version: pynvml
    # raises what ctypes and decoding raise, besides its own errors.
    NVML_ERRORS = (pynvml.NVMLError, ValueError, TypeError, AttributeError, OSError)

MEBIBYTE = 1024**2
# sizeof and revision of nvmlMemory_v2_t. Only version 2 counts used memory as nvidia-smi does:
# version 1 adds what the driver reserves (480 MiB on an idle H100).
MEMORY_INFO_VERSION_2 = 0x02000028
COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
MIG_MODES = {0: "Disabled", 1: "Enabled"}
# The names that nvidia-smi gives the bits (clocks_event_reasons.* of its --query-gpu).
CLOCKS_EVENT_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
# GPM (GPU performance monitoring, Hopper and newer): the field of a sample -> NVML's metric id.
GPM_METRICS = {
    "graphics_engine_active_percent": 1,  # NVML_GPM_METRIC_GRAPHICS_UTIL
    "sm_activity_percent": 2,  # NVML_GPM_METRIC_SM_UTIL
    "sm_occupancy_percent": 3,  # NVML_GPM_METRIC_SM_OCCUPANCY
    "tensor_activity_percent": 5,  # NVML_GPM_METRIC_ANY_TENSOR_UTIL
    "dram_activity_percent": 10,  # NVML_GPM_METRIC_DRAM_BW_UTIL
}
DESCRIPTION_FIELDS = (
    "index", "uuid", "name", "memory_total_mib", "driver_version", "cuda_driver_version",
    "mig_mode", "compute_mode", "compute_capability", "mig_devices", "gpm_supported",
)  # fmt: skip
STATE_FIELDS = (
    "gpu_index", "gpu_uuid", "utilization_gpu_percent", "utilization_source", *GPM_METRICS,
    "memory_used_mib", "memory_total_mib", "sm_clock_mhz", "power_draw_watts", "energy_joules",
    "throttle_reasons", "temperature_celsius",
)  # fmt: skip


# What to do about an NVML error, by nvmlReturn_t (nvml.h).
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 9, 12
ADVICE = {
    4: "let this account open /dev/nvidia*, in a container with --gpus all",  # no permission
    DRIVER_NOT_LOADED: "load the driver: sudo modprobe nvidia",
    15: "the GPU has left the bus: look for Xid in the kernel's log, and restart",
    16: "the GPU has to be reset: see nvidia-smi --gpu-reset, or restart",
    18: "the driver was upgraded while the old one runs: restart",
}
# These say that there is no such thing, which is no failure: an argument that does not fit (a plain
# GPU asked as a MIG instance), not supported, not found, a function that the driver does not have.
NO_FAILURES = frozenset((2, 3, 6, 13))

_failures: dict[str, str] = {}


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
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except NVML_ERRORS as error:
        is_no_driver = getattr(error, "value", None) in (LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED)
        return f"NVML says: {describe(error)}", is_no_driver
    return (None if count else "the driver answers but lists no GPU"), not count


def describe(error: Exception) -> str:
    """Return NVML's words for an error, with what to do about it where that is known."""
    advice = ADVICE.get(getattr(error, "value", None))
    return f"{error} ({advice})" if advice else str(error)


def failures() -> dict[str, str]:
    """Return each function of NVML's that has failed so far, with NVML's word for it.

    What the driver, the GPU or pynvml does not offer is no failure.
    """
    return dict(_failures)


def open_gpu(selector: str | int | None = None) -> Gpu | None:
    """Return the GPU or MIG instance that ``selector`` names.

    Args:
        selector: NVML's index, a ``GPU-...`` or ``MIG-...`` UUID; None means the first GPU that
            is not lost.

    Returns:
        None when no GPU was named and this machine has none (``unavailable_reason`` says why).

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
        raise GpuNotFoundError(f"GPU {selector} cannot be found: {reason}.")
    try:
        if selector is None:
            return Gpu(pynvml.nvmlDeviceGetHandleByIndex(next(iter(_handles()[0]), 0)))
        if str(selector).isdecimal():
            return Gpu(pynvml.nvmlDeviceGetHandleByIndex(int(selector)))
        return Gpu(pynvml.nvmlDeviceGetHandleByUUID(str(selector)))
    except NVML_ERRORS as error:
        if getattr(error, "value", None) in ADVICE:
            raise GpuUnusableError(f"NVML says: {describe(error)}") from None
        # "0 (GPU-...)" for each GPU, so that the error names the fix
        known = ", ".join(
            f"{index} ({_ask('nvmlDeviceGetUUID', handle)})"
            for index, handle in _handles()[0].items()
        )
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
    if names_none(environment[VISIBLE]):
        raise GpuHiddenError(f"{VISIBLE} hides every GPU")
    if unavailable_reason() is not None:
        return None
    cards = [_card(handle) for handle in _handles()[0].values()]
    visible = visible_devices(environment, [card for card in cards if card.uuid])
    if not visible:
        raise GpuHiddenError(f"{VISIBLE} hides every GPU")
    return visible[0]


def lost_gpus() -> list[str]:
    """Return a sentence for each GPU of the machine that cannot be asked while others can."""
    return [] if unavailable_reason() is not None else _handles()[1]


def describe_gpu(selector: str | int | None = None) -> dict[str, Any] | None:
    """Return the facts of one GPU (``Gpu.describe``), None when it cannot be asked."""
    gpu = _open_or_none(selector)
    return None if gpu is None else gpu.describe()


def compute_processes(selector: str | int | None = None) -> list[dict[str, Any]] | None:
    """Return the compute processes of one GPU (``Gpu.compute_processes``), None when unknown."""
    gpu = _open_or_none(selector)
    return None if gpu is None else gpu.compute_processes()


class Gpu:
    """One GPU, or one MIG instance of it.

    Under MIG the sensors belong to the card: power, energy, clock, temperature and the reasons
    for a lowered clock are the whole card's also for an instance. Memory, processes and GPM
    figures are the instance's own.
    """

    def __init__(self, handle: Any) -> None:
        """Wrap an NVML device handle of a GPU or of a MIG instance."""
        self._handle = handle
        card = _ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        is_mig = getattr(_ask("nvmlDeviceIsMigDeviceHandle", handle), "value", 0)
        self._is_instance = bool(is_mig) and card is not None
        self._card = card if self._is_instance else handle
        self.index: int | None = _ask("nvmlDeviceGetIndex", self._card)
        self.uuid: str | None = _ask("nvmlDeviceGetUUID", handle)
        self._mig_handles = [] if self._is_instance else _mig_handles(self._card)
        support = _ask("nvmlGpmQueryDeviceSupport", self._card)
        self.gpm_supported: bool | None = (
            None if support is None else bool(support.isSupportedDevice)
        )

    def describe(self) -> dict[str, Any]:
        """Return what does not change while jobs run, one value for each of ``DESCRIPTION_FIELDS``.

        ``uuid`` is the MIG instance's where one was named, ``index`` the card's; ``mig_mode``
        ({"current", "pending"}; None: the GPU has no MIG) and ``compute_mode`` are in nvidia-smi's
        words; versions are texts as "13.0"; ``mig_devices`` lists the card's instances, each with
        ``uuid``, ``profile`` ("1g.10gb"), ``gpu_instance_id``, ``multiprocessor_count``,
        ``memory_mib``.
        """
        mig_mode = _ask("nvmlDeviceGetMigMode", self._card)
        capability = _ask("nvmlDeviceGetCudaComputeCapability", self._card)
        facts = (
            self.index,
            self.uuid,
            _ask("nvmlDeviceGetName", self._handle),
            self._memory_mib()[1],
            _ask("nvmlSystemGetDriverVersion"),
            _cuda_version(_first_answer("nvmlSystemGetCudaDriverVersion_v2",
                                        "nvmlSystemGetCudaDriverVersion")),
            mig_mode and {"current": MIG_MODES.get(mig_mode[0]),
                          "pending": MIG_MODES.get(mig_mode[1])},
            COMPUTE_MODES.get(_ask("nvmlDeviceGetComputeMode", self._card)),
            capability and f"{capability[0]}.{capability[1]}",
            [_describe_mig_device(handle) for handle in _mig_handles(self._card)],
            self.gpm_supported,
        )  # fmt: skip
        return dict(zip(DESCRIPTION_FIELDS, facts, strict=True))

    def read_state(self) -> dict[str, Any]:
        """Return the values of this moment, one for each of ``STATE_FIELDS``.

        ``utilization_gpu_percent`` is NVML's (some kernel ran), and GPM's graphics engine
        figure where NVML has none (MIG); ``utilization_source`` says which. GPM figures cover the
        time since the call before, so they are None in the first. ``power_draw_watts`` is what
        the driver calls current, on many GPUs a mean over the last second; ``energy_joules`` is a
        counter since the driver was loaded, of which only differences mean something.
        """
        gpm = self._read_gpm()
        utilization = _ask("nvmlDeviceGetUtilizationRates", self._handle)
        used_mib, total_mib = self._memory_mib()
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
            "sm_clock_mhz": _ask("nvmlDeviceGetClockInfo", self._card, 1),  # 1: NVML_CLOCK_SM
            "power_draw_watts": _thousandth(_ask("nvmlDeviceGetPowerUsage", self._card)),
            "energy_joules": _thousandth(_ask("nvmlDeviceGetTotalEnergyConsumption", self._card)),
            "throttle_reasons": self._throttle_reasons(),
            "temperature_celsius": _first_answer(
                "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", arguments=(self._card, 0)
            ),
        }

    def compute_processes(self) -> list[dict[str, Any]] | None:
        """Return ``{"pid", "used_memory_mib"}`` of each compute process; None when unknown.

        MPS clients stand in this list too, beside the MPS server itself. In a container with its
        own pid namespace the list may be empty or name pids of the host.
        """
        return self._processes("nvmlDeviceGetComputeRunningProcesses")

    def mps_processes(self) -> list[dict[str, Any]] | None:
        """Return ``{"pid", "used_memory_mib"}`` of each MPS client; None when unknown."""
        return self._processes("nvmlDeviceGetMPSComputeRunningProcesses")

    @functools.cached_property
    def _gpm_readers(self) -> list[tuple[int, _GpmReader]]:
        """One reader with weight 1, or one for each GPU instance of a card under MIG.

        The weight is the instance's multiprocessor count, so that the mean over instances is a
        mean over multiprocessors. They are made on first use: who only asks for facts arms no
        counters.
        """
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
        weights = [weight for weight, _ in self._gpm_readers]
        readings = [reader.read() for _, reader in self._gpm_readers]
        figures: dict[str, float | None] = dict.fromkeys(GPM_METRICS)
        for field in GPM_METRICS:
            values = [reading[field] for reading in readings]
            if values and None not in values:
                total = sum(map(operator.mul, weights, values))
                figures[field] = round(total / sum(weights), 3)
        return figures

    def _memory_mib(self) -> tuple[float | None, float | None]:
        """Return used and total memory, used as nvidia-smi counts it where the driver can."""
        memory = _ask("nvmlDeviceGetMemoryInfo", self._handle, MEMORY_INFO_VERSION_2)
        if memory is None:
            memory = _ask("nvmlDeviceGetMemoryInfo", self._handle)
        return _mebibytes(getattr(memory, "used", None)), _mebibytes(getattr(memory, "total", None))

    def _throttle_reasons(self) -> list[str] | None:
        """Return the names of what lowers the clock now (an empty list: nothing does)."""
        bits = _first_answer(
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",  # the name before driver 535
            arguments=(self._card,),
        )
        if bits is None:
            return None
        names = [name for bit, name in CLOCKS_EVENT_REASONS.items() if bits & bit]
        unnamed = bits & ~sum(CLOCKS_EVENT_REASONS)
        return [*names, f"unknown_{unnamed:#x}"] if unnamed else names

    def _processes(self, function: str) -> list[dict[str, Any]] | None:
        """Ask for a process list; under MIG also instance by instance.

        Asking a card under MIG needs a privilege that asking its instances does not.
        """
        # The unversioned names raise an error that is no NVMLError when the driver is old.
        functions = (f"{function}_v3", f"{function}_v2")
        processes = _first_answer(*functions, arguments=(self._handle,))
        if processes is None and self._mig_handles:
            parts = [_first_answer(*functions, arguments=(handle,)) for handle in self._mig_handles]
            if all(part is not None for part in parts):
                processes = [process for part in parts for process in part]
        if processes is None:
            return None
        return [
            {"pid": process.pid, "used_memory_mib": _mebibytes(process.usedGpuMemory)}
            for process in processes
        ]


class _GpmReader:
    """GPM figures between one reading and the next, of a GPU or of one MIG GPU instance.

    NVML wants more than 100 ms between two readings, since it refreshes its counters that often.
    """

    def __init__(self, card: Any, gpu_instance_id: int | None) -> None:
        """Allocate two samples, which take turns at being the earlier one."""
        self._card = card
        self._gpu_instance_id = gpu_instance_id
        self._earlier = _ask("nvmlGpmSampleAlloc")
        self._later = _ask("nvmlGpmSampleAlloc")
        self._earlier_is_filled = False
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(GPM_METRICS)
        for position, metric_id in enumerate(GPM_METRICS.values()):
            self._request.metrics[position].metricId = metric_id

    def read(self) -> dict[str, float | None]:
        """Return the figures since the last call; None for each that is not known."""
        is_taken = None not in (self._earlier, self._later) and self._take_sample()
        figures = dict.fromkeys(GPM_METRICS)
        if is_taken:
            if self._earlier_is_filled:
                figures = self._compare_samples()
            self._earlier, self._later = self._later, self._earlier
        self._earlier_is_filled = is_taken
        return figures

    def _take_sample(self) -> bool:
        if self._gpu_instance_id is None:
            return _ask("nvmlGpmSampleGet", self._card, self._later) is not None
        arguments = (self._card, self._gpu_instance_id, self._later)
        return _ask("nvmlGpmMigSampleGet", *arguments) is not None

    def _compare_samples(self) -> dict[str, float | None]:
        self._request.sample1 = self._earlier
        self._request.sample2 = self._later
        if _ask("nvmlGpmMetricsGet", self._request) is None:
            return dict.fromkeys(GPM_METRICS)
        metrics = self._request.metrics
        # The call as a whole succeeds also where single metrics fail, or divide 0 by 0.
        return {
            field: metrics[position].value
            if metrics[position].nvmlReturn == 0 and math.isfinite(metrics[position].value)
            else None
            for position, field in enumerate(GPM_METRICS)
        }


def _ask(function: str, *arguments: Any) -> Any:
    """Call one function of pynvml; None when the driver, the GPU or pynvml cannot answer."""
    callee = getattr(pynvml, function, None)
    if callee is None:
        return None
    try:
        return callee(*arguments)
    except NVML_ERRORS as error:
        if getattr(error, "value", None) not in NO_FAILURES:
            _failures.setdefault(function, describe(error))
        return None


def _first_answer(*functions: str, arguments: tuple = ()) -> Any:
    """Return the first answer among functions that came one after another in NVML's history."""
    for function in functions:
        answer = _ask(function, *arguments)
        if answer is not None:
            return answer
    return None


def _open_or_none(selector: str | int | None) -> Gpu | None:
    try:
        return open_gpu(selector)
    except (GpuNotFoundError, GpuUnusableError):
        return None


def _handles() -> tuple[dict[int, Any], list[str]]:
    """Return the handles of all GPUs by index, and a sentence for each that is lost."""
    handles, lost = {}, []
    for index in range(_ask("nvmlDeviceGetCount") or 0):
        try:
            handles[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
        except NVML_ERRORS as error:
            lost.append(f"GPU {index} cannot be used: NVML says: {describe(error)}")
    return handles, lost


def _card(handle: Any) -> Card:
    capability = _ask("nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)
    memory = _ask("nvmlDeviceGetMemoryInfo", handle)
    mig_uuids = [_ask("nvmlDeviceGetUUID", one) for one in _mig_handles(handle)]
    return Card(
        uuid=_ask("nvmlDeviceGetUUID", handle) or "",
        name=_ask("nvmlDeviceGetName", handle) or "",
        mig_uuids=tuple(filter(None, mig_uuids)),
        speed=(*capability, 0 if memory is None else memory.total),
    )


def _mig_handles(card: Any) -> list[Any]:
    """Return the handles of a card's MIG instances; their indices have holes."""
    count = _ask("nvmlDeviceGetMaxMigDeviceCount", card) or 0
    handles = [_ask("nvmlDeviceGetMigDeviceHandleByIndex", card, index) for index in range(count)]
    return [handle for handle in handles if handle is not None]


def _describe_mig_device(handle: Any) -> dict[str, Any]:
    attributes = _ask("nvmlDeviceGetAttributes_v2", handle)
    return {
        "uuid": _ask("nvmlDeviceGetUUID", handle),
        "profile": _mig_profile(_ask("nvmlDeviceGetName", handle)),
        "gpu_instance_id": _ask("nvmlDeviceGetGpuInstanceId", handle),
        "multiprocessor_count": getattr(attributes, "multiprocessorCount", None),
        "memory_mib": getattr(attributes, "memorySizeMB", None),
    }


def _mig_profile(name: str | None) -> str | None:
    """Return "1g.10gb" for "NVIDIA H100 80GB HBM3 MIG 1g.10gb", as NVML calls an instance."""
    return (name or "").partition(" MIG ")[2] or None


def _cuda_version(number: int | None) -> str | None:
    """Return "13.0" for NVML's 13000."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _mebibytes(number: int | None) -> float | None:
    return None if number is None else round(number / MEBIBYTE, 1)


def _thousandth(value: int | None) -> float | None:
    """Return watts for milliwatts, joules for millijoules."""
    return None if value is None else value / 1000
