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
from bench_sparse_grad_weight import index_add

import fastsae
from fastsae.bench import checks

NAME = "sparse_adam_step"
WHOLE = "fastsae, whole backward with Adam"
LR = 1e-4


def contenders(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> list[h.Contender]:
    n, d, f = shape
    xs = [h.normal(n, d, seed=10 + s, dtype=dtype) for s in range(2)]
    grads = [h.normal(n, d, seed=20 + s, dtype=dtype) * 1e-3 for s in range(2)]
    sets = [h.random_pairs(n, k, f, seed=s, dtype=dtype) for s in range(2)]
    long_sets = [(v, i.long()) for v, i in sets]
    start = h.unit_rows(f, d, seed=1, dtype=dtype)
    check = checks.adam(fastsae.ops.sparse_adam_step, start, *sets[0], grads[0], LR)

    def with_state(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return h.unit_rows(f, d, seed=seed, dtype=dtype), torch.zeros(f, d), torch.zeros(f, d)

    dec, enc = with_state(1), with_state(2)
    count = [0]

    def own(lazy: bool = False, unit_norm: bool = False) -> Callable[[int], None]:
        def run(i: int) -> None:
            count[0] += 1
            fastsae.ops.sparse_adam_step(
                *dec, *sets[i % 2], grads[i % 2],
                lr=LR, step=count[0], lazy=lazy, unit_norm=unit_norm,
            )  # fmt: skip

        return run

    def few(fmt: str) -> h.Contender:
        """The same with moments in few bits."""
        kept = checks.fresh_moments(dec[0], fmt)

        def run(i: int) -> None:
            count[0] += 1
            fastsae.ops.sparse_adam_step(
                dec[0], *kept[:2], *sets[i % 2], grads[i % 2], lr=LR, step=count[0], unit_norm=True,
                exp_avg_scale=kept[2], exp_avg_sq_scale=kept[3],
            )  # fmt: skip

        name = f"fastsae, unit norm, {fmt.replace('8bit', '8-bit')} moments"
        verify = checks.adam(fastsae.ops.sparse_adam_step, start, *sets[0], grads[0], LR, fmt)
        return h.Contender(name, run, verify)

    def whole(i: int) -> None:
        values, indices = sets[i % 2]
        dv = fastsae.ops.sparse_grad_values(grads[i % 2], indices, dec[0])
        own(unit_norm=True)(i)
        fastsae.ops.sparse_adam_step(
            *enc, dv * (values > 0), indices, xs[i % 2], lr=LR, step=count[0]
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
            p.grad = index_add(*long_sets[i % 2], grads[i % 2], f) if formed else dense_grad
            optimizer.step()
            p.grad = None

        return run

    units = h.products(xs, [enc[0]])
    for c in units:
        c.every = 5
    return [
        *units,
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
    args = h.parse(h.arguments(__doc__, rounds=41, seconds=50.0), argv)
    for shape in args.shapes:
        for k in args.k:
            for dtype in args.dtype:
                every = contenders(shape, k, getattr(torch, dtype))
                results = h.measure(
                    h.chosen(every, args.only), rounds=args.rounds, seconds=args.seconds
                )
                rows = h.rows_of(results, op=NAME, shape=shape, k=k, dtype=dtype)
                title = f"sparse_adam_step N={shape[0]} D={shape[1]} F={shape[2]} K={k} {dtype}"
                h.finish(NAME, title, rows, args)


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_sparse_adam_step(benchmark: Any, lazy: bool) -> None:
    param = h.unit_rows(1024, 64, seed=1)
    values, indices = h.random_pairs(256, 16, 1024, seed=0)
    rows = h.normal(256, 64, seed=2)
    checks.adam(fastsae.ops.sparse_adam_step, param, values, indices, rows, LR)(None)
    state = torch.zeros(2, 1024, 64)

    def run() -> None:
        fastsae.ops.sparse_adam_step(
            param, state[0], state[1], values, indices, rows, lr=LR, step=1, lazy=lazy
        )

    benchmark(run)


if __name__ == "__main__":
    main()
