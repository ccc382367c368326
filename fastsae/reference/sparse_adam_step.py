"""sparse_adam_step in plain PyTorch, some rows at a time.

Forms the whole gradient; the compiled backends never do.
"""

from __future__ import annotations

import torch

from . import moments
from ._common import acc_dtype
from .sparse_grad_weight import sparse_grad_weight, sparse_grad_weight_rows

_ELEMENTS = 1 << 21  # updated at a time: few enough for a cache, many enough for threads


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
    f, d = param.shape
    values, rows = values.to(acc), rows.to(acc)
    if lazy:
        latents, grads = sparse_grad_weight_rows(values, indices, rows, f)
    else:
        latents = torch.arange(f, device=param.device)
        grads = sparse_grad_weight(values, indices, rows, f)
    if schedule is None:
        when = [lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, step]
        schedule = torch.tensor(when, dtype=torch.float64, device=param.device)
    step_size, correction = schedule[:2].to(acc)
    size = max(1, _ELEMENTS // max(1, d))
    for part in (slice(begin, begin + size) for begin in range(0, len(latents), size)):
        index, grad = latents[part].long(), grads[part]
        at = index if lazy else part
        p = weight[at].to(acc)
        m, v = moments.load(
            moments.Moments(*(None if t is None else t[at] for t in stored))  # type: ignore[arg-type]
        )
        if weight_decay:
            grad.add_(weight_decay * p)
        if unit_norm:
            square = (p * p).sum(1, keepdim=True)
            along = (grad * p).sum(1, keepdim=True) / square
            grad.sub_(along.where(square > 0, 0) * p)
        # in place: where p, m and v are parts of what is stored, that is written here
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.sub_((step_size * m).div_(v.sqrt().mul_(correction).add_(eps)))
        if unit_norm:
            norm = p.norm(dim=1, keepdim=True)
            p.div_(norm.where(norm > 0, 1))
        new = moments.store(m, v, moments.format_of(exp_avg), schedule[2], index)
        for target, source in zip((param, *stored, master), (p, *new, p), strict=True):
            if target is not None:
                assert source is not None
                if lazy or target[part].data_ptr() != source.data_ptr():
                    target[at] = source.to(target.dtype)
