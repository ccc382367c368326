"""sparse_adam_step: one program per latent sums its gradient row in registers and applies it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from ._group_by_latent import _TILE, gradient_block, group_by_latent, tile_sums

# A program holds gradient, parameter and both moments of its part of a row in registers.
_WIDEST_ROW = 8192
# With unit_norm a wider row takes three passes over blocks of this many elements, each of which
# sums the gradient again: products with the parameter, norm of the result, store.
_WIDE_BLOCK = 4096
_WHOLE, _PRODUCTS, _NORM, _STORE = 0, 1, 2, 3


@triton.jit
def _sparse_adam_step_kernel(
    param_ptr,  # [F, D]
    exp_avg_ptr,  # [F, D] fp32
    exp_avg_sq_ptr,  # [F, D] fp32
    offsets_ptr,  # [F + 1]
    tokens_ptr,  # [P]
    values_ptr,  # [P]
    rows_ptr,  # [N, D]
    sums_ptr,  # [P // TILE, D]
    scratch_ptr,  # [F, 3, BLOCKS] fp32: param.param, grad.param, norm^2 of the result
    D,
    step_size,  # lr / (1 - beta1^t)
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    correction,  # 1 / sqrt(1 - beta2^t)
    eps,
    weight_decay,
    LAZY: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    PASS: tl.constexpr,  # 0: a block is a whole row or rows need no norm; 1, 2, 3: see above
    BLOCKS: tl.constexpr,  # of a row, a power of two
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    touched = end > begin
    if touched or not LAZY:
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = d < D
        at = latent * D + d
        grad = gradient_block(
            begin, end, tokens_ptr, values_ptr, rows_ptr, sums_ptr, d, in_row, D,
            BLOCK_P, BLOCK_D, TILE,
        )  # fmt: skip
        p = tl.load(param_ptr + at, mask=in_row, other=0.0).to(tl.float32)
        grad += weight_decay * p
        scratch = scratch_ptr + latent * (3 * BLOCKS)
        every = scratch + tl.arange(0, BLOCKS)
        if PASS == 1:
            tl.store(scratch + block, tl.sum(p * p))
            tl.store(scratch + BLOCKS + block, tl.sum(grad * p))
        else:
            if UNIT_NORM:
                if PASS == 0:
                    square = tl.sum(p * p)
                    along = tl.sum(grad * p)
                else:
                    square = tl.sum(tl.load(every))
                    along = tl.sum(tl.load(every + BLOCKS))
                along = tl.where(square > 0, along, 0.0) / tl.where(square > 0, square, 1.0)
                grad -= along * p
            m = tl.load(exp_avg_ptr + at, mask=in_row, other=0.0)
            v = tl.load(exp_avg_sq_ptr + at, mask=in_row, other=0.0)
            m += rest1 * (grad - m)
            v = v * beta2 + rest2 * grad * grad
            p -= step_size * m / (tl.sqrt(v) * correction + eps)
            p = tl.where(in_row, p, 0.0)  # 0 / 0 beyond the row when eps is 0
            if PASS == 2:
                tl.store(scratch + 2 * BLOCKS + block, tl.sum(p * p))
            else:
                if UNIT_NORM:
                    if PASS == 0:
                        norm = tl.sqrt(tl.sum(p * p))
                    else:
                        norm = tl.sqrt(tl.sum(tl.load(every + 2 * BLOCKS)))
                    p /= tl.where(norm > 0, norm, 1.0)
                tl.store(exp_avg_ptr + at, m, mask=in_row)
                tl.store(exp_avg_sq_ptr + at, v, mask=in_row)
                tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=in_row)


def _blocks(d: int, unit_norm: bool) -> tuple[dict[str, int], list[int]]:
    """Launch constants and the passes: 8 elements a thread up to 16 warps, then 16."""
    whole = triton.next_power_of_2(d)
    if whole <= _WIDEST_ROW:
        block, passes = whole, [_WHOLE]
    elif unit_norm:
        block, passes = _WIDE_BLOCK, [_PRODUCTS, _NORM, _STORE]
    else:
        block, passes = _WIDE_BLOCK, [_WHOLE]
    constants = dict(
        BLOCKS=triton.next_power_of_2(triton.cdiv(d, block)),
        BLOCK_D=block,
        BLOCK_P=2 if block > 4096 else 4,
        num_warps=min(16, max(1, block // 256)),
    )
    return constants, passes


def sparse_adam_step(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    lazy: bool,
    unit_norm: bool,
) -> None:
    """See `fastsae.ops.sparse_adam_step`. An index out of range touches no row.

    Differences from 1 and bias corrections are taken here, in fp64: 1 - 0.999 in fp32 is off by
    1e-5.
    """
    f, d = param.shape
    if param.numel() == 0:
        return
    constants, passes = _blocks(d, unit_norm)
    with on_device(param):
        groups = group_by_latent(values, indices, f)
        sums = tile_sums(groups, rows)
        wide = len(passes) > 1
        scratch = param.new_zeros(f, 3, constants["BLOCKS"], dtype=torch.float32) if wide else sums
        for this in passes:
            _sparse_adam_step_kernel[(f, triton.cdiv(d, constants["BLOCK_D"]))](
                param, exp_avg, exp_avg_sq,
                groups.offsets, groups.tokens, groups.values, rows, sums, scratch, d,
                lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5,
                eps, weight_decay,
                LAZY=lazy, UNIT_NORM=unit_norm, PASS=this, TILE=_TILE, **constants,
            )  # fmt: skip


def configurations() -> list[Configuration]:
    """Ordinary, widest and odd rows, each dtype; the passes of a row wider than that."""
    scalars = "step_size", "rest1", "beta2", "rest2", "correction", "eps", "weight_decay"
    shapes = [
        (4096, True, False), (8192, True, False), (769, True, True), (4096, False, True),
        (16384, True, False),
    ]  # fmt: skip
    result = []
    for pointer in POINTERS.values():
        for d, unit_norm, lazy in shapes:
            constants, passes = _blocks(d, unit_norm)
            warps = constants.pop("num_warps")
            signature = dict(
                param_ptr=pointer, exp_avg_ptr="*fp32", exp_avg_sq_ptr="*fp32",
                offsets_ptr="*i64", tokens_ptr="*i32", values_ptr=pointer, rows_ptr=pointer,
                sums_ptr="*fp32", scratch_ptr="*fp32",
                D="i32:16" if d % 16 == 0 else "i32", **dict.fromkeys(scalars, "fp32"),
            )  # fmt: skip
            for this in passes:
                all_constants = dict(constants, LAZY=lazy, UNIT_NORM=unit_norm, PASS=this)
                label = f"{pointer[1:]} D={d}" + " unit_norm" * unit_norm + " lazy" * lazy
                if this:
                    label += f" pass {this}"
                kernel, all_constants["TILE"] = _sparse_adam_step_kernel, _TILE
                result.append(
                    Configuration(kernel, label, signature, all_constants, num_warps=warps)
                )
    return result
