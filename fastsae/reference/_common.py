"""What the references share."""

from __future__ import annotations

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_range(op: str, indices: torch.Tensor, n_latents: int) -> torch.Tensor:
    """Indices as int64, refused when one is outside [0, n_latents).

    On a GPU the check would cost a host sync; PyTorch's own indexing asserts there.
    """
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= n_latents:
            raise RuntimeError(
                f"{op}: indices must lie in [0, {n_latents}), got values from {low} to {high}"
            )
    return indices.long()
