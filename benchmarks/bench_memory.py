"""Memory: what encode needs beyond its inputs and outputs up to F = 1M, and a million-latent step.

    python benchmarks/bench_memory.py [--latents 65536 1048576] [--d 64]
    python benchmarks/bench_memory.py --step        # one training step, F = 1,048,576, D = 256

Every figure comes from a fresh process: the high-water mark of resident memory over the call, above
the level before it. Packed weights (bf16 copies that the filter reads) are inside the figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h

import fastsae

NAME = "memory"
N, K = 2048, 32
SYSTEMS = ("fastsae", "fastsae, plain fp32 (avx512)", "eager torch")


def encode_extra(system: str, f: int, d: int) -> float:
    x, w, b = torch.randn(N, d), torch.randn(f, d), torch.zeros(f)

    def run(n: int, latents: int) -> Any:
        if system == "eager torch":
            pre = torch.nn.functional.linear(x[:n], w[:latents], b[:latents])
            return pre.relu().topk(K, dim=-1)
        return fastsae.ops.topk_encode(x[:n], w[:latents], b[:latents], K)

    if "avx512" in system:
        torch.ops.fastsae._set_cpu_level("avx512")
    run(16, 256)  # threads and libraries allocate on their first call
    return h.peak_extra_mb(lambda: run(N, f))


def step_memory(f: int, d: int) -> dict[str, float]:
    torch.manual_seed(0)
    sae = fastsae.nn.TopKSAE(d, f, K)
    optimizer = fastsae.optim.FusedAdam(sae.parameters(), lr=1e-3)
    seconds = []
    for _ in range(4):
        x = torch.randn(N, d)
        start = time.perf_counter()
        loss = (sae(x) - x).pow(2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"peak_mb": h.peak_mb(), "ms": 1e3 * sorted(seconds[1:])[1], "loss": loss.item()}


def in_fresh_process(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"failed": last[0][:120]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--latents", nargs="+", type=int, default=[16384, 65536, 262144, 1048576])
    p.add_argument("--d", type=int, default=64)
    p.add_argument("--step", action="store_true", help="only the million-latent training step")
    p.add_argument("--step-latents", type=int, default=1048576)
    p.add_argument("--step-d", type=int, default=256)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="small sizes, nothing kept")
    p.add_argument("--no-keep", action="store_true")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.child == "step":
        print(json.dumps(step_memory(args.step_latents, args.step_d)))
        return
    if args.child is not None:
        print(json.dumps({"extra_mb": encode_extra(args.child, args.latents[0], args.d)}))
        return
    if args.quick:
        args.latents, args.step_latents, args.step_d, args.no_keep = [4096], 4096, 64, True
    print(h.header(), flush=True)
    base = h.machine()
    rows: list[dict[str, Any]] = []
    if not args.step:
        print(f"\n## extra memory of topk_encode, N={N} D={args.d} K={K}, MB")
        print(f"{'F':>9}  {'[N, F] once':>11}  " + "  ".join(f"{s:>28}" for s in SYSTEMS))
        for f in args.latents:
            cells = []
            for system in SYSTEMS:
                if system == "eager torch" and f > 300_000:
                    got: Any = {"failed": f"needs {2 * N * f * 4 / 2**30:.0f} GB"}
                else:
                    got = in_fresh_process(
                        "--child", system, "--latents", str(f), "--d", str(args.d)
                    )
                cells.append(f"{got['extra_mb']:.0f}" if "extra_mb" in got else got["failed"])
                rows.append(
                    {**base, "op": "encode memory", "N": N, "D": args.d, "F": f, "K": K,
                     "dtype": "float32", "contender": system, **got}
                )  # fmt: skip
            print(f"{f:9d}  {N * f * 4 / 2**20:11.0f}  " + "  ".join(f"{c:>28}" for c in cells))
            sys.stdout.flush()
    got = in_fresh_process(
        "--child", "step", "--step-latents", str(args.step_latents), "--step-d", str(args.step_d)
    )
    rows.append(
        {**base, "op": "step memory", "N": N, "D": args.step_d, "F": args.step_latents, "K": K,
         "dtype": "float32", "contender": "fastsae", **got}
    )  # fmt: skip
    print(f"\n## training step N={N} D={args.step_d} F={args.step_latents} K={K}: {got}")
    if not args.no_keep:
        h.keep(NAME, rows)


if __name__ == "__main__":
    main()
