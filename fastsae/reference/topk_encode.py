"""topk_encode in plain PyTorch. The only backend that writes scores of [rows, F]."""

from __future__ import annotations

import torch

from ._common import best, score_blocks


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    relu: bool,
    rank_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk_encode`."""
    values = x.new_empty(x.shape[0], k)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    for at, pre in score_blocks(x, W_enc, b_enc):
        order = best(pre if rank_scale is None else pre * rank_scale.to(pre.dtype), k)
        top = pre.gather(1, order)
        values[at] = top.relu() if relu else top
        indices[at] = order
    return values, indices
