"""sparse_adam_step against torch.optim.Adam, and the whole backward pass of a TopK SAE.

    python benchmarks/bench_sparse_adam_step.py [--shapes 2048x768x24576] [--k 32]

torch's Adam is given its dense gradient for free in the rows "Adam only"; the rows with index_add
form the gradient as fastsae does inside the step. "whole backward" is sparse_grad_values, then the
steps of W_dec (unit norm) and W_enc: all that happens to the weights after the loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h
from _harness import Inputs, Size
from bench_sparse_grad_weight import index_add

import fastsae
from fastsae.bench import checks
from fastsae.bench.cases import LR, turn

NAME = "sparse_adam_step"
WHOLE = "fastsae, whole backward with Adam"


def contenders(size: Size, given: Inputs) -> list[h.Contender]:
    d, f, dtype = size.d, size.f, size.dtype
    xs, sets, start = given.x, given.pairs, given.w[0]
    grads = [x * 1e-3 for x in xs]
    long_sets = [(v, i.long()) for v, i in sets]
    check = h.own(NAME, size, given).check

    def with_state(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return h.unit_rows(f, d, seed=seed, dtype=dtype), torch.zeros(f, d), torch.zeros(f, d)

    dec, enc = with_state(1), with_state(2)
    count = [0]

    def own(lazy: bool = False, unit_norm: bool = False) -> Callable[[int], None]:
        def run(i: int) -> None:
            count[0] += 1
            fastsae.ops.sparse_adam_step(
                *dec, *turn(sets, i), turn(grads, i),
                lr=LR, step=count[0], lazy=lazy, unit_norm=unit_norm,
            )  # fmt: skip

        return run

    def few(fmt: str) -> h.Contender:
        """The same with moments in few bits."""
        kept = checks.fresh_moments(dec[0], fmt)

        def run(i: int) -> None:
            count[0] += 1
            fastsae.ops.sparse_adam_step(
                dec[0], *kept[:2], *turn(sets, i), turn(grads, i), lr=LR, step=count[0],
                unit_norm=True, exp_avg_scale=kept[2], exp_avg_sq_scale=kept[3],
            )  # fmt: skip

        name = f"fastsae, unit norm, {fmt.replace('8bit', '8-bit')} moments"
        verify = checks.adam(fastsae.ops.sparse_adam_step, start, *sets[0], grads[0], LR, fmt)
        return h.Contender(name, run, verify)

    def whole(i: int) -> None:
        values, indices = turn(sets, i)
        dv = fastsae.ops.sparse_grad_values(turn(grads, i), indices, dec[0])
        own(unit_norm=True)(i)
        fastsae.ops.sparse_adam_step(
            *enc, dv * (values > 0), indices, turn(xs, i), lr=LR, step=count[0]
        )

    # torch's optimizer works on the same parameter and moments (fp32 only), so they fit in memory
    leaf = dec[0].requires_grad_(False)
    p = torch.nn.Parameter(leaf)
    dense_grad = torch.zeros_like(leaf)

    def adam(fused: bool, formed: bool) -> Callable[[int], None]:
        optimizer = torch.optim.Adam([p], lr=LR, fused=fused or None)
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": dec[1].to(dtype),
            "exp_avg_sq": dec[2].to(dtype),
        }

        def run(i: int) -> None:
            p.grad = index_add(*turn(long_sets, i), turn(grads, i), f) if formed else dense_grad
            optimizer.step()
            p.grad = None

        return run

    return [
        *h.units(given, every=5),
        h.Contender("fastsae", own(), check),
        h.Contender("fastsae, unit norm", own(unit_norm=True), check),
        few("bf16"),
        few("8bit"),
        h.Contender("fastsae, lazy", own(lazy=True), check),
        h.Contender(WHOLE, whole, check),
        h.Contender("torch Adam only", adam(False, False), every=2),
        h.Contender("torch Adam only, fused", adam(True, False), every=2),
        h.Contender("torch index_add + Adam, fused", adam(True, True), every=5),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    h.bench(NAME, contenders, h.parse(h.arguments(__doc__, rounds=41, seconds=50.0), argv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_adam_step(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype)


if __name__ == "__main__":
    main()
