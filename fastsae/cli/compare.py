"""`fastsae compare-steering`: an SAE's clamp, a vector and a prompt, effect against damage."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import check_writable, fail, fail_missing
from .progress import progress_bars
from .subject import ANY_MODEL, MODEL, SAE, load_saved

if TYPE_CHECKING:
    from ..lm.harvest import Store, Windows
    from ..lm.load import Subject
    from ..lm.text import Progress
    from ..steer.compare import Comparison, Outcome

TOKENS = 80_000  # of text that the concept's words and the vector come from
PROMPTS, PROMPT_TOKENS = 24, 24
NEUTRAL, NEUTRAL_TOKENS = 8, 128
HELD_OUT_TOKENS, CONTEXT = 24_576, 256
MAX_BYTES = 2 << 30  # of activations
PREFIXES = 4
STRENGTHS = "0.5,0.75,1,1.25,1.5,2,3"


def compare_steering(
    sae: Path = SAE,
    feature: int = typer.Option(..., min=0, help="The latent that is clamped."),
    model: str | None = MODEL,
    layer: int | None = typer.Option(None, help="Block whose output is edited, from 0."),
    hook: str | None = typer.Option(None, help="Dotted path of a module instead of --layer."),
    concept: str | None = typer.Option(
        None, help="Words that count as the effect, with commas.", show_default="the latent's own"
    ),
    prompts: Path | None = typer.Option(  # noqa: B008
        None, help="Texts to continue, one a line.", show_default="held-out text"
    ),
    neutral: Path | None = typer.Option(  # noqa: B008
        None, help="Texts to measure the KL on, one a line.", show_default="other held-out text"
    ),
    positive: Path | None = typer.Option(  # noqa: B008
        None, help="Texts whose end the vector leads to.", show_default="places before the concept"
    ),
    negative: Path | None = typer.Option(  # noqa: B008
        None, help="Texts that the vector leads away from.", show_default="all other places"
    ),
    prefix: str | None = typer.Option(
        None,
        help="Text to put before, once to four times.",
        show_default="one to four positive texts",
    ),
    strengths: str = typer.Option(STRENGTHS, help="Multiples of the latent's maximum activation."),
    tokens: int = typer.Option(64, min=2, help="Tokens to sample for each prompt."),
    seed: int = typer.Option(0, help="Of the text and of the sampling."),
    device: str = typer.Option("cpu", help="Torch device."),
    any_model: bool = ANY_MODEL,
    out: Path = typer.Option(Path("compare-steering"), help="Folder for JSON and plot."),  # noqa: B008
) -> None:
    """Measure a clamp, a difference-of-means vector and a prompt: effect against damage."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        fail_missing(error)
    from .._files import json_text, write_text_atomic
    from ..lm.tokens import encoded
    from ..steer import attach, describe
    from ..steer.compare import Trial, compare, plot
    from ..steer.sweep import Sampling

    if (positive is None) != (negative is None):
        fail("give --positive and --negative, or neither")
    check_writable(out)
    saved = load_saved(sae, model, layer, hook, device, any_model)
    trained, statistics = saved.sae, saved.statistics
    if statistics is None:
        fail(f"{sae} has no maximum activations beside it, which the strengths are multiples of")
    if feature >= trained.d_sae:
        fail(f"--feature {feature}: the SAE has {trained.d_sae} latents")
    try:
        chosen = [float(s) for s in strengths.split(",")]
    except ValueError:
        fail(f"--strengths must be numbers with commas between, got {strengths!r}")
    try:
        with progress_bars() as progress:
            subject = saved.load_model()
            text = _Text(seed, subject, progress)
            own_prompts = _lines(subject.tokenizer, prompts) if prompts else None
            own_neutral = _lines(subject.tokenizer, neutral) if neutral else None
            words = _concept(concept, subject, trained, feature, text)
            vector, examples = _vector(subject, positive, negative, words, text)
            if prefix is not None:
                examples = [encoded(subject.tokenizer, prefix, bos=False)] * PREFIXES
            trial = Trial(
                own_prompts or text.held_out.tokens[:PROMPTS, :PROMPT_TOKENS].tolist(),
                own_neutral or text.held_out.tokens[PROMPTS:][:NEUTRAL, :NEUTRAL_TOKENS].tolist(),
                words,
                frozenset(subject.tokenizer.all_special_ids),
                Sampling(new_tokens=tokens, seed=seed),
            )
            prefixes = list(itertools.accumulate(examples))
            steerer = attach(subject.model, describe(trained, statistics), hook=subject.site)
            with progress("Comparing", 1 + 2 * len(chosen) + len(prefixes)) as advance:
                found = compare(
                    subject.model, subject.tokenizer, steerer, feature,
                    float(statistics.values[feature]), vector, prefixes, trial, chosen, advance,
                )  # fmt: skip
        decode = subject.tokenizer.decode
        named = [decode([t]) for t in words.tolist()]
        report = {
            "model": subject.name, "hook": subject.site, "latent": feature,
            "max_activation": float(statistics.values[feature]), "concept": named,
            "prompts": len(trial.prompts), "sampling": asdict(trial.sampling),
            "prefixes": [decode(p) for p in prefixes], **found.as_dict(),
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out / "compare.json", json_text(report))
        shown = " ".join(repr(t) for t in named[:5]) + (" ..." if len(named) > 5 else "")
        plot(found, out / "compare.png", f"{subject.name}, latent {feature}: {shown}")
    except (ValueError, OSError, NotImplementedError) as error:
        fail(" ".join(str(error).split()))
    _show(found, shown, out)


