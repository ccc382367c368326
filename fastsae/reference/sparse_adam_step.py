"""sparse_adam_step in plain PyTorch. Forms the gradient rows; the compiled backends never do."""

from __future__ import annotations

import torch

from ._common import acc_dtype
from .sparse_grad_weight import sparse_grad_weight_rows


def sparse_adam_step(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    lazy: bool,
    unit_norm: bool,
) -> None:
    """See `fastsae.ops.sparse_adam_step`."""
    acc = acc_dtype(param.dtype)
    latents, touched = sparse_grad_weight_rows(
        values.to(acc), indices, rows.to(acc), param.shape[0]
    )
    index = latents.long()
    if lazy:
        grad, p, m, v = touched, param[index].to(acc), exp_avg[index], exp_avg_sq[index]
    else:
        grad = torch.zeros(param.shape, dtype=acc, device=param.device)
        grad[index] = touched
        p, m, v = param.to(acc), exp_avg, exp_avg_sq
    grad = grad + weight_decay * p
    if unit_norm:
        square = (p * p).sum(1, keepdim=True)
        along = (grad * p).sum(1, keepdim=True) / square
        grad = grad - torch.where(square > 0, along, torch.zeros_like(along)) * p
    m = torch.lerp(m.to(acc), grad, 1 - beta1)
    v = v.to(acc) * beta2 + (1 - beta2) * grad * grad
    denom = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
    p = p - lr / (1 - beta1**step) * m / denom
    if unit_norm:
        norm = p.norm(dim=1, keepdim=True)
        p = torch.where(norm > 0, p / norm, p)
    if lazy:
        param[index] = p.to(param.dtype)
        exp_avg[index] = m.to(exp_avg.dtype)
        exp_avg_sq[index] = v.to(exp_avg_sq.dtype)
    else:
        param.copy_(p)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
