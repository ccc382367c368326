"""sparse_decode against torch's embedding_bag and the dense decoder product.

python benchmarks/bench_sparse_decode.py [--shapes 2048x768x24576] [--k 32] [--dtype bfloat16]
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
from fastsae.bench import checks

NAME = "sparse_decode"


def contenders(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> list[h.Contender]:
    n, d, f = shape
    xs = [h.normal(n, d, seed=0, dtype=dtype)]
    copies = h.rotations(f * d * dtype.itemsize, most=4)
    ws = [h.unit_rows(f, d, seed=100 + s, dtype=dtype) for s in range(copies)]
    sets = [h.random_pairs(n, k, f, seed=s, dtype=dtype) for s in range(4)]
    long_sets = [(v, i.long()) for v, i in sets]
    check = checks.decoded(*sets[0], ws[0])

    def own(i: int) -> torch.Tensor:
        v, idx = sets[i % 4]
        return fastsae.ops.sparse_decode(v, idx, ws[i % copies])

    def bag(i: int) -> torch.Tensor:
        v, idx = long_sets[i % 4]
        return torch.nn.functional.embedding_bag(
            idx, ws[i % copies], per_sample_weights=v, mode="sum"
        )

    def dense(i: int) -> torch.Tensor:
        v, idx = long_sets[i % 4]
        acts = torch.zeros(n, f, dtype=dtype).scatter_(1, idx, v)
        return acts @ ws[i % copies]

    units = h.products(xs, ws)
    for c in units:
        c.every = 10
    return [
        *units,
        h.Contender("fastsae", own, check),
        h.Contender("torch embedding_bag", bag, check),
        h.Contender("dense product, default", dense, check, every=10),
        h.Contender("dense product, oneDNN", dense, check, "onednn", every=10),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = h.parse(h.arguments(__doc__, rounds=81, seconds=40.0), argv)
    for shape in args.shapes:
        for k in args.k:
            for dtype in args.dtype:
                every = contenders(shape, k, getattr(torch, dtype))
                results = h.measure(
                    h.chosen(every, args.only), rounds=args.rounds, seconds=args.seconds
                )
                rows = h.rows_of(results, op=NAME, shape=shape, k=k, dtype=dtype)
                title = f"sparse_decode N={shape[0]} D={shape[1]} F={shape[2]} K={k} {dtype}"
                h.finish(NAME, title, rows, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_decode(benchmark: Any, dtype: torch.dtype) -> None:
    w = h.unit_rows(1024, 64, seed=1, dtype=dtype)
    values, indices = h.random_pairs(256, 16, 1024, seed=0, dtype=dtype)
    checks.decoded(values, indices, w)(fastsae.ops.sparse_decode(values, indices, w))
    benchmark(fastsae.ops.sparse_decode, values, indices, w)


if __name__ == "__main__":
    main()
