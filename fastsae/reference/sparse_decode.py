"""sparse_decode in plain PyTorch: a bag of K decoder rows for every token."""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range, weighted_sums


def sparse_decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None,
) -> torch.Tensor:
    """See `fastsae.ops.sparse_decode`."""
    n, k = values.shape
    rows = check_range("sparse_decode", indices, W_dec.shape[0]).flatten()
    acc = acc_dtype(W_dec.dtype)
    table = W_dec
    if W_dec.dtype != acc and len(rows) < len(W_dec):  # fewer rows to widen than the weight has
        table, rows = W_dec[rows], torch.arange(n * k, device=rows.device)
    offsets = torch.arange(n + 1, device=rows.device) * k
    out = weighted_sums(table.to(acc), rows, offsets, values.flatten().to(acc))
    if b_dec is not None:
        out = out + b_dec.to(acc)
    return out.to(W_dec.dtype)
