"""sparse_grad_weight against index_add, embedding_bag's backward and the dense product.

python benchmarks/bench_sparse_grad_weight.py [--shapes 2048x768x24576] [--k 32]
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

NAME = "sparse_grad_weight"


def index_add(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, f: int
) -> torch.Tensor:
    """What sparsify does: the [N·K, D] products, then one index_add."""
    terms = (values.unsqueeze(2) * rows.unsqueeze(1)).reshape(-1, rows.shape[1])
    return rows.new_zeros(f, rows.shape[1]).index_add_(0, indices.flatten(), terms)


def contenders(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> list[h.Contender]:
    n, d, f = shape
    rows = [h.normal(n, d, seed=10 + s, dtype=dtype) for s in range(4)]
    w = h.unit_rows(f, d, seed=100, dtype=dtype)
    sets = [h.random_pairs(n, k, f, seed=s, dtype=dtype) for s in range(4)]
    long_sets = [(v, i.long()) for v, i in sets]
    check = checks.grad_weight(*sets[0], rows[0], f)

    def own(i: int) -> torch.Tensor:
        return fastsae.ops.sparse_grad_weight(*sets[i % 4], rows[i % 4], f)

    def own_rows(i: int) -> Any:
        return fastsae.ops.sparse_grad_weight(*sets[i % 4], rows[i % 4], f, layout="rows")

    def added(i: int) -> torch.Tensor:
        return index_add(*long_sets[i % 4], rows[i % 4], f)

    def dense(i: int) -> torch.Tensor:
        v, idx = long_sets[i % 4]
        return torch.zeros(n, f, dtype=dtype).scatter_(1, idx, v).T @ rows[i % 4]

    offsets = torch.arange(0, n * k, k)

    def bag_backward(i: int) -> torch.Tensor:
        v, idx = long_sets[i % 4]
        leaf = w.detach().requires_grad_()
        out = torch.nn.functional.embedding_bag(
            idx.flatten(), leaf, offsets, per_sample_weights=v.flatten(), mode="sum"
        )
        return torch.autograd.grad(out, leaf, rows[i % 4])[0]

    units = h.products(rows, [w])
    for c in units:
        c.every = 10
    return [
        *units,
        h.Contender("fastsae", own, check),
        h.Contender("fastsae, row-sparse result", own_rows, check),
        h.Contender("torch index_add", added, check, every=5),
        h.Contender("torch embedding_bag forward + backward", bag_backward, check, every=5),
        h.Contender("dense product, default", dense, check, every=10),
        h.Contender("dense product, oneDNN", dense, check, "onednn", every=10),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = h.parse(h.arguments(__doc__, rounds=61, seconds=40.0), argv)
    for shape in args.shapes:
        for k in args.k:
            for dtype in args.dtype:
                every = contenders(shape, k, getattr(torch, dtype))
                results = h.measure(
                    h.chosen(every, args.only), rounds=args.rounds, seconds=args.seconds
                )
                rows = h.rows_of(results, op=NAME, shape=shape, k=k, dtype=dtype)
                title = f"sparse_grad_weight N={shape[0]} D={shape[1]} F={shape[2]} K={k} {dtype}"
                h.finish(NAME, title, rows, args)


@pytest.mark.parametrize("layout", ["dense", "rows"])
def test_sparse_grad_weight(benchmark: Any, layout: str) -> None:
    values, indices = h.random_pairs(256, 16, 1024, seed=0)
    rows = h.normal(256, 64, seed=2)

    def run() -> Any:
        return fastsae.ops.sparse_grad_weight(values, indices, rows, 1024, layout=layout)

    checks.grad_weight(values, indices, rows, 1024)(run())
    benchmark(run)


if __name__ == "__main__":
    main()
