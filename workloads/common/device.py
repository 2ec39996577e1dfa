"""Which device a workload runs on, with which arithmetic and engine, and who it is there.

``open_device`` is where torch is first used, after the variables that CUDA reads at its start have
been set.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from workloads.common import console, torch
from workloads.common.errors import MIB, GpuUnavailableError, UsageError
from workloads.common.files import cache_folder

BF16_COMPUTE_CAPABILITY = (8, 0)
POLLING_SECONDS = 0.5e-3
# Left in a shell, each would make a result of another engine or precision than the one recorded.
MISLEADING_VARIABLES = (
    "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE",
)  # fmt: skip
RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "tokenizers", "numpy", "pillow", "flask", "gunicorn",
    "gevent", "aiohttp", "nvidia-ml-py", "triton",
)  # fmt: skip


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use.

    ``os.cpu_count()`` counts the machine; a container's quota and an affinity mask both lower what
    a client really gets.
    """
    return max(1, int(min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the cores that this process's control group, and each above it, may use at most.

    Version 2 has both numbers in one file, and version 1 in two, with a negative one for no limit.
    Inside a container the group's own path is often not to be seen, but its limits are at the top.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            names, mount = ["cpu.max"], root / "sys/fs/cgroup"
            if "cpu" in controllers.split(","):
                names, mount = ["cpu.cfs_quota_us", "cpu.cfs_period_us"], mount / "cpu"
            for folder in (PurePath(path.lstrip("/")), *PurePath(path.lstrip("/")).parents):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    words = [(mount / folder / name).read_text() for name in names]
                    quota, period = map(int, " ".join(words).split())
                    if quota > 0:
                        yield quota / period


def clients_on_gpu() -> int:
    """Return how many clients share the GPU, which the suite says in GPU_SHARING_CLIENTS."""
    clients = os.environ.get("GPU_SHARING_CLIENTS", "1")
    return max(1, int(clients)) if re.fullmatch("[0-9]{1,6}", clients) else 1


def package_versions() -> dict[str, str | None]:
    """Return versions by package name without importing the packages; None where missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def sharing_environment() -> dict[str, str]:
    """Return the variables of this process that choose a GPU or set its sharing mode."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("CUDA_VISIBLE_DEVICES", "CUDA_MPS_", "CUDA_DEVICE_ORDER"))
    }


@dataclass(frozen=True)
class ComputeDevice:
    """A device opened for one workload."""

    torch_device: torch.device  # `cuda:0` or `cpu`; CUDA_VISIBLE_DEVICES has made the choice
    precision: str  # `fp32`, `tf32` or `bf16`
    engine: str  # `eager`, `graph` or `compile`; always `eager` on the CPU

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that an inference model is cast to once (training uses ``autocast``)."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a training step's forward pass.

        The cache of casted weights is off: inside a CUDA graph it would hold tensors of the
        graph's private pool beyond the capture.
        """
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, torch.bfloat16, cache_enabled=False)

    def synchronize(self) -> None:
        """Wait until the device has finished everything that was launched.

        The wait polls for ``POLLING_SECONDS`` and then sleeps: other clients need the cores, but
        waking up costs about 0.12 ms (seen on an H100), a quarter of a small batch.
        """
        if self.is_cuda:
            done = torch.cuda.Event(blocking=True)
            done.record()
            polling_end_seconds = time.monotonic() + POLLING_SECONDS
            while not done.query() and time.monotonic() < polling_end_seconds:
                pass
            done.synchronize()
            # What other streams still do.
            torch.cuda.synchronize()

    def peak_memory_mib(self) -> float | None:
        """Return the most memory PyTorch has reserved on the GPU, in MiB; None on the CPU.

        The CUDA context and library workspaces outside PyTorch's allocator come on top: what
        nvidia-smi shows for the process is larger by several hundred MiB.
        """
        return torch.cuda.max_memory_reserved() / MIB if self.is_cuda else None

    def identity(self, batch_size: int | None = None) -> dict[str, Any]:
        """Return who this client is as CUDA sees it: the evidence a sharing mode is checked by."""
        identity: dict[str, Any] = {
            "pid": os.getpid(),
            "device": self.torch_device.type,
            "gpu_name": None,
            "gpu_uuid": None,
            "multiprocessor_count": None,
            "memory_total_mib": None,
            "sharing_environment": sharing_environment(),
            "host_threads": torch.get_num_threads(),
            "engine": self.engine,
            "precision": self.precision,
            "batch_size": batch_size,
            "versions": package_versions(),
        }
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.torch_device)
            # CUDA's may be bare; nvidia-smi's form is wanted.
            uuid = str(properties.uuid)
            if not uuid.startswith(("GPU-", "MIG-")):
                is_mig = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
                uuid = f"{'MIG' if is_mig else 'GPU'}-{uuid}"
            identity |= {
                "gpu_name": properties.name,
                "gpu_uuid": uuid,
                "multiprocessor_count": properties.multi_processor_count,
                "memory_total_mib": properties.total_memory // MIB,
            }
            cudnn = torch.backends.cudnn.version()
            identity["versions"] |= {"cuda": torch.version.cuda, "cudnn": cudnn}
        return identity


def open_device(args: argparse.Namespace) -> ComputeDevice:
    """Choose device, precision and engine as the shared flags say, and prepare PyTorch for them.

    Raises:
        GpuUnavailableError: A GPU was asked for or is in the machine, but PyTorch cannot use it.
        UsageError: The device does not offer the precision asked for.
    """
    for name in MISLEADING_VARIABLES:
        value = os.environ.pop(name, None)
        if value is not None:
            console.note(f"{name}={value} would change what is measured: it is not used")
    if args.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu
    # nvidia-smi and NVML count GPUs in PCI order; CUDA by default counts the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # Idle OpenMP threads spin and steal cores from the other clients: measured 158 s instead of
    # 80 s for four clients on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if args.device != "cpu":
        _create_context_meanwhile()
    if args.engine == "compile":
        _protect_compiler()
    # Who names a GPU wants one.
    use_cuda = args.device == "cuda" or (
        args.device == "auto" and (args.gpu is not None or _gpu_expected())
    )
    if use_cuda and not torch.cuda.is_available():
        raise GpuUnavailableError(_why_no_gpu())
    device = torch.device("cuda:0" if use_cuda else "cpu")
    precision = _resolve_precision(args.precision, device)
    # fp32 means fp32: PyTorch leaves TF32 on in cuDNN by default.
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    # cuDNN chooses its kernels by heuristics, not by timing them: next to a neighbor the timing may
    # choose others. Nothing is lost by it: an epoch of ResNet50 took 4.43 s on an H100 instead of
    # 4.47 s, and warm-up 1.7 s instead of over 10 s.
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(args.seed)
    if not use_cuda and args.engine in ("graph", "compile"):
        console.note(
            f"--engine {args.engine} needs a GPU: this run on the CPU uses the eager engine"
        )
    return ComputeDevice(device, precision, args.engine or "graph" if use_cuda else "eager")


def _create_context_meanwhile() -> None:
    """Let the driver create this process's context on its GPU while Python imports.

    It is the primary context, which PyTorch then finds. Whatever fails here PyTorch says better.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return

    def create() -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    threading.Thread(target=create, name="cuda-context", daemon=True).start()


def _protect_compiler() -> None:
    """Keep what torch.compile makes, and later executes, where nobody else may write.

    By default it goes to ``torchinductor_<user>`` in the temporary folder, which anybody can make
    beforehand. Its compiling processes must not import from the working folder either.

    Raises:
        UsageError: The folder that the environment names belongs to, or is open to, others.
    """
    for variable, name in (
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"),
    ):  # fmt: skip
        folder = Path(os.environ.get(variable) or cache_folder() / name)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            above = folder.parent.stat()
        except OSError as error:
            raise UsageError(
                f"cannot make {folder} ({error.strerror}); set {variable} to a folder of your own"
            ) from error
        is_open = not stat.S_ISDIR(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        # Whoever owns the folder above, or may write there, may put another in this one's place.
        is_open = is_open or above.st_uid not in (0, os.geteuid())
        is_open = is_open or above.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH
        if is_open or status.st_uid != os.geteuid():
            raise UsageError(
                f"{folder}, or what it lies in, is not yours alone, and compiled code is run from "
                f"there; set {variable} to a folder of your own (chmod 700) in one of your own"
            )
        os.environ[variable] = str(folder)
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.version_info < (3, 11):
        # Compiling in this process, since the others would import from the working folder.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _gpu_expected() -> bool:
    """Whether there is a GPU to use: one PyTorch sees, or one only the driver sees (an error)."""
    if torch.cuda.is_available():
        return True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA reads the list up to the first entry that names no device.
    if visible is not None and not re.match(r"\s*([0-9]|GPU-|MIG-)", visible):
        console.note(f"CUDA_VISIBLE_DEVICES={visible} hides every GPU: this run uses the CPU")
        return False
    return driver_listing() is not None


def driver_listing() -> str | None:
    """Return the first row of ``nvidia-smi`` (name, driver version), None where there is none.

    It ends with 14 where a GPU's infoROM is damaged, and says on the same stream what fails.
    """
    try:
        answer = subprocess.run(
            ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
            capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    row = re.search(r"^.+, \d+\.[\d.]+$", answer.stdout, re.MULTILINE)
    return row[0] if row else None


def _why_no_gpu() -> str:
    listing = driver_listing()
    if listing is None:
        return (
            "no NVIDIA driver answers (nvidia-smi fails or is missing); "
            "install the driver, or use --device cpu and leave --gpu out"
        )
    seen = f"the driver sees {listing}, but PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        fix = "reinstall it with 'pip install --force-reinstall torch'"
        return f"{seen} was built without CUDA; {fix}"
    return (
        f"{seen} for CUDA {torch.version.cuda} cannot use it; it needs a driver that "
        "shows at least this CUDA version in nvidia-smi's first line, so update the driver or "
        "install a PyTorch build for an older CUDA (and check CUDA_VISIBLE_DEVICES or --gpu)"
    )


def _resolve_precision(asked: str | None, device: torch.device) -> str:
    if device.type == "cpu":
        if asked == "tf32":
            raise UsageError("--precision tf32 needs a GPU; use --precision fp32 on the CPU")
        return asked or "fp32"
    capability = torch.cuda.get_device_capability(device)
    if capability >= BF16_COMPUTE_CAPABILITY:
        return asked or "bf16"
    if asked in ("tf32", "bf16"):
        raise UsageError(
            f"--precision {asked} needs compute capability 8.0 and this GPU has "
            f"{capability[0]}.{capability[1]}; use --precision fp32"
        )
    return "fp32"
