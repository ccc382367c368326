"""Statistics of latents against a dense computation, and the choice of latents."""

from __future__ import annotations

import torch

from fastsae.features.cards import choose_latents, strongest_effects
from fastsae.features.stats import FeatureStats
from fastsae.features.tokens import TokenMass, TokenShares, own_tokens, stands_whole

W, T, K, F = 7, 11, 3, 9


def stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(W, T, K, generator=g).relu()
    indices = torch.rand(W, T, F, generator=g).argsort(-1)[..., :K].int()
    return values, indices, torch.arange(W * T).view(W, T)


def dense_stream() -> torch.Tensor:
    values, indices, _ = stream()
    return torch.zeros(W, T, F).scatter(-1, indices.long(), values)


def fed(cuts: list[int], **options: int) -> FeatureStats:
    values, indices, places = stream()
    stats = FeatureStats(F, **options)
    for low, high in zip([0, *cuts], [*cuts, W]):
        stats.update(values[low:high], indices[low:high], places[low:high])
    return stats


def test_stats_agree_with_the_dense_activations() -> None:
    dense = dense_stream()
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
        all_places, values = stats.of(j)
        assert all_places.tolist() == dense.view(-1, F)[:, j].nonzero().flatten().tolist()
        assert values.tolist() == dense.view(-1, F)[all_places, j].tolist()


def test_histograms_count_every_firing() -> None:
    dense, stats = dense_stream(), fed([3])
    got = stats.histogram(5)
    assert got.sum(1).tolist() == stats.count.tolist()
    for j in range(F):
        fired = dense[..., j][dense[..., j] > 0]
        assert got[j].tolist() == torch.histc(fired, 5, 0.0, float(fired.max())).tolist()


def test_places_of_an_interval_are_spread_over_the_stream() -> None:
    stats = FeatureStats(2)
    values = torch.arange(1.0, 101.0).view(10, 10, 1)
    stats.update(values, torch.ones(10, 10, 1).int(), torch.arange(100).view(10, 10))
    assert stats.between(1, 20.0, 60.0, 4) == ([20, 30, 40, 50], 40)
    assert stats.between(1, 98.0, 100.0, 4) == ([98, 99], 2)
    assert stats.between(1, 100.0, 200.0, 4) == ([], 0)
    assert stats.between(0, 0.0, 1.0, 4) == ([], 0)


def test_stats_do_not_depend_on_batches() -> None:
    one, other = fed([]), fed([1, 2, 6])
    assert torch.equal(one.histogram(4), other.histogram(4))
    assert torch.equal(one.max, other.max) and torch.equal(one.total, other.total)
    for j in range(F):
        assert one.between(j, 0.2, 0.9, 3) == other.between(j, 0.2, 0.9, 3)
        for a, b in zip(one.top(j), other.top(j)):
            assert torch.equal(a, b)


def test_stats_that_are_asked_can_go_on() -> None:
    values, indices, places = stream()
    asked, other = FeatureStats(F), fed([])
    for low, high in ((0, 3), (3, W)):
        asked.update(values[low:high], indices[low:high], places[low:high])
        assert int(asked.count.sum()) == int((values[:high] > 0).sum())
    for j in range(F):
        assert asked.of(j)[0].tolist() == other.of(j)[0].tolist()


def test_a_latent_that_never_fires_has_nothing() -> None:
    stats = FeatureStats(3)
    stats.update(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1).int(), torch.arange(2)[None])
    assert stats.count.tolist() == stats.max.tolist() == stats.total.tolist() == [0, 0, 0]
    assert not stats.top(1)[0].numel() and not stats.histogram(4).any()


def test_token_shares_agree_with_a_dense_sum() -> None:
    dense, stats = dense_stream().view(-1, F).double(), fed([4])
    tokens = torch.randint(-1, 5, (W * T,), generator=torch.Generator().manual_seed(1))
    shares = TokenShares(stats, tokens)
    for j in range(F):
        mass = torch.stack([dense[tokens == t, j].sum() for t in range(5)])
        ids, got = shares.of(j)
        assert got.tolist() == sorted(got.tolist(), reverse=True)
        assert sorted(ids.tolist()) == mass.nonzero().flatten().tolist()
        torch.testing.assert_close(got, mass[ids] / mass.sum())


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


