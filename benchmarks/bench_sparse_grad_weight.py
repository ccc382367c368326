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
from _harness import Inputs, Size

from fastsae.bench.cases import CASES, turn

NAME = "sparse_grad_weight"


def index_add(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, f: int
) -> torch.Tensor:
    """What sparsify does: the [N·K, D] products, then one index_add."""
    terms = (values.unsqueeze(2) * rows.unsqueeze(1)).reshape(-1, rows.shape[1])
    return rows.new_zeros(f, rows.shape[1]).index_add_(0, indices.flatten(), terms)


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    own, few = h.own(NAME, size, given), CASES[f"{NAME}_rows"](size, given)
    n, k, f, rows, w = size.n, size.k, size.f, given.x, given.w[0]
    sets = [(v, i.long()) for v, i in given.pairs]

    def added(i: int) -> torch.Tensor:
        return index_add(*turn(sets, i), turn(rows, i), f)

    def dense(i: int) -> torch.Tensor:
        v, idx = turn(sets, i)
        return torch.zeros(n, f, dtype=size.dtype).scatter_(1, idx, v).T @ turn(rows, i)

    offsets = torch.arange(0, n * k, k)

    def bag_backward(i: int) -> torch.Tensor:
        v, idx = turn(sets, i)
        leaf = w.detach().requires_grad_()
        out = torch.nn.functional.embedding_bag(
            idx.flatten(), leaf, offsets, per_sample_weights=v.flatten(), mode="sum"
        )
        return torch.autograd.grad(out, leaf, turn(rows, i))[0]

    return [
        *h.units(given),
        own,
        h.Contender("fastsae, row-sparse result", few.run, few.check),
        h.Contender("torch index_add", added, own.check, every=5),
        h.Contender("torch embedding_bag forward + backward", bag_backward, own.check, every=5),
        h.Contender("dense product, default", dense, own.check, every=10),
        h.Contender("dense product, oneDNN", dense, own.check, "onednn", every=10),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    h.bench(NAME, contenders, h.parse(h.arguments(__doc__, rounds=61, seconds=40.0), argv))


@pytest.mark.parametrize("op", [NAME, f"{NAME}_rows"])
def test_sparse_grad_weight(benchmark: Any, op: str) -> None:
    h.at_a_small_size(benchmark, op, torch.float32)


if __name__ == "__main__":
    main()
