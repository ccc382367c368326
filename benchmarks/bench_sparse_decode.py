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
from _harness import Inputs, Size

from fastsae.bench.cases import turn

NAME = "sparse_decode"


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    own = h.own(NAME, size, given)
    ws, sets = given.w, [(v, i.long()) for v, i in given.pairs]

    def bag(i: int) -> torch.Tensor:
        v, idx = turn(sets, i)
        return torch.nn.functional.embedding_bag(idx, turn(ws, i), per_sample_weights=v, mode="sum")

    def dense(i: int) -> torch.Tensor:
        v, idx = turn(sets, i)
        acts = torch.zeros(size.n, size.f, dtype=size.dtype).scatter_(1, idx, v)
        return acts @ turn(ws, i)

    return [
        *h.units(given),
        own,
        h.Contender("torch embedding_bag", bag, own.check),
        h.Contender("dense product, default", dense, own.check, every=10),
        h.Contender("dense product, oneDNN", dense, own.check, "onednn", every=10),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    h.bench(NAME, contenders, h.parse(h.arguments(__doc__, rounds=81, seconds=40.0), argv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_decode(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype)


if __name__ == "__main__":
    main()
