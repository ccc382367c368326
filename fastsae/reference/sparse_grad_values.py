"""sparse_grad_values in plain PyTorch, one active latent at a time."""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range


def sparse_grad_values(
    grad_out: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_values`."""
    index = check_range("sparse_grad_values", indices, W_dec.shape[0])
    acc = acc_dtype(W_dec.dtype)
    grad = grad_out.to(acc)
    out = torch.empty(indices.shape, dtype=acc, device=grad_out.device)
    for j in range(indices.shape[1]):
        out[:, j] = (grad * W_dec[index[:, j]].to(acc)).sum(1)
    return out.to(W_dec.dtype)