class _Text:
    """The standard library's text, read when something needs it."""

    def __init__(self, seed: int, subject: Subject, progress: Progress) -> None:
        self._seed, self._subject, self._progress = seed, subject, progress

    @cached_property
    def _both(self) -> tuple[Windows, Windows]:
        from ..lm.text import stdlib_windows

        return stdlib_windows(
            self._subject, tokens=TOKENS, held_out_tokens=HELD_OUT_TOKENS, context=CONTEXT,
            seed=self._seed, progress=self._progress,
        )  # fmt: skip

    @property
    def held_out(self) -> Windows:
        return self._both[1]

    @cached_property
    def store(self) -> Store:
        """Activations of the training text."""
        from ..lm.harvest import collect

        windows, subject = self._both[0], self._subject
        total = windows.tokens.numel()
        with self._progress(f"Harvesting {subject.site}", total) as advance:
            return collect(
                subject.model, subject.module, windows, max_bytes=MAX_BYTES, progress=advance
            )


def _texts(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no text")
    return lines


def _lines(tokenizer: Any, path: Path) -> list[list[int]]:
    from ..lm.tokens import encoded

    return [encoded(tokenizer, line) for line in _texts(path)]


def _concept(concept: str | None, subject: Subject, sae: Any, latent: int, text: _Text) -> Any:
    from ..steer.concept import latent_words, word_tokens

    if concept is None:
        return latent_words(subject.model, subject.tokenizer, sae, latent, text.store)
    vocabulary = subject.model.get_output_embeddings().weight.shape[0]
    return word_tokens(subject.tokenizer, concept.split(","), vocabulary)


def _vector(
    subject: Subject, positive: Path | None, negative: Path | None, words: Any, text: _Text
) -> tuple[Any, list[list[int]]]:
    """The difference of means, and a few positive texts as token ids."""
    from ..lm.tokens import encoded
    from ..steer.concept import excerpts, leads
    from ..steer.vectors import difference_of_means, prompt_activations

    if positive is not None and negative is not None:
        means = [
            prompt_activations(subject.model, subject.tokenizer, _texts(path), hook=subject.site)
            for path in (positive, negative)
        ]
        lines = _texts(positive)[:PREFIXES]
        examples = [encoded(subject.tokenizer, line + "\n", bos=False) for line in lines]
        return difference_of_means(*means), examples
    follows = leads(text.store, words)
    if not bool(follows.any()):
        raise ValueError("the concept does not occur in the training text: give --positive")
    x = text.store.activations
    return difference_of_means(x[follows], x[~follows]), excerpts(text.store, words, PREFIXES)


def _show(found: Comparison, concept: str, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..steer.compare import LIMITS, METHODS

    console = Console()
    best = [found.best(method) for method in METHODS]
    table = Table(title=escape(f"concept: {concept}"))
    for name in ("method", "strength", "concept", "perplexity", "KL", "distinct bigrams"):
        table.add_column(name, justify="left" if name == "method" else "right")

    def row(o: Outcome) -> None:
        table.add_row(
            o.method, f"{o.strength:g}", f"{100 * o.share:.1f}%", f"{o.perplexity:.1f}",
            f"{o.kl:.2f}", f"{o.distinct_bigrams:.2f}",
            style="bold" if any(o is one for one in best) else None,
        )  # fmt: skip

    row(found.base)
    for method in METHODS:
        table.add_section()
        for o in found.of(method):
            row(o)
    console.print(table)
    console.print(
        f"bold: the strongest with perplexity at most {LIMITS['perplexity']:g} times the unsteered "
        f"text's, KL at most {LIMITS['kl']:g} nats, and {LIMITS['distinct_bigrams']:.0%} of its "
        "distinct bigrams",
        highlight=False,
    )
    console.print(f"{escape(str(out))}/compare.json, compare.png", soft_wrap=True, highlight=False)
