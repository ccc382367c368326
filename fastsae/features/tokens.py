"""How an SAE's latents relate to tokens."""

from __future__ import annotations

import torch


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
