"""What is shown of a latent, and which latents are shown first.

A `Card` is all that a page knows of a latent, and `assets/card.js` draws one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..lm.harvest import Windows
from ..lm.tokens import TokenText
from .excerpts import Example, Reader
from .stats import FeatureStats
from .titles import title
from .tokens import TokenShares

# Examples are shown by intervals of activation, shares of the maximum: (low, high, how many).
INTERVALS = ((0.75, 1.0, 3), (0.5, 0.75, 1), (0.25, 0.5, 1), (0.0, 0.25, 1))
BINS = 24  # of a histogram
_REACH = 80  # tokens to both sides of a place that an excerpt may show


@dataclass(frozen=True)
class Interval:
    """Examples of one interval of activation.

    Attributes:
        low, high: its ends, shares of the latent's maximum.
        share: of the latent's firings.
        examples: of the top interval the strongest, of the others spread evenly over the text.
    """

    low: float
    high: float
    share: float
    examples: list[Example]


@dataclass(frozen=True)
class Card:
    """What is shown of one latent. Shares are of the latent's activation, all tokens together.

    Attributes:
        index: the latent.
        title: the words at the places where it is strongest.
        max_activation, density: over the tokens of the statistics.
        fires_on: (token, share) where it fires, by share.
        promotes, suppresses: (token, logit) that its decoder row raises and lowers most, on the
            direct path.
        followed_by: (token, share) that in fact comes next where it fires.
        agreement: share of its activation that is followed by one of the promoted tokens.
        concentration: share of its activation on its own five most frequent tokens.
        histogram: firings by activation, in equal steps from 0 to the maximum.
        intervals: examples by activation, from the top, of different documents and wording. There
            are none of negative activations.
    """

    index: int
    title: str
    max_activation: float
    density: float
    fires_on: list[tuple[str, float]]
    promotes: list[tuple[str, float]]
    suppresses: list[tuple[str, float]]
    followed_by: list[tuple[str, float]]
    agreement: float
    concentration: float
    histogram: list[int]
    intervals: list[Interval]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Effects:
    """The tokens whose logits a decoder row moves most.

    Attributes:
        promoted, raised: [F, P] token ids and logits, from the highest.
        suppressed, lowered: [F, P] token ids and logits, from the lowest.
    """

    promoted: torch.Tensor
    raised: torch.Tensor
    suppressed: torch.Tensor
    lowered: torch.Tensor


def strongest_effects(effect: torch.Tensor, token_counts: torch.Tensor, count: int = 10) -> Effects:
    """The `count` tokens that each latent raises and lowers most.

    Args:
        effect: [F, V] from `logit_effect`.
        token_counts: [V] how often each token occurs in the text of the statistics. Tokens that
            hardly occur are left out: their embeddings are noise.
    """
    rare = (token_counts < 3).to(effect.device)
    count = min(count, int((~rare).sum()))
    raised, promoted = effect.masked_fill(rare, -torch.inf).topk(count, dim=-1)
    lowered, suppressed = effect.masked_fill(rare, torch.inf).topk(count, dim=-1, largest=False)
    return Effects(promoted.cpu(), raised.cpu(), suppressed.cpu(), lowered.cpu())


@dataclass(frozen=True)
class Scores:
    """How readable each latent is.

    Attributes:
        score: [F]; -inf for latents that are dead, too rare or fire almost everywhere.
        concentration: [F] share of its activation on its five most frequent tokens.
        agreement: [F] share of its activation that one of its promoted tokens follows.
        lift: [F] the same, as a multiple of how often those tokens occur at all.
    """

    score: torch.Tensor
    concentration: torch.Tensor
    agreement: torch.Tensor
    lift: torch.Tensor


def score_latents(
    stats: FeatureStats,
    fires: TokenShares,
    follows: TokenShares,
    promoted: torch.Tensor,
    token_counts: torch.Tensor,
    words: torch.Tensor,
    *,
    min_count: int = 100,
    max_density: float = 0.05,
) -> Scores:
    """Scores latents by what they fire on and by whether what they promote does come next.

    A latent reads well when a few tokens carry its activation (a reader sees what it fires on)
    and when the tokens that its decoder promotes are those that follow it in real text, more
    often than those tokens come anyway (a reader sees what it does).

    Args:
        promoted: [F, P] from `strongest_effects`.
        token_counts: [V] how often each token occurs in the text of the statistics.
        words: [V] bool, tokens that say something alone. Latents of line ends and brackets are many
            and say little, so words count for more.
    """
    n_latents = len(stats.count)
    share = token_counts.double() / token_counts.sum()
    concentration = torch.zeros(n_latents, dtype=torch.float32)
    worded = torch.zeros(n_latents, dtype=torch.float32)
    agreement = torch.zeros(n_latents, dtype=torch.float32)
    for j in stats.count.nonzero().flatten().tolist():
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
    return Scores(score, concentration, agreement, lift.float())


def choose_latents(
    score: torch.Tensor,
    W_dec: torch.Tensor,
    fires: TokenShares,
    promoted: torch.Tensor,
    alike: torch.Tensor,
    count: int,
    *,
    max_cosine: float = 0.5,
    max_shared: float = 0.3,
) -> list[int]:
    """The best `count` latents by score, no two of one idea.

    Skips a latent whose decoder row has a cosine above `max_cosine` with one already chosen, one
    that fires on the same tokens (the overlap of their shares is above `max_shared`), and one of
    whose promoted tokens more than half are promoted by one already chosen.

    Args:
        alike: [V] a number for every token, equal for tokens that a reader takes for the same.
    """
    chosen: list[int] = []
    seen: list[tuple[dict[int, float], set[int]]] = []
    unit = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=-1)
    for j in torch.argsort(score, descending=True, stable=True).tolist():
        if len(chosen) == count or score[j] == -torch.inf:
            break
        if chosen and float((unit[chosen] @ unit[j]).max()) > max_cosine:
            continue
        tokens, shares = fires.of(j)
        own: dict[int, float] = {}
        for token, share in zip(alike[tokens[:50]].tolist(), shares[:50].tolist()):
            own[token] = own.get(token, 0.0) + share
        raised = set(alike[promoted[j]].tolist())
        if any(
            sum(min(share, other.get(token, 0.0)) for token, share in own.items()) > max_shared
            or len(raised & others) > len(raised) / 2
            for other, others in seen
        ):
            continue
        chosen.append(j)
        seen.append((own, raised))
    return chosen


class CardMaker:
    """Makes the cards of latents from what one pass over the text has gathered.

    Places in `stats` must be numbers of the tokens that `windows` keeps, in order.
    """

    def __init__(
        self,
        stats: FeatureStats,
        scores: Scores,
        effects: Effects,
        fires: TokenShares,
        follows: TokenShares,
        windows: Windows,
        text: TokenText,
    ) -> None:
        self._reader = Reader(windows, text)
        self._stats, self._scores = stats, scores
        self._fires, self._follows = fires, follows
        self._text = text
        self._histogram = stats.histogram(BINS)
        self._promotes = self._pairs(effects.promoted, effects.raised)
        self._suppresses = self._pairs(effects.suppressed, effects.lowered)

    def _pairs(self, tokens: torch.Tensor, values: torch.Tensor) -> list[list[tuple[str, float]]]:
        return [
            [(self._text[t], rounded(v)) for t, v in zip(*row)]
            for row in zip(tokens.tolist(), values.tolist())
        ]

    def card(self, latent: int) -> Card:
        """Everything that is shown of one latent."""
        places, activations = self._stats.top(latent)
        return Card(
            index=latent,
            title=title(map(self._reader.around, places.tolist()), activations.abs().tolist()),
            max_activation=rounded(float(self._stats.max[latent])),
            density=rounded(float(self._stats.density[latent])),
            fires_on=self._shares(self._fires, latent),
            promotes=self._promotes[latent],
            suppresses=self._suppresses[latent],
            followed_by=self._shares(self._follows, latent),
            agreement=rounded(float(self._scores.agreement[latent])),
            concentration=rounded(float(self._scores.concentration[latent])),
            histogram=self._histogram[latent].tolist(),
            intervals=self._intervals(latent),
        )

    def _shares(self, of: TokenShares, latent: int) -> list[tuple[str, float]]:
        tokens, shares = of.of(latent)
        pairs = zip(tokens[:6].tolist(), shares[:6].tolist())
        return [(self._text[t], rounded(share)) for t, share in pairs if share > 0.01]

    def _intervals(self, latent: int) -> list[Interval]:
        places, values = self._stats.of(latent)
        largest = float(self._stats.max[latent])
        strongest, activations = self._stats.top(latent)
        total = sum(count for _, _, count in INTERVALS)
        candidates, shares = [], []
        for low, high, _ in INTERVALS:
            if high == 1.0:
                found = strongest[activations > low * largest].tolist()
                number = int((values > low * largest).sum())
            else:
                ends = low * largest, high * largest
                found, number = self._stats.between(latent, *ends, 4 * total)
            candidates.append(found)
            shares.append(number / max(1, len(values)))
        chosen = spread(candidates, [count for _, _, count in INTERVALS], self._reader)
        return [
            Interval(low, high, rounded(share), [self._example(p, places, values) for p in some])
            for (low, high, _), share, some in zip(INTERVALS, shares, chosen)
            if some
        ]

    def _example(self, place: int, places: np.ndarray, values: np.ndarray) -> Example:
        near = slice(*np.searchsorted(places, [place - _REACH, place + _REACH]))
        return self._reader.example(
            place, places[near].tolist(), [rounded(v) for v in values[near].tolist()]
        )


def spread(
    candidates: Sequence[Sequence[int]], wanted: Sequence[int], reader: Reader
) -> list[list[int]]:
    """Places from each list of candidates, of different documents and not of the same wording.

    What one list lacks, the next ones give. Documents repeat where there are too few of them.
    """
    chosen: list[list[int]] = [[] for _ in candidates]
    documents: set[str] = set()
    wordings: set[tuple[int, ...]] = set()
    used: set[int] = set()

    def take(into: list[int], places: Iterable[int], count: int, new_document: bool) -> int:
        for place in places:
            if count == 0:
                break
            document, wording = reader.document(place), reader.wording(place)
            if place in used or wording in wordings or (new_document and document in documents):
                continue
            into.append(place)
            used.add(place)
            documents.add(document)
            wordings.add(wording)
            count -= 1
        return count

    left = 0
    for into, places, count in zip(chosen, candidates, wanted):
        left = take(into, places, count + left, True)
    for into, places in zip(chosen, candidates):
        left = take(into, places, left, False)
    return chosen


def rounded(x: float) -> float:
    """Four significant digits: what a reader sees of a number."""
    return float(f"{x:.4g}") if math.isfinite(x) else x
