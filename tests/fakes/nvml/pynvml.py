"""NVML with a scripted card: the real pynvml, but for the library that it calls.

Where this file comes before the real package on the path, that package's code and ctypes structures
are used as they are; the functions of libnvidia-ml.so.1 are those below. They read the file
named by NVML_STUB_STATE at each call, whose keys are listed in tests/nvml_stub.py; a function that
needs a key that is missing answers NVML_ERROR_NOT_SUPPORTED, as a GPU without that sensor does.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE = 2, 3, 4, 6, 7
FUNCTION_NOT_FOUND, GPU_IS_LOST, VERSION_MISMATCH = 13, 15, 25
MAX_MIG_DEVICES, MEBIBYTE, UNKNOWN_ID = 7, 2**20, 0xFFFFFFFF
GPM_KEYS = {1: "gpm_graphics_util", 2: "gpm_sm_util", 3: "gpm_sm_occupancy",
            5: "gpm_any_tensor_util", 10: "gpm_dram_bw_util"}  # fmt: skip
# Functions that this library lacks, as that of an old driver does.
LACKS = Path(__file__).with_name("lacks")

card: dict[str, Any] = {}
# Of each GPM sample: the GPU instance, None for a whole GPU, and when it was taken.
gpm_samples: list[tuple[int | None, float] | None] = []


class Refused(Exception):
    """Ends a function with an nvmlReturn_t."""


class Device(NamedTuple):
    """What a handle stands for; no position: a whole GPU."""

    gpu: int
    position: int | None = None


def load_real() -> Any:
    """Import the package that this file hides, with the functions below as its library."""
    own = Path(__file__).resolve()
    others = [entry for entry in sys.path if Path(entry, own.name).resolve() != own]
    spec = importlib.machinery.PathFinder.find_spec("pynvml", others)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pynvml"] = module
    spec.loader.exec_module(module)
    module._LoadNvmlLibrary = lambda: None
    module._nvmlGetFunctionPointer = find_function
    return module


def find_function(name: str) -> Callable[..., int]:
    """What the library has under a name."""
    function = FUNCTIONS.get(name)
    if function is None or (LACKS.exists() and name in LACKS.read_text().split()):
        raise real.NVMLError(FUNCTION_NOT_FOUND)

    def call(*arguments: Any) -> int:
        path = Path(os.environ["NVML_STUB_STATE"])
        card.clear()
        card.update(json.loads(path.read_text()) if path.exists() else {"count": 0})
        failure = card.get("fail", {}).get(name)
        try:
            return failure or function(*arguments) or 0
        except Refused as refused:
            return refused.args[0]

    return call


# --- handles and the script -----------------------------------------------------------------------


def number_of(pointer: Any) -> int:
    """What `point` made a handle hold."""
    return ctypes.cast(pointer, ctypes.c_void_p).value


def point(reference: Any, number: int) -> None:
    """Let an opaque pointer that was handed over by reference hold a number."""
    ctypes.c_void_p.from_buffer(reference._obj).value = number


def hand_out(reference: Any, device: Device) -> None:
    position = 0 if device.position is None else device.position + 1
    point(reference, 1 + device.gpu * (MAX_MIG_DEVICES + 1) + position)


def device_of(handle: Any) -> Device:
    gpu, position = divmod(number_of(handle) - 1, MAX_MIG_DEVICES + 1)
    return Device(gpu, position - 1 if position else None)


def value_of(gpu: int, key: str, default: Any = None) -> Any:
    return card.get(f"{key}_{gpu}", card.get(key, default))


def need(gpu: int, key: str) -> Any:
    value = value_of(gpu, key)
    if value is None:
        raise Refused(NOT_SUPPORTED)
    return value


def instance_of(device: Device, refusal: int = NOT_SUPPORTED) -> list:
    """UUID, GPU instance, multiprocessors, MiB, used MiB, and the profile, which may be missing."""
    listed = value_of(device.gpu, "mig_devices", []) if is_sliced(device.gpu) else []
    if device.position is None or device.position >= len(listed) or not listed[device.position]:
        raise Refused(refusal)
    return [*listed[device.position], ""]


def is_sliced(gpu: int) -> bool:
    return value_of(gpu, "mig_mode_current") == 1


def of_whole_gpu(device: Device, key: str) -> Any:
    """A value of a GPU; its instances have no sensors."""
    if device.position is not None:
        raise Refused(NOT_SUPPORTED)
    return need(device.gpu, key)


def out(compute: Callable[[Device], Any], field: str = "value") -> Callable[..., None]:
    """A function whose last argument gets one number, in this field of what it refers to."""

    def fill(handle: Any, *others: Any) -> None:
        setattr(others[-1]._obj, field, compute(device_of(handle)))

    return fill


def sensor(key: str, factor: float = 1, field: str = "value") -> Callable[..., None]:
    return out(lambda device: round(of_whole_gpu(device, key) * factor), field)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# --- devices --------------------------------------------------------------------------------------


def get_handle_by_index(index: Any, reference: Any) -> None:
    if index.value >= card["count"]:
        raise Refused(INVALID_ARGUMENT)
    if value_of(index.value, "lost"):
        raise Refused(GPU_IS_LOST)
    hand_out(reference, Device(index.value))


def get_handle_by_uuid(uuid: Any, reference: Any) -> None:
    for gpu in range(card["count"]):
        listed = [one and one[0] for one in value_of(gpu, "mig_devices", [])]
        uuids = {need(gpu, "uuid"): None, **{one: at for at, one in enumerate(listed)}}
        if uuid.value.decode() in uuids:
            return hand_out(reference, Device(gpu, uuids[uuid.value.decode()]))
    raise Refused(NOT_FOUND)


def get_uuid(handle: Any, text: Any, size: Any) -> None:
    device = device_of(handle)
    whole = device.position is None
    text.value = encoded(need(device.gpu, "uuid") if whole else instance_of(device)[0])


def get_name(handle: Any, text: Any, size: Any) -> None:
    device = device_of(handle)
    profile = instance_of(device)[5] if device.position is not None else ""
    text.value = encoded(need(device.gpu, "name") + (f" MIG {profile}" if profile else ""))


def get_compute_capability(handle: Any, *numbers: Any) -> None:
    words = need(device_of(handle).gpu, "compute_capability").split(".")
    for number, word in zip(numbers, words, strict=True):
        number._obj.value = int(word)


def get_memory(handle: Any, reference: Any) -> None:
    memory, device = reference._obj, device_of(handle)
    reserved = 0
    if device.position is None:
        total, used = (need(device.gpu, f"memory_{name}_mib") for name in ("total", "used"))
        reserved = value_of(device.gpu, "memory_reserved_mib", 0)
    else:
        total, used = instance_of(device)[3:5]
    if hasattr(memory, "version"):
        if memory.version != 0x02000028:
            raise Refused(VERSION_MISMATCH)
        memory.reserved = reserved * MEBIBYTE
    else:  # version 1 counts what the driver reserves as used
        used += reserved
    memory.total, memory.used = total * MEBIBYTE, used * MEBIBYTE
    memory.free = memory.total - memory.used


def utilization_of(device: Device) -> int:
    if is_sliced(device.gpu):
        raise Refused(NOT_SUPPORTED)
    return of_whole_gpu(device, "utilization_gpu_percent")


def millijoules_of(device: Device) -> int:
    joules = of_whole_gpu(device, "energy_joules")
    if joules == "clock":
        joules = of_whole_gpu(device, "power_draw_watts") * time.monotonic()
    return round(joules * 1000)


def reasons_of(device: Device) -> int:
    return int(of_whole_gpu(device, "clocks_event_reasons"), 0)


class LargerEntry(ctypes.Structure):
    """An entry of the process lists, version 3, of drivers 535.43 to 535.86."""

    _fields_ = (
        ("pid", ctypes.c_uint), ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint), ("computeInstanceId", ctypes.c_uint),
        ("usedGpuCcProtectedMemory", ctypes.c_ulonglong),
    )  # fmt: skip


def list_processes(key: str, version: str) -> Callable[..., None]:
    def fill(handle: Any, count: Any, processes: Any) -> None:
        device = device_of(handle)
        if is_sliced(device.gpu) and device.position is None:
            raise Refused(NO_PERMISSION)  # as nvml.h says, to all but root
        only = None if device.position is None else instance_of(device)[1]
        found = []
        for pid, memory in need(device.gpu, key).items():
            used, instance = memory if isinstance(memory, list) else (memory, UNKNOWN_ID)
            if only in (None, instance):
                found.append((int(pid), used, instance))
        room, count._obj.value = count._obj.value, len(found)
        if len(found) > room:
            raise Refused(INSUFFICIENT_SIZE)
        is_larger = version == "v3" and value_of(device.gpu, "larger_process_entries", 0)
        entries = (LargerEntry * len(found))() if is_larger else processes or []
        for process, (pid, used, instance) in zip(entries, found, strict=False):
            process.pid, process.gpuInstanceId = pid, instance
            process.usedGpuMemory = 2**64 - 1 if used is None else int(used * MEBIBYTE)
        if is_larger and processes:
            ctypes.memmove(processes, entries, ctypes.sizeof(entries))

    return fill


# --- MIG and GPM ----------------------------------------------------------------------------------


def get_mig_mode(handle: Any, current: Any, pending: Any) -> None:
    device = device_of(handle)
    current._obj.value = of_whole_gpu(device, "mig_mode_current")
    pending._obj.value = value_of(device.gpu, "mig_mode_pending", current._obj.value)


def get_mig_device(handle: Any, index: Any, reference: Any) -> None:
    device = Device(device_of(handle).gpu, index.value)
    instance_of(device, NOT_FOUND)
    hand_out(reference, device)


def get_card_of_mig_device(handle: Any, reference: Any) -> None:
    device = device_of(handle)
    instance_of(device, INVALID_ARGUMENT)
    hand_out(reference, Device(device.gpu))


def get_attributes(handle: Any, reference: Any) -> None:
    instance = instance_of(device_of(handle), INVALID_ARGUMENT)
    reference._obj.multiprocessorCount, reference._obj.memorySizeMB = instance[2:4]


def allocate_gpm_sample(reference: Any) -> None:
    gpm_samples.append(None)
    point(reference, len(gpm_samples))


def take_gpm_sample(handle: Any, sample: Any, instance: int | None = None) -> None:
    gpu = device_of(handle).gpu
    listed = [one[1] for one in value_of(gpu, "mig_devices", []) if one] if is_sliced(gpu) else []
    if not value_of(gpu, "gpm") or (instance not in listed if instance is not None else listed):
        raise Refused(NOT_SUPPORTED)
    gpm_samples[number_of(sample) - 1] = (instance, time.monotonic())


def take_gpm_sample_of_instance(handle: Any, instance: Any, sample: Any) -> None:
    take_gpm_sample(handle, sample, getattr(instance, "value", instance))


def compare_gpm_samples(reference: Any) -> None:
    request = reference._obj
    pair = [gpm_samples[number_of(sample) - 1] for sample in (request.sample1, request.sample2)]
    if request.version != 1 or None in pair or pair[0][0] != pair[1][0] or pair[0][1] >= pair[1][1]:
        raise Refused(INVALID_ARGUMENT)
    for metric in request.metrics[: request.numMetrics]:
        key = GPM_KEYS[metric.metricId]
        value = card.get(f"{key}_gi{pair[0][0]}", card.get(key))
        metric.nvmlReturn = NOT_SUPPORTED if value is None else 0
        metric.value = 0 if value is None else float(value)


def put(key: str) -> Callable[..., None]:
    """A function that tells one thing of the machine, a text or a number."""

    def tell(target: Any, *size: Any) -> None:
        if size:
            target.value = encoded(need(0, key))
        else:
            target._obj.value = need(0, key)

    return tell


FUNCTIONS: dict[str, Callable[..., None]] = {
    "nvmlInitWithFlags": lambda flags: None,
    "nvmlShutdown": lambda: None,
    "nvmlSystemGetDriverVersion": put("driver_version"),
    "nvmlSystemGetCudaDriverVersion": put("cuda_driver_version"),
    "nvmlSystemGetCudaDriverVersion_v2": put("cuda_driver_version"),
    "nvmlDeviceGetCount_v2": put("count"),
    "nvmlDeviceGetHandleByIndex_v2": get_handle_by_index,
    "nvmlDeviceGetHandleByUUID": get_handle_by_uuid,
    "nvmlDeviceGetIndex": out(lambda device: device.gpu),
    "nvmlDeviceGetUUID": get_uuid,
    "nvmlDeviceGetName": get_name,
    "nvmlDeviceGetComputeMode": sensor("compute_mode"),
    "nvmlDeviceGetCudaComputeCapability": get_compute_capability,
    "nvmlDeviceGetMemoryInfo": get_memory,
    "nvmlDeviceGetMemoryInfo_v2": get_memory,
    "nvmlDeviceGetUtilizationRates": out(utilization_of, "gpu"),
    "nvmlDeviceGetClockInfo": sensor("sm_clock_mhz"),
    "nvmlDeviceGetPowerUsage": sensor("power_draw_watts", 1000),
    "nvmlDeviceGetTotalEnergyConsumption": out(millijoules_of),
    "nvmlDeviceGetTemperatureV": sensor("temperature_celsius", field="temperature"),
    "nvmlDeviceGetTemperature": sensor("temperature_celsius"),
    "nvmlDeviceGetCurrentClocksEventReasons": out(reasons_of),
    "nvmlDeviceGetCurrentClocksThrottleReasons": out(reasons_of),
    "nvmlDeviceGetMigMode": get_mig_mode,
    "nvmlDeviceIsMigDeviceHandle": out(lambda device: device.position is not None),
    "nvmlDeviceGetMaxMigDeviceCount": out(
        lambda device: MAX_MIG_DEVICES if is_sliced(device.gpu) else 0
    ),
    "nvmlDeviceGetMigDeviceHandleByIndex": get_mig_device,
    "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": get_card_of_mig_device,
    "nvmlDeviceGetGpuInstanceId": out(lambda device: instance_of(device, NOT_FOUND)[1]),
    "nvmlDeviceGetAttributes_v2": get_attributes,
    "nvmlGpmQueryDeviceSupport": out(
        lambda device: value_of(device.gpu, "gpm", 0), "isSupportedDevice"
    ),
    "nvmlGpmSampleAlloc": allocate_gpm_sample,
    "nvmlGpmSampleGet": take_gpm_sample,
    "nvmlGpmMigSampleGet": take_gpm_sample_of_instance,
    "nvmlGpmMetricsGet": compare_gpm_samples,
    **{
        f"nvmlDeviceGet{kind}RunningProcesses_{version}": list_processes(key, version)
        for kind, key in (("Compute", "pids"), ("MPSCompute", "mps_pids"))
        for version in ("v2", "v3")
    },
}
real = load_real()
