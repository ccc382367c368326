"""How often topk_encode by "fp8" misses a latent, on trained weights and real activations.

    python benchmarks/fp8_recall.py --cache DIR [--tokens 40000]

The arithmetic of triton_kernels/topk_encode/fp8.py in PyTorch: rows scaled by a power of two and
rounded to e4m3, products summed in fp32, margin of S sigma plus the tensor cores' part. A pair is
violated when its fp32 score lies outside of the margin; a latent is missed when it is one of the
exact K and its upper bound is below the K-th largest lower bound, which takes an error of about
twice the margin. What tensor cores do to the sums is in the margin but not emulated: unverified on
a GPU.

Data: MiniLM layer 3 (`_real.py`), F = 6144 and 12288, K = 32, held-out tokens; random unit rows of
width 4096, K = 64, and the same with three places of x 100 or 1000 times larger, in W as they are,
10 or 32 times larger, or as in x. Keeps benchmarks/results/cpu/fp8_recall.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import header, machine
from _real import trained_sae

RESULTS = Path(__file__).parent / "results" / "cpu" / "fp8_recall.json"
SIGMAS = (1.0, 1.5, 2.0, 3.0)  # the kernel's are 2
ACCUMULATION = 2.0**-11  # as in the kernel's module, which needs Triton to import
ROOM = 512  # candidates a row holds before it is settled at once, K <= 512


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the codes stand for; |.|_2 and |.|_4 of rows or codes, |.|_4 of what codes left out."""
    most = rows.abs().amax(1, keepdim=True).clamp(min=2.0**-60)
    unit = torch.exp2(most.log2().floor() - 7)
    low = (rows / unit).to(torch.float8_e4m3fn).float() * unit
    largest = torch.maximum(rows.abs(), low.abs())
    return low, largest.norm(dim=1), largest.norm(4, dim=1), (rows - low).norm(4, dim=1)


def measure(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, k: int) -> dict[str, Any]:
    n, d = x.shape
    W_low, W_size, W_fourth, W_off = rounded(W)
    worst, rank = 0.0, 0
    violated = dict.fromkeys(SIGMAS, 0)
    missed = dict.fromkeys(SIGMAS, 0)
    kept: dict[float, list[torch.Tensor]] = {s: [] for s in SIGMAS}
    for part in x.split(256):
        low, size, fourth, off = rounded(part)
        exact, cheap = part @ W.T, low @ W_low.T
        sigma = torch.hypot(torch.outer(off, W_fourth), torch.outer(fourth, W_off))
        slack = ACCUMULATION * torch.outer(size, W_size)
        error = (exact - cheap).abs()
        worst = max(worst, float((error / sigma).max()))
        if b is not None:
            exact, cheap = exact + b, cheap + b
        top = exact.topk(k).indices
        order = cheap.argsort(1, descending=True).argsort(1)
        rank = max(rank, int(order.gather(1, top).max()) + 1)
        for s in SIGMAS:
            margin = s * sigma + slack
            violated[s] += int((error > margin).sum())
            threshold = (cheap - margin).kthvalue(W.shape[0] - k + 1, dim=1).values
            candidate = cheap + margin >= threshold[:, None]
            missed[s] += int((~candidate.gather(1, top)).sum())
            kept[s].append(candidate.sum(1))
    result = {"N": n, "D": d, "F": len(W), "K": k, "pairs": n * len(W), "worst_sigma": worst}
    result["worst_rank"] = rank
    for s in SIGMAS:
        count = torch.cat(kept[s]).double()
        result[f"{s:g} sigma"] = {
            "violated": violated[s],
            "missed": missed[s],
            "recall": 1 - missed[s] / (n * k),
            "candidates": [float(count.quantile(q)) for q in (0.5, 0.99, 1.0)],
            "settled_rows": int((count > ROOM).sum()),
        }
    return result


def cases(
    cache: Path, tokens: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None, int]]:
    for f in (6144, 12288):
        held_out, W, b_enc, b_dec = trained_sae(f, 32, cache)
        yield "MiniLM layer 3, trained", held_out[:tokens] - b_dec, W, b_enc, 32
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 4096, generator=generator) for n in (32768, tokens // 8))
    yield "random", x, torch.nn.functional.normalize(W, dim=1), None, 64
    places, x, W = [3, 77, 2000], x[: tokens // 40], W[:8192]
    for in_x, in_W in ((100, 1), (100, 10), (100, 100), (1000, 1), (1000, 32), (1000, 1000)):
        large_x, large_W = x.clone(), W.clone()
        large_x[:, places] *= in_x
        large_W[:, places] *= in_W
        name = f"random, three places {in_x} times larger in x, {in_W} in W"
        yield name, large_x, torch.nn.functional.normalize(large_W, dim=1), None, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the activations")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(header())
    rows = []
    for name, x, W, b, k in cases(args.cache, args.tokens):
        row = machine() | {"data": name} | measure(x, W, b, k)
        rows.append(row)
        print(
            f"{name}: N={row['N']} D={row['D']} F={row['F']} K={k}, {row['pairs'] / 1e6:.1f} M "
            f"pairs, worst error {row['worst_sigma']:.2f} sigma, worst fp8 rank of an exact latent "
            f"{row['worst_rank']}"
        )
        for s in SIGMAS:
            r = row[f"{s:g} sigma"]
            median, p99, most = r["candidates"]
            print(
                f"  {s:g} sigma: {r['violated']} pairs violated, {r['missed']} latents missed "
                f"(recall {r['recall']:.7f}), candidates {median:.0f} / {p99:.0f} / {most:.0f}, "
                f"{r['settled_rows']} rows settled at once"
            )
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
