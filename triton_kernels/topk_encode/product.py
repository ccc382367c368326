"""Scores of a block of latents, summed in fp32 in one order.

No library product: its kernel, and so the order of its sums, follows from the number of tokens, and
torch's settings (tf32, reductions and accumulation in fp16 or bf16, the preferred library) change
what it computes. Here one tile serves a dtype and device, and an element's sum runs over D in the
same order wherever in a tile it lies: a token's scores do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._blocks import POINTERS
from .._configuration import Configuration


@dataclass(frozen=True)
class ProductConfig:
    """Tile of the product kernel."""

    block_n: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int

    def sizes(self) -> dict[str, int]:
        return dict(BLOCK_N=self.block_n, BLOCK_F=self.block_f, BLOCK_D=self.block_d)


# fp32 runs on the FMA units: 32 accumulators a thread. A step takes some 1000 cycles: one more in
# flight hides memory. With two more Triton 3.6 spills 8 bytes where D is odd. Low precision by
# pointers fits gfx942's 64 KB of shared memory; by TMA it is the tile of the fused design, which
# scores the same pairs.
FP32 = ProductConfig(128, 64, 16, 8, 2)
LOW = ProductConfig(128, 128, 32, 8, 3)
TMA = ProductConfig(128, 256, 64, 8, 3)
# From tensor memory to the store sm_100 has registers for half of it.
TMA_SM100 = ProductConfig(128, 128, 64, 8, 3)


@triton.jit
def tile_scores(
    x, W, first_row, first, D,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_F] fp32 of descriptors x [R, D] and W [F, D]."""
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for d in range(0, D, BLOCK_D):
        acc = tl.dot(x.load([first_row, d]), W.load([first, d]).T, acc)
    return acc


@triton.jit(do_not_specialize=["first"])
def _product_kernel(
    x,  # [R, D], a descriptor with TMA, else a pointer
    W,  # a descriptor of [F, D], else a pointer to row `first` of it
    scores_ptr,  # [R, C] fp32, row stride `stride`
    only_ptr,  # [R] int32 or None: blocks of rows where all are 0 are left out
    R,
    C,
    D,
    stride,
    first,  # row of W that column 0 belongs to
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    # latents in the grid's first dimension, which alone may exceed 65,535
    first_column, first_row = tl.program_id(0) * BLOCK_F, tl.program_id(1) * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_F)
    if only_ptr is not None:  # noqa: SIM102 - the first is decided by the compiler
        if tl.max(tl.load(only_ptr + row, mask=row < R, other=0)) == 0:
            return
    if TMA:
        acc = tile_scores(x, W, first_row, first + first_column, D, BLOCK_N, BLOCK_F, BLOCK_D)
    else:
        x_row = x + row.to(tl.int64)[:, None] * D
        W_row = W + column.to(tl.int64)[None, :] * D
        acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            v = tl.load(x_row + d[None, :], mask=(row[:, None] < R) & (d[None, :] < D), other=0.0)
            w = tl.load(
                W_row + d[:, None], mask=(column[None, :] < C) & (d[:, None] < D), other=0.0
            )
            acc = tl.dot(v, w, acc, input_precision="ieee")
    at = scores_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, acc, mask=(row[:, None] < R) & (column[None, :] < C))


def has_tma(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether tiles of rows of D come by TMA: nothing but width, dtype, device and where W lies."""
    if x.dtype == torch.float32 or W.shape[1] % 8 or W.data_ptr() % 16:
        return False
    if not x.is_cuda:
        return True  # interpreted
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


class Product:
    """x [R, D] W [F, D]^T, some latents at a time."""

    def __init__(self, x: torch.Tensor, W: torch.Tensor):
        self.rows, self.d = x.shape
        tma = has_tma(x, W)
        self.tile = FP32 if x.dtype == torch.float32 else LOW
        if tma:
            sm100 = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (10, 0)
            self.tile = TMA_SM100 if sm100 else TMA
        self.constants = dict(
            self.tile.sizes(), TMA=tma,
            num_warps=self.tile.num_warps, num_stages=self.tile.num_stages,
        )  # fmt: skip
        self.x: torch.Tensor | TensorDescriptor = x
        self.W: torch.Tensor | TensorDescriptor = W
        if tma:
            self.x = TensorDescriptor.from_tensor(x, [self.tile.block_n, self.tile.block_d])
            self.W = TensorDescriptor.from_tensor(W, [self.tile.block_f, self.tile.block_d])

    def __call__(
        self, scores: torch.Tensor, first: int = 0, only: torch.Tensor | None = None
    ) -> None:
        """scores [R, C] of latents first to first + C.

        only: [R] int32; the scores of rows where it is 0 need not be written.
        """
        columns = scores.shape[1]
        grid = triton.cdiv(columns, self.tile.block_f), triton.cdiv(self.rows, self.tile.block_n)
        W = self.W[first:] if isinstance(self.W, torch.Tensor) else self.W
        _product_kernel[grid](
            self.x, W, scores, only, self.rows, columns, self.d, scores.stride(0), first,
            **self.constants,
        )  # fmt: skip


def configurations() -> list[Configuration]:
    """Each dtype, with rows on 16 bytes and without; by TMA where it is, all rows and some."""
    result = []
    shared = dict(scores_ptr="*fp32", R="i32", C="i32:16", stride="i32:16", first="i32")
    for dtype, pointer in POINTERS.items():
        tile = FP32 if dtype == torch.float32 else LOW
        for d in ("i32:16", "i32"):
            signature = dict(shared, x=pointer, W=pointer, D=d)
            constants = dict(tile.sizes(), TMA=False)
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
        if dtype == torch.float32:
            continue
        for tile, target, only in (
            (TMA, "sm_90", None), (TMA, "sm_90", "*i32"), (TMA_SM100, "sm_100", "*i32"),
        ):  # fmt: skip
            signature = dict(
                shared, D="i32:16", x=f"tensordesc<{pointer[1:]}[{tile.block_n},{tile.block_d}]>",
                W=f"tensordesc<{pointer[1:]}[{tile.block_f},{tile.block_d}]>",
            )  # fmt: skip
            constants = dict(tile.sizes(), TMA=True)
            if only is None:
                constants["only_ptr"] = None
            else:
                signature["only_ptr"] = only
            result.append(
                Configuration(
                    _product_kernel, pointer[1:] + " TMA" + " some rows" * (only is not None),
                    signature, constants, tile.num_warps, tile.num_stages,
                    tensor_cores=True, tma=True, targets=(target,),
                )
            )  # fmt: skip
    return result
