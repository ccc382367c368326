"""sparse_decode in plain PyTorch, one active latent at a time so that [N, K, D] never exists."""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range


def sparse_decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None,
) -> torch.Tensor:
    """See `fastsae.ops.sparse_decode`."""
    index = check_range("sparse_decode", indices, W_dec.shape[0])
    acc = acc_dtype(W_dec.dtype)
    out = torch.zeros(values.shape[0], W_dec.shape[1], dtype=acc, device=values.device)
    if b_dec is not None:
        out += b_dec.to(acc)
    for j in range(values.shape[1]):
        out += values[:, j, None].to(acc) * W_dec[index[:, j]].to(acc)
    return out.to(W_dec.dtype)
