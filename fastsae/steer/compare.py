"""An SAE's clamp, a difference-of-means vector and a prompt, measured on the same text.

Effect is the share of a concept's tokens in text that is sampled. Damage is measured twice: how
surprising that text is to the unsteered model (perplexity, given the prompt alone), and how far
the steered model's predictions move on neutral text (KL). Text that repeats itself surprises
little, so the share of distinct bigrams stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..lm.sites import device_of
from .attach import Steerer
from .operations import add_vector, clamp
from .sweep import Sampling, distinct_bigrams, sample, token_share

UNSTEERED, CLAMP, VECTOR, PROMPT = "unsteered", "SAE clamp", "vector", "prompt"
METHODS = (CLAMP, VECTOR, PROMPT)
COLOURS = {CLAMP: "#d1495b", VECTOR: "#2e86ab", PROMPT: "#8a6d1f"}
# Damage that text survives: times the unsteered text's, nats, and times the unsteered text's.
LIMITS = {"perplexity": 2.0, "kl": 0.5, "distinct_bigrams": 0.75}
_ROWS = 8  # of one forward pass whose logits are kept


@dataclass(frozen=True)
class Trial:
    """What every method is measured on.

    Attributes:
        prompts: token ids that are continued.
        neutral: token ids of text that has nothing to do with the concept.
        concept: token ids that count as the concept.
        begins: ids that a text may begin with (BOS); a prefix goes behind them.
    """

    prompts: list[list[int]]
    neutral: list[list[int]]
    concept: torch.Tensor
    begins: frozenset[int]
    sampling: Sampling


@dataclass(frozen=True)
class Outcome:
    """One strength of one method.

    Attributes:
        strength: of the clamp, multiples of the latent's maximum; of the vector, the same length
            added; of the prompt, how many pieces of text stand before.
        share: of the concept's tokens in the sampled text.
        perplexity: of the unsteered model on the sampled text, given the prompt without prefix.
        kl: KL(unsteered || steered) of next-token distributions on neutral text, nats, mean.
        distinct_bigrams: of the sampled text.
        text: the first continuation.
    """

    method: str
    strength: float
    share: float
    perplexity: float
    kl: float
    distinct_bigrams: float
    text: str = ""


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and attention mask [B, T], shorter rows padded on that side with id 0."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def _behind(row: Sequence[int], prefix: Sequence[int], begins: frozenset[int]) -> list[int]:
    """`prefix` put before a text's tokens, behind its BOS."""
    head = int(row[0] in begins)
    return [*row[:head], *prefix, *row[head:]]


def _log_probs(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, T, V] in fp32; rows padded on the right, which a causal model does not see."""
    device = device_of(model)
    logits = model(input_ids=padded(rows, "right")[0].to(device), use_cache=False).logits
    return logits.float().log_softmax(-1)


@torch.no_grad()
def perplexity(
    model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> float:
    """exp of the mean loss on the continuations' tokens, each given its prompt."""
    total, count = 0.0, 0
    for first in range(0, len(prompts), _ROWS):
        pairs = list(zip(prompts, continuations))[first : first + _ROWS]
        log_probs = _log_probs(model, [[*p, *c] for p, c in pairs])
        for row, (before, after) in zip(log_probs, pairs):
            target = torch.tensor(after, device=row.device)
            total += float(functional.nll_loss(row[len(before) - 1 :][: len(after)], target,
                                               reduction="sum"))  # fmt: skip
            count += len(after)
    return math.exp(total / count)


@torch.no_grad()
def neutral_kl(
    model: Any,
    neutral: Sequence[Sequence[int]],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prefix: Sequence[int] = (),
    begins: frozenset[int] = frozenset(),
) -> float:
    """Mean KL(unsteered || steered) in nats of the predictions after each token of `neutral`.

    Args:
        context: makes the block inside which the model is steered.
        prefix: what the steered model reads before the text, behind a BOS (one of `begins`).
    """
    total, count = 0.0, 0
    for first in range(0, len(neutral), _ROWS):
        rows = neutral[first : first + _ROWS]
        clean = _log_probs(model, rows)
        with context():
            steered = _log_probs(model, [_behind(row, prefix, begins) for row in rows])
        for i, row in enumerate(rows):
            head = int(row[0] in begins)
            p = clean[i, head : len(row)]
            q = steered[i, head + len(prefix) : len(row) + len(prefix)]
            total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
            count += len(row) - head
    return total / count


