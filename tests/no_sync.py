"""Finds operations that a CUDA graph capture forbids, on a machine without a GPU.

A captured step must never make the host read a tensor. On the CPU such reads pass unnoticed;
under ``forbid_host_reads`` they raise, since they go through these operators on every device.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
)


class forbid_host_reads(TorchDispatchMode):
    """Raise ``AssertionError`` where the host reads a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in HOST_READS, f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))
