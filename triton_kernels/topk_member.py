"""topk_member: the k best of every token by topk_encode, and one kernel that looks for the latents.

A latent has one score, whichever of the two ops asks for it and however many tokens the call has:
who beats it is decided by topk_encode alone. It reads W_enc once for all tokens, where counting
those that beat a latent reads it once a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from .topk_encode import topk_encode

_BLOCK_J, _BLOCK_K, _WARPS = 64, 64, 4


@triton.jit
def _topk_member_kernel(
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    latents_ptr,  # [P, J]
    member_ptr,  # [N, J] uint8
    N_LIST,  # neighbouring tokens that share a list
    J,
    K,
    POSITIVE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(J, BLOCK_J)
    n = tl.program_id(0).to(tl.int64) // blocks
    j = tl.program_id(0) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    latent = tl.load(latents_ptr + n // N_LIST * J + j, mask=j < J, other=-1)  # [BLOCK_J]
    found = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + n * K + k, mask=k < K, other=-2)  # [BLOCK_K]
        if POSITIVE:
            value = tl.load(values_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
            index = tl.where(value <= 0.0, -2, index)  # NaN stays
        same = (latent[:, None] == index[None, :]) & (latent >= 0)[:, None]
        found = tl.maximum(found, tl.max(same.to(tl.int32), axis=1))
    tl.store(member_ptr + n * J + j, found.to(tl.uint8), mask=j < J)


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
    trusted: frozenset[str] | None = None,
) -> torch.Tensor:
    """See `fastsae.ops.topk_member`. A latent out of range is no member; the screen is not read.

    x [..., D] of N tokens, latents [P, J]: N / P neighbouring tokens share a list. Returns [N, J].
    trusted: the designs of topk_encode that may be used.
    """
    (P, J), d = latents.shape, x.shape[-1]
    tokens = x.view(-1, d)
    n = len(tokens)
    member = torch.empty(n, J, dtype=torch.bool, device=x.device)
    if n * J == 0:
        return member
    values, indices = topk_encode(tokens, W_enc, b_enc, k, False, rank_scale, trusted=trusted)
    with on_device(x):
        _topk_member_kernel[(n * triton.cdiv(J, _BLOCK_J),)](
            values, indices, latents, member.view(torch.uint8), n // P, J, k,
            POSITIVE=positive, BLOCK_J=_BLOCK_J, BLOCK_K=_BLOCK_K, num_warps=_WARPS,
        )  # fmt: skip
    return member


def configurations() -> list[Configuration]:
    """Each dtype; with a look at the values and without."""
    result = []
    for pointer in POINTERS.values():
        for positive in (True, False):
            signature = dict(
                values_ptr=pointer, indices_ptr="*i32", latents_ptr="*i32", member_ptr="*u8",
                N_LIST="i32", J="i32", K="i32",
            )  # fmt: skip
            constants = dict(POSITIVE=positive, BLOCK_J=_BLOCK_J, BLOCK_K=_BLOCK_K)
            label = pointer[1:] + " positive" * positive
            made = Configuration(_topk_member_kernel, label, signature, constants, _WARPS)
            result.append(made)
    return result
