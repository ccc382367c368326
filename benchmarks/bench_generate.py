"""Generation with the embedded model, steered against unsteered: what a hook costs in tokens/s.

    python benchmarks/bench_generate.py [--batches 1 32] [--tokens 64]

The same prompts are continued greedily by a model without hooks and by ones that are steered at the
middle block; all share one set of weights. Every contender's text must be that of the edit inside
the SAE with its error kept. Two tables, whose ratios are to the unsteered model:

- generate: whole calls of `generate`, entering and leaving the program included, so 1.03 is 3%
  fewer tokens/s. A call takes 0.3 to 0.6 s, in which the machine's speed moves by several percent.
- a step: the forward passes of such texts, token by token, all contenders in turn at every token,
  in random order. The difference to the unsteered step next to it is known to 10 us that way; its
  share is of a step without what `generate` does around it. "95%" is the interval of the median.
"""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

from fastsae.bench.timing import WallClock
from fastsae.lm.sites import edited, find_site
from fastsae.steer import Description, Program, attach, clamp

NAME = "generate"
F, K, LAYER, PROMPT_TOKENS = 2048, 24, 2, 24
LATENTS, TARGET = (5, 300, 1200, 2000), 6.0
UNSTEERED, AGAIN = "unsteered", "unsteered again"


def embedded() -> tuple[Any, int]:
    from fastsae.lm.load import load_subject

    model = load_subject().model
    return model, model.config.hidden_size


def sae_of(kind: str, d: int) -> Description:
    rows = h.unit_rows(F, d, seed=1)
    bias = h.normal(F, seed=3) / 10
    options: dict[str, Any] = {"threshold": 0.5} if kind == "jumprelu" else {"k": K}
    return Description(rows, bias, h.unit_rows(F, d, seed=2), torch.zeros(d), kind, **options)


def definition(sae: Description, latents: Sequence[int]) -> Callable[[Any], Any]:
    """x with the latents clamped inside the SAE and its error kept."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        p = x.double() @ sae.W_enc.double().T + sae.b_enc
        if sae.k is None:
            f = p * (p > 0.5)
        else:
            top = p.topk(sae.k)
            f = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
        delta = TARGET - f[..., list(latents)]
        return (x + delta @ sae.W_dec[list(latents)].double()).to(x.dtype)

    return edit


def sharing(model: Any) -> Any:
    """A copy of the modules around the same weights: where these lie makes 2% of a step."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(w): w for w in weights})


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


@dataclass
class Subject:
    """A model and how it is steered; `step` continues its texts by a token."""

    name: str
    model: Any
    prompts: torch.Tensor
    steerer: Any = None
    programs: list[Program | None] = field(default_factory=list)
    check: Callable[[Any], str] | None = None
    seconds: list[float] = field(default_factory=list)  # of the steps

    def generate(self, new_tokens: int) -> torch.Tensor:
        if self.steerer is None:
            return generate(self.model, self.prompts, new_tokens)
        with self.steerer.steer(self.programs):
            return generate(self.model, self.prompts, new_tokens)

    def begin(self) -> None:
        from transformers import DynamicCache

        if self.steerer is not None:
            self.steerer.set(self.programs)
        self.ids, self.cache = self.prompts, DynamicCache()
        self.step()
        self.seconds.pop()  # the prompt

    def step(self) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
            self.ids = out.logits[:, -1].argmax(-1, keepdim=True)
        self.seconds.append(time.perf_counter() - start)

    def end(self) -> None:
        if self.steerer is not None:
            self.steerer.clear()


