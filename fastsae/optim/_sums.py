"""Sums of recorded factors: over backward calls, over ranks, and onto an ordinary gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops._factors import Factor
from ..ops.sparse_grad_weight import sparse_grad_weight


def _widen(factor: Factor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices with K = k: pairs of value 0 with a latent the row has anyway."""
    n, extra = factor.values.shape[0], k - factor.values.shape[1]
    if extra == 0:
        return factor.values, factor.indices
    return (
        torch.cat([factor.values, factor.values.new_zeros(n, extra)], 1),
        torch.cat([factor.indices, factor.indices[:, :1].expand(n, extra)], 1),
    )


def merge(param: torch.Tensor, recorded: list[Factor]) -> Factor | None:
    """One factor of the sum; None when nothing was recorded."""
    recorded = [f for f in recorded if f.values.shape[1] > 0]
    if len(recorded) < 2:
        return recorded[0] if recorded else None
    # same rows (one input, several selections): join along K, rows are not repeated
    joined: dict[tuple[int, ...], list[Factor]] = {}
    for f in recorded:
        joined.setdefault((f.rows.data_ptr(), *f.rows.shape, *f.rows.stride()), []).append(f)
    factors = [
        fs[0]
        if len(fs) == 1
        else Factor(
            torch.cat([f.values for f in fs], 1),
            torch.cat([f.indices for f in fs], 1),
            fs[0].rows,
        )
        for fs in joined.values()
    ]
    if len(factors) == 1:
        return factors[0]
    # Factors of one width: AuxK selects another number of latents than the SAE. Padding a narrow
    # one costs pairs of value zero, cutting a wide one costs copies of its rows (about two pairs).
    width = min(
        {f.values.shape[1] for f in factors},
        key=lambda w: sum(
            -(-f.values.shape[1] // w) * f.values.shape[0] * (w + 2) for f in factors
        ),
    )
    values, indices, rows = zip(*(_cut(f, width) for f in factors), strict=True)
    return Factor(torch.cat(values), torch.cat(indices), torch.cat(rows))


def _cut(factor: Factor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same sum with K = width, over copies of the rows."""
    n, k = factor.values.shape
    pieces = -(-k // width)
    values, indices = (
        t.view(n, pieces, width).transpose(0, 1).reshape(-1, width)
        for t in _widen(factor, pieces * width)
    )
    return values, indices, factor.rows.repeat(pieces, 1)


def add_to_grad(param: torch.Tensor, factor: Factor) -> None:
    latents, grads = sparse_grad_weight(
        factor.values, factor.indices, factor.rows, param.shape[0], layout="rows"
    )
    assert param.grad is not None
    param.grad.index_add_(0, latents.long(), grads.to(param.grad.dtype))


def exchange(
    group: dist.ProcessGroup, work: list[tuple[torch.Tensor, Factor | None]]
) -> list[Factor | None]:
    """Factors of all ranks joined, divided by their number; ordinary gradients averaged."""
    world = dist.get_world_size(group)
    device = work[0][0].device
    # N, K (0: nothing was recorded, not even an empty batch), and whether there is a gradient
    shape = torch.tensor(
        [[*((0, 0) if f is None else f.values.shape), p.grad is not None] for p, f in work],
        dtype=torch.int64,
        device=device,
    )
    shapes = [torch.empty_like(shape) for _ in range(world)]
    dist.all_gather(shapes, shape, group=group)
    sizes = torch.stack(shapes).cpu()  # [world, params, 3]
    out: list[Factor | None] = []
    for i, (param, factor) in enumerate(work):
        if sizes[:, i, 2].any():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            dist.all_reduce(param.grad, group=group)
            param.grad.div_(world)
        tokens = sizes[:, i, 0].tolist()
        n, k = max(tokens), int(sizes[:, i, 1].max())
        if k == 0:
            out.append(None)
            continue
        values = param.new_zeros(n, k)
        indices = torch.zeros(n, k, dtype=torch.int32, device=param.device)
        rows = param.new_zeros(n, param.shape[1])
        if factor is not None:
            here = factor.values.shape[0]
            values[:here], indices[:here] = _widen(factor, k)
            values.div_(world)
            rows[:here] = factor.rows
        gathered = []
        for tensor in (values, indices, rows):
            parts = [torch.empty_like(tensor) for _ in range(world)]
            if n > 0:  # else a step without gradient on every rank: moments decay alike
                dist.all_gather(parts, tensor, group=group)
            gathered.append(torch.cat([p[:t] for p, t in zip(parts, tokens, strict=True)]))
        out.append(Factor(*gathered))
    return out
