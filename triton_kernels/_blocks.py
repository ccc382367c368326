"""Block sizes that several kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# Pointer types as Triton names them, for `configurations()`.
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def row_block(d: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_D and num_warps for kernels whose threads each hold 16 bytes of a row.

    At most 4 KB of a row per program (8 warps), and as little of the last block masked as possible:
    768 takes three blocks of 256, not one of 1024.
    """
    vector = 16 // itemsize
    sizes = [32 * vector * warps for warps in (8, 4, 2, 1)]
    block = min(sizes, key=lambda size: (-(-d // size) * size, -size))
    return block, block // (32 * vector)


def on_device(tensor: torch.Tensor) -> Any:
    """Launches inside go to the tensor's GPU, which need not be the current one."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
