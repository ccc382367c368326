"""Quality: held-out FVU and dead latents of TopKSAE's own loop on MiniLM layer-3 activations.

Protocol: 400,000 training tokens and 40,000 tokens of other files (minilm_activations.py says of
which two texts), K = 32, 1500 steps of 2048 tokens, seeds 0, 1, 2. Held-out FVU is
sum |x - x_hat|^2 / sum |x - mean|^2 over the held-out tokens. A latent is dead when the trained SAE
does not fire it on any of the 400,000 training tokens.

`--method plain` trains the same architecture by the same schedule with dense PyTorch operations,
autograd and torch.optim.Adam, as the reference that says what the text allows.

    python benchmarks/quality_minilm.py --cache DIR [--text prose code] [--latents 3072 6144]
                                       [--method fastsae plain] [--moments fp32 bf16 8bit]

`--moments` is how FusedAdam stores its moments, `--dtype bfloat16` trains bf16 weights with fp32
masters on bf16 activations (measured in fp32 on the same held-out tokens).

Keeps the runs in benchmarks/results/cpu/quality_minilm.json; make_tables.py makes the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import header, machine
from minilm_activations import TEXTS, load

from fastsae.nn import Code, TopKConfig, TopKSAE, fvu
from fastsae.train import TrainConfig, Trainer
from fastsae.train.trainer import shuffled

K, STEPS, BATCH = 32, 1500, 2048
TARGET = {3072: 0.110, 6144: 0.097}
RESULTS = Path(__file__).parent / "results" / "cpu" / "quality_minilm.json"


class PlainTopKSAE(TopKSAE):
    """The same SAE by dense matrix products and autograd."""

    def encode(self, x: torch.Tensor) -> Code:
        pre = nn.functional.linear(self._input(x), self.W_enc, self.b_enc)
        values, indices = pre.topk(self.k, dim=-1)
        return self._tracked(Code(values.relu(), indices))

    def decode(self, code: Code) -> torch.Tensor:
        return self._dense(code.values, code.indices) @ self.W_dec + self.b_dec

    def _dense(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(values.shape[0], self.d_sae).scatter(1, indices, values)

    def aux_loss(
        self,
        x: torch.Tensor,
        reconstruction: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        most_dead: int | None = None,
    ) -> torch.Tensor:
        dead = self.dead_latents()
        if len(dead) == 0:
            return x.new_zeros(())
        residual = (x - reconstruction).detach()
        pre = self._input(x) @ self.W_enc[dead].T + self.b_enc[dead]
        values, at = pre.topk(min(self.config.k_aux, len(dead)), dim=-1)
        found = self._dense(values.relu(), dead[at]) @ self.W_dec
        return (found - residual).square().sum() / (residual - residual.mean(0)).square().sum()


class ProjectedAdam(torch.optim.Adam):
    """torch.optim.Adam with the decoder gradient's parallel part removed first."""

    def __init__(self, sae: TopKSAE, **options: float) -> None:
        super().__init__(sae.parameters(), fused=True, **options)
        self._w = sae.W_dec

    def step(self, closure: None = None) -> None:
        with torch.no_grad():
            w, grad = self._w, self._w.grad
            grad.sub_((grad * w).sum(1, keepdim=True) * w)
        super().step()


