"""A whole training step of a TopK SAE, beside dense PyTorch and the SAE libraries' own trainers.

    python benchmarks/bench_training_step.py [--shapes 2048x768x24576] [--k 32] [--only REGEX]
    python benchmarks/bench_training_step.py --stages      # where fastsae's step spends its time

fastsae's step has everything on: b_dec and its gradient, unit-norm decoder rows with the parallel
gradient removed, dead-latent tracking, AuxK's question whether a latent is dead (none is here, for
any contender), both weights and biases updated. It is verified against the
dense PyTorch step: same start, same batches, and the weights must agree after two steps. A peer is
checked for what it claims to train: F x D weights, K active latents for each of N tokens, a finite
loss that its own update lowers. Peers take seconds per step: measure them one at a time with
--only, the products and fastsae run beside them in every round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h
import _peers as peers

import fastsae

NAME = "training_step"
LR = 1e-3


def own_model(d: int, f: int, k: int) -> tuple[Any, Any]:
    sae = fastsae.nn.TopKSAE(d, f, k)
    return sae, fastsae.optim.FusedAdam(sae.parameters(), lr=LR)


def own_step(sae: Any, optimizer: Any) -> Callable[[torch.Tensor], float]:
    """The README's loop with AuxK."""

    def step(x: torch.Tensor) -> float:
        recon = sae(x)
        loss = (recon - x).pow(2).sum(-1).mean() + sae.aux_loss(x, recon) / 32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def batches(n: int, d: int, count: int = 4) -> list[torch.Tensor]:
    """Tokens with structure (a random sparse dictionary) and an offset, so that training works."""
    basis = h.unit_rows(4 * d, d, seed=5)
    out = []
    for s in range(count):
        g = torch.Generator().manual_seed(50 + s)
        acts = torch.rand(n, 4 * d, generator=g)
        acts = acts * (torch.rand(n, 4 * d, generator=g) < 8 / d)
        out.append(acts @ basis + 0.1 * basis[0] + 0.05 * torch.randn(n, d, generator=g))
    return out


def own_check(d: int, f: int, k: int, xs: Sequence[torch.Tensor]) -> Callable[[Any], str]:
    """Two steps from one start, against dense PyTorch with torch.optim.Adam."""

    def check(_: Any) -> str:
        sae, optimizer = own_model(d, f, k)
        dense = peers.DenseTopK(d, f, k)
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
                getattr(dense, name).copy_(getattr(sae, name))
        step, truth = own_step(sae, optimizer), peers.eager_step(d, f, k, model=dense, lr=LR)
        for x in xs[:2]:
            ours, theirs = step(x), truth(x)[0]
            if abs(ours - theirs) > 1e-3 * abs(theirs):
                raise h.WrongError(f"loss {ours:.6f}, dense PyTorch {theirs:.6f}")
        # Adam turns a gradient that is only rounding into a step of lr: compare the bulk
        worst = 0.0
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            gap = (getattr(sae, name) - getattr(dense, name)).detach().abs()
            share = (gap > 0.1 * LR).float().mean().item()
            worst = max(worst, share)
            if share > 0.01:
                raise h.WrongError(
                    f"{share:.1%} of {name} differ from dense PyTorch after two steps"
                )
        return f"2 steps as dense PyTorch ({worst:.2%} of weights apart)"

    return check


def peer_check(n: int, k: int) -> Callable[[Any], str]:
    def check(result: tuple[float, torch.Tensor]) -> str:
        loss, active = result
        if not torch.isfinite(torch.tensor(loss)):
            raise h.WrongError(f"loss is {loss}")
        if active.is_sparse:
            rows, per_token = active.shape[0], active._nnz() / active.shape[0]
        elif active.is_floating_point():
            rows, per_token = active.shape[0], (active != 0).sum().item() / active.shape[0]
        else:
            rows, per_token = active.shape
        if rows != n or not 0.5 * k <= per_token <= k:
            raise h.WrongError(
                f"{rows} tokens with {per_token:.1f} active latents, not {n} with {k}"
            )
        return f"{rows} tokens, {per_token:.0f} latents each"

    return check


