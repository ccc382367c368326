"""topk_member in plain PyTorch: the whole score matrix, and who is better."""

from __future__ import annotations

import torch

from ._common import acc_dtype


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
    acc = acc_dtype(x.dtype)
    scores = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(acc) @ W_enc.to(acc).T  # [N, F]
    if b_enc is not None:
        scores = scores + b_enc.to(acc)
    ranks = scores if rank_scale is None else scores * rank_scale.to(acc)
    check_latents(latents, len(W_enc))
    wanted = latents.long().repeat_interleave(len(scores) // max(len(latents), 1), 0)
    # stable and descending: ties keep the lowest index first, NaN ranks above +inf
    best = ranks.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best, True)
    at = wanted.clamp(min=0)
    member = chosen.gather(1, at) & (wanted >= 0)
    return member & ~(scores.gather(1, at) <= 0) if positive else member
