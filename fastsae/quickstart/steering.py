"""Which latent to turn up, by which method and how far, and what that does to the text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..features.tokens import own_tokens
from ..lm.harvest import Store, Windows
from ..lm.splice import SpliceLoss, cross_entropy
from ..lm.tokens import TokenText, head
from ..nn import TopKSAE
from ..steer import Steerer, add_vector, attach, clamp
from ..steer.concept import leads
from ..steer.sweep import (
    Point,
    Sampling,
    damage,
    distinct_bigrams,
    net_effect,
    sample,
    token_share,
)
from ..steer.vectors import difference_of_means
from .settings import Settings

if TYPE_CHECKING:
    from ..lm.text import Progress
    from .pipeline import Found

CLAMP = "clamp"
VECTOR = "difference of means"


@dataclass(frozen=True)
class Text:
    """One prompt continued without and with steering, from the same random numbers.

    Attributes:
        before, after: tokens of the continuation, piece by piece.
        own_before, own_after: which of them are the feature's own tokens.
    """

    prompt: str
    before: list[str]
    after: list[str]
    own_before: list[bool]
    own_after: list[bool]


@dataclass(frozen=True)
class Screened:
    """A candidate's best point in the screening."""

    feature: int
    strength: float
    share_before: float
    share_after: float
    damage: float
    net: float


@dataclass(frozen=True)
class Best:
    """The point of one method that has the most effect after damage.

    Attributes:
        net: its effect minus its damage (`net_effect`).
        texts: prompts continued there; the first is the one of median effect.
    """

    point: Point
    net: float
    texts: list[Text]


@dataclass(frozen=True)
class Steering:
    """Attributes:
    feature: the latent that was turned up.
    own_tokens: its top tokens: where it fires, and what its decoder promotes.
    max_activation: the unit of the strengths, over `stats_tokens` of the report.
    base: the unsteered model. points: the sweep, both methods. net: of each point.
    best: of each method, the better one first; that one is shown.
    screened: the candidates, best first.
    """

    feature: int
    own_tokens: list[str]
    max_activation: float
    base: Point
    points: list[Point]
    net: list[float]
    best: list[Best]
    screened: list[Screened]
    sampling: Sampling
    loss_scale: float

    def as_dict(self) -> dict[str, Any]:
        winner, *others = self.best
        first, chosen = winner.texts[0], winner.point
        harm = damage(chosen, self.base, self.loss_scale)
        return {
            "feature": self.feature,
            "own_tokens": self.own_tokens,
            "method": chosen.method,
            "strength": chosen.strength,
            "unit": "max_activation",
            "max_activation": self.max_activation,
            "value": chosen.strength * self.max_activation,
            "net_effect": winner.net,
            "prompt": first.prompt,
            "before": first.prompt + "".join(first.before),
            "after": first.prompt + "".join(first.after),
            "effect": {
                "share_before": self.base.share,
                "share_after": chosen.share,
                "gain": winner.net + harm,
                "tokens_sampled": len(winner.texts) * self.sampling.new_tokens,
            },
            "damage": {
                "loss_before": self.base.loss,
                "loss_after": chosen.loss,
                "distinct_bigrams_before": self.base.distinct_bigrams,
                "distinct_bigrams_after": chosen.distinct_bigrams,
                "loss_scale": self.loss_scale,
                "total": harm,
            },
            "sweep": [
                {**asdict(point), "net_effect": net}
                for point, net in zip(self.points, self.net, strict=True)
            ],
            "texts": [asdict(text) for text in winner.texts],
            "other_methods": [
                {**asdict(one.point), "net_effect": one.net, "text": asdict(one.texts[0])}
                for one in others
            ],
            "screened": [asdict(one) for one in self.screened],
            "sampling": asdict(self.sampling),
        }


def words_of(found: Found, latent: int) -> torch.Tensor:
    return own_tokens(found.fires.of(latent), found.promoted[latent], found.words)


