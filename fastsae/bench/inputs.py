"""Inputs that look like an SAE's, repeatable by seed."""

from __future__ import annotations

import torch

CACHE_BYTES = 96 << 20  # rotate inputs until they exceed this: three times a 32 MB last-level cache


def rotations(bytes_per_set: int, most: int = 8) -> int:
    """How many input sets make the rotation larger than the cache."""
    return max(2, min(most, -(-CACHE_BYTES // max(1, bytes_per_set))))


def normal(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float32, device=device).to(dtype)


def unit_rows(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    if torch.device(device).type == "cuda":  # row by row slabs: an fp32 copy may not fit
        rows, d = shape
        g = torch.Generator(device).manual_seed(seed)
        out = torch.empty(rows, d, dtype=dtype, device=device)
        for slab in out.split(max(1, (1 << 28) // d)):
            w = torch.randn(len(slab), d, generator=g, dtype=torch.float32, device=device)
            slab.copy_(w / w.norm(dim=-1, keepdim=True))
        return out
    w = normal(*shape, seed=seed)
    return (w / w.norm(dim=-1, keepdim=True)).to(dtype)


def random_pairs(
    n: int, k: int, f: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, k] and distinct indices [n, k] int32 with the skew of real SAEs.

    A trained SAE's latents fire at very different rates: half of the indices are drawn
    uniformly, half towards low numbers (log-uniform), so that some latents own many pairs.
    """
    g = torch.Generator().manual_seed(seed)
    uniform, which = (torch.rand(n, 2 * k, generator=g, dtype=torch.float32) for _ in range(2))
    skewed = torch.exp(uniform * torch.log(torch.tensor(f, dtype=torch.float32))) - 1
    pick = torch.where(which < 0.5, uniform * f, skewed)
    candidates = pick.long().clamp_(max=f - 1)
    indices = torch.empty(n, k, dtype=torch.int32)
    for row in range(n):
        unique = torch.unique(candidates[row])
        unique = unique[torch.randperm(len(unique), generator=g)][:k]
        while len(unique) < k:  # a rare row with many repeats
            extra = torch.randint(f, (k,), generator=g)
            unique = torch.unique(torch.cat([unique, extra]))[:k]
        indices[row] = unique.int()
    values = torch.rand(n, k, generator=g, dtype=torch.float32).to(dtype) + 0.1
    return values, indices