def contenders(
    shape: tuple[int, int, int], k: int, only: str | None, compiled: bool
) -> list[h.Contender]:
    n, d, f = shape
    xs = batches(n, d)
    w = h.unit_rows(f, d, seed=1)
    sae, optimizer = own_model(d, f, k)
    step = own_step(sae, optimizer)
    # the dense reference needs seconds and gigabytes: only when fastsae's own row is measured
    check = own_check(d, f, k, xs) if only is None or "fastsae" in only else None
    result = [
        *h.products(xs, [w]),
        h.Contender("fastsae", lambda i: step(xs[i % len(xs)]), check),
    ]

    def lazy(make: Callable[[], peers.Step]) -> Callable[[int], Any]:
        built: list[peers.Step] = []

        def run(i: int) -> Any:
            if not built:
                built.append(make())
            return built[0](xs[i % len(xs)])

        return run

    def add(name: str, make: Callable[[], peers.Step]) -> None:
        for library, label in (("onednn", "oneDNN"), ("default", "default")):
            result.append(h.Contender(f"{name}, {label}", lazy(make), peer_check(n, k), library))

    add("dense PyTorch", lambda: peers.eager_step(d, f, k, fused_adam=False))
    add("dense PyTorch, fused Adam", lambda: peers.eager_step(d, f, k))
    if compiled:
        add("dense PyTorch, compiled", lambda: peers.eager_step(d, f, k, compiled=True))
    for name, make in peers.STEPS.items():
        add(name, lambda make=make: make(d, f, k))
    return result


def stages(shape: tuple[int, int, int], k: int, rounds: int) -> list[tuple[str, float]]:
    """Median milliseconds of each part of fastsae's step, each timed in place."""
    n, d, f = shape
    xs = batches(n, d)
    sae, optimizer = own_model(d, f, k)
    spent: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        spent.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def one(x: torch.Tensor) -> None:
        with torch.no_grad():
            code = timed("  encode alone (not in the sum)", lambda: sae.encode(x))
            timed("  decode alone (not in the sum)", lambda: sae.decode(code))
        begin = time.perf_counter()
        recon = timed("forward", lambda: sae(x))
        loss = timed("loss", lambda: (recon - x).pow(2).sum(-1).mean())
        aux = timed("aux loss, none dead", lambda: sae.aux_loss(x, recon))
        timed("backward", (loss + aux / 32).backward)
        timed("optimizer", optimizer.step)
        timed("zero_grad", optimizer.zero_grad)
        spent.setdefault("whole step", []).append(time.perf_counter() - begin)

    for i in range(rounds + 2):
        one(xs[i % len(xs)])
    return [(name, 1e3 * sorted(t[2:])[len(t[2:]) // 2]) for name, t in spent.items()]


def main(argv: Sequence[str] | None = None) -> None:
    p = h.arguments(__doc__, rounds=15, seconds=75.0)
    p.add_argument("--stages", action="store_true", help="time the parts of fastsae's step only")
    p.add_argument("--compiled", action="store_true", help="also torch.compile the dense model")
    args = h.parse(p, argv)
    for shape in args.shapes:
        for k in args.k:
            title = f"training step N={shape[0]} D={shape[1]} F={shape[2]} K={k}"
            if args.stages:
                print(f"\n## {title}")
                for name, ms in stages(shape, k, args.rounds):
                    print(f"{name:32s} {ms:9.2f} ms")
                continue
            every = contenders(shape, k, args.only, args.compiled)
            results = h.measure(
                h.chosen(every, args.only), rounds=args.rounds, seconds=args.seconds
            )
            rows = h.rows_of(results, op=NAME, shape=shape, k=k)
            h.finish(NAME, title, rows, args)


def test_training_step(benchmark: Any) -> None:
    n, d, f, k = 256, 64, 1024, 16
    xs = batches(n, d)
    own_check(d, f, k, xs)(None)
    step = own_step(*own_model(d, f, k))
    benchmark(step, xs[0])


if __name__ == "__main__":
    main()
