"""What an fp8 filter of topk_encode would miss, on SAEs trained on real activations. Emulated.

    python benchmarks/fp8_recall.py --cache DIR [--latents 6144 12288] [--rows 4096]

x (centred by b_dec) and W_enc are rounded to e4m3, one scale a row and one a latent; products of
the rounded numbers are summed exactly. The error of a pair is modelled as independent roundings,

    sigma = sqrt((|x - x^| |w|)^2 + (|x^| |w - w^|)^2) / sqrt(D),

and a latent stays a candidate when score + m sigma reaches the k-th largest score - m sigma of its
row; candidates would be scored again exactly. The rows say how often an error exceeds m sigma, how
many of the exact k best are no candidates, and how many candidates remain. "proof" is the margin of
Cauchy-Schwarz, sqrt(D) sigma with a sum for the root of squares. A GPU adds the error of its sums.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _real import trained_sae

MARGINS = (4.0, 5.0, 6.0, 7.0, 8.0)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """To e4m3 and back, each row scaled so that its largest element is the format's."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.finfo(torch.float8_e4m3fn).max / largest
    return (rows * scale).to(torch.float8_e4m3fn).float() / scale


def norm(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().norm(dim=1)


def study(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int, chunk: int = 256) -> None:
    """Prints a row for each margin."""
    x_low, W_low = rounded(x), rounded(W)
    found: dict[str, list[torch.Tensor]] = {}
    beyond = dict.fromkeys(MARGINS, 0)
    worst = 0.0
    ranks = []
    for begin in range(0, len(x), chunk):
        some, low = x[begin : begin + chunk], x_low[begin : begin + chunk]
        exact = some.double() @ W.double().T + b.double()
        score = low.double() @ W_low.double().T + b.double()
        parts = (
            norm(some - low)[:, None] * norm(W)[None, :],
            norm(low)[:, None] * norm(W - W_low)[None, :],
        )
        sigma = torch.hypot(*parts) / x.shape[1] ** 0.5
        best = exact.topk(k, dim=1).indices
        errors = (score - exact).abs() / sigma
        worst = max(worst, errors.max().item())
        ranks.append((score > score.gather(1, best).amin(1, keepdim=True)).sum(1) + 1)
        margins = {f"{m:g} sigma": m * sigma for m in MARGINS} | {"proof": parts[0] + parts[1]}
        for m in MARGINS:
            beyond[m] += int((errors > m).sum())
        for name, margin in margins.items():
            bound = (score - margin).topk(k, dim=1).values[:, -1:]
            kept = score + margin >= bound
            lost = k - kept.gather(1, best).sum(1)
            found.setdefault(name, []).append(torch.stack([kept.sum(1), lost]))
    pairs = x.shape[0] * W.shape[0]
    print(f"{len(x)} rows, D={x.shape[1]}, F={len(W)}, k={k}: {pairs / 1e6:.0f} M pairs, ", end="")
    print(f"largest error {worst:.2f} sigma, worst fp8 rank of a true one {torch.cat(ranks).max()}")
    print(f"{'margin':>8} {'beyond':>8} {'lost':>5} {'recall':>10}  candidates: median, 99%, most")
    for name, parts_found in found.items():
        kept, lost = torch.cat(parts_found, 1).double()
        recall = 1 - lost.sum().item() / (len(x) * k)
        quantiles = (kept.quantile(q).item() for q in (0.5, 0.99, 1.0))
        over = beyond.get(float(name.split()[0]), 0) if name != "proof" else 0
        print(
            f"{name:>8} {over:8d} {int(lost.sum()):5d} {recall:10.7f}  "
            + ", ".join(f"{q:.0f}" for q in quantiles)
        )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--latents", type=int, nargs="+", default=[6144, 12288])
    parser.add_argument("--rows", type=int, default=4096)
    args = parser.parse_args()
    for latents in args.latents:
        x, W, b_enc, b_dec = trained_sae(latents, 32, args.cache)
        study(x[: args.rows].float() - b_dec, W, b_enc, 32)


if __name__ == "__main__":
    main()
