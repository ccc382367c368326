"""How strongly to steer: effect against damage, measured."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..lm.sites import device_of


@dataclass(frozen=True)
class Sampling:
    """How text is sampled; the same settings everywhere, so that shares compare."""

    new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@torch.no_grad()
def sample(
    model: Any,
    prompts: torch.Tensor,
    settings: Sampling,
    context: AbstractContextManager[Any] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Continues `prompts` [B, T] inside `context`; returns the new tokens [B, new_tokens].

    The same seed draws the same random numbers whatever the context is. `attention_mask` [B, T] is
    0 where a shorter prompt is padded on the left.
    """
    device = device_of(model)
    prompts = prompts.to(device)
    torch.manual_seed(settings.seed)
    with context or nullcontext():
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts)
            if attention_mask is None
            else attention_mask.to(device),
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            min_new_tokens=settings.new_tokens,
            max_new_tokens=settings.new_tokens,
            pad_token_id=model.config.eos_token_id or 0,
        )
    return out[:, prompts.shape[1] :].cpu()


def token_share(tokens: torch.Tensor, own: torch.Tensor) -> float:
    """Share of `tokens` that are among the ids `own`."""
    return float(torch.isin(tokens, own).float().mean())


def distinct_bigrams(tokens: torch.Tensor) -> float:
    """Distinct pairs of neighbours over all pairs, per row of [B, n], averaged. 1: no repeats."""
    shares = []
    for row in tokens.tolist():
        pairs = list(itertools.pairwise(row))
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Point:
    """One strength of one method.

    Attributes:
        method: "clamp" or "difference of means".
        strength: multiples of the latent's maximum activation (for a vector, its added norm).
        share: of the feature's own tokens in the sampled text.
        distinct_bigrams: of the sampled text.
        loss: of the steered model on held-out text, nats.
    """

    method: str
    strength: float
    share: float
    distinct_bigrams: float
    loss: float


def damage(point: Point, base: Point, loss_scale: float) -> float:
    """Loss added by steering, as a share of what removing the layer's output would add, plus the
    share of distinct bigrams lost. 0 is no damage."""
    added = max(0.0, point.loss - base.loss) / loss_scale
    repeated = max(0.0, 1 - point.distinct_bigrams / max(base.distinct_bigrams, 1e-9))
    return added + repeated


ENOUGH = 0.25  # of all tokens: text that holds more of one concept no longer reads as text


def net_effect(point: Point, base: Point, loss_scale: float) -> float:
    """Gain in the share of the feature's own tokens, up to `ENOUGH`, minus the damage."""
    gain = min(point.share, max(ENOUGH, base.share)) - base.share
    return gain - damage(point, base, loss_scale)