def test_tokens_that_are_pieces_of_words_do_not_stand_whole() -> None:
    texts = {0: "hand", 1: "ler", 2: " the", 3: "(", 4: "un"}
    windows = torch.tensor(
        [[2, 0, 1], [3, 0, 3], [0, 3, 2]]
    )  # " the|hand|ler", "(hand(", "hand( the"
    assert stands_whole(windows, texts, 6).tolist() == [True, False, False, True, False, False]


def test_own_tokens_are_words_it_fires_on_or_promotes() -> None:
    words = torch.tensor([True, True, False, True, True])
    fires_on = torch.tensor([0, 2, 3]), torch.tensor([0.6, 0.36, 0.04])
    assert own_tokens(fires_on, torch.tensor([1, 2]), words).tolist() == [0, 1]


def test_effects_have_values_and_leave_out_rare_tokens() -> None:
    effect = torch.tensor([[0.5, -9.0, -0.25, 9.0, 0.75], [1.0, 0.0, -1.0, 0.0, 2.0]])
    got = strongest_effects(effect, torch.tensor([5, 2, 5, 0, 5]), count=2)
    assert got.promoted.tolist() == [[4, 0], [4, 0]]
    assert got.raised.tolist() == [[0.75, 0.5], [2.0, 1.0]]
    assert got.suppressed.tolist() == [[2, 0], [2, 0]]
    assert got.lowered.tolist() == [[-0.25, 0.5], [-1.0, 1.0]]
    assert strongest_effects(effect, torch.tensor([5, 0, 0, 0, 0])).promoted.tolist() == [[0], [0]]


class Chosen:
    """Latents 0 to 3, unlike in all that choosing looks at; a test makes two alike."""

    def __init__(self) -> None:
        self.score = torch.tensor([4.0, 3.0, 2.0, 1.0])
        self.W_dec = torch.eye(4)
        self.fires_on = [{0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}]
        self.promoted = torch.arange(4, 12).view(4, 2)
        self.alike = torch.arange(12)

    def of(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        shares = self.fires_on[latent]
        return torch.tensor(list(shares)), torch.tensor(list(shares.values()))

    def latents(self, count: int = 4) -> list[int]:
        return choose_latents(self.score, self.W_dec, self, self.promoted, self.alike, count)  # type: ignore[arg-type]


def test_choice_takes_the_best_that_are_usable() -> None:
    made = Chosen()
    assert made.latents() == [0, 1, 2, 3]
    assert made.latents(2) == [0, 1]
    made.score[1] = -torch.inf
    assert made.latents() == [0, 2, 3]


def test_choice_shows_one_of_near_duplicates_by_decoder() -> None:
    made = Chosen()
    made.W_dec[1] = made.W_dec[0] + 0.5 * made.W_dec[1]
    made.W_dec[2] = 0.5 * made.W_dec[0] + made.W_dec[2]  # a cosine of 0.45
    assert made.latents() == [0, 2, 3]


def test_choice_shows_one_of_near_duplicates_by_the_tokens_they_fire_on() -> None:
    made = Chosen()
    made.fires_on[1] = {1: 0.6, 0: 0.4}
    made.fires_on[2] = {2: 0.8, 0: 0.2}
    assert made.latents() == [0, 2, 3]
    made.alike[3] = 0  # the same word in another spelling
    assert made.latents() == [0, 2]


def test_choice_shows_one_of_near_duplicates_by_the_tokens_they_promote() -> None:
    made = Chosen()
    made.promoted = torch.tensor([[4, 5, 6], [4, 5, 7], [4, 8, 9], [10, 11, 6]])
    assert made.latents() == [0, 2, 3]
    made.alike[10], made.alike[11] = 4, 5
    assert made.latents() == [0, 2]


def test_negative_activations_have_a_maximum():
    """An identity activation: the largest of what fired, not 0."""
    stats = FeatureStats(3)
    values = torch.tensor([[[-3.0], [-2.0], [0.0]]])
    stats.update(values, torch.tensor([[[1], [1], [2]]]), torch.arange(3)[None])
    assert stats.max.tolist() == [0.0, -2.0, 0.0] and stats.count.tolist() == [0, 2, 0]
    assert stats.top(1)[1].tolist() == [-2.0]
    assert not stats.histogram(4).any()
