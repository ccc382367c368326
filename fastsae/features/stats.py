"""Where every latent fires and how strongly, gathered in one pass over (values, indices)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_Array = np.ndarray


@dataclass(frozen=True)
class _ByLatent:
    """All firings, latent by latent, each in the order of its places."""

    bounds: _Array  # [F + 1], where each latent's firings begin
    latents: _Array
    places: _Array
    values: _Array
    starts: _Array  # the first place of every window
    count: torch.Tensor
    total: torch.Tensor
    max: torch.Tensor


class FeatureStats:
    """What F latents do on a stream of tokens.

    Keeps every firing (latent, place, activation), 16 bytes for each active latent of each token;
    nothing is O(N · F). What is asked of a latent is read from its own firings alone, and does not
    depend on how the stream was cut into batches.

    A latent fires where its activation is not 0.

    Args:
        kept: windows that `top` gives at most.

    Attributes:
        n_tokens: tokens seen.
    """

    def __init__(self, n_latents: int, *, kept: int = 32) -> None:
        self.n_tokens = 0
        self._n_latents = n_latents
        self._kept = kept
        self._firings: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._starts: list[torch.Tensor] = []
        self._sorted: _ByLatent | None = None

    def update(self, values: torch.Tensor, indices: torch.Tensor, places: torch.Tensor) -> None:
        """Adds some windows.

        Args:
            values, indices: [B, T, K], the active latents of B windows. A window's tokens must
                come in one call.
            places: [B, T] int64, a number for every token, increasing, all tokens of one window
                below those of the next.
        """
        values, indices = values.detach().float().cpu(), indices.int().cpu()
        active = values != 0
        spots = places[:, :, None].expand_as(indices)[active]
        self._firings.append((indices[active], spots, values[active]))
        self._starts.append(places[:, 0])
        self.n_tokens += places.numel()
        self._sorted = None

    def _by_latent(self) -> _ByLatent:
        if self._sorted is None:
            none = (torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.long),
                    torch.empty(0, dtype=torch.float32))  # fmt: skip
            latent, place, value = map(torch.cat, zip(none, *self._firings))
            latent, order = torch.sort(latent, stable=True)
            place, value = place[order], value[order]
            self._firings = [(latent, place, value)]  # later ones come behind, latent by latent
            edges = torch.arange(self._n_latents + 1, dtype=torch.int32)
            bounds = torch.searchsorted(latent, edges)
            total = torch.bincount(latent, value.double(), self._n_latents)
            largest = torch.zeros(self._n_latents, dtype=torch.float32)
            largest.scatter_reduce_(0, latent.long(), value, "amax", include_self=False)
            self._sorted = _ByLatent(
                bounds.numpy(), latent.numpy(), place.numpy(), value.numpy(),
                torch.cat([torch.empty(0, dtype=torch.long), *self._starts]).numpy(),
                bounds.diff(), total, largest,
            )  # fmt: skip
        return self._sorted

    @property
    def count(self) -> torch.Tensor:
        """[F] int64: tokens on which the latent fires."""
        return self._by_latent().count

    @property
    def total(self) -> torch.Tensor:
        """[F] float64: sum of its activations."""
        return self._by_latent().total

    @property
    def max(self) -> torch.Tensor:
        """[F] float32: the largest activation where the latent fires, which is negative where all
        are (an identity activation); 0 where it never fires."""
        return self._by_latent().max

    @property
    def density(self) -> torch.Tensor:
        """[F] share of tokens on which the latent fires."""
        return self.count.float() / max(1, self.n_tokens)

    @property
    def mean_active(self) -> torch.Tensor:
        """[F] mean activation where it fires."""
        return (self.total / self.count.clamp(min=1)).float()

    def histogram(self, bins: int) -> torch.Tensor:
        """[F, bins] int64: firings by activation, in equal steps from 0 to the latent's maximum.
        Negative activations are left out."""
        latents, values = self._by_latent().latents, self._by_latent().values
        positive = values > 0
        latents, values = latents[positive].astype(np.int64), values[positive]
        step = np.minimum(values / self.max.numpy()[latents] * bins, bins - 1).astype(np.int64)
        counts = np.bincount(latents * bins + step, minlength=self._n_latents * bins)
        return torch.from_numpy(counts).view(self._n_latents, bins)

    def span(self, low: int, high: int) -> tuple[_Array, _Array, _Array]:
        """Latents, places and activations of all firings of latents low to high - 1, latent by
        latent, each by place."""
        firings = self._by_latent()
        here = slice(firings.bounds[low], firings.bounds[high])
        return firings.latents[here], firings.places[here], firings.values[here]

    def of(self, latent: int) -> tuple[_Array, _Array]:
        """Places and activations of all firings of a latent, by place."""
        return self.span(latent, latent + 1)[1:]

    def top(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and activations of a latent in its strongest windows, strongest first.

        One place of each window, so that one text does not fill the list. Of equals the first.
        """
        places, values = self.of(latent)
        starts = self._by_latent().starts
        many = 4 * self._kept
        while True:  # sorting a few is enough, where they are of windows enough
            few = np.arange(len(values))
            if many < len(values):
                least = np.partition(values, len(values) - many)[len(values) - many]
                few = np.flatnonzero(values >= least)
            order = few[np.argsort(-values[few], kind="stable")]
            windows = np.searchsorted(starts, places[order], side="right").tolist()
            first = {window: i for i, window in reversed([*enumerate(windows)])}
            if len(first) >= self._kept or many >= len(values):
                break
            many *= 4
        chosen = order[sorted(first.values())[: self._kept]]
        return torch.from_numpy(places[chosen]), torch.from_numpy(values[chosen])

    def between(self, latent: int, low: float, high: float, count: int) -> tuple[list[int], int]:
        """Up to `count` places with an activation in (low, high], spread evenly over the stream,
        and how many there are."""
        places, values = self.of(latent)
        found = places[(values > low) & (values <= high)]
        taken = min(count, len(found))
        return found[np.arange(taken) * len(found) // max(1, taken)].tolist(), len(found)
