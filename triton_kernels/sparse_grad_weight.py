"""sparse_grad_weight: one program per latent sums its pairs' rows; dense and row-sparse results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device, row_block
from ._configuration import Configuration
from ._group_by_latent import _BLOCK_P, _TILE, Groups, gradient_block, group_by_latent, tile_sums


@triton.jit
def _sparse_grad_weight_kernel(
    latents_ptr,  # [M] int64, or None: every latent in turn
    offsets_ptr,  # [F + 1]
    tokens_ptr,  # [P]
    values_ptr,  # [P]
    rows_ptr,  # [N, D]
    sums_ptr,  # [P // TILE, D]
    out_ptr,  # [M or F, D]
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    latent = i
    if latents_ptr is not None:
        latent = tl.load(latents_ptr + i)
    begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    acc = gradient_block(
        begin, end, tokens_ptr, values_ptr, rows_ptr, sums_ptr, d, in_row, D,
        BLOCK_P, BLOCK_D, TILE,
    )  # fmt: skip
    tl.store(out_ptr + i * D + d, acc.to(out_ptr.dtype.element_ty), mask=in_row)


def _launch(groups: Groups, rows: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
    m = groups.offsets.numel() - 1 if latents is None else latents.numel()
    d = rows.shape[1]
    out = rows.new_empty(m, d)
    if out.numel():
        block_d, warps = row_block(d, rows.element_size())
        _sparse_grad_weight_kernel[(m, triton.cdiv(d, block_d))](
            latents, groups.offsets, groups.tokens, groups.values, rows, tile_sums(groups, rows),
            out, d, BLOCK_P=_BLOCK_P, BLOCK_D=block_d, TILE=_TILE, num_warps=warps,
        )  # fmt: skip
    return out


def sparse_grad_weight(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_weight`. An index out of range adds nothing."""
    with on_device(rows):
        return _launch(group_by_latent(values, indices, n_latents), rows, None)


def sparse_grad_weight_rows(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.sparse_grad_weight` with layout="rows"; counting the rows syncs."""
    with on_device(rows):
        groups = group_by_latent(values, indices, n_latents)
        latents = groups.offsets.diff().nonzero().view(-1)
        return latents.to(torch.int32), _launch(groups, rows, latents)


def configurations() -> list[Configuration]:
    """Wide, narrow and odd rows, each dtype; both results."""
    result = []
    for dtype, pointer in POINTERS.items():
        for d, dense in ((4096, True), (768, False), (769, True)):
            block_d, warps = row_block(d, dtype.itemsize)
            signature = dict(
                latents_ptr="*i64", offsets_ptr="*i64", tokens_ptr="*i32", values_ptr=pointer,
                rows_ptr=pointer, sums_ptr="*fp32", out_ptr=pointer,
                D="i32:16" if d % 16 == 0 else "i32",
            )  # fmt: skip
            constants = dict(BLOCK_P=_BLOCK_P, BLOCK_D=block_d, TILE=_TILE)
            if dense:
                constants["latents_ptr"] = None
            label = f"{pointer[1:]} D={d}" + ("" if dense else " rows")
            kernel = _sparse_grad_weight_kernel
            result.append(Configuration(kernel, label, signature, constants, num_warps=warps))
    return result
