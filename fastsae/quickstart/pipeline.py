"""The quickstart, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .._errors import UserError, one_line
from .._files import json_text, write_text_atomic
from .._waits import Waits, told
from ..features.cards import Card, CardMaker, choose_latents, score_latents, strongest_effects
from ..features.stats import FeatureStats
from ..features.tokens import TokenShares, stands_whole
from ..lm.harvest import Store, Windows, collect
from ..lm.load import Subject, load_subject
from ..lm.readout import logit_effect
from ..lm.splice import SpliceLoss, splice_loss
from ..lm.text import Progress
from ..lm.tokens import TokenText, is_word
from ..nn import TopKSAE
from ..nn.description import MAX_ACTIVATION, MaxActivations
from ..optim import FusedAdam
from ..train.evaluate import Reconstruction, reconstruction
from ..train.plain import PlainTopKStep
from ..train.trainer import TrainConfig, Trainer, shuffled
from .settings import Settings
from .steering import Steering, steer


@dataclass
class Training:
    """Attributes:
    sae: trained, in eval mode.
    steps: done; `Settings.steps`, or fewer where those would have taken too long.
    curve: (tokens seen, FVU of the batch) through training.
    tokens_per_s: of the training loop, measured over all of it but its first steps.
    step_ms, plain_step_ms: medians of the two steps, run in turn on the same batches.
    waited: share of the time, in both, in which threads waited for a core.
    """

    sae: TopKSAE
    steps: int
    curve: list[tuple[int, float]]
    tokens: int
    tokens_per_s: float
    step_ms: float
    plain_step_ms: float
    waited: float

    @property
    def speedup_vs_torch(self) -> float:
        return self.plain_step_ms / self.step_ms


@dataclass
class Result:
    """Everything the report and the page are made of.

    Attributes:
        cards: of the latents that are shown first, best first.
        other_cards: of all others that fire, by index.
    """

    settings: Settings
    subject: Subject
    training: Training
    reconstruction: Reconstruction
    splice: SpliceLoss
    cards: list[Card]
    other_cards: list[Card]
    steering: Steering | None
    max_activation: MaxActivations
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """The content of report.json. Keys that hold times end in _s, _ms or are in `timing`."""
        s, t = self.settings, self.training
        return {
            "model": self.subject.name,
            "hook": self.subject.site,
            "d_sae": t.sae.d_sae,
            "k": t.sae.k,
            "seed": s.seed,
            "tokens": t.tokens,
            "tokens_per_s": t.tokens_per_s,
            "speedup_vs_torch": t.speedup_vs_torch,
            "busy": told(t.waited),
            "steps": t.steps,
            "steps_planned": s.steps,
            "fvu": self.reconstruction.fvu,
            "l0": self.reconstruction.l0,
            "dead_fraction": self.reconstruction.dead_fraction,
            "held_out_tokens": self.reconstruction.tokens,
            "ce_clean": self.splice.ce_clean,
            "ce_spliced": self.splice.ce_spliced,
            "ce_zero_ablated": self.splice.ce_zero_ablated,
            "loss_recovered": self.splice.loss_recovered,
            "loss_curve": [list(point) for point in t.curve],
            "stats_tokens": self.max_activation.tokens,
            "firing_latents": int((self.max_activation.values != 0).sum()),
            "features": [card.as_dict() for card in self.cards],
            "other_features": [card.as_dict() for card in self.other_cards],
            "steering": None if self.steering is None else self.steering.as_dict(),
            "timing": {
                "step_ms": t.step_ms,
                "plain_step_ms": t.plain_step_ms,
                "threads": torch.get_num_threads(),
                "seconds": self.seconds,
            },
        }


# Keys of the report that a second run with the same seed need not repeat.
TIMING_KEYS = ("tokens_per_s", "speedup_vs_torch", "busy", "timing")


def run(settings: Settings, progress: Progress) -> Result:
    """Runs the whole job; writes nothing but what `settings.out` will hold (see `write`)."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    torch.manual_seed(settings.seed)
    with timed("load"):
        subject = load_subject(
            settings.model, device=settings.device, layer=settings.layer, hook=settings.hook
        )
    with timed("harvest"):
        train_windows, held_out = settings.windows(subject, progress)
        store, test = harvest(settings, subject, train_windows, held_out, progress)
        try:  # before the minutes of training that come before it is needed
            logit_effect(subject.model, torch.zeros(1, store.activations.shape[1]))
        except NotImplementedError as error:
            raise UserError(f"no words for latents at {subject.site}: {one_line(error)}") from error
    with timed("train"):
        training = train(settings, subject, store, progress)
    if training.steps < settings.steps:  # the rest takes as much longer as training did
        samples = max(4, settings.samples * training.steps // settings.steps)
        settings = replace(settings, samples=samples)
    with timed("evaluate"):
        quality = reconstruction(training.sae, test.activations.split(4096))
        dead = dead_fraction(training.sae, store)
        quality = Reconstruction(quality.fvu, quality.l0, dead, quality.tokens)
        with progress("Splicing the SAE into the model", 3 * held_out.tokens.numel()) as advance:
            splice = splice_loss(
                subject.model, subject.module, training.sae, held_out, progress=advance
            )
    with timed("features"):
        found = study_latents(settings, subject, training.sae, store, progress)
    with timed("steer"):
        steering = steer(
            settings, subject.model, subject.site, subject.tokenizer, training.sae, store,
            held_out, found, splice, progress,
        )  # fmt: skip
    return Result(
        settings, subject, training, quality, splice, found.cards, found.other_cards, steering,
        MaxActivations(
            found.stats.max, found.stats.n_tokens, "the standard library's text", site=subject.site
        ),
        seconds,
    )  # fmt: skip


# -- activations ----------------------------------------------------------------------------------


def harvest(
    settings: Settings,
    subject: Subject,
    train_windows: Windows,
    held_out: Windows,
    progress: Progress,
) -> tuple[Store, Store]:
    """Activations of both, without the first position of every window."""
    total = train_windows.tokens.numel() + held_out.tokens.numel()
    with progress(f"Harvesting {subject.site}", total) as advance:
        kept = [
            collect(
                subject.model, subject.module, windows,
                max_bytes=settings.max_bytes, progress=advance,
            )
            for windows in (train_windows, held_out)
        ]  # fmt: skip
    return kept[0], kept[1]


# -- the SAE --------------------------------------------------------------------------------------


def train(settings: Settings, subject: Subject, store: Store, progress: Progress) -> Training:
    """Trains the SAE with fused steps, then times that step against plain PyTorch's."""
    width = store.activations.shape[1]
    d_sae = settings.d_sae or 8 * width
    batch_size = min(settings.batch_size, len(store))
    try:
        sae = TopKSAE(
            width, d_sae, settings.k, aux_coefficient=settings.aux_weight, k_aux=settings.k_aux,
            dead_after=settings.dead_after, device=store.activations.device, seed=settings.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(one_line(error)) from error
    sae.initialize_from_data(store.activations, seed=settings.seed)
    batches = shuffled(store.activations, batch_size, seed=settings.seed + 1)
    steps = affordable_steps(settings, sae, store.activations[:batch_size])
    config = TrainConfig(
        steps, settings.lr, warmup=max(1, round(0.03 * steps)), decay=0.4,
        log_every=max(1, steps // 120),
    )  # fmt: skip
    trainer = Trainer(sae, config)
    waits = Waits()
    title = "Training the SAE"
    if steps < settings.steps:
        title += f" ({steps} steps of {settings.steps}: slow here)"
    with progress(title, steps * batch_size) as advance:
        records = trainer.fit(
            batches, on_log=lambda r: advance(min(config.log_every, steps) * batch_size)
        )
    step_ms, plain_step_ms = compare_steps(settings, sae, batches, progress)
    assert isinstance(trainer.optimizer, FusedAdam)
    trainer.optimizer.release()
    sae.eval().requires_grad_(False)
    sae.origin = subject.origin
    settled = records[2:] if len(records) > 4 else records  # the first steps warm up
    seconds = sum(config.log_every * batch_size / r.tokens_per_s for r in settled)
    return Training(
        sae, steps, [(r.tokens, r.fvu) for r in records], trainer.tokens,
        len(settled) * config.log_every * batch_size / seconds, step_ms, plain_step_ms,
        waits.share(),
    )  # fmt: skip


def affordable_steps(settings: Settings, sae: TopKSAE, x: torch.Tensor) -> int:
    """`settings.steps`, or three, two or one quarter of them, to stay near `settings.train_s`.

    By the time of a few steps on a copy. A few numbers only, so that runs on a machine that does
    not change its speed much are the same.
    """
    if settings.train_s is None or settings.steps < 40:
        return settings.steps
    copy = TopKSAE(sae.config, device=sae.W_dec.device)
    copy.load_state_dict(sae.state_dict())
    trial, times = Trainer(copy, TrainConfig(8, settings.lr)), []
    for _ in range(8):
        begin = time.perf_counter()
        trial.step(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    assert isinstance(trial.optimizer, FusedAdam)
    trial.optimizer.release()
    seconds = settings.steps * sum(times[2:]) / len(times[2:])
    quarters = next((q for q in (4, 3, 2) if q / 4 * seconds <= 1.25 * settings.train_s), 1)
    return settings.steps * quarters // 4


def compare_steps(
    settings: Settings, trained: TopKSAE, batches: Iterator[torch.Tensor], progress: Progress
) -> tuple[float, float]:
    """Medians in ms of the fused step and of plain PyTorch's, both on copies of the weights."""
    sae = TopKSAE(replace(trained.config, aux_coefficient=0.0), device=trained.W_dec.device)
    sae.load_state_dict(trained.state_dict())
    fused = Trainer(sae, TrainConfig(settings.plain_steps, settings.lr, warmup=0))
    plain = PlainTopKStep(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k, settings.lr)
    steps: tuple[Callable[[torch.Tensor], Any], ...] = (fused.step, plain)
    times: tuple[list[float], list[float]] = ([], [])
    with progress("Timing against plain PyTorch", 2 * settings.plain_steps) as advance:
        for i, x in enumerate(islice(batches, settings.plain_steps)):
            for spent, step in zip(times, steps):
                begin = time.perf_counter()
                step(x)
                if x.device.type == "cuda":
                    torch.cuda.synchronize()
                if i >= min(3, settings.plain_steps - 1):  # the first ones warm up
                    spent.append(1000 * (time.perf_counter() - begin))
                advance(1)
    return median(times[0]), median(times[1])


@torch.no_grad()
def dead_fraction(sae: TopKSAE, store: Store, tokens: int = 131_072) -> float:
    """Share of latents that fire on none of (up to) `tokens` training activations.

    On training activations because a held-out set short enough for a quick run would call every
    rare latent dead.
    """
    return reconstruction(sae, store.activations[:tokens].split(8192)).dead_fraction


# -- the latents ----------------------------------------------------------------------------------


@dataclass
class Found:
    """What is known of the latents after one pass over the text."""

    stats: FeatureStats
    fires: TokenShares
    promoted: torch.Tensor  # [F, P] token ids
    words: torch.Tensor  # [V] bool, tokens with three letters or a digit that stand as whole words
    cards: list[Card]
    other_cards: list[Card]
    candidates: list[int]


@torch.no_grad()
def study_latents(
    settings: Settings, subject: Subject, sae: TopKSAE, store: Store, progress: Progress
) -> Found:
    """Statistics and cards of the latents, first of those that read best."""
    tokens = store.windows.kept
    n_windows, per_window = tokens.shape
    n_windows = min(n_windows, max(1, settings.stats_tokens // per_window))
    tokens = tokens[:n_windows]
    vocabulary = subject.model.get_output_embeddings().weight.shape[0]
    stats = FeatureStats(sae.d_sae)
    with progress("Reading the latents", tokens.numel()) as advance:
        step = 128
        for first in range(0, n_windows, step):
            last = min(first + step, n_windows)
            places = torch.arange(first * per_window, last * per_window).view(-1, per_window)
            x = store.activations[first * per_window : last * per_window]
            values, indices, _ = sae.encode(x.view(last - first, per_window, -1))
            stats.update(values, indices, places)
            advance(places.numel())
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    fires, follows = (TokenShares(stats, ids.reshape(-1)) for ids in (tokens, following))
    counts = torch.bincount(tokens.reshape(-1), minlength=vocabulary)
    text = TokenText(subject.tokenizer)
    seen = counts.nonzero().flatten().tolist()
    words = torch.zeros(vocabulary, dtype=torch.bool)
    words[seen] = torch.tensor([is_word(text[token]) for token in seen])
    words &= stands_whole(tokens, {token: text[token] for token in seen}, vocabulary)
    alike = torch.arange(vocabulary)
    same: dict[str, int] = {}
    for token in seen:  # space and case aside
        alike[token] = same.setdefault(text[token].strip().casefold(), token)
    effects = strongest_effects(logit_effect(subject.model, sae.W_dec), counts)
    promoted = effects.promoted
    min_count = max(3, min(100, stats.n_tokens // 2500))
    scores = score_latents(stats, fires, follows, promoted, counts, words, min_count=min_count)
    many = 2 * max(settings.cards, settings.candidates)
    chosen = choose_latents(scores.score, sae.W_dec, fires, promoted, alike, many)
    # a reader sees words come and go: candidates for steering promote mostly words
    worded = [j for j in chosen if words[promoted[j]].float().mean() >= 0.6]
    maker = CardMaker(stats, scores, effects, store.windows, text)
    shown, candidates = chosen[: settings.cards], worded[: settings.candidates]
    by_count = torch.argsort(stats.count, descending=True, stable=True)[: settings.max_cards]
    firing = by_count[stats.count[by_count] > 0].tolist()
    others = sorted({*firing, *candidates} - {*shown})
    return Found(
        stats, fires, promoted, words, [maker.card(j) for j in shown],
        [maker.card(j) for j in others], candidates,
    )  # fmt: skip


# -- what is written ------------------------------------------------------------------------------


def write(result: Result) -> Path:
    """Writes sae/ (with the latents' maximum activations), report.json and index.html.

    Each atomically. Returns the page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    from .page import render

    out = result.settings.out
    report = result.report()
    try:
        out.mkdir(parents=True, exist_ok=True)
        result.training.sae.save_pretrained(out / "sae")
        result.max_activation.save(out / "sae" / MAX_ACTIVATION)
        page = out / "index.html"
        write_text_atomic(out / "report.json", report_text(report))
        write_text_atomic(page, render(report))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {one_line(error)}") from error
    return page.resolve()


def report_text(report: dict[str, Any]) -> str:
    """`json_text`, but that each of the many other cards is one line."""
    from .page import compact

    rest = {key: value for key, value in report.items() if key != "other_features"}
    cards = ",\n".join(map(compact, report["other_features"]))
    return json_text(rest).removesuffix("\n}\n") + f',\n "other_features": [\n{cards}\n ]\n}}\n'
