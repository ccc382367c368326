"""What a language model loses when a coder's reconstruction takes the place of its activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..nn import SparseCoder
from .harvest import Windows
from .sites import by_token, device_of, edited, refuse_encoder_decoder


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
    refuse_encoder_decoder(model, "cross_entropy")
    device = device_of(model)
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
    progress: Callable[[int], None] | None = None,
) -> SpliceLoss:
    """The model's loss with `module`'s output untouched, reconstructed and zeroed.

    The positions that windows leave out, which the SAE is not trained on, stay untouched in all
    three.
    """
    skip_first, length = windows.skip_first, windows.tokens.shape[1]

    def replaced(with_what: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def edit(x: torch.Tensor) -> torch.Tensor:
            count = x.shape[:-1].numel() // length
            rows = by_token(x, (count, length), type(module).__name__)
            rows = torch.cat([rows[:, :skip_first], with_what(rows[:, skip_first:])], 1)
            return rows.view(x.shape)

        return edited(module, edit)

    def spliced(x: torch.Tensor) -> torch.Tensor:
        return sae(x).to(x.dtype)

    clean = cross_entropy(model, windows, progress=progress)
    with_sae = cross_entropy(model, windows, replaced(spliced), progress=progress)
    zeroed = cross_entropy(model, windows, replaced(torch.zeros_like), progress=progress)
    gap = zeroed - clean
    return SpliceLoss(clean, with_sae, zeroed, (zeroed - with_sae) / gap if gap else float("nan"))
