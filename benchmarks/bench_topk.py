"""topk against torch.topk (whose ties are open).

python benchmarks/bench_topk.py [--shapes 2048x131072] [--k 1024] [--dtype bfloat16]

On a GPU the published figures are at 2048x131072 K=1024 and 4096x200000 K=1024.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

import fastsae
from fastsae.bench import checks

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


def contenders(n: int, m: int, k: int, dtype: torch.dtype) -> list[h.Contender]:
    copies = h.rotations(n * m * dtype.itemsize, most=4)
    xs = [h.normal(n, m, seed=s, dtype=dtype) for s in range(copies)]
    check = checks.largest(xs[0], k)
    return [
        h.Contender("fastsae", lambda i: fastsae.ops.topk(xs[i % copies], k), check),
        h.Contender("torch.topk", lambda i: torch.topk(xs[i % copies], k), check),
        h.Contender("read once (sum)", lambda i: xs[i % copies].sum(1)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=21, seconds=12.0)
    for action in parser._actions:
        if action.dest == "shapes":
            action.type, action.metavar, action.default = row_shape, "NxM", None
        if action.dest == "k":
            action.default = None
    args: argparse.Namespace = h.parse(parser, argv)
    shapes = [(64, 1024, 16)] if args.quick else SHAPES
    if args.shapes and not args.quick:
        shapes = [(n, m, k) for n, m in args.shapes for k in args.k or h.KS]
    for n, m, k in shapes:
        for dtype in args.dtype:
            every = h.chosen(contenders(n, m, k, getattr(torch, dtype)), args.only)
            results = h.measure(every, rounds=args.rounds, seconds=args.seconds)
            rows = h.rows_of(
                results, op=NAME, shape=(n, 1, m), k=k, dtype=dtype, units=("none",), own="fastsae"
            )
            h.finish(NAME, f"topk N={n} M={m} K={k} {dtype}", rows, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk(benchmark: Any, dtype: torch.dtype) -> None:
    x = h.normal(64, 4096, seed=0, dtype=dtype)
    checks.largest(x, 32)(fastsae.ops.topk(x, 32))
    benchmark(fastsae.ops.topk, x, 32)


if __name__ == "__main__":
    main()
