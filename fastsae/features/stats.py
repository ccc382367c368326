"""Statistics and top examples of every latent, gathered in one pass over (values, indices)."""

from __future__ import annotations

import torch


class FeatureStats:
    """Running statistics of F latents over a stream of tokens. Memory O(F · kept), none O(N · F).

    Per latent: how often it fires, the sum and the maximum of its activation, the `kept` windows
    where its activation is largest (one place per window, so that one text does not fill the
    list), and `sampled` windows where it fires at all, drawn evenly by a hash of the place.

    Ties are broken by position; the result does not depend on how the stream is cut into batches.

    Attributes:
        n_tokens: tokens seen.
        count: [F] int64, tokens on which the latent fires: its activation is not 0.
        total: [F] float64, sum of its activations.
    """

    def __init__(self, n_latents: int, *, kept: int = 32, sampled: int = 8, seed: int = 0):
        self.n_tokens = 0
        self.count = torch.zeros(n_latents, dtype=torch.long)
        self.total = torch.zeros(n_latents, dtype=torch.float64)
        self._max = torch.full((n_latents,), -torch.inf, dtype=torch.float32)
        self._top = _TopPlaces(n_latents, kept)
        self._random = _TopPlaces(n_latents, sampled)
        self._seed = seed

    def update(self, values: torch.Tensor, indices: torch.Tensor, places: torch.Tensor) -> None:
        """Adds some windows.

        Args:
            values, indices: [B, T, K], the active latents of B windows. A window's tokens must
                come in one call.
            places: [B, T] int64, a number for every token, increasing, all tokens of one window
                below those of the next.
        """
        values, indices = values.detach().float().cpu(), indices.long().cpu()
        self.n_tokens += places.numel()
        active = values != 0
        windows = torch.arange(places.shape[0])[:, None, None].expand_as(indices)[active]
        spots = places[:, :, None].expand_as(indices)[active]
        value, latent = values[active], indices[active]
        if not len(latent):
            return
        self.count += torch.bincount(latent, minlength=len(self.count))
        self.total.index_add_(0, latent, value.double())
        self._max.scatter_reduce_(0, latent, value, "amax")

        # the strongest place of every (latent, window), the first of equals: [F, B]
        n_latents, n_windows = len(self.count), places.shape[0]
        group = latent * n_windows + windows
        best = value.new_full((n_latents * n_windows,), -torch.inf)
        best.scatter_reduce_(0, group, value, "amax")
        strongest = value == best[group]
        nowhere = torch.iinfo(torch.long).max
        spot = torch.full((n_latents * n_windows,), nowhere)
        spot.scatter_reduce_(0, group[strongest], spots[strongest], "amin")
        best, spot = best.view(n_latents, n_windows), spot.view(n_latents, n_windows)
        fires = spot < nowhere
        self._top.add(best.double().masked_fill(~fires, -torch.inf), best, spot)
        names = spot * n_latents + torch.arange(n_latents)[:, None]
        hashed = _hash(names, self._seed).masked_fill(~fires, -torch.inf)
        self._random.add(hashed, best, spot)

    @property
    def max(self) -> torch.Tensor:
        """[F] float32: the largest activation where the latent fires, which is negative where all
        are (an identity activation); 0 where it never fires."""
        return self._max.masked_fill(self.count == 0, 0.0)

    @property
    def density(self) -> torch.Tensor:
        """[F] share of tokens on which the latent fires."""
        return self.count.float() / max(1, self.n_tokens)

    @property
    def mean_active(self) -> torch.Tensor:
        """[F] mean activation where it fires."""
        return (self.total / self.count.clamp(min=1)).float()

    def top(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and activations of the strongest windows of a latent, strongest first."""
        return self._top.of(latent)

    def sample(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and activations of windows drawn evenly among those where it fires."""
        return self._random.of(latent)


class _TopPlaces:
    """For every latent the `kept` entries of highest rank, with their values and places."""

    def __init__(self, n_latents: int, kept: int):
        self.rank = torch.full((n_latents, kept), -torch.inf, dtype=torch.float64)
        self.value = torch.zeros(n_latents, kept, dtype=torch.float32)
        self.place = torch.full((n_latents, kept), -1, dtype=torch.long)

    def add(self, rank: torch.Tensor, value: torch.Tensor, place: torch.Tensor) -> None:
        """[F, B] each, places increasing along B; rank -inf is no entry."""
        ranks = torch.cat([self.rank, rank], 1)
        order = torch.argsort(ranks, dim=1, descending=True, stable=True)[:, : self.rank.shape[1]]
        self.rank = ranks.gather(1, order)
        self.value = torch.cat([self.value, value], 1).gather(1, order)
        self.place = torch.cat([self.place, place], 1).gather(1, order)

    def of(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        filled = self.rank[latent] > -torch.inf
        return self.place[latent][filled], self.value[latent][filled]


def _hash(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A fixed pseudo-random number in [0, 1) for every int64 (splitmix64's mixing)."""
    z = x + (seed * 2 + 1) * -7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() / 2.0**53


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
