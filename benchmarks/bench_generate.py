"""Generation with the embedded model, steered against unsteered: what a hook costs in tokens/s.

    python benchmarks/bench_generate.py [--batches 1 32] [--tokens 64]

The same prompts are continued greedily by a model without hooks and by one that is steered at its
middle block; entering and leaving the program is part of a steered call. A row's ratio is to the
unsteered call of the same round, so 1.03 is 3% fewer tokens/s. Every contender's text must be that
of the edit inside the SAE with its error kept.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

from fastsae.steer import Program, SAEDescription, attach, clamp
from fastsae.train.activations import edited, find_site

NAME = "generate"
F, K, LAYER, PROMPT_TOKENS = 2048, 24, 2, 24
LATENTS, TARGET = (5, 300, 1200, 2000), 6.0
UNSTEERED = "unsteered"


def embedded() -> tuple[Any, int]:
    from fastsae.quickstart.pipeline import load_subject
    from fastsae.quickstart.settings import Settings

    model = load_subject(Settings()).model
    return model, model.config.hidden_size


def sae_of(kind: str, d: int) -> SAEDescription:
    rows = h.unit_rows(F, d, seed=1)
    bias = h.normal(F, seed=3) / 10
    options: dict[str, Any] = {"threshold": 0.5} if kind == "jumprelu" else {"k": K}
    return SAEDescription(rows, bias, h.unit_rows(F, d, seed=2), torch.zeros(d), kind, **options)


def definition(sae: SAEDescription, latents: Sequence[int]) -> Callable[[Any], Any]:
    """x with the latents clamped inside the SAE and its error kept."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        p = x.double() @ sae.W_enc.double().T + sae.b_enc
        if sae.k is None:
            f = p * (p > 0.5)
        else:
            f = torch.zeros_like(p).scatter(-1, p.topk(sae.k).indices, p.relu())
            top = p.topk(sae.k)
            f = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
        delta = TARGET - f[..., list(latents)]
        return (x + delta @ sae.W_dec[list(latents)].double()).to(x.dtype)

    return edit


def generate(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip


def same_text(truth: torch.Tensor) -> Callable[[Any], str]:
    def check(got: torch.Tensor) -> str:
        same = int((got == truth).all(1).sum())
        if same < len(truth):
            raise h.WrongError(f"{same} of {len(truth)} texts are those of the definition")
        return f"{same} texts as defined"

    return check


def contenders(model: Any, d: int, batch: int, new_tokens: int) -> list[h.Contender]:
    prompts = torch.randint(
        1, 4096, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    site = find_site(model, layer=LAYER)[1]
    out = [h.Contender(UNSTEERED, lambda i: generate(model, prompts, new_tokens))]
    for kind, latents, name in (
        ("jumprelu", LATENTS[:1], "one clamp, JumpReLU"),
        ("jumprelu", LATENTS, "four clamps, JumpReLU"),
        ("topk", LATENTS[:1], "one clamp, TopK"),
        ("topk", LATENTS, "four clamps, TopK"),
    ):
        sae = sae_of(kind, d)
        with edited(site, definition(sae, latents)):
            truth = generate(model, prompts, new_tokens)
        hooked = copy.deepcopy(model)
        steerer = attach(hooked, sae, layer=LAYER)
        program: Program = [clamp(j, TARGET) for j in latents]

        def run(_: int, m: Any = hooked, s: Any = steerer, p: Program = program) -> torch.Tensor:
            with s.steer([p] * batch):
                return generate(m, prompts, new_tokens)

        out.append(h.Contender(name, run, same_text(truth)))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=21, seconds=60.0)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--tokens", type=int, default=64)
    args = h.parse(parser, argv)
    model, d = embedded()
    for batch in args.batches:
        every = contenders(model, d, batch, args.tokens)
        kept = h.chosen(every, args.only, always=(UNSTEERED,))
        results = h.measure(kept, rounds=args.rounds, seconds=args.seconds)
        rows = h.rows_of(
            results, op=NAME, shape=(batch, d, F), k=K, data="embedded model", units=("", ""),
            own=UNSTEERED,
        )  # fmt: skip
        for row in rows:
            if "ms" in row:
                row["new_tokens"] = args.tokens
                row["tokens_per_s"] = round(1e3 * batch * args.tokens / row["ms"], 1)
        h.finish(NAME, f"generate: batch={batch}, {args.tokens} new tokens each", rows, args)


def test_generate(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    model, d = embedded()
    _, steered, *_ = contenders(model, d, 2, 8)
    assert steered.check is not None
    steered.check(steered.run(0))
    benchmark(steered.run, 0)


if __name__ == "__main__":
    main()
