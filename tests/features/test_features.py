"""Statistics of latents against a dense computation, examples, and the choice of latents."""

from __future__ import annotations

import pytest
import torch

import fastsae
from fastsae.features.cards import Scores, choose_latents, make_example
from fastsae.features.stats import FeatureStats
from fastsae.features.tokens import TokenMass
from fastsae.lm.harvest import Store, Windows

W, T, K, F = 7, 11, 3, 9


def stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(W, T, K, generator=g).relu()
    indices = torch.rand(W, T, F, generator=g).argsort(-1)[..., :K].int()
    return values, indices, torch.arange(W * T).view(W, T)


def fed(cuts: list[int], **options: int) -> FeatureStats:
    values, indices, places = stream()
    stats = FeatureStats(F, **options)
    for low, high in zip([0, *cuts], [*cuts, W]):
        stats.update(values[low:high], indices[low:high], places[low:high])
    return stats


def test_stats_agree_with_the_dense_activations() -> None:
    values, indices, _ = stream()
    dense = torch.zeros(W, T, F).scatter(-1, indices.long(), values)
    stats = fed([2, 5], kept=4)
    assert stats.n_tokens == W * T
    assert stats.count.tolist() == (dense > 0).sum((0, 1)).tolist()
    torch.testing.assert_close(stats.max, dense.amax((0, 1)))
    torch.testing.assert_close(stats.density, (dense > 0).float().mean((0, 1)))
    torch.testing.assert_close(stats.total.float(), dense.sum((0, 1)))
    for j in range(F):
        places, activations = stats.top(j)
        strongest = dense[..., j].amax(1).sort(descending=True).values[:4]
        torch.testing.assert_close(activations, strongest[strongest > 0])
        for place, activation in zip(places.tolist(), activations.tolist()):
            assert dense.view(-1, F)[place, j] == activation


def test_stats_do_not_depend_on_batches() -> None:
    one, other = fed([]), fed([1, 2, 6])
    for j in range(F):
        for a, b in zip((*one.top(j), *one.sample(j)), (*other.top(j), *other.sample(j))):
            assert torch.equal(a, b)


def test_token_mass_with_and_without_merging_agrees_with_a_dense_sum() -> None:
    values, indices, _ = stream()
    values, indices = values.view(-1, K), indices.view(-1, K)
    tokens = torch.randint(5, (W * T,), generator=torch.Generator().manual_seed(1))
    dense = torch.zeros(F, 5, dtype=torch.float64)
    for v, i, t in zip(values, indices, tokens):
        dense[i.long(), t] += v.double()
    for pending in (1, 1 << 20):
        mass = TokenMass(F, 5, pending=pending)
        mass.update(values[:30], indices[:30], tokens[:30])
        mass.update(values[30:], indices[30:], tokens[30:])
        for j in range(F):
            ids, shares = mass.of(j)
            assert shares.tolist() == sorted(shares.tolist(), reverse=True)
            torch.testing.assert_close(shares, dense[j, ids] / dense[j].sum())


def test_choice_skips_twins_and_dead_latents() -> None:
    mass = TokenMass(4, 5)
    mass.update(torch.ones(4, 1), torch.arange(4).view(4, 1).int(), torch.arange(4))
    W_dec = torch.eye(4)
    W_dec[1] = W_dec[0]
    zeros = torch.zeros(4)
    score = torch.tensor([3.0, 2.0, 1.0, -torch.inf])
    scores = Scores(score, zeros, zeros, zeros, torch.zeros(4, 1, dtype=torch.long))
    assert choose_latents(scores, mass, W_dec, 4) == [0, 2]


class Letters:
    def __getitem__(self, token: int) -> str:
        return chr(97 + token)

    def pieces(self, tokens: list[int]) -> list[str]:
        return [self[t] for t in tokens]


def test_example_has_the_text_and_activations_around_its_place() -> None:
    sae = fastsae.nn.TopKSAE(4, 8, 2, seed=0).eval()
    x = torch.randn(2 * 5, 4, generator=torch.Generator().manual_seed(0))
    store = Store(x, Windows(torch.arange(12).view(2, 6), ["one", "two"]))
    values, indices, _ = sae.encode(x)
    place = 7  # window 1, position 3: token 9
    latent = int(indices[place, 0])
    got = make_example(latent, place, sae, store, Letters(), before=1, after=2)  # type: ignore[arg-type]
    assert got.document == "two"
    assert got.tokens == ["i", "j", "k", "l"]
    assert got.peak == 1
    assert got.activations[1] == pytest.approx(float(values[place, 0].detach()), abs=1e-3)


def test_negative_activations_have_a_maximum():
    """An identity activation: the largest of what fired, not 0."""
    stats = FeatureStats(3)
    values = torch.tensor([[[-3.0], [-2.0], [0.0]]])
    stats.update(values, torch.tensor([[[1], [1], [2]]]), torch.arange(3)[None])
    assert stats.max.tolist() == [0.0, -2.0, 0.0] and stats.count.tolist() == [0, 2, 0]
    assert stats.top(1)[1].tolist() == [-2.0]