def choose_prompts(held_out: Windows, tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """[count, length] tokens, one prompt of each window: the BOS, where there is one, and the first
    stretch that begins and ends with a whole word or mark, not in white space."""
    text, first = TokenText(tokenizer), len(head(tokenizer))
    rows = held_out.tokens[:count].tolist()
    return torch.tensor([row[:first] + _stretch(row[first:], text, length - first) for row in rows])


def _stretch(tokens: list[int], text: TokenText, length: int) -> list[int]:
    pieces = [text[token] for token in tokens]

    def cuts(at: int) -> bool:  # a word
        return pieces[at - 1][-1:].isalnum() and pieces[at][:1].isalnum()

    ends = [at for at in range(length, len(tokens)) if pieces[at - 1][-1:].strip() and not cuts(at)]
    begins = [at - length for at in ends if at > length and not cuts(at - length)]
    whole = [at for at in begins if pieces[at].lstrip(" ")[:1].strip()]
    begin = next(iter(whole or [at - length for at in ends]), 0)
    return tokens[begin : begin + length]


def steer(
    settings: Settings,
    model: Any,
    site: str,
    tokenizer: Any,
    sae: TopKSAE,
    store: Store,
    held_out: Windows,
    found: Found,
    splice: SpliceLoss,
    progress: Progress,
) -> Steering | None:
    """Screens the candidates, sweeps the best one, and samples text with it.

    A candidate's score is the gain in the share of its own tokens in sampled text, minus the
    damage (`fastsae.steer.sweep`), by a clamp. The sweep sets clamps against a difference of
    means, and its best point of all is what is shown. None when no latent is usable.
    """
    if not found.candidates:
        return None
    steerer = attach(model, sae, hook=site, max_slots=len(found.candidates))
    try:
        return _steer(settings, model, steerer, tokenizer, store, held_out, found, splice, progress)
    finally:
        steerer.detach()


def _steer(
    settings: Settings,
    model: Any,
    steerer: Steerer,
    tokenizer: Any,
    store: Store,
    held_out: Windows,
    found: Found,
    splice: SpliceLoss,
    progress: Progress,
) -> Steering:
    sampling = Sampling(new_tokens=settings.sample_tokens, seed=settings.seed)
    count = min(settings.samples, len(held_out))
    length = min(24, held_out.tokens.shape[1] // 2)
    prompts = choose_prompts(held_out, tokenizer, count, length)
    loss_windows = held_out.select(range(min(8, len(held_out))))
    loss_scale = max(1e-6, splice.ce_zero_ablated - splice.ce_clean)
    points = 2 * len(settings.strengths)
    candidates = torch.tensor(found.candidates)
    steps = 2 + len(settings.screen_strengths) * (1 + len(candidates)) + 2 * points
    with progress("Steering: screening and sweep", steps) as advance:
        before = sample(model, prompts, sampling)
        advance(1)
        base_loss = cross_entropy(model, loss_windows)
        advance(1)

        def base_of(own: torch.Tensor) -> Point:
            return Point("none", 0.0, token_share(before, own), distinct_bigrams(before), base_loss)

        screened = _screen(
            settings, model, steerer, found, candidates, prompts, loss_windows, sampling,
            base_of, loss_scale, advance,
        )  # fmt: skip
        latent = screened[0].feature
        own = words_of(found, latent)
        base = base_of(own)
        unit = float(found.stats.max[latent])
        vector = difference_of_means(store.activations[leads(store, own)], store.activations)
        vector /= vector.norm()

        swept: list[Point] = []
        texts: dict[tuple[str, float], torch.Tensor] = {}
        for method in (CLAMP, VECTOR):
            for strength in settings.strengths:

                def hook(method: str = method, value: float = strength * unit) -> Any:
                    if method == CLAMP:
                        return steerer.steer([[clamp(latent, value)]])
                    return steerer.steer([[add_vector(vector, value)]])

                tokens = sample(model, prompts, sampling, hook())
                advance(1)
                loss = cross_entropy(model, loss_windows, hook())
                advance(1)
                texts[method, strength] = tokens
                swept.append(
                    Point(
                        method, strength, token_share(tokens, own), distinct_bigrams(tokens), loss
                    )
                )
    net = [net_effect(point, base, loss_scale) for point in swept]
    best = [
        Best(
            swept[i], net[i],
            _texts(tokenizer, prompts, before, texts[swept[i].method, swept[i].strength], own),
        )
        for i in best_of_each(swept, net)
    ]  # fmt: skip
    return Steering(
        feature=latent,
        own_tokens=[TokenText(tokenizer)[t] for t in own.tolist()],
        max_activation=unit,
        base=base,
        points=swept,
        net=net,
        best=best,
        screened=screened,
        sampling=sampling,
        loss_scale=loss_scale,
    )


def best_of_each(points: list[Point], net: list[float]) -> list[int]:
    """The number of each method's best point, that of the best method first."""
    order = sorted(range(len(points)), key=lambda i: -net[i] if math.isfinite(net[i]) else math.inf)
    best: dict[str, int] = {}
    for i in order:
        best.setdefault(points[i].method, i)
    return list(best.values())


def _screen(
    settings: Settings,
    model: Any,
    steerer: Steerer,
    found: Found,
    candidates: torch.Tensor,
    prompts: torch.Tensor,
    loss_windows: Windows,
    sampling: Sampling,
    base_of: Any,
    loss_scale: float,
    advance: Any,
) -> list[Screened]:
    """Every candidate at a few strengths, all candidates in one batch of samples."""
    each = min(6, len(prompts))
    few = loss_windows.select(range(min(2, len(loss_windows))))
    best: dict[int, Screened] = {}
    for strength in settings.screen_strengths:
        values = (strength * found.stats.max[candidates]).tolist()
        programs = [[clamp(j, value)] for j, value in zip(candidates.tolist(), values)]
        tokens = sample(
            model, prompts[:each].repeat(len(candidates), 1), sampling,
            steerer.steer(programs),
        ).view(len(candidates), each, -1)  # fmt: skip
        advance(1)
        clean = None
        for i, latent in enumerate(candidates.tolist()):
            own = words_of(found, latent)
            base = base_of(own)
            if clean is None:
                clean = cross_entropy(model, few)
            steered = cross_entropy(model, few, steerer.steer([programs[i]]))
            advance(1)
            point = Point(
                CLAMP, strength, token_share(tokens[i], own), distinct_bigrams(tokens[i]),
                base.loss + steered - clean,
            )  # fmt: skip
            net = net_effect(point, base, loss_scale)
            if latent not in best or net > best[latent].net:
                best[latent] = Screened(
                    latent, strength, base.share, point.share, damage(point, base, loss_scale), net
                )
    return sorted(best.values(), key=lambda one: (-one.net, one.feature))


def _texts(
    tokenizer: Any,
    prompts: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    own: torch.Tensor,
) -> list[Text]:
    """All samples, the one whose gain is the median first."""
    text = TokenText(tokenizer)
    special = set(tokenizer.all_special_ids)
    gains = torch.isin(after, own).float().mean(1) - torch.isin(before, own).float().mean(1)
    order = torch.argsort(gains, stable=True).tolist()
    middle = order[len(order) // 2]
    rows = [middle, *(i for i in range(len(prompts)) if i != middle)]
    return [
        Text(
            prompt=text.text([t for t in prompts[i].tolist() if t not in special]),
            before=text.pieces(before[i].tolist()),
            after=text.pieces(after[i].tolist()),
            own_before=torch.isin(before[i], own).tolist(),
            own_after=torch.isin(after[i], own).tolist(),
        )
        for i in rows
    ]
