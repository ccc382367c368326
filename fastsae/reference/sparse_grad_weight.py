"""sparse_grad_weight in plain PyTorch: dense and row-sparse results."""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range


def _accumulate(
    values: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, n_rows: int
) -> torch.Tensor:
    acc = acc_dtype(rows.dtype)
    out = torch.zeros(n_rows, rows.shape[1], dtype=acc, device=rows.device)
    wide = rows.to(acc)
    for j in range(values.shape[1]):
        out.index_add_(0, index[:, j], values[:, j, None].to(acc) * wide)
    return out.to(rows.dtype)


def sparse_grad_weight(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_weight` with layout="dense"."""
    index = check_range("sparse_grad_weight", indices, n_latents)
    return _accumulate(values, index, rows, n_latents)


def sparse_grad_weight_rows(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.sparse_grad_weight` with layout="rows"."""
    index = check_range("sparse_grad_weight_rows", indices, n_latents)
    latents, position = index.unique(return_inverse=True)
    grads = _accumulate(values, position.view_as(index), rows, latents.numel())
    return latents.to(torch.int32), grads
