"""The N*K pairs (token, value) grouped by latent, and the gradient rows summed from the groups.

A stable sort puts each latent's pairs side by side in token order, so that sums run in a fixed
order without atomics. A latent that is active in thousands of tokens would keep one program busy
long after the others are done, so every run of TILE sorted pairs that belongs to one latent is
summed beforehand by a program of its own (`_tile_sums_kernel`); the latent's program then adds
those sums. Which runs these are is read on the device: buffers depend on shapes only, nothing
syncs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, row_block
from ._configuration import Configuration

_TILE = 256
_BLOCK_P = 8


class Groups(NamedTuple):
    """The pairs, P = N*K of them, sorted by latent; those with a bad index come last."""

    latents: torch.Tensor  # [P] int32, F where the index was out of range
    tokens: torch.Tensor  # [P] int32
    values: torch.Tensor  # [P]
    offsets: torch.Tensor  # [F + 1] int64: the pairs of latent i are offsets[i]:offsets[i + 1]


def group_by_latent(values: torch.Tensor, indices: torch.Tensor, n_latents: int) -> Groups:
    """Groups [N, K] pairs. An index out of range is in no group."""
    flat = indices.view(-1)
    in_range = (flat >= 0) & (flat < n_latents)
    latents, order = torch.where(in_range, flat, n_latents).sort(stable=True)
    bounds = torch.arange(n_latents + 1, dtype=torch.int32, device=indices.device)
    return Groups(
        latents,
        (order // max(1, indices.shape[1])).to(torch.int32),
        values.view(-1)[order],
        torch.searchsorted(latents, bounds),
    )


@triton.jit
def _sum_pairs(
    acc,  # [BLOCK_D] fp32
    begin,
    end,
    tokens_ptr,
    values_ptr,
    rows_ptr,  # [N, D]
    d,
    in_row,
    D,
    BLOCK_P: tl.constexpr,
):
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        token = tl.load(tokens_ptr + p, mask=p < end, other=0).to(tl.int64)
        value = tl.load(values_ptr + p, mask=p < end, other=0.0).to(tl.float32)
        row = tl.load(
            rows_ptr + token[:, None] * D + d[None, :],
            mask=(p < end)[:, None] & in_row[None, :],
            other=0.0,
        )  # [BLOCK_P, BLOCK_D]
        acc += tl.sum(value[:, None] * row.to(tl.float32), axis=0)
    return acc


@triton.jit
def gradient_block(
    begin,
    end,  # the latent's pairs
    tokens_ptr,
    values_ptr,
    rows_ptr,
    sums_ptr,  # [P // TILE, D] fp32
    d,
    in_row,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum of values * rows over a latent's pairs: head, whole tiles, tail. [BLOCK_D] fp32."""
    first, last = (begin + TILE - 1) // TILE, end // TILE  # whole tiles inside: first .. last - 1
    head_end = tl.where(first < last, first * TILE, end)
    tail_begin = tl.where(first < last, last * TILE, end)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    acc = _sum_pairs(acc, begin, head_end, tokens_ptr, values_ptr, rows_ptr, d, in_row, D, BLOCK_P)
    for tile in range(first, last):
        acc += tl.load(sums_ptr + tile * D + d, mask=in_row, other=0.0)
    return _sum_pairs(acc, tail_begin, end, tokens_ptr, values_ptr, rows_ptr, d, in_row, D, BLOCK_P)


@triton.jit
def _tile_sums_kernel(
    latents_ptr,  # [P]
    tokens_ptr,
    values_ptr,
    rows_ptr,  # [N, D]
    sums_ptr,  # [P // TILE, D] fp32
    F,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    begin = tile * TILE
    latent = tl.load(latents_ptr + begin)
    if (latent == tl.load(latents_ptr + begin + TILE - 1)) & (latent < F):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = d < D
        acc = tl.zeros((BLOCK_D,), tl.float32)
        acc = _sum_pairs(
            acc, begin, begin + TILE, tokens_ptr, values_ptr, rows_ptr, d, in_row, D, BLOCK_P
        )
        tl.store(sums_ptr + tile * D + d, acc, mask=in_row)


def tile_sums(groups: Groups, rows: torch.Tensor) -> torch.Tensor:
    """[P // TILE, D] fp32; rows of tiles that hold more than one latent are left unwritten."""
    tiles, d = groups.tokens.numel() // _TILE, rows.shape[1]
    sums = rows.new_empty(tiles, d, dtype=torch.float32)
    if sums.numel():
        block_d, warps = row_block(d, rows.element_size())
        _tile_sums_kernel[(tiles, triton.cdiv(d, block_d))](
            groups.latents, groups.tokens, groups.values, rows, sums,
            groups.offsets.numel() - 1, d,
            BLOCK_P=_BLOCK_P, BLOCK_D=block_d, TILE=_TILE, num_warps=warps,
        )  # fmt: skip
    return sums


def configurations() -> list[Configuration]:
    """Wide and odd rows, each dtype."""
    result = []
    for dtype, pointer in POINTERS.items():
        for d in (4096, 769):
            block_d, warps = row_block(d, dtype.itemsize)
            signature = dict(
                latents_ptr="*i32", tokens_ptr="*i32", values_ptr=pointer, rows_ptr=pointer,
                sums_ptr="*fp32", F="i32", D="i32:16" if d % 16 == 0 else "i32",
            )  # fmt: skip
            constants = dict(BLOCK_P=_BLOCK_P, BLOCK_D=block_d, TILE=_TILE)
            label = f"{pointer[1:]} D={d}"
            result.append(
                Configuration(_tile_sums_kernel, label, signature, constants, num_warps=warps)
            )
    return result
