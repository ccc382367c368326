"""Tokens as a reader sees them, and how an SAE's latents relate to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TokenText:
    """The text of single tokens, exactly as they stand in running text.

    `tokenizer.decode([i])` alone drops the leading space of many vocabularies; decoding after
    another token does not.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._prefix = self._decode(self._anchor)
        self._cache: dict[int, str] = {}

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def __getitem__(self, token: int) -> str:
        if token not in self._cache:
            text = self._decode([*self._anchor, token])
            self._cache[token] = text[len(self._prefix) :]
        return self._cache[token]

    def text(self, tokens: list[int]) -> str:
        """A run of tokens, decoded together (bytes of one character meet)."""
        return self._decode([*self._anchor, *tokens])[len(self._prefix) :]


def is_word(text: str) -> bool:
    """Three letters or a digit: enough for a reader to see what it is."""
    return sum(c.isalpha() for c in text) >= 3 or any(c.isdigit() for c in text)


class TokenMass:
    """For every latent, the activation that falls on each token id: a sparse [F, V] sum.

    Holds one entry per (latent, token) that occurs, and up to `pending` more until they are merged.
    """

    def __init__(self, n_latents: int, n_tokens: int, *, pending: int = 1 << 22):
        self.shape = (n_latents, n_tokens)
        self._limit = pending
        self._keys = [torch.empty(0, dtype=torch.long)]
        self._mass = [torch.empty(0, dtype=torch.float64)]
        self._waiting = 0

    def update(self, values: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> None:
        """values, indices [N, K]; tokens [N], the token that each row's activation counts for."""
        values, indices = values.detach().double().cpu(), indices.long().cpu()
        active = values != 0
        self._keys.append((indices * self.shape[1] + tokens[:, None])[active])
        self._mass.append(values[active].abs())
        self._waiting += len(self._mass[-1])
        if self._waiting > self._limit:
            self._merge()

    def _merge(self) -> None:
        keys, inverse = torch.unique(torch.cat(self._keys), return_inverse=True)
        mass = torch.zeros(len(keys), dtype=torch.float64)
        mass.index_add_(0, inverse, torch.cat(self._mass))
        self._keys, self._mass, self._waiting = [keys], [mass], 0

    def of(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of a latent by falling mass, and their shares of its mass (sum 1)."""
        if self._waiting:
            self._merge()
        keys, mass = self._keys[0], self._mass[0]
        bounds = torch.tensor([latent, latent + 1]) * self.shape[1]
        low, high = torch.searchsorted(keys, bounds).tolist()
        tokens, mass = keys[low:high] - latent * self.shape[1], mass[low:high]
        order = torch.argsort(mass, descending=True, stable=True)
        return tokens[order], (mass / mass.sum().clamp(min=1e-300))[order]


def own_tokens(
    fires_on: tuple[torch.Tensor, torch.Tensor], promoted: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """Words of a latent: where most of its activation falls, and what its decoder promotes.

    Args:
        fires_on: of `TokenMass.of`.
        promoted: token ids, strongest first.
        words: [V] bool, tokens that say something alone.
    """
    tokens, share = fires_on
    own = torch.cat([tokens[:6][share[:6] >= 0.05], promoted[:10]]).unique()
    return own[words[own]]


def final_norm_of(model: nn.Module) -> nn.Module | None:
    """The norm before the unembedding, where the families of transformers keep it."""
    for path in (
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.norm",
        "model.language_model.norm",
        "model.decoder.final_layer_norm",
    ):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


@torch.no_grad()
def logit_effect(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """What each direction of the residual stream adds to the logits, on the direct path.

    The final norm is taken at its scale (gamma; centred first for LayerNorm), its division by the
    token's own norm left out, and the mean over the vocabulary subtracted, since softmax ignores
    it. Later blocks are not in it.

    Args:
        directions: [M, D], rows of W_dec.

    Returns:
        [M, V] float32.
    """
    unembedding = model.get_output_embeddings().weight.float()  # [V, D]
    d = directions.float()
    norm = final_norm_of(model)
    weight = getattr(norm, "weight", None)
    if norm is not None and "RMS" not in type(norm).__name__:
        d = d - d.mean(-1, keepdim=True)
    if weight is not None:
        gamma = weight.float()
        # Gemma's RMSNorm multiplies by 1 + weight.
        d = d * (1 + gamma if "Gemma" in type(norm).__name__ else gamma)
    effect = d @ unembedding.T
    return effect - effect.mean(-1, keepdim=True)
