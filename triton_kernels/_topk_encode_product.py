"""Scores of a block of latents: torch's library product where it sums in fp32, else a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS
from ._configuration import Configuration


@dataclass(frozen=True)
class ProductConfig:
    """Tile of the product kernel."""

    block_n: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int


# fp32 runs on the FMA units: 32 accumulators a thread. Low precision (used where the library has
# no fp32 result) fits gfx942's 64 KB of shared memory.
_FP32 = ProductConfig(128, 64, 16, 8, 3)
_LOW = ProductConfig(128, 128, 32, 8, 3)


@triton.jit
def _product_kernel(
    x_ptr,  # [R, D]
    W_ptr,  # [C, D]
    scores_ptr,  # [R, C] fp32, row stride `stride`
    only_ptr,  # [R] int32 or None: blocks of rows where all are 0 are left out
    R,
    C,
    D,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    x_row = x_ptr + row.to(tl.int64)[:, None] * D
    W_row = W_ptr + column.to(tl.int64)[None, :] * D
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    depth = D
    if only_ptr is not None:  # noqa: SIM102 - the first is decided by the compiler
        if tl.max(tl.load(only_ptr + row, mask=row < R, other=0)) == 0:
            depth, R = 0, 0
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row + d[None, :], mask=(row[:, None] < R) & (d[None, :] < D), other=0.0)
        w = tl.load(W_row + d[:, None], mask=(column[None, :] < C) & (d[:, None] < D), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    at = scores_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, acc, mask=(row[:, None] < R) & (column[None, :] < C))


def has_library_product(x: torch.Tensor) -> bool:
    """Whether torch.mm takes these inputs to an fp32 result, independent of global settings.

    fp32 inputs do not: torch.backends.cuda.matmul may make them tf32.
    """
    return x.is_cuda and x.dtype != torch.float32 and torch.version.hip is None


def product(
    x: torch.Tensor,
    W: torch.Tensor,
    scores: torch.Tensor,
    only: torch.Tensor | None = None,
    **config: Any,
) -> None:
    """scores [R, C] = x [R, D] W [C, D]^T, summed in fp32.

    only: [R] int32; the scores of rows where it is 0 need not be written.
    """
    if has_library_product(x) and only is None and not config:
        torch.mm(x, W.T, out_dtype=torch.float32, out=scores)
        return
    (rows, d), columns = x.shape, W.shape[0]
    tile = ProductConfig(**config) if config else (_FP32 if x.dtype == torch.float32 else _LOW)
    grid = (triton.cdiv(rows, tile.block_n), triton.cdiv(columns, tile.block_f))
    _product_kernel[grid](
        x, W, scores, only, rows, columns, d, scores.stride(0),
        BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def configurations() -> list[Configuration]:
    """Each dtype, with rows on 16 bytes and without."""
    result = []
    for dtype, pointer in POINTERS.items():
        tile = _FP32 if dtype == torch.float32 else _LOW
        for d in ("i32:16", "i32"):
            signature = dict(
                x_ptr=pointer, W_ptr=pointer, scores_ptr="*fp32", R="i32", C="i32", D=d,
                stride="i32:16",
            )  # fmt: skip
            constants = dict(BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d)
            if dtype != torch.float16:
                constants["only_ptr"] = None
            else:
                signature["only_ptr"] = "*i32"
            result.append(
                Configuration(
                    _product_kernel,
                    pointer[1:] + (" odd D" if d == "i32" else ""),
                    signature,
                    constants,
                    tile.num_warps,
                    tile.num_stages,
                    tensor_cores=dtype != torch.float32,
                )
            )
    return result
