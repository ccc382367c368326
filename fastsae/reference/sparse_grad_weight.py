"""sparse_grad_weight in plain PyTorch: dense and row-sparse results.

The pairs are grouped by latent, those of one latent in the order of the tokens, so a result is
repeatable: no row is added to by two threads.
"""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range, weighted_sums


def _sums(
    values: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    acc = acc_dtype(rows.dtype)
    tokens = order // max(1, values.shape[1])
    weights = values.flatten().to(acc)[order]
    return weighted_sums(rows.to(acc), tokens, offsets, weights).to(rows.dtype)


def sparse_grad_weight(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_weight` with layout="dense"."""
    index = check_range("sparse_grad_weight", indices, n_latents)
    latents, order = index.flatten().sort(stable=True)
    offsets = torch.searchsorted(latents, torch.arange(n_latents + 1, device=latents.device))
    return _sums(values, order, offsets, rows)


def sparse_grad_weight_rows(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.sparse_grad_weight` with layout="rows"."""
    index = check_range("sparse_grad_weight_rows", indices, n_latents)
    latents, order = index.flatten().sort(stable=True)
    active, counts = latents.unique_consecutive(return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return active.to(torch.int32), _sums(values, order, offsets, rows)
