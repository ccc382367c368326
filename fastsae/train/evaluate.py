"""How well an SAE reconstructs, and what splicing it into its language model costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..nn import SparseCoder


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    fvu: fraction of variance unexplained, sum |x - x̂|² / sum |x - mean(x)|².
    l0: mean number of latents per token that fire, whose value is not 0.
    dead_fraction: share of latents that fire on none of the tokens.
    tokens: tokens measured on.
    """

    fvu: float
    l0: float
    dead_fraction: float
    tokens: int


@torch.no_grad()
def reconstruction(sae: SparseCoder, batches: Iterable[torch.Tensor]) -> Reconstruction:
    """Streams [n, D] batches through the SAE. Sums in float64.

    Raises:
        ValueError: no tokens.
    """
    n = 0
    active = 0
    residual = torch.zeros((), dtype=torch.float64)
    square = torch.zeros((), dtype=torch.float64)
    total: torch.Tensor | None = None
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for x in batches:
        code = sae.encode(x)
        error = (x - sae.decode(code)).double()
        residual += error.square().sum().cpu()
        square += x.double().square().sum().cpu()
        total = x.double().sum(0).cpu() + (0 if total is None else total)
        fires = code.values != 0
        active += int(fires.sum())
        fired[code.indices[fires].long().cpu()] = True
        n += x.shape[0]
    if total is None:
        raise ValueError("reconstruction: no activations to measure on")
    variance = square - total.square().sum() / n
    return Reconstruction(
        fvu=float(residual / variance),
        l0=active / n,
        dead_fraction=1 - int(fired.sum()) / len(fired),
        tokens=n,
    )
