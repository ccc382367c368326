"""Which tokens a steerer edits: absolute positions, from what the model's forward is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

EXCLUDABLE = ("bos", "pad")


@dataclass(frozen=True)
class Positions:
    """A choice of tokens. Made by the functions below.

    Attributes:
        prompt, generated: are tokens of the prompt, and those after it, edited?
        exclude: of "bos" and "pad".
        only: positions counted from a sequence's first real token, or None for all.
    """

    prompt: bool
    generated: bool
    exclude: frozenset[str]
    only: tuple[int, ...] | None = None

    @property
    def everywhere(self) -> bool:
        return self.prompt and self.generated and not self.exclude and self.only is None


def _exclusions(exclude: Iterable[str]) -> frozenset[str]:
    names = frozenset((exclude,) if isinstance(exclude, str) else exclude)
    if names - set(EXCLUDABLE):
        raise ValueError(f"positions: exclude takes {', '.join(EXCLUDABLE)}, got {sorted(names)}")
    return names


def prompt_and_generated(exclude: Iterable[str] = ()) -> Positions:
    """Every token."""
    return Positions(True, True, _exclusions(exclude))


def prompt_only(exclude: Iterable[str] = ()) -> Positions:
    """The tokens of the first forward pass inside the context."""
    return Positions(True, False, _exclusions(exclude))


def generated_only(exclude: Iterable[str] = ()) -> Positions:
    """The tokens after the prompt. The first generated token is predicted from the prompt's last
    position, which is not edited then."""
    return Positions(False, True, _exclusions(exclude))


def at(positions: Iterable[int], exclude: Iterable[str] = ()) -> Positions:
    """Positions counted from each sequence's first real token (padding left out)."""
    chosen = tuple(sorted(set(positions)))
    if any(p < 0 for p in chosen):
        raise ValueError(f"positions: must be 0 or more, got {chosen}")
    return Positions(True, True, _exclusions(exclude), chosen)


def past_length(kwargs: dict[str, Any]) -> Any:
    """How many tokens the cache holds before this pass: an int, or a tensor (static caches).

    Raises:
        ValueError: there is a cache that does not say (a state-space model's), nor does anything.
    """
    # transformers 5.24, 4.56, older; state-space models; RWKV
    names = ("cache", "past_key_values", "past_key_value", "cache_params", "state")
    cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        with contextlib.suppress(ValueError):  # layers without attention know none
            return cache.get_seq_length()
    place = kwargs.get("cache_position")
    if place is None:
        raise ValueError(
            f"steer: positions need to know where a pass begins, and {type(cache).__name__} does "
            "not say how many tokens it holds; steer every position, or run with use_cache=False"
        )
    return place[0]


def _real_2d(attention: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] bool, is the token no padding? and [B, T], its position among those."""
    real = attention.to(torch.bool)
    order = real.cumsum(-1) - 1  # [B, total]
    return real.index_select(1, column), order.index_select(1, column)


def _real_4d(
    attention: torch.Tensor, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of [B, 1, T, total], true or 0.0 where a token sees one, as `generate` gives it with
    a static cache: padding on the left sees nothing."""
    sees = attention[:, 0] if attention.dtype == torch.bool else attention[:, 0] == 0
    real = sees.any(-1)
    # counting what it sees would not do where a window slides
    order = sees.sum(-1) - 1 if position_ids is None else position_ids
    return real, torch.where(real, order, -1)


def is_bos(ids: torch.Tensor | None, bos: tuple[int, ...]) -> torch.Tensor:
    """[B, T] bool: the BOS, wherever it stands (several documents in one sequence have several)."""
    if ids is None or not bos:
        raise ValueError("steer: exclude='bos' needs input_ids and the model's bos_token_id")
    found = ids == bos[0]
    for one in bos[1:]:
        found = found | (ids == one)
    return found


def token_mask(
    where: Positions,
    kwargs: dict[str, Any],
    prompt_length: int,
    bos: tuple[int, ...],
    only: torch.Tensor | None,
) -> torch.Tensor:
    """[B, T] bool: which tokens of this forward pass are edited.

    Columns are absolute (cache length plus offset), so that cached, uncached and chunked passes
    agree; with an attention mask, positions count from the first real token.
    """
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    like = ids if ids is not None else embeds
    if like is None:
        raise ValueError("steer: the model was called without input_ids or inputs_embeds")
    B, T = like.shape[:2]
    column = past_length(kwargs) + torch.arange(T, device=like.device)  # [T]
    mask = torch.ones(B, T, dtype=torch.bool, device=like.device)
    if not where.prompt:
        mask = mask & (column >= prompt_length)
    if not where.generated:
        mask = mask & (column < prompt_length)
    if not where.exclude and only is None:
        return mask
    position = column.expand(B, T)
    attention = kwargs.get("attention_mask")
    if isinstance(attention, dict):  # one for each kind of layer
        attention = attention.get("full_attention", next(iter(attention.values())))
    if attention is not None:
        if not isinstance(attention, torch.Tensor) or attention.dim() not in (2, 4):
            raise ValueError(
                "steer: positions need attention_mask [B, tokens] or [B, 1, T, tokens], got "
                f"{tuple(getattr(attention, 'shape', ())) or type(attention).__name__}"
            )
        real, position = (
            _real_2d(attention, column)
            if attention.dim() == 2
            else _real_4d(attention, kwargs.get("position_ids"))
        )
        if "pad" in where.exclude:
            mask = mask & real
    if "bos" in where.exclude:
        mask = mask & ~is_bos(ids, bos)
    if only is not None:  # where.only on the device: copied before the model runs
        mask = mask & torch.isin(position, only.to(position.device))
    return mask