def run(
    method: str,
    f: int,
    seed: int,
    train: torch.Tensor,
    held_out: torch.Tensor,
    config: TrainConfig,
    aux: dict[str, Any],
    directions: str,
    dtype: torch.dtype,
) -> dict[str, object]:
    """One training run and its figures."""
    sae = (PlainTopKSAE if method == "plain" else TopKSAE)(train.shape[1], f, K, seed=seed, **aux)
    sae.initialize_from_data(train, directions=directions, seed=seed)
    with torch.no_grad():
        first = float(fvu(held_out, sae.eval()(held_out)))
    sae.to(dtype)
    train = train.to(dtype)
    optimizer = None
    if method == "plain":
        optimizer = ProjectedAdam(sae, lr=config.lr, betas=config.betas, eps=config.eps)
    trainer = Trainer(sae, config, optimizer)
    start = time.perf_counter()
    records = trainer.fit(shuffled(train, BATCH, seed=seed), on_log=show)
    seconds = time.perf_counter() - start
    sae.eval()
    out, l0 = [], 0.0
    fired = torch.zeros(f, dtype=torch.bool)
    with torch.no_grad():
        for x in held_out.split(BATCH):
            code = sae.encode(x.to(dtype))
            out.append(sae.decode(code).float())
            l0 += float((code.values != 0).sum()) / len(held_out)
        for x in train.split(BATCH):
            code = sae.encode(x)
            fired[code.indices[code.values != 0].long()] = True
    return {
        "method": method,
        "F": f,
        "K": K,
        "seed": seed,
        "directions": directions,
        "dtype": str(dtype).removeprefix("torch."),
        "config": asdict(config) | aux,
        "initial_fvu": first,
        "fvu": float(fvu(held_out, torch.cat(out))),
        "dead_fraction": 1 - float(fired.float().mean()),
        "dead_in_training": records[-1].dead_fraction,
        "l0": l0,
        "seconds": seconds,
    }


def show(record: object) -> None:
    if record.step % 250 == 0:  # type: ignore[attr-defined]
        print(f"  {record}", flush=True)


def keep(path: Path, row: dict[str, object]) -> None:
    """Adds a run to the file, in place of one of the same method, size, seed and settings."""
    rows = json.loads(path.read_text()) if path.exists() else []

    def key(r: dict[str, object]) -> tuple[str, ...]:
        names = ("text", "method", "F", "K", "seed", "directions", "dtype", "config")
        r = {"dtype": "float32"} | r | {"config": {"moments": "fp32"} | r["config"]}  # type: ignore[dict-item]
        return tuple(json.dumps(r.get(n), sort_keys=True) for n in names)

    row = json.loads(json.dumps(row))
    rows = [r for r in rows if key(r) != key(row)] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join("  " + json.dumps(r) for r in rows) + "\n]\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the activations")
    parser.add_argument("--text", nargs="+", default=["prose"], choices=list(TEXTS))
    parser.add_argument("--latents", type=int, nargs="+", default=[3072, 6144])
    parser.add_argument("--method", nargs="+", default=["fastsae"], choices=["fastsae", "plain"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--directions", default="data", choices=["data", "random"])
    parser.add_argument("--lr", type=float, default=TrainConfig(1).lr)
    parser.add_argument("--decay", type=float, default=TrainConfig(1).decay)
    parser.add_argument("--warmup", type=int, default=TrainConfig(1).warmup)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--aux", type=float, default=TopKConfig.aux_coefficient)
    parser.add_argument("--k-aux", type=int, default=TopKConfig.k_aux)
    parser.add_argument("--dead-after", type=int, default=200_000)
    parser.add_argument("--moments", nargs="+", default=["fp32"], choices=["fp32", "bf16", "8bit"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--onednn", action="store_true", help="dense products through oneDNN")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("medium" if args.onednn else "highest")
    print(header(), flush=True)
    for text, method, f, moments in itertools.product(
        args.text, args.method, args.latents, args.moments
    ):
        config = TrainConfig(
            args.steps, args.lr, args.warmup, args.decay, (0.9, args.beta2), moments=moments
        )
        aux = {
            "aux_coefficient": args.aux, "k_aux": args.k_aux, "dead_after": args.dead_after
        }  # fmt: skip
        train, held_out = load(args.cache, text)
        new = []
        for seed in args.seeds:
            row = {"text": text}
            row |= run(
                method, f, seed, train, held_out, config, aux, args.directions,
                getattr(torch, args.dtype),
            )  # fmt: skip
            print(json.dumps({k: v for k, v in row.items() if k != "config"}), flush=True)
            keep(args.out, machine() | row)
            new.append(row)
        mean = statistics.mean(float(r["fvu"]) for r in new)
        dead = statistics.mean(float(r["dead_fraction"]) for r in new)
        print(
            f"{text} {method} F={f} {moments} moments: FVU {mean:.4f} (target {TARGET.get(f)}), "
            f"dead {dead:.2%}, {len(new)} seeds"
        )


if __name__ == "__main__":
    main()
