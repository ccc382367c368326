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
from _harness import Inputs, Size

from fastsae.bench.cases import turn

NAME = "sparse_grad_values"


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    own = h.own(NAME, size, given)
    n, k, gs, ws = size.n, size.k, given.x, given.w
    sets = [i.long() for _, i in given.pairs]

    def gather(i: int) -> torch.Tensor:
        g, idx, w = turn(gs, i), turn(sets, i), turn(ws, i)
        parts = [
            torch.bmm(w[idx[r]], g[r].unsqueeze(2)).squeeze(2)
            for r in torch.arange(n).split(256)  # [256, K, D] at a time
        ]
        return torch.cat(parts)

    def dense(i: int) -> torch.Tensor:
        return (turn(gs, i) @ turn(ws, i).T).gather(1, turn(sets, i))

    crow = torch.arange(0, n * k + 1, k)
    zeros = torch.zeros(n * k, dtype=size.dtype)
    orders = [i.sort(dim=1) for i in sets]

    def sampled(i: int) -> torch.Tensor:
        columns, order = turn(orders, i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR is in beta"
            pattern = torch.sparse_csr_tensor(crow, columns.flatten(), zeros, (n, size.f))
            out = torch.sparse.sampled_addmm(pattern, turn(gs, i), turn(ws, i).T)
        return torch.empty(n, k, dtype=size.dtype).scatter_(1, order, out.values().view(n, k))

    result = [*h.units(given), own]
    result.append(h.Contender("torch gather + bmm", gather, own.check, every=5))
    if size.dtype == torch.float32:
        result.append(h.Contender("torch sampled_addmm", sampled, own.check, every=5))
    for library, label in (("default", "default"), ("onednn", "oneDNN")):
        name = f"dense product + gather, {label}"
        result.append(h.Contender(name, dense, own.check, library, every=10))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    h.bench(NAME, contenders, h.parse(h.arguments(__doc__, rounds=81, seconds=40.0), argv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_grad_values(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype)


if __name__ == "__main__":
    main()
