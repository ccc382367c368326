"""sparse_grad_values against the dense product with a gather, and torch's sampled product.

python benchmarks/bench_sparse_grad_values.py [--shapes 2048x768x24576] [--k 32]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

import fastsae
from fastsae.bench import checks

NAME = "sparse_grad_values"


def contenders(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> list[h.Contender]:
    n, d, f = shape
    gs = [h.normal(n, d, seed=s, dtype=dtype) for s in range(4)]
    copies = h.rotations(f * d * dtype.itemsize, most=4)
    ws = [h.unit_rows(f, d, seed=100 + s, dtype=dtype) for s in range(copies)]
    sets = [h.random_pairs(n, k, f, seed=s, dtype=dtype)[1] for s in range(4)]
    long_sets = [i.long() for i in sets]
    check = checks.grad_values(gs[0], sets[0], ws[0])

    def own(i: int) -> torch.Tensor:
        return fastsae.ops.sparse_grad_values(gs[i % 4], sets[i % 4], ws[i % copies])

    def gather(i: int) -> torch.Tensor:
        g, idx, w = gs[i % 4], long_sets[i % 4], ws[i % copies]
        parts = [
            torch.bmm(w[idx[r]], g[r].unsqueeze(2)).squeeze(2)
            for r in torch.arange(n).split(256)  # [256, K, D] at a time
        ]
        return torch.cat(parts)

    def dense(i: int) -> torch.Tensor:
        return (gs[i % 4] @ ws[i % copies].T).gather(1, long_sets[i % 4])

    crow = torch.arange(0, n * k + 1, k)
    zeros = torch.zeros(n * k, dtype=dtype)
    orders = [i.sort(dim=1) for i in long_sets]

    def sampled(i: int) -> torch.Tensor:
        columns, order = orders[i % 4]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR is in beta"
            pattern = torch.sparse_csr_tensor(crow, columns.flatten(), zeros, (n, f))
            out = torch.sparse.sampled_addmm(pattern, gs[i % 4], ws[i % copies].T)
        return torch.empty(n, k, dtype=dtype).scatter_(1, order, out.values().view(n, k))

    units = h.products(gs, ws)
    for c in units:
        c.every = 10
    result = [*units, h.Contender("fastsae", own, check)]
    result.append(h.Contender("torch gather + bmm", gather, check, every=5))
    if dtype == torch.float32:
        result.append(h.Contender("torch sampled_addmm", sampled, check, every=5))
    result.append(h.Contender("dense product + gather, default", dense, check, every=10))
    result.append(h.Contender("dense product + gather, oneDNN", dense, check, "onednn", every=10))
    return result


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
                title = f"sparse_grad_values N={shape[0]} D={shape[1]} F={shape[2]} K={k} {dtype}"
                h.finish(NAME, title, rows, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_grad_values(benchmark: Any, dtype: torch.dtype) -> None:
    w = h.unit_rows(1024, 64, seed=1, dtype=dtype)
    grad = h.normal(256, 64, seed=2, dtype=dtype)
    indices = h.random_pairs(256, 16, 1024, seed=0)[1]
    checks.grad_values(grad, indices, w)(fastsae.ops.sparse_grad_values(grad, indices, w))
    benchmark(fastsae.ops.sparse_grad_values, grad, indices, w)


if __name__ == "__main__":
    main()
