"""A kernel that writes outside of every allocation (see fault_client.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Far past what any card has; aligned, so that the address and not the alignment is what is wrong.
FAR_ELEMENTS = 2**44


@triton.jit
def _store(pointer: tl.tensor, offset: tl.tensor) -> None:
    tl.store(pointer + offset, 1.0)


def store_outside(matrix: torch.Tensor) -> None:
    """Launch one store of a float far behind ``matrix`` (fp32, on the GPU)."""
    _store[(1,)](matrix, FAR_ELEMENTS)
