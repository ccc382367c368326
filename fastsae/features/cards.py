"""What is shown of a latent, and which latents are shown first.

A `Card` is all that a page knows of a latent, and `assets/card.js` draws one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
_TITLED = 16  # strongest windows that make a title
_TRIED = 24  # places of an interval that examples are chosen from


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
        # not `dataclasses.asdict`, which copies every number of thousands of cards
        intervals = [
            {**vars(some), "examples": [{**vars(one)} for one in some.examples]}
            for some in self.intervals
        ]
        return {**vars(self), "intervals": intervals}


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
        fires_on, followed_by: the tokens of greatest share of its activation, where it falls and
            what comes next: [F, up to 6] ids, and these shares.
    """

    score: torch.Tensor
    concentration: torch.Tensor
    agreement: torch.Tensor
    lift: torch.Tensor
    fires_on: tuple[torch.Tensor, torch.Tensor]
    followed_by: tuple[torch.Tensor, torch.Tensor]


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
    share = token_counts.double() / token_counts.sum()
    worded, agreement, most, next_most = [], [], [], []
    for (_, on), (latents, after) in zip(fires.blocks(), follows.blocks()):
        most.append(on.topk(min(6, on.shape[1])))
        next_most.append(after.topk(min(6, after.shape[1])))
        worded.append(on @ words[fires.ids].double())
        own = promoted[latents]
        column = torch.searchsorted(follows.ids, own).clamp(max=len(follows.ids) - 1)
        found = follows.ids[column] == own
        agreement.append((after.gather(1, column) * found).sum(1))
    fires_on, followed_by = (
        (of.ids[torch.cat([one.indices for one in top])], torch.cat([one.values for one in top]))
        for of, top in ((fires, most), (follows, next_most))
    )
    concentrated, agreed = fires_on[1][:, :5].sum(1).float(), torch.cat(agreement).float()
    expected = share[promoted].sum(-1)
    lift = agreed / expected.clamp(min=1e-6)
    usable = (stats.count >= min_count) & (stats.density <= max_density)
    score = concentrated + agreed + 0.2 * torch.log2(lift.clamp(min=1, max=64))
    score = score + torch.cat(worded).float() + words[promoted].float().mean(-1)
    score = torch.where(usable, score.double(), -torch.inf).float()
    return Scores(score, concentrated, agreed, lift.float(), fires_on, followed_by)


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
        windows: Windows,
        text: TokenText,
    ) -> None:
        self._reader = Reader(windows, text)
        self._stats, self._text = stats, text
        self._histogram = stats.histogram(BINS).tolist()
        self._max, self._density = rounded(stats.max), rounded(stats.density)
        self._agreement = rounded(scores.agreement)
        self._concentration = rounded(scores.concentration)
        self._fires_on = self._pairs(*scores.fires_on, least=0.01)
        self._followed_by = self._pairs(*scores.followed_by, least=0.01)
        self._promotes = self._pairs(effects.promoted, effects.raised)
        self._suppresses = self._pairs(effects.suppressed, effects.lowered)

    def _pairs(
        self, tokens: torch.Tensor, values: torch.Tensor, least: float = -math.inf
    ) -> list[list[tuple[str, float]]]:
        text = {token: self._text[token] for token in tokens.unique().tolist()}
        return [
            [(text[t], v) for t, v in zip(*row) if v > least]
            for row in zip(tokens.tolist(), rounded(values))
        ]

    def card(self, latent: int) -> Card:
        """Everything that is shown of one latent."""
        places, activations = (one.tolist() for one in self._stats.top(latent))
        weights = [abs(a) for a in activations[:_TITLED]]
        return Card(
            index=latent,
            title=title(map(self._reader.around, places[:_TITLED]), weights),
            max_activation=self._max[latent],
            density=self._density[latent],
            fires_on=self._fires_on[latent],
            promotes=self._promotes[latent],
            suppresses=self._suppresses[latent],
            followed_by=self._followed_by[latent],
            agreement=self._agreement[latent],
            concentration=self._concentration[latent],
            histogram=self._histogram[latent],
            intervals=self._intervals(latent, places, activations),
        )

    def _intervals(self, latent: int, top: list[int], activations: list[float]) -> list[Interval]:
        places, values = self._stats.of(latent)
        largest = max(activations, default=0.0)
        candidates, shares = [], []
        for low, high, _ in INTERVALS:
            found, number = self._stats.between(latent, low * largest, high * largest, _TRIED)
            if high == 1.0:
                found = [p for p, a in zip(top, activations) if a > low * largest]
            candidates.append(found)
            shares.append(number / max(1, len(values)))
        chosen = spread(candidates, [count for _, _, count in INTERVALS], self._reader)
        return [
            Interval(low, high, round(share, 4), [self._example(p, places, values) for p in some])
            for (low, high, _), share, some in zip(INTERVALS, shares, chosen)
            if some
        ]

    def _example(self, place: int, places: np.ndarray, values: np.ndarray) -> Example:
        first, last = places.searchsorted([place - _REACH, place + _REACH]).tolist()
        near = [float(f"{value:.4g}") for value in values[first:last].tolist()]
        return self._reader.example(place, places[first:last].tolist(), near)


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


def rounded(values: torch.Tensor) -> Any:
    """As lists, to four significant digits: what a reader sees of a number."""
    x = values.double()
    size = 10.0 ** (3 - x.abs().log10().floor())
    return torch.where(size.isfinite(), (x * size).round() / size, x).tolist()
