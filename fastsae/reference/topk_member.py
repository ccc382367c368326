"""topk_member in plain PyTorch: all scores, and who is among the best."""

from __future__ import annotations

import torch

from ._common import best, score_blocks


def check_latents(latents: torch.Tensor, n_latents: int) -> None:
    """Refuses a latent outside [-1, n_latents), where that costs no host sync."""
    if latents.device.type == "cpu" and latents.numel():
        low, high = (int(v) for v in latents.aminmax())
        if low < -1 or high >= n_latents:
            raise RuntimeError(
                f"topk_member: latents must lie in [-1, {n_latents}), got values from {low} to "
                f"{high}"
            )


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
    """See `fastsae.ops.topk_member`; the screen is not looked at.

    x [..., D] of N tokens, latents [P, J]: N / P neighbouring tokens share a list. Returns [N, J].
    """
    check_latents(latents, len(W_enc))
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    wanted = latents.long().repeat_interleave(len(x) // max(len(latents), 1), 0)
    member = torch.empty(wanted.shape, dtype=torch.bool, device=x.device)
    for rows, scores in score_blocks(x, W_enc, b_enc):
        ranks = scores if rank_scale is None else scores * rank_scale.to(scores.dtype)
        chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best(ranks, k), True)
        at = wanted[rows].clamp(min=0)
        found = chosen.gather(1, at) & (wanted[rows] >= 0)
        member[rows] = found & ~(scores.gather(1, at) <= 0) if positive else found
    return member
