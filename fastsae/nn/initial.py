"""Where training starts: directions and offsets from a sample of the data."""

from __future__ import annotations

import torch


def normalize_rows_(weight: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Rows to norm 1, in place; with a generator, zero rows become random directions."""
    with torch.no_grad():
        norm = weight.norm(
            dim=1, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        zero = (norm == 0).squeeze(1)
        if generator is not None and zero.any():
            count = int(zero.sum())
            fresh = torch.randn(
                count, weight.shape[1], generator=generator, dtype=norm.dtype, device=weight.device
            )
            weight[zero] = fresh.to(weight.dtype)
            norm[zero] = fresh.norm(dim=1, keepdim=True).to(norm.dtype)
        weight.div_(norm.where(norm > 0, 1))


@torch.no_grad()
def geometric_median(x: torch.Tensor, *, steps: int = 50, tolerance: float = 1e-4) -> torch.Tensor:
    """The point [D] of least mean distance to the rows of x [N, D] (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-8)
        previous, median = median, (x * weight).sum(0) / weight.sum()
        if (median - previous).norm() <= tolerance * median.norm():
            break
    return median
