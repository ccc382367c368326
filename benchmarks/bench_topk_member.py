"""topk_member for few tokens: counting, with and without a screen, against selecting.

python benchmarks/bench_topk_member.py [--shapes 1x768x24576] [--k 32] [--dtype bfloat16]

"active": the latent is among the k, so every other one must be looked at; "inactive": its rank is
F/8, as a latent has that is steered where it does not fire.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

import fastsae
from fastsae import ops
from fastsae.bench import checks

NAME = "topk_member"
SHAPES = [(1, 768, 24576), (4, 768, 24576), (16, 768, 24576), (32, 768, 24576)]


def contenders(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> list[h.Contender]:
    n, d, f = shape
    x, b = h.normal(n, d, seed=0, dtype=dtype), torch.zeros(f, dtype=dtype)
    copies = h.rotations(f * d * dtype.itemsize, most=3)
    ws = [h.unit_rows(f, d, seed=100 + s, dtype=dtype) for s in range(copies)]
    screens = [ops.topk_screen(w) for w in ws]
    order = [(x.float() @ w.float().T).argsort(dim=1, descending=True).int() for w in ws]

    def member(rank: int, screened: bool) -> h.Contender:
        latents = [o[:, rank : rank + 1].contiguous() for o in order]

        def run(i: int) -> torch.Tensor:
            i %= copies
            screen = screens[i] if screened else None
            return ops.topk_member(x, ws[i], b, latents[i], k, screen=screen)

        name = "fastsae" if screened else "fastsae, no screen"
        name += ", active" if rank < k else ", inactive"
        return h.Contender(name, run, checks.members(x, ws[0], b, latents[0], k))

    def select(i: int) -> Any:
        return ops.topk_encode(x, ws[i % copies], b, k)

    return [
        h.Contender("read once (sum)", lambda i: ws[i % copies].sum()),
        *(member(rank, screened) for rank in (k // 2, f // 8) for screened in (True, False)),
        h.Contender("topk_encode", select, checks.selection(x, ws[0], b, k)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=31, seconds=12.0)
    parser.set_defaults(shapes=SHAPES)
    args = h.parse(parser, argv)
    for shape in args.shapes:
        for k in args.k:
            for dtype in args.dtype:
                every = h.chosen(contenders(shape, k, getattr(torch, dtype)), args.only)
                results = h.measure(every, rounds=args.rounds, seconds=args.seconds)
                rows = h.rows_of(
                    results, op=NAME, shape=shape, k=k, dtype=dtype,
                    units=("read once (sum)",), own="fastsae, active",
                )  # fmt: skip
                title = f"topk_member N={shape[0]} D={shape[1]} F={shape[2]} K={k} {dtype}"
                h.finish(NAME, title, rows, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_member(benchmark: Any, dtype: torch.dtype) -> None:
    w, x = h.unit_rows(1024, 64, seed=1, dtype=dtype), h.normal(1, 64, seed=0, dtype=dtype)
    screen = ops.topk_screen(w)
    latents = fastsae.ops.topk_encode(x, w, None, 16)[1][:, 8:9]
    checks.members(x, w, None, latents, 16)(ops.topk_member(x, w, None, latents, 16, screen=screen))
    benchmark(ops.topk_member, x, w, None, latents, 16, screen=screen)


if __name__ == "__main__":
    main()
