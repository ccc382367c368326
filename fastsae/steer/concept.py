"""A latent's concept in text: which tokens it is, where they stand, what leads to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..features.tokens import TokenMass, own_tokens
from ..lm.harvest import Store
from ..lm.readout import logit_effect
from ..lm.tokens import TokenText, is_word
from ..nn import SparseCoder


@torch.no_grad()
def latent_words(
    model: Any, tokenizer: Any, sae: SparseCoder, latent: int, store: Store
) -> torch.Tensor:
    """Token ids of the words that a latent fires on in `store` and that its decoder promotes.

    Raises:
        ValueError: there are none.
    """
    tokens = store.windows.kept.reshape(-1)[: len(store)]
    effect = logit_effect(model, sae.W_dec[latent : latent + 1])[0].cpu()
    fires = TokenMass(1, len(effect))
    for rows, here in zip(store.activations.split(8192), tokens.split(8192)):
        code = sae.encode(rows)
        active = (code.values * (code.indices == latent)).sum(-1, keepdim=True)
        fires.update(active, torch.zeros_like(active, dtype=torch.long), here)
    counts = torch.bincount(tokens, minlength=len(effect))
    text = TokenText(tokenizer)
    words = torch.zeros(len(effect), dtype=torch.bool)
    for token in counts.nonzero().flatten().tolist():
        words[token] = is_word(text[token])
    promoted = effect.masked_fill(counts < 3, -torch.inf).topk(min(10, len(effect))).indices
    own = own_tokens(fires.of(0), promoted, words)
    if not len(own):
        raise ValueError(f"latent {latent} neither fires on words nor promotes any: name some")
    return own


def word_tokens(tokenizer: Any, words: Sequence[str], n_tokens: int) -> torch.Tensor:
    """Ids of every token that is one of `words`, space and case aside.

    Raises:
        ValueError: a word is no single token of this vocabulary.
    """
    text = TokenText(tokenizer)
    ids: list[int] = []
    known = [text[token].strip().lower() for token in range(n_tokens)]
    for word in words:
        found = [i for i, one in enumerate(known) if one == word.strip().lower()]
        if not found:
            raise ValueError(f"{word!r} is no single token of this model's vocabulary")
        ids += found
    return torch.tensor(sorted(set(ids)))


def leads(store: Store, concept: torch.Tensor) -> torch.Tensor:
    """For every row of the store, whether the next token is among `concept`."""
    tokens = store.windows.kept
    following = torch.zeros_like(tokens, dtype=torch.bool)
    following[:, :-1] = torch.isin(tokens[:, 1:], concept)
    return following.reshape(-1)


def excerpts(store: Store, concept: torch.Tensor, count: int, length: int = 24) -> list[list[int]]:
    """The stretches of `length` tokens that hold most of `concept`, each of another document."""
    tokens = store.windows.kept
    held = torch.isin(tokens, concept).float().unfold(1, min(length, tokens.shape[1]), 1).sum(-1)
    most, start = held.max(1)
    out: dict[str, list[int]] = {}
    for window in torch.argsort(most, descending=True, stable=True).tolist():
        if len(out) == count or most[window] == 0:
            break
        at = int(start[window])
        out.setdefault(store.windows.documents[window], tokens[window, at : at + length].tolist())
    return list(out.values())
