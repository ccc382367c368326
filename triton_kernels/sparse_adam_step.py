"""sparse_adam_step: one program per latent sums its gradient row in registers and applies it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from ._group_by_latent import _TILE, gradient_block, group_by_latent, tile_sums
from ._moments import BLOCK, load_moments, store_moments

# A program holds gradient, parameter and both moments of its part of a row in registers.
_WIDEST_ROW = 8192
# With unit_norm a wider row takes three passes over blocks of this many elements, each of which
# sums the gradient again: products with the parameter, norm of the result, store.
_WIDE_BLOCK = 4096
_WHOLE, _PRODUCTS, _NORM, _STORE = 0, 1, 2, 3


@triton.jit(do_not_specialize=["step"])  # not compiled again for steps 1 and 16
def _sparse_adam_step_kernel(
    param_ptr,  # [F, D]
    master_ptr,  # [F, D] fp32, the weights that param is a rounded copy of; param without them
    exp_avg_ptr,  # [F, D] fp32, or bits of bf16 as int16, or int8 codes
    exp_avg_sq_ptr,  # [F, D] fp32, or bits of bf16 as int16, or uint8 codes
    mean_scale_ptr,  # [F, ceil(D / 128)] fp32, of codes
    root_scale_ptr,
    schedule_ptr,  # [3] fp64: step_size, correction, step; read where ON_DEVICE
    offsets_ptr,  # [F + 1]
    tokens_ptr,  # [P]
    values_ptr,  # [P]
    rows_ptr,  # [N, D]
    sums_ptr,  # [P // TILE, D]
    scratch_ptr,  # [F, 3, BLOCKS] fp32: param.param, grad.param, norm^2 of the result
    D,
    step,
    step_size,  # lr / (1 - beta1^t)
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    correction,  # 1 / sqrt(1 - beta2^t)
    eps,
    weight_decay,
    ON_DEVICE: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENTS: tl.constexpr,  # bits of a stored moment
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
        if MASTER:
            p = tl.load(master_ptr + at, mask=in_row, other=0.0)
        else:
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
            m, v = load_moments(
                exp_avg_ptr, exp_avg_sq_ptr, mean_scale_ptr, root_scale_ptr, latent, d, in_row, D,
                MOMENTS,
            )  # fmt: skip
            if ON_DEVICE:
                step_size = tl.load(schedule_ptr).to(tl.float32)
                correction = tl.load(schedule_ptr + 1).to(tl.float32)
                step = tl.load(schedule_ptr + 2).to(tl.int32)
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
                if MASTER:
                    tl.store(master_ptr + at, p, mask=in_row)
                tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=in_row)
                store_moments(
                    exp_avg_ptr, exp_avg_sq_ptr, mean_scale_ptr, root_scale_ptr, latent, d, in_row,
                    D, m, v, step, MOMENTS, BLOCK_D,
                )  # fmt: skip


def _blocks(d: int, unit_norm: bool, moments: int) -> tuple[dict[str, int], list[int]]:
    """Launch constants and the passes: 8 elements a thread up to 16 warps, then 16."""
    whole = triton.next_power_of_2(d)
    if moments == 8:
        whole = max(whole, BLOCK.value)
    if whole <= _WIDEST_ROW:
        block, passes = whole, [_WHOLE]
    elif unit_norm:
        block, passes = _WIDE_BLOCK, [_PRODUCTS, _NORM, _STORE]
    else:
        block, passes = _WIDE_BLOCK, [_WHOLE]
    constants = dict(
        BLOCKS=triton.next_power_of_2(triton.cdiv(d, block)),
        BLOCK_D=block,
        BLOCK_P=2 if block > 4096 or moments == 8 else 4,
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
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    master: torch.Tensor | None,
    schedule: torch.Tensor | None,
) -> None:
    """See `fastsae.ops.sparse_adam_step`. An index out of range touches no row.

    Differences from 1 and bias corrections are taken here, in fp64: 1 - 0.999 in fp32 is off by
    1e-5.
    """
    f, d = param.shape
    if param.numel() == 0:
        return
    bits = exp_avg.element_size() * 8
    if bits == 16:
        exp_avg, exp_avg_sq = exp_avg.view(torch.int16), exp_avg_sq.view(torch.int16)
    constants, passes = _blocks(d, unit_norm, bits)
    with on_device(param):
        groups = group_by_latent(values, indices, f)
        sums = tile_sums(groups, rows)
        wide = len(passes) > 1
        scratch = param.new_zeros(f, 3, constants["BLOCKS"], dtype=torch.float32) if wide else sums
        for this in passes:
            _sparse_adam_step_kernel[(f, triton.cdiv(d, constants["BLOCK_D"]))](
                param, param if master is None else master, exp_avg, exp_avg_sq,
                sums if exp_avg_scale is None else exp_avg_scale,
                sums if exp_avg_sq_scale is None else exp_avg_sq_scale,
                sums if schedule is None else schedule,
                groups.offsets, groups.tokens, groups.values, rows, sums, scratch, d, step,
                lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5,
                eps, weight_decay,
                ON_DEVICE=schedule is not None, MASTER=master is not None, MOMENTS=bits,
                LAZY=lazy, UNIT_NORM=unit_norm, PASS=this, TILE=_TILE, **constants,
            )  # fmt: skip


def configurations() -> list[Configuration]:
    """Ordinary, widest and odd rows, each dtype; the passes of a row wider than that; moments in
    16 and 8 bits, with masters and with step and lr on the device."""
    shapes = [
        (4096, True, False), (8192, True, False), (769, True, True), (4096, False, True),
        (16384, True, False),
    ]  # fmt: skip
    result = []
    for pointer in POINTERS.values():
        for shape in shapes:
            result += _configurations(pointer, *shape, moments=32, low=False)
    for moments in (16, 8):
        for shape in [*shapes[::2], (24, False, False)]:
            result += _configurations("*fp32", *shape, moments=moments, low=False)
            result += _configurations("*bf16", *shape, moments=moments, low=True)
    return result


def _configurations(
    pointer: str, d: int, unit_norm: bool, lazy: bool, moments: int, low: bool
) -> list[Configuration]:
    constants, passes = _blocks(d, unit_norm, moments)
    warps = constants.pop("num_warps")
    mean, square = {32: ("*fp32", "*fp32"), 16: ("*i16", "*i16"), 8: ("*i8", "*u8")}[moments]
    scalars = "step_size", "rest1", "beta2", "rest2", "correction", "eps", "weight_decay"
    signature = dict(
        param_ptr=pointer, master_ptr="*fp32" if low else pointer, exp_avg_ptr=mean,
        exp_avg_sq_ptr=square, mean_scale_ptr="*fp32", root_scale_ptr="*fp32",
        schedule_ptr="*fp64" if low else "*fp32", offsets_ptr="*i64", tokens_ptr="*i32",
        values_ptr=pointer, rows_ptr=pointer, sums_ptr="*fp32", scratch_ptr="*fp32",
        D="i32:16" if d % 16 == 0 else "i32", step="i32", **dict.fromkeys(scalars, "fp32"),
    )  # fmt: skip
    label = f"{pointer[1:]} D={d}" + " unit_norm" * unit_norm + " lazy" * lazy
    if moments != 32:
        label += f" {moments}-bit moments" + " master, schedule" * low
    constants |= dict(
        LAZY=lazy, UNIT_NORM=unit_norm, ON_DEVICE=low, MASTER=low, MOMENTS=moments, TILE=_TILE
    )
    return [
        Configuration(
            _sparse_adam_step_kernel, label + f" pass {this}" * (this > 0), signature,
            dict(constants, PASS=this), num_warps=warps,
        )
        for this in passes
    ]  # fmt: skip
