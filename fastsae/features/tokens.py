"""How an SAE's latents relate to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from .stats import FeatureStats

_BLOCK = 64  # latents of which something dense is made at a time


class TokenShares:
    """Which tokens a latent's activation falls on, from the places where it fires.

    Args:
        tokens: [P] int64, the token id that the activation at each place counts for; -1 for none.

    Attributes:
        ids: [M] the token ids that occur, increasing.
    """

    def __init__(self, stats: FeatureStats, tokens: torch.Tensor) -> None:
        self._stats = stats
        self._n_latents = len(stats.count)
        ids, self._column = np.unique(tokens.numpy(), return_inverse=True)
        self._none = int(ids[0] < 0)
        self.ids = torch.from_numpy(ids[self._none :])

    def rows(self, low: int, high: int) -> torch.Tensor:
        """[high - low, M] float64: shares of the activation of some latents, each row's sum 1."""
        latents, places, values = self._stats.span(low, high)
        width = len(self.ids) + self._none
        keys = (latents - low).astype(np.int64) * width + self._column[places]
        mass = np.bincount(keys, np.abs(values), (high - low) * width).reshape(-1, width)
        mass = mass[:, self._none :]
        return torch.from_numpy(mass / np.maximum(mass.sum(1, keepdims=True), 1e-300))

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """`rows` of all latents, some at a time, and which they are."""
        for low in range(0, self._n_latents, _BLOCK):
            high = min(low + _BLOCK, self._n_latents)
            yield slice(low, high), self.rows(low, high)

    def of(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of a latent by falling share of its activation, and these shares (sum 1)."""
        shares = self.rows(latent, latent + 1)[0]
        shares, at = shares.sort(descending=True, stable=True)
        count = int((shares > 0).sum())
        return self.ids[at[:count]], shares[:count]


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


def stands_whole(tokens: torch.Tensor, texts: Mapping[int, str], n_tokens: int) -> torch.Tensor:
    """[V] bool: tokens that more often than not are no piece of a longer word.

    Args:
        tokens: [W, T], windows of text.
        texts: of the tokens that occur.
    """
    begins, ends = (torch.zeros(n_tokens, dtype=torch.bool) for _ in range(2))
    for token, text in texts.items():
        begins[token], ends[token] = text[:1].isalnum(), text[-1:].isalnum()
    cut = ends[tokens[:, :-1]] & begins[tokens[:, 1:]]
    piece = torch.zeros_like(tokens, dtype=torch.bool)
    piece[:, 1:] |= cut
    piece[:, :-1] |= cut
    pieces = torch.bincount(tokens[piece], minlength=n_tokens)
    return 2 * pieces < torch.bincount(tokens.reshape(-1), minlength=n_tokens)


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
