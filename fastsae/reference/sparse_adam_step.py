"""sparse_adam_step in plain PyTorch. Forms the gradient rows; the compiled backends never do."""

from __future__ import annotations

import torch

from . import moments
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
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
    master: torch.Tensor | None = None,
    schedule: torch.Tensor | None = None,
) -> None:
    """See `fastsae.ops.sparse_adam_step`."""
    acc = acc_dtype(param.dtype)
    weight = param if master is None else master
    stored = moments.Moments(exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale)
    latents, touched = sparse_grad_weight_rows(
        values.to(acc), indices, rows.to(acc), param.shape[0]
    )
    index = latents.long()
    if lazy:
        grad, p = touched, weight[index].to(acc)
        old = moments.Moments(*(None if t is None else t[index] for t in stored))  # type: ignore[arg-type]
    else:
        grad = torch.zeros(param.shape, dtype=acc, device=param.device)
        grad[index] = touched
        p, old = weight.to(acc), stored
        index = torch.arange(param.shape[0], device=param.device)
    m, v = moments.load(old)
    grad = grad + weight_decay * p
    if unit_norm:
        square = (p * p).sum(1, keepdim=True)
        along = (grad * p).sum(1, keepdim=True) / square
        grad = grad - torch.where(square > 0, along, torch.zeros_like(along)) * p
    m = torch.lerp(m, grad, 1 - beta1)
    v = v * beta2 + (1 - beta2) * grad * grad
    if schedule is None:
        when = [lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, step]
        schedule = torch.tensor(when, dtype=torch.float64, device=param.device)
    step_size, correction = schedule[:2].to(acc)
    p = p - step_size * m / (v.sqrt() * correction + eps)
    if unit_norm:
        norm = p.norm(dim=1, keepdim=True)
        p = torch.where(norm > 0, p / norm, p)
    new = moments.store(m, v, moments.format_of(exp_avg), schedule[2], index)
    targets = (param, *stored) if master is None else (param, *stored, master)
    sources = (p, *new) if master is None else (p, *new, p)
    for target, source in zip(targets, sources, strict=True):
        if target is not None:
            assert source is not None
            target[index] = source.to(target.dtype)
