"""topk against torch.topk (whose ties are open).

python benchmarks/bench_topk.py [--shapes 2048x131072] [--k 1024] [--dtype bfloat16]

On a GPU the published figures are at 2048x131072 K=1024 and 4096x200000 K=1024.
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

from fastsae.bench.cases import turn

NAME = "topk"
SHAPES = (
    (512, 24576, 32),
    (512, 24576, 64),
    (2048, 4096, 32),
    (64, 131072, 1024),
    (1, 1048576, 64),
)


def row_shape(text: str) -> tuple[int, int]:
    n, m = (int(part) for part in text.lower().split("x"))
    return n, m


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    own = h.own(NAME, size, given)
    scores, k = given.scores, size.k
    return [
        own,
        h.Contender("torch.topk", lambda i: torch.topk(turn(scores, i), k), own.check),
        h.Contender("read once (sum)", lambda i: turn(scores, i).sum(1)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=21, seconds=12.0)
    for action in parser._actions:
        if action.dest == "shapes":
            action.type, action.metavar, action.default = row_shape, "NxM", None
        if action.dest == "k":
            action.default = None
    args = h.parse(parser, argv)
    shapes = [(64, 1024, 16)] if args.quick else SHAPES
    if args.shapes and not args.quick:
        shapes = [(n, m, k) for n, m in args.shapes for k in args.k or h.KS]
    for n, m, k in shapes:
        args.shapes, args.k = [(n, 1, m)], [k]
        h.bench(NAME, contenders, args, units=("none",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype, n=64, f=4096, k=32)


if __name__ == "__main__":
    main()
