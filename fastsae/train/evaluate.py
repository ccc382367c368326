"""How well an SAE reconstructs, and what splicing it into its language model costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..nn import SparseCoder
from .activations import Windows, edited


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


@torch.no_grad()
def cross_entropy(
    model: nn.Module,
    windows: Windows,
    context: AbstractContextManager[Any] | None = None,
    *,
    batch_windows: int = 8,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Mean next-token loss in nats over `windows`, inside `context` (a hook, say)."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with context or nullcontext():
        for first in range(0, len(windows), batch_windows):
            tokens = windows.tokens[first : first + batch_windows].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(),
                tokens[:, 1:].reshape(-1),
                reduction="sum",
            )
            total += float(loss)
            count += tokens[:, 1:].numel()
            if progress is not None:
                progress(tokens.numel())
    return total / count


@dataclass(frozen=True)
class SpliceLoss:
    """Attributes, all in nats but the last:
    ce_clean: the model's own loss.
    ce_spliced: with the SAE's reconstruction in place of the activations.
    ce_zero_ablated: with zeros in their place.
    loss_recovered: (zero - spliced) / (zero - clean).
    """

    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    loss_recovered: float


def splice_loss(
    model: nn.Module,
    module: nn.Module,
    sae: SparseCoder,
    windows: Windows,
    *,
    skip_first: int = 1,
    progress: Callable[[int], None] | None = None,
) -> SpliceLoss:
    """The model's loss with `module`'s output untouched, reconstructed and zeroed.

    The first `skip_first` positions, which the SAE is not trained on, stay untouched in all three.
    """

    def replaced(with_what: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def edit(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :skip_first], with_what(x[:, skip_first:])], 1)

        return edited(module, edit)

    def spliced(x: torch.Tensor) -> torch.Tensor:
        return sae(x).to(x.dtype)

    clean = cross_entropy(model, windows, progress=progress)
    with_sae = cross_entropy(model, windows, replaced(spliced), progress=progress)
    zeroed = cross_entropy(model, windows, replaced(torch.zeros_like), progress=progress)
    gap = zeroed - clean
    return SpliceLoss(clean, with_sae, zeroed, (zeroed - with_sae) / gap if gap else float("nan"))
