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
from _harness import Inputs, Size

from fastsae import ops
from fastsae.bench import checks
from fastsae.bench.cases import turn

NAME = "topk_member"
SHAPES = [(1, 768, 24576), (4, 768, 24576), (16, 768, 24576), (32, 768, 24576)]


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    x, ws, b, k = given.x[0], given.w, given.b, size.k
    screens = [ops.topk_screen(w) for w in ws]
    scores = [x.double() @ w.double().T + b.double() for w in ws]
    order = [s.argsort(dim=1, descending=True).int() for s in scores]

    def member(rank: int, screened: bool) -> h.Contender:
        latents = [o[:, rank : rank + 1].contiguous() for o in order]

        def run(i: int) -> torch.Tensor:
            screen = turn(screens, i) if screened else None
            return ops.topk_member(x, turn(ws, i), b, turn(latents, i), k, screen=screen)

        name = "fastsae" if screened else "fastsae, no screen"
        name += ", active" if rank < k else ", inactive"
        return h.Contender(name, run, checks.members(x, ws[0], b, latents[0], k))

    def select(i: int) -> Any:
        return ops.topk_encode(x, turn(ws, i), b, k)

    return [
        h.Contender("read once (sum)", lambda i: turn(ws, i).sum()),
        *(member(rank, screened) for rank in (k // 2, size.f // 8) for screened in (True, False)),
        h.Contender("topk_encode", select, checks.selection(x, ws[0], b, k)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=31, seconds=12.0)
    parser.set_defaults(shapes=SHAPES)
    args = h.parse(parser, argv)
    h.bench(NAME, contenders, args, units=("read once (sum)",), own="fastsae, active")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_member(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype, n=1)


if __name__ == "__main__":
    main()
