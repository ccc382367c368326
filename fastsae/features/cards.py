"""Which latents a reader can name, and what to show of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..lm.harvest import Store
from ..lm.tokens import TokenText
from ..nn import SparseCoder
from .stats import FeatureStats
from .tokens import TokenMass


@dataclass(frozen=True)
class Example:
    """A piece of text around a place where a latent fires.

    Attributes:
        document: where it is from.
        tokens: the pieces of text, token by token.
        activations: the latent's activation on each.
        peak: which of them is the place.
    """

    document: str
    tokens: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class Card:
    """What is shown of one latent. Shares are of the latent's activation, all tokens together.

    Attributes:
        index: the latent.
        max_activation, density: over the tokens of the statistics.
        fires_on: (token, share) where it fires, by share.
        promotes: (token, logit) that its decoder row raises most, on the direct path.
        followed_by: (token, share) that in fact comes next where it fires.
        agreement: share of its activation that is followed by one of the promoted tokens.
        concentration: share of its activation on its own five most frequent tokens.
        top_examples: strongest windows, of different documents and different wording.
        weaker_examples: windows drawn at random where it fires.
    """

    index: int
    max_activation: float
    density: float
    fires_on: list[tuple[str, float]]
    promotes: list[tuple[str, float]]
    followed_by: list[tuple[str, float]]
    agreement: float
    concentration: float
    top_examples: list[Example]
    weaker_examples: list[Example]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """How readable each latent is.

    Attributes:
        score: [F]; -inf for latents that are dead, too rare or fire almost everywhere.
        concentration: [F] share of its activation on its five most frequent tokens.
        agreement: [F] share of its activation that one of its promoted tokens follows.
        lift: [F] the same, as a multiple of how often those tokens occur at all.
        promoted: [F, P] token ids that the decoder row raises most.
    """

    score: torch.Tensor
    concentration: torch.Tensor
    agreement: torch.Tensor
    lift: torch.Tensor
    promoted: torch.Tensor


def score_latents(
    stats: FeatureStats,
    fires: TokenMass,
    follows: TokenMass,
    effect: torch.Tensor,
    token_counts: torch.Tensor,
    words: torch.Tensor,
    *,
    n_promoted: int = 10,
    min_count: int = 100,
    max_density: float = 0.05,
) -> Scores:
    """Scores latents by what they fire on and by whether what they promote does come next.

    A latent reads well when a few tokens carry its activation (a reader sees what it fires on)
    and when the tokens that its decoder promotes are those that follow it in real text, more
    often than those tokens come anyway (a reader sees what it does).

    Args:
        effect: [F, V] from `logit_effect`.
        token_counts: [V] how often each token occurs in the text of the statistics. Tokens that
            hardly occur are no candidates for promotion: their embeddings are noise.
        words: [V] bool, tokens that say something alone. Latents of line ends and brackets are many
            and say little, so words count for more.
    """
    n_latents = len(stats.count)
    seen = effect.masked_fill((token_counts < 3).to(effect.device), -torch.inf)
    promoted = seen.topk(min(n_promoted, effect.shape[1]), dim=-1).indices.cpu()
    share = token_counts.double() / token_counts.sum()
    concentration = torch.zeros(n_latents, dtype=torch.float32)
    worded = torch.zeros(n_latents, dtype=torch.float32)
    agreement = torch.zeros(n_latents, dtype=torch.float32)
    for j in range(n_latents):
        if stats.count[j] == 0:
            continue
        tokens, mass = fires.of(j)
        concentration[j] = mass[:5].sum()
        worded[j] = mass[words[tokens]].sum()
        tokens, mass = follows.of(j)
        agreement[j] = mass[torch.isin(tokens, promoted[j])].sum()
    expected = share[promoted].sum(-1)
    lift = agreement / expected.clamp(min=1e-6)
    usable = (stats.count >= min_count) & (stats.density <= max_density)
    score = concentration + agreement + 0.2 * torch.log2(lift.clamp(min=1, max=64))
    score = score + worded + words[promoted].float().mean(-1)
    score = torch.where(usable, score.double(), -torch.inf).float()
    return Scores(score, concentration, agreement, lift.float(), promoted)


def choose_latents(
    scores: Scores,
    fires: TokenMass,
    W_dec: torch.Tensor,
    count: int,
    *,
    max_cosine: float = 0.5,
    max_same_token: int = 2,
) -> list[int]:
    """The best `count` latents by score, no two alike.

    Skips a latent whose decoder row has a cosine above `max_cosine` with one already chosen, or
    whose most frequent token is that of `max_same_token` chosen ones.
    """
    chosen: list[int] = []
    heads: dict[int, int] = {}
    unit = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=-1)
    for j in torch.argsort(scores.score, descending=True, stable=True).tolist():
        if len(chosen) == count or scores.score[j] == -torch.inf:
            break
        if chosen and float((unit[chosen] @ unit[j]).max()) > max_cosine:
            continue
        head = int(fires.of(j)[0][0])
        if heads.get(head, 0) >= max_same_token:
            continue
        heads[head] = heads.get(head, 0) + 1
        chosen.append(j)
    return chosen


def make_card(
    latent: int,
    sae: SparseCoder,
    store: Store,
    stats: FeatureStats,
    scores: Scores,
    fires: TokenMass,
    follows: TokenMass,
    effect: torch.Tensor,
    text: TokenText,
    *,
    before: int = 20,
    after: int = 8,
    n_top: int = 4,
    n_weaker: int = 2,
) -> Card:
    """Everything that is shown of one latent.

    Places in `stats` must be row numbers of `store`.
    """

    def shares(mass: TokenMass, n: int) -> list[tuple[str, float]]:
        tokens, part = mass.of(latent)
        return [
            (text[int(t)], float(p)) for t, p in zip(tokens[:n], part[:n], strict=True) if p > 0.01
        ]

    promoted = scores.promoted[latent].tolist()
    top = _distinct(store, stats.top(latent)[0].tolist(), n_top)
    weaker = [p for p in stats.sample(latent)[0].tolist() if p not in top]
    weaker = _distinct(store, weaker, n_weaker)

    def example(place: int) -> Example:
        return make_example(latent, place, sae, store, text, before, after)

    return Card(
        index=latent,
        max_activation=float(stats.max[latent]),
        density=float(stats.density[latent]),
        fires_on=shares(fires, 6),
        promotes=[(text[t], float(effect[latent, t])) for t in promoted],
        followed_by=shares(follows, 6),
        agreement=float(scores.agreement[latent]),
        concentration=float(scores.concentration[latent]),
        top_examples=[example(p) for p in top],
        weaker_examples=[example(p) for p in weaker],
    )


def _where(store: Store, place: int) -> tuple[int, int]:
    """Window and position in it of row `place` of the store."""
    per_window = store.windows.kept.shape[1]
    return place // per_window, place % per_window + store.windows.skip_first


def _distinct(store: Store, places: list[int], count: int) -> list[int]:
    """The first `count` places, of different documents and not the same words before them.

    Falls back to places of documents already used when there are too few others.
    """
    chosen: list[int] = []
    wordings: set[tuple[int, ...]] = set()
    documents: set[str] = set()
    for other_documents in (True, False):
        for place in places:
            if len(chosen) == count:
                return chosen
            window, position = _where(store, place)
            wording = tuple(store.windows.tokens[window, max(0, position - 4) : position + 1])
            wording = tuple(int(t) for t in wording)
            document = store.windows.documents[window]
            if (
                place in chosen
                or wording in wordings
                or (other_documents and document in documents)
            ):
                continue
            chosen.append(place)
            wordings.add(wording)
            documents.add(document)
    return chosen


@torch.no_grad()
def make_example(
    latent: int,
    place: int,
    sae: SparseCoder,
    store: Store,
    text: TokenText,
    before: int,
    after: int,
) -> Example:
    """The text around row `place` of the store, with the latent's activation on every token."""
    window, position = _where(store, place)
    low = max(store.windows.skip_first, position - before)
    high = min(store.windows.tokens.shape[1], position + after + 1)
    rows = store.activations[place - (position - low) : place + (high - position)]
    code = sae.encode(rows)
    activation = (code.values * (code.indices == latent)).sum(-1)
    return Example(
        document=store.windows.documents[window],
        tokens=text.pieces(store.windows.tokens[window, low:high].tolist()),
        activations=[round(float(a), 4) for a in activation],
        peak=position - low,
    )
