"""Short runs that the tests of FusedAdam share."""

from __future__ import annotations

import torch

from fastsae.nn import TopKSAE

N, D, F, K = 48, 16, 96, 4


def make(dtype=torch.float64, **options):
    return TopKSAE(D, F, K, dtype=dtype, seed=0, **options)


def batches(count, dtype=torch.float64, n=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator, dtype=dtype) for _ in range(count)]


def project(sae):
    """What FusedAdam does to a unit-norm decoder, around a torch optimizer's step."""
    with torch.no_grad():
        w, g = sae.W_dec, sae.W_dec.grad
        g -= (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w


def close(a, b, atol=1e-10):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
