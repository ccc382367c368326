"""steer for one latent: through the op, through a model's hook, and beside SAELens's error term.

    python benchmarks/bench_steer.py [--shapes 1x768x24576 512x768x24576] [--k 32]

A shape is tokens x D x F. Times are microseconds of one call. Every contender is checked against
the edit inside the SAE with its error kept, in fp64.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

import fastsae
from fastsae import _steer_codes as codes
from fastsae.steer import Description, attach, clamp

NAME = "steer"
LATENT, TARGET = 5, 3.0


class OneSite(nn.Module):
    """A model that is nothing but a site: what is left is the hook's own cost."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1, d))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.site(input_ids)


def sae_of(kind: str, d: int, f: int, k: int) -> Any:
    """A SAELens SAE with random weights, its own error-term path switched on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens

        options = {"k": k, "rescale_acts_by_decoder_norm": False} if kind == "TopK" else {}
        sae = getattr(sae_lens, f"{kind}SAE")(
            getattr(sae_lens, f"{kind}SAEConfig")(d_in=d, d_sae=f, **options)
        )
        with torch.no_grad():
            sae.W_enc.copy_(h.unit_rows(f, d, seed=1).T)
            sae.W_dec.copy_(h.unit_rows(f, d, seed=2))
            sae.b_enc.copy_(h.normal(f, seed=3) / 10)
            if kind == "JumpReLU":
                sae.threshold.fill_(0.5)
        sae.use_error_term = True
    return sae


def set_latent(acts: torch.Tensor, hook: Any = None) -> torch.Tensor:
    acts = acts.to_dense() if acts.is_sparse else acts.clone()
    acts[..., LATENT] = TARGET
    return acts


def truth_of(sae: Any, kind: str, x: torch.Tensor, k: int) -> torch.Tensor:
    u = x.double()
    pre = (u - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    f = pre.relu()
    if kind == "JumpReLU":
        f = f * (pre > sae.threshold.double())
    if kind == "TopK":
        f = torch.zeros_like(f).scatter(-1, pre.topk(k).indices, f.gather(-1, pre.topk(k).indices))
    return u + (TARGET - f[..., LATENT, None]) * sae.W_dec[LATENT].double()


def checked(truth: torch.Tensor) -> Callable[[Any], str]:
    def check(got: torch.Tensor) -> str:
        error = (got.double() - truth).abs().max().item()
        if error > 1e-5 * truth.abs().max().item():
            raise h.WrongError(f"off by {error:.1e}")
        return f"max error {error:.1e}"

    return check


def repeated(call: Callable[[], Any], count: int) -> Callable[[int], Any]:
    def run(_: int) -> Any:
        for _ in range(count - 1):
            call()
        return call()

    return run


@torch.no_grad()
def contenders(n: int, d: int, f: int, k: int) -> list[tuple[h.Contender, int]]:
    """Contenders and how many calls one run makes.

    Many: the first call after SAELens's 75 MB finds no line of its own in a cache.
    """
    many = 200
    x = h.normal(1, n, d, seed=0)
    out = []
    for kind in ("JumpReLU", "TopK"):
        sae = sae_of(kind, d, f, k)
        # the latent is active in the first token: membership is not settled by its sign
        x[0, 0] = x[0, 0].norm() * sae.W_enc[:, LATENT]
        check = checked(truth_of(sae, kind, x, k))
        model = OneSite(d)
        steerer = attach(model, sae, hook="site")
        steerer.set([[clamp(LATENT, TARGET)]])
        calls = many if kind == "JumpReLU" else 1
        name = f"fastsae, hook, {kind}"
        out.append((h.Contender(name, repeated(lambda m=model: m(x), calls), check), calls))
        hooked = sae.hook_sae_acts_post
        hooked.add_hook(set_latent, is_permanent=True)
        out.append((h.Contender(f"SAELens, error term, {kind}", lambda i, s=sae: s(x), check), 1))
        if kind == "JumpReLU":
            table = op_table(sae)
            op = lambda t=table: fastsae.ops.steer(x, *t)  # noqa: E731
            out.insert(0, (h.Contender("fastsae", repeated(op, many), check), many))
    return out


def op_table(sae: Any) -> tuple[torch.Tensor, ...]:
    """One slot with one clamp, for the op alone."""
    theta = float(sae.threshold[LATENT])
    param = torch.tensor(
        [[[float(sae.b_enc[LATENT]), theta, 1.0, float(sae.b_enc[LATENT]), TARGET, 0]]]
    )
    code = torch.tensor([[[codes.CLAMP, 0, -1]]], dtype=torch.int32)
    enc = sae.W_enc[:, LATENT].detach().clone().view(1, 1, -1)
    dec = sae.W_dec[LATENT].detach().clone().view(1, 1, -1)
    return enc, dec, param, code, torch.zeros(1, dtype=torch.int32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = h.arguments(__doc__, rounds=21, seconds=40.0)
    parser.set_defaults(shapes=[(1, 768, 24576), (512, 768, 24576)], k=[32])
    args = h.parse(parser, argv)
    with torch.no_grad():
        for n, d, f in args.shapes:
            for k in args.k:
                every = contenders(n, d, f, k)
                kept = h.chosen([c for c, _ in every], args.only)
                results = h.measure(kept, rounds=args.rounds, seconds=args.seconds)
                calls = {c.name: count for c, count in every}
                for m in results:  # microseconds a call, in the harness's milliseconds
                    m.times = {r: 1e3 * t / calls[m.name] for r, t in m.times.items()}
                rows = h.rows_of(results, op=NAME, shape=(n, d, f), k=k, units=("", ""))
                for row in rows:
                    row["unit"] = "us"
                h.finish(NAME, f"steer, microseconds: tokens={n} D={d} F={f} K={k}", rows, args)


@pytest.mark.parametrize("tokens", [1, 64])
def test_steer(benchmark: Any, tokens: int) -> None:
    w = h.unit_rows(64, 32, seed=1)
    sae = Description(w, torch.zeros(64), w, torch.zeros(32), "relu")
    model = OneSite(32)
    attach(model, sae, hook="site").set([[clamp(LATENT, TARGET)]])
    x = h.normal(1, tokens, 32, seed=0)
    with torch.no_grad():
        f = (x @ w[LATENT]).relu()
        checked(x.double() + ((TARGET - f)[..., None] * w[LATENT]).double())(model(x))
        benchmark(model, x)


if __name__ == "__main__":
    main()
