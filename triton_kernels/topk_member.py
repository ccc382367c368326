"""topk_member: programs of latents count, for each latent asked for, those that beat it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from ._topk_encode_keys import inner_products, order_keys, rank_scores

_LATENTS = 16  # rows of W_enc that a program holds a block of
_BLOCK_D, _HALVINGS = 128, tl.constexpr(7)
_WARPS = 4


@triton.jit
def _topk_member_keys_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    latents_ptr,  # [P, J]
    keys_ptr,  # [N, J] int64: of the latents asked for
    counts_ptr,  # [N, J] int32: 0, or k where it is no member whatever the others are
    N_LIST,  # neighbouring tokens that share a list
    J,
    D,
    F,
    K,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(latents_ptr + n // N_LIST * J + j, mask=j < J, other=-1)
    inside = (latent >= 0) & (latent < F)
    score = inner_products(x_ptr + n * D, w_ptr, latent, inside, D, BLOCK, BLOCK_D, _HALVINGS)
    rank = rank_scores(score, latent, inside, bias_ptr, scale_ptr)
    member = inside
    if POSITIVE:
        pre = rank_scores(score, latent, inside, bias_ptr, None)
        member = inside & ((pre > 0.0) | (pre != pre))
    tl.store(keys_ptr + n * J + j, order_keys(rank, latent), mask=j < J)
    tl.store(counts_ptr + n * J + j, tl.where(member, 0, K), mask=j < J)


@triton.jit
def _topk_member_count_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [N, J]
    counts_ptr,  # [N, J] int32: latents that beat this one, so far
    J,
    D,
    F,
    K,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    # another program may raise a count meanwhile: it only matters whether it reached k before
    lowest = K
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        lowest = tl.minimum(
            lowest, tl.min(tl.load(counts_ptr + n * J + j, mask=j < J, other=2147483647))
        )
    if lowest < K:
        latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = latent < F
        score = inner_products(x_ptr + n * D, w_ptr, latent, inside, D, BLOCK, BLOCK_D, _HALVINGS)
        own = order_keys(rank_scores(score, latent, inside, bias_ptr, scale_ptr), latent)
        for start in range(0, J, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            key = tl.load(keys_ptr + n * J + j, mask=j < J, other=0)
            beaten = tl.sum(
                ((own[:, None] > key[None, :]) & inside[:, None]).to(tl.int32), axis=0
            )  # [BLOCK_J]
            held = tl.load(counts_ptr + n * J + j, mask=j < J, other=2147483647)
            tl.atomic_add(
                counts_ptr + n * J + j, beaten, mask=(j < J) & (held < K) & (beaten > 0),
                sem="relaxed",
            )  # fmt: skip


def topk_member(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    latents: torch.Tensor,
    k: int,
    rank_scale: torch.Tensor | None,
    positive: bool,
    codes: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> torch.Tensor:
    """See `fastsae.ops.topk_member`. A latent out of range is no member.

    x [..., D] of N tokens, latents [P, J]: N / P neighbouring tokens share a list. Returns [N, J].

    Integer counts add up to the same number in any order. The screen is not read: the launches
    decide nothing on the host, and a program stops where every count of its token has reached k.
    """
    (F, D), (P, J), N = W_enc.shape, latents.shape, x.shape[:-1].numel()
    keys = torch.empty(N, J, dtype=torch.int64, device=x.device)
    counts = torch.empty(N, J, dtype=torch.int32, device=x.device)
    if N * J == 0:
        return counts < k
    constants = dict(BLOCK=_LATENTS, BLOCK_D=_BLOCK_D, num_warps=_WARPS)
    with on_device(x):
        _topk_member_keys_kernel[(triton.cdiv(J, _LATENTS), N)](
            x, W_enc, b_enc, rank_scale, latents, keys, counts, N // P, J, D, F, k,
            POSITIVE=positive, **constants,
        )  # fmt: skip
        _topk_member_count_kernel[(triton.cdiv(F, _LATENTS), N)](
            x, W_enc, b_enc, rank_scale, keys, counts, J, D, F, k,
            BLOCK_J=_block_j(J), **constants,
        )  # fmt: skip
    return counts < k


def _block_j(j: int) -> int:
    return min(16, max(2, triton.next_power_of_2(j)))


def configurations() -> list[Configuration]:
    """One latent and a full program; with and without bias and scale."""
    result = []
    for pointer in POINTERS.values():
        for d, j, extras in ((4096, 2, True), (769, 32, False)):
            common = dict(
                x_ptr=pointer, w_ptr=pointer, bias_ptr=pointer, scale_ptr=pointer,
                keys_ptr="*i64", counts_ptr="*i32",
                J="i32", D="i32:16" if d % 16 == 0 else "i32", F="i32", K="i32",
            )  # fmt: skip
            constants = dict(BLOCK=_LATENTS, BLOCK_D=_BLOCK_D)
            if not extras:
                constants |= dict(bias_ptr=None, scale_ptr=None)
            label = f"{pointer[1:]} D={d} J={j}"
            result += [
                Configuration(
                    _topk_member_keys_kernel, label,
                    {**common, "latents_ptr": "*i32", "N_LIST": "i32"},
                    constants | dict(POSITIVE=True), num_warps=_WARPS,
                ),
                Configuration(
                    _topk_member_count_kernel, label, common,
                    constants | dict(BLOCK_J=_block_j(j)), num_warps=_WARPS,
                ),
            ]  # fmt: skip
    return result
