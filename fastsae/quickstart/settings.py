"""What a quickstart run does, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..lm.harvest import Windows
from ..lm.load import Subject
from ..lm.text import Progress, stdlib_windows

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Settings:
    """Sizes are for the embedded model on two CPU cores and about two minutes in all."""

    model: str | None = None  # hub id or path; None: the embedded model
    out: Path = Path("quickstart")
    device: str = "cpu"
    seed: int = 0
    layer: int | None = None  # None: the middle block
    hook: str | None = None  # a module's path instead of layer

    tokens: int = 300_000  # activations harvested for training
    held_out_tokens: int = 24_576
    stats_tokens: int = 200_000  # of the training activations, for the latents' statistics
    context: int = 256
    max_bytes: int = 2 << 30  # of activations kept

    d_sae: int | None = None  # None: 8 times the width
    k: int = 24
    steps: int = 600
    train_s: float | None = 60.0  # on a slower machine fewer steps, down to a quarter; None: all
    batch_size: int = 2048
    lr: float = 1e-3
    aux_weight: float = 1 / 32
    k_aux: int = 32
    dead_after: int = 60_000  # tokens without firing
    plain_steps: int = 15  # of the comparison, each

    cards: int = 24  # shown first
    max_cards: int = 16_384  # on the page, of the latents that fire most often
    candidates: int = 24  # latents screened for steering
    sample_tokens: int = 64
    samples: int = 16  # texts per point of the sweep
    strengths: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0)
    screen_strengths: tuple[float, ...] = (1.0, 1.75)

    def windows(self, subject: Subject, progress: Progress) -> tuple[Windows, Windows]:
        """Windows of the standard library's text, to train on and held out."""
        return stdlib_windows(
            subject, tokens=self.tokens, held_out_tokens=self.held_out_tokens,
            context=self.context, seed=self.seed, progress=progress,
        )  # fmt: skip
