"""What a quickstart's report, beside the SAE, says of some latents."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EXAMPLES = 4  # of a latent


@dataclass(frozen=True)
class Known:
    """One latent.

    Attributes:
        fires_on, promotes: tokens, the most frequent and the strongest first.
        density: share of tokens that it fires on.
        examples: texts as tokens, with an activation each; `peak` is the strongest.
    """

    fires_on: list[str]
    promotes: list[str]
    density: float
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """Attributes:
    latents: those that a reader can name, the most readable first.
    steered: the latent that was turned up, or None; strength: how far, times its maximum.
    prompt: a text in which that showed, or None.
    """

    latents: dict[int, Known] = field(default_factory=dict)
    steered: int | None = None
    strength: float = 2.0
    prompt: str | None = None


def read_report(path: Path, n_latents: int) -> Report:
    """An empty one where there is none, or one of an SAE of another size."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["d_sae"] != n_latents:
            return Report()
        latents = {int(f["index"]): _known(f) for f in report["features"]}
        steering = report["steering"]
        if steering is None:
            return Report(latents)
        prompt = _prompt(steering["texts"])
        return Report(latents, int(steering["feature"]), float(steering["strength"]), prompt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Report()


def _known(feature: dict[str, Any]) -> Known:
    examples = [*feature["top_examples"], *feature["weaker_examples"]]
    return Known(
        [str(t) for t, _ in feature["fires_on"]],
        [str(t) for t, _ in feature["promotes"]],
        float(feature["density"]),
        [
            {
                "document": str(e["document"]),
                "tokens": [str(t) for t in e["tokens"]],
                "activations": [float(a) for a in e["activations"]],
                "peak": int(e["peak"]),
            }
            for e in examples[:_EXAMPLES]
        ],
    )


def _prompt(texts: list[dict[str, Any]]) -> str | None:
    """The longest of the texts that gained most of the latent's own tokens, from its second line
    on: the windows that they are taken from begin anywhere in a line."""
    gains = [sum(t["own_after"]) - sum(t["own_before"]) for t in texts]
    prompts = [
        textwrap.dedent(text["prompt"].partition("\n")[2]).strip("\n").rstrip()
        for text, gain in zip(texts, gains, strict=True)
        if gain > 0 and gain >= max(gains) / 2
    ]
    return max(prompts, key=len, default="") or None
