"""topk_encode in plain PyTorch. The only backend that writes scores of [rows, F]."""

from __future__ import annotations

import torch

from ._common import acc_dtype

_CHUNK_SCORES = 1 << 24  # scores held at once: 64 MB in fp32


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    relu: bool,
    rank_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk_encode`."""
    n, f = x.shape[0], W_enc.shape[0]
    acc = acc_dtype(x.dtype)
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    weight = W_enc.to(acc).T
    step = max(1, _CHUNK_SCORES // f)
    for i in range(0, n, step):
        pre = x[i : i + step].to(acc) @ weight
        if b_enc is not None:
            pre += b_enc.to(acc)
        score = pre if rank_scale is None else pre * rank_scale.to(acc)
        # stable and descending: ties keep the lowest index first, NaN ranks above +inf
        order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best = pre.gather(1, order)
        values[i : i + step] = best.relu() if relu else best
        indices[i : i + step] = order
    return values, indices