def subjects(model: Any, d: int, batch: int, new_tokens: int) -> list[Subject]:
    prompts = torch.randint(
        1, 4096, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    site = find_site(model, layer=LAYER)[1]
    out = [Subject(UNSTEERED, model, prompts), Subject(AGAIN, sharing(model), prompts)]
    for kind, latents, name in (
        ("jumprelu", LATENTS[:1], "one clamp, JumpReLU"),
        ("jumprelu", LATENTS, "four clamps, JumpReLU"),
        ("topk", LATENTS[:1], "one clamp, TopK"),
        ("topk", LATENTS, "four clamps, TopK"),
    ):
        sae = sae_of(kind, d)
        with edited(site, definition(sae, latents)):
            truth = generate(model, prompts, new_tokens)
        hooked = sharing(model)
        program: Program = [clamp(j, TARGET) for j in latents]
        steerer = attach(hooked, sae, layer=LAYER)
        out.append(Subject(name, hooked, prompts, steerer, [program] * batch, same_text(truth)))
    return out


def contenders(every: Sequence[Subject], new_tokens: int) -> list[h.Contender]:
    return [h.Contender(s.name, lambda _, s=s: s.generate(new_tokens), s.check) for s in every]


def time_steps(every: Sequence[Subject], texts: int, new_tokens: int) -> float:
    """Fills `seconds`; returns the share of the CPUs that other processes took."""
    turns = random.Random(0)
    clock, start = WallClock(), time.perf_counter()
    busy, own = clock.used()
    for _ in range(texts):
        for subject in every:
            subject.begin()
        for _ in range(new_tokens - 1):
            for subject in turns.sample(list(every), len(every)):
                subject.step()
        for subject in every:
            subject.end()
    busy_after, own_after = clock.used()
    wall = (time.perf_counter() - start) * torch.get_num_threads()
    return max(0.0, (busy_after - busy) - (own_after - own)) / wall


def step_rows(
    every: Sequence[Subject], others: float, shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """A row for each subject: median step, median difference to the unsteered step beside it."""
    base = every[0].seconds
    unit = statistics.median(base)
    rows = []
    for subject in every:
        ordered = sorted(subject.seconds)
        over = sorted(mine - its for mine, its in zip(subject.seconds, base))
        n = len(over)
        half = 0.98 * n**0.5  # ranks of the median's 95% interval
        low, high = over[max(0, int(n / 2 - half))], over[min(n - 1, int(n / 2 + half) + 1)]
        added = statistics.median(over)
        rows.append({
            **h.machine(), "op": "generate step", "data": "embedded model",
            **dict(zip(("N", "D", "F"), shape)), "K": K, "dtype": "float32",
            "contender": subject.name, "ms": round(1e3 * statistics.median(ordered), 4),
            "p20": round(1e3 * ordered[n // 5], 4), "p80": round(1e3 * ordered[4 * n // 5], 4),
            "rounds": n, "others": round(others, 3), "of_own": round(1 + added / unit, 4),
            "added_us": round(1e6 * added, 1), "low": round(low / unit, 4),
            "high": round(high / unit, 4),
            "note": f"{1e6 * added:+.0f} us, 95% {low / unit:+.1%} to {high / unit:+.1%}",
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=21, seconds=60.0)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=10, help="of the table of steps")
    args = h.parse(parser, argv)
    model, d = embedded()
    for batch in args.batches:
        every = subjects(model, d, batch, args.tokens)
        shape = (batch, d, F)
        kept = h.chosen(contenders(every, args.tokens), args.only, always=(UNSTEERED,))
        if args.rounds:
            results = h.measure(kept, rounds=args.rounds, seconds=args.seconds)
            rows = h.rows_of(
                results, op=NAME, shape=shape, k=K, data="embedded model", units=("", ""),
                own=UNSTEERED,
            )  # fmt: skip
            for row in rows:
                if "ms" in row:
                    row["new_tokens"] = args.tokens
                    row["tokens_per_s"] = round(1e3 * batch * args.tokens / row["ms"], 1)
            h.finish(NAME, f"generate: batch={batch}, {args.tokens} new tokens each", rows, args)
        if not args.texts:
            continue
        names = {c.name for c in kept}
        timed = [s for s in every if s.name in names]
        others = time_steps(timed, args.texts, args.tokens)
        rows = step_rows(timed, others, shape)
        h.finish(NAME, f"a step: batch={batch}, {args.tokens - 1} steps a text", rows, args)


def test_generate(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    model, d = embedded()
    _, _, steered, *_ = contenders(subjects(model, d, 2, 8), 8)
    assert steered.check is not None
    steered.check(steered.run(0))
    benchmark(steered.run, 0)


if __name__ == "__main__":
    main()