def measure(
    model: Any,
    tokenizer: Any,
    trial: Trial,
    method: str,
    strength: float,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prefix: Sequence[int] = (),
) -> Outcome:
    """Samples with one strength of one method and measures what came."""
    given = [_behind(row, prefix, trial.begins) for row in trial.prompts]
    ids, mask = padded(given, "left")
    tokens = sample(model, ids, trial.sampling, context(), mask)
    return Outcome(
        method,
        strength,
        token_share(tokens, trial.concept),
        perplexity(model, trial.prompts, tokens.tolist()),
        neutral_kl(model, trial.neutral, context, prefix, trial.begins),
        distinct_bigrams(tokens),
        tokenizer.decode(tokens[0].tolist()),
    )


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    base: the unsteered model.
    outcomes: every strength of every method.
    vector_norm: length of the difference of means itself.
    added_norm: length that strength 1 of the clamp and of the vector adds to a token on which the
        latent is silent.
    """

    base: Outcome
    outcomes: list[Outcome]
    vector_norm: float
    added_norm: float

    def of(self, method: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.method == method]

    def best(self, method: str) -> Outcome | None:
        """The largest share among a method's outcomes of bounded damage (`LIMITS`, against the
        unsteered text). None: no outcome is."""
        within = [
            o
            for o in self.of(method)
            if o.perplexity <= LIMITS["perplexity"] * self.base.perplexity
            and o.kl <= LIMITS["kl"]
            and o.distinct_bigrams >= LIMITS["distinct_bigrams"] * self.base.distinct_bigrams
        ]
        return max(within, key=lambda o: o.share, default=None)

    def as_dict(self) -> dict[str, Any]:
        best = {method: self.best(method) for method in METHODS}
        return {
            "vector_norm": self.vector_norm,
            "added_norm": self.added_norm,
            "unsteered": asdict(self.base),
            "outcomes": [asdict(o) for o in self.outcomes],
            "limits": LIMITS,
            "best_within_limits": {
                method: None if o is None else asdict(o) for method, o in best.items()
            },
        }


def _check_lengths(model: Any, trial: Trial, prefixes: Sequence[Sequence[int]]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    before = max(map(len, prefixes), default=0)
    sampled = max(map(len, trial.prompts)) + trial.sampling.new_tokens
    longest = before + max(sampled, max(map(len, trial.neutral)))
    if limit is not None and longest > limit:
        raise ValueError(
            f"compare: {longest} tokens (a prefix of {before}, then a prompt with "
            f"{trial.sampling.new_tokens} new tokens or a neutral text), the model takes {limit}"
        )


def compare(
    model: Any,
    tokenizer: Any,
    steerer: Steerer,
    latent: int,
    unit: float,
    vector: torch.Tensor,
    prefixes: Sequence[Sequence[int]],
    trial: Trial,
    strengths: Sequence[float],
    advance: Callable[[int], None] = lambda n: None,
) -> Comparison:
    """Measures the clamp and the vector at every strength, and every prefix.

    Args:
        steerer: attached to the site with the SAE.
        unit: the latent's maximum activation.
        vector: [D], scaled here to the length that the clamp adds; for an SAE that normalises
            its input, at a token of scale 1.
        prefixes: token ids; the n-th counts as strength n + 1.
        advance: told of every outcome.
    """
    sae = steerer.sae
    if sae is None:
        raise ValueError(f"compare: no SAE is attached at {steerer.site}")
    added = unit * float(sae.W_dec[latent].float().norm()) / sae.input_scale
    norm = float(vector.float().norm())
    if norm == 0.0:
        raise ValueError("compare: the two sets have the same mean, so there is no vector")
    unit_vector = vector / norm
    _check_lengths(model, trial, prefixes)

    def one(method: str, strength: float, program: Any = None, prefix: Sequence[int] = ()) -> Any:
        context: Any = nullcontext if program is None else lambda: steerer.steer([[program]])
        found = measure(model, tokenizer, trial, method, strength, context, prefix)
        advance(1)
        return found

    base = one(UNSTEERED, 0.0)
    outcomes = [one(CLAMP, s, clamp(latent, s * unit)) for s in strengths]
    outcomes += [one(VECTOR, s, add_vector(unit_vector, s * added)) for s in strengths]
    outcomes += [one(PROMPT, i, prefix=prefix) for i, prefix in enumerate(prefixes, 1)]
    return Comparison(base, outcomes, norm, added)


def plot(comparison: Comparison, path: Path, title: str) -> None:
    """Effect against each damage, a line per method, strengths beside the points, damage beyond
    `LIMITS` grey. PNG or SVG by the path's ending. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = comparison.base
    most_repeated = 1 - LIMITS["distinct_bigrams"] * base.distinct_bigrams
    panels: tuple[tuple[str, float, Callable[[Outcome], float]], ...] = (
        (
            "perplexity to the unsteered model",
            LIMITS["perplexity"] * base.perplexity,
            lambda o: o.perplexity,
        ),
        ("KL on neutral text, nats", LIMITS["kl"], lambda o: o.kl),
        ("repeated bigrams", most_repeated, lambda o: 1 - o.distinct_bigrams),
    )
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": "#222222"}):
        figure, every = pyplot.subplots(
            1, len(panels), figsize=(13, 4.4), layout="constrained", sharey=True
        )
        for axes, (label, limit, damage) in zip(every, panels):
            found = [damage(o) for o in (base, *comparison.outcomes)]
            right = max(*found, 1.1 * limit)
            if label.startswith("perplexity"):
                axes.set_xscale("log", base=2)
                axes.set_xlim(0.9 * min(found), 1.2 * right)
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            else:
                axes.set_xlim(min(found) - 0.04 * right, 1.08 * right)
            axes.axvspan(limit, axes.get_xlim()[1], color="#f3f3f3", zorder=0)
            axes.set_ylim(-4, 106 * max(o.share for o in comparison.outcomes) + 6)
            labelled: list[Any] = []
            for method in METHODS:
                points = comparison.of(method)
                x, y = [damage(o) for o in points], [100 * o.share for o in points]
                axes.plot(x, y, "-o", markersize=4, color=COLOURS[method], label=method)
                for o, *at in zip(points, x, y):
                    spot = axes.transData.transform(at)
                    if all(abs(spot - other).max() > 14 for other in labelled):
                        labelled.append(spot)
                        axes.annotate(
                            f"{o.strength:g}", at, (4, 3), textcoords="offset points",
                            fontsize=7, color=COLOURS[method],
                        )  # fmt: skip
            axes.plot(damage(base), 100 * base.share, "*", color="#222222", markersize=11,
                      label=UNSTEERED, linestyle="none")  # fmt: skip
            axes.set_xlabel(label)
            axes.grid(True, color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        every[0].set_ylabel("concept's share of the text, %")
        every[0].legend(frameon=False, fontsize=9, loc="upper left")
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
