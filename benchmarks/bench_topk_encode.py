"""topk_encode against the bare product, eager PyTorch and the encoders of the SAE libraries.

    python benchmarks/bench_topk_encode.py [--shapes 2048x768x24576] [--k 32] [--only REGEX]
    python benchmarks/bench_topk_encode.py --real --cache DIR     # trained SAEs, real activations

Each contender's selection is compared with the fp64 one, row by row: a contender whose selected
pre-activations fall short of the fp64 k-th best by more than rounding is wrong and is not timed.
The count of rows with exactly the fp64 set is printed beside the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as h
import _peers as peers
from _harness import Inputs, Size

import fastsae
from fastsae.bench import checks
from fastsae.bench.cases import turn

NAME = "topk_encode"
PLAIN = "fastsae, plain fp32 (avx512)"


def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, k: int) -> Any:
    values, indices = torch.nn.functional.linear(x, w, b).relu().topk(k, dim=-1)
    return values, indices


def own_contenders(run: Callable[[int], Any], check: Callable[[Any], str]) -> list[h.Contender]:
    """fastsae at the level that it takes, without its bf16 filter, and as on most laptops."""
    result = [h.Contender("fastsae", run, check)]
    found = h.levels()
    if "avx512_bf16" in found:
        result.append(h.Contender(PLAIN, h.at_level("avx512", run), check))
    if "avx2" in found:
        result.append(h.Contender("fastsae, avx2", h.at_level("avx2", run), check))
    return result


def contenders(size: Size, given: Inputs, with_peers: bool = True) -> list[h.Contender]:
    own = h.own(NAME, size, given)
    xs, ws, b, k, check = given.x, given.w, given.b, size.k, own.check

    def run_eager(i: int) -> Any:
        return eager(turn(xs, i), turn(ws, i), b, k)

    result = [*h.products(xs, ws), *own_contenders(own.run, check)]
    if size.dtype != torch.float32:
        # eager low precision rounds every score, so its selection is its own: not held to fp64
        result.append(h.Contender("eager torch, default", run_eager, loose(check)))
        return result
    for library, label in (("default", "default"), ("onednn", "oneDNN")):
        result.append(h.Contender(f"eager torch, {label}", run_eager, check, library))
    if with_peers:
        for peer, make in peers.ENCODERS.items():
            run = lazy(make, xs, ws[0], b, k)
            result.append(h.Contender(f"{peer}, oneDNN", run, check, "onednn"))
    return result


def loose(check: Callable[[Any], str]) -> Callable[[Any], str]:
    def checked(result: Any) -> str:
        try:
            return check(result)
        except h.WrongError as error:
            return f"not exact: {error}"

    return checked


def lazy(
    make: Callable[..., Callable[[torch.Tensor], Any]],
    xs: Sequence[torch.Tensor],
    w: torch.Tensor,
    b: torch.Tensor,
    k: int,
) -> Callable[[int], Any]:
    """A peer is imported and built on its first run, so that a missing one is only a note."""
    built: list[Callable[[torch.Tensor], Any]] = []

    def run(i: int) -> Any:
        if not built:
            built.append(make(w, b, k))
        with torch.no_grad():
            return built[0](turn(xs, i))

    return run


def real_contenders(f: int, k: int, cache: Path) -> tuple[list[h.Contender], tuple[int, int, int]]:
    import _real

    held_out, w, b, b_dec = _real.trained_sae(f, k, cache)
    n = 2048
    xs = [(rows - b_dec).contiguous() for rows in held_out.split(n) if len(rows) == n][:8]
    check = checks.selection(xs[0], w, b, k)

    def run_eager(i: int) -> Any:
        return eager(turn(xs, i), w, b, k)

    def run(i: int) -> Any:
        return fastsae.ops.topk_encode(turn(xs, i), w, b, k)

    result = [*h.products(xs, [w]), *own_contenders(run, check)]
    for library, label in (("default", "default"), ("onednn", "oneDNN")):
        result.append(h.Contender(f"eager torch, {label}", run_eager, check, library))
    return result, (n, w.shape[1], f)


def main(argv: Sequence[str] | None = None) -> None:
    p = h.arguments(__doc__)
    p.add_argument("--no-peers", action="store_true")
    p.add_argument(
        "--real", action="store_true", help="MiniLM activations and SAEs trained on them"
    )
    p.add_argument("--latents", nargs="+", type=int, default=[6144, 12288], help="with --real")
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fastsae-bench")
    args = h.parse(p, argv)
    if args.real:
        for f in args.latents:
            every, shape = real_contenders(f, args.k[0], args.cache)
            results = h.measure(
                h.chosen(every, args.only, [PLAIN]), rounds=args.rounds, seconds=args.seconds
            )
            plain = next((m for m in results if m.name == PLAIN), None)
            rows = h.rows_of(
                results, op=NAME, shape=shape, k=args.k[0], data="MiniLM layer 3, trained SAE"
            )
            for row, m in zip(rows, results):
                ratio = m.ratio(plain)
                if ratio is not None:
                    row["of_plain"] = round(ratio, 4)
            h.finish(NAME, f"topk_encode, MiniLM layer 3, F={f}, K={args.k[0]}", rows, args)
            print("ratio to the plain path:", {r["contender"]: r.get("of_plain") for r in rows})
        return
    h.bench(NAME, partial(contenders, with_peers=not args.no_peers), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_encode(benchmark: Any, dtype: torch.dtype) -> None:
    h.at_a_small_size(benchmark, NAME, dtype)


if __name__ == "__main__":
    main()
