"""topk in plain PyTorch: a stable sort."""

from __future__ import annotations

import torch


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk`."""
    # stable and descending: ties keep the lowest index first, NaN ranks above +inf
    order = x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return x.gather(1, order), order.to(torch.int32)
