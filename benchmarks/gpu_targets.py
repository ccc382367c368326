"""The targets on a GPU, a piece at a time: what gpu_suite.sh runs. Unverified on a GPU.

    python benchmarks/gpu_targets.py bench --out FILE       every op, every kernel
    python benchmarks/gpu_targets.py encode --out FILE      encode at the two target shapes
    python benchmarks/gpu_targets.py grid --out FILE        encode against product + torch.topk
    python benchmarks/gpu_targets.py gather --out FILE      decode and backward against a gather
    python benchmarks/gpu_targets.py step --out FILE        whole training step beside dense code
    python benchmarks/gpu_targets.py largest --out FILE     a step with 1,048,576 latents
    python benchmarks/gpu_targets.py hopper --out FILE      encode by the design "hopper", sm_90
    python benchmarks/gpu_targets.py report --state DIR     all of it, beside the targets

A piece writes its rows as they come, each from a process of its own beside what it is compared
with, and leaves out what its file already has; what failed is tried again. With --device cpu
--quick every piece runs at toy sizes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
if torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "0"

import _harness as h
import _peers as peers
from bench_training_step import own_step, peer_check

import fastsae
from fastsae import _isolated
from fastsae.bench import run
from fastsae.bench.cases import CASES, Inputs, Size
from fastsae.bench.isolated import Job, measured
from fastsae.bench.timing import Contender, Measurement, measure

STEP_LIMIT_S = 100.0  # of one training step: its kernels, or torch.compile's, are compiled in it
BIG = (8192, 4096, 131072, 64)
NARROW = (8192, 768, 131072, 64)
# every extreme of 1024–16384 tokens, 768–8192 wide, 32k–1M latents, 16–512 active, not every corner
GRID = (
    (1024, 768, 32768, 16), (1024, 768, 1048576, 64), (1024, 8192, 32768, 512),
    (1024, 8192, 1048576, 64), (4096, 4096, 131072, 16), (4096, 768, 131072, 512),
    (4096, 2048, 262144, 64), (8192, 2048, 65536, 32), (8192, 8192, 131072, 128),
    (16384, 768, 32768, 64), (16384, 768, 524288, 32), (16384, 8192, 32768, 16),
)  # fmt: skip
GATHERING = ("sparse_decode", "sparse_grad_values", "sparse_grad_weight", "sparse_adam_step")
TARGETS = (
    ("encode, bf16 exact, 8192 4096 131072 64", "≤ 1.10"),
    ("encode, bf16 exact, 8192 768 131072 64", "≤ 1.05"),
    ("encode, fp8 filter, 8192 4096 131072 64", "≤ 0.80"),
    ("encode, fp8 filter, recall", "≥ 0.99999"),
    ("encode against product + torch.topk, least", "> 1"),
    ("encode against product + torch.topk, median", "≥ 1.5"),
    ("extra memory of encode, MB", "≤ 256"),
    *((f"{op}, of a plain gather's GB/s", "≥ 0.75") for op in GATHERING[:3]),
    ("whole step with Adam, of the product", "≤ 1.9"),
    ("whole step against dense eager", "≥ 5"),
    ("whole step against compiled dense", "≥ 3"),
    ("whole step against sparsify", "≥ 2"),
    ("latents trained on one GPU at D = 4096", "≥ 1048576"),
)


class Piece:
    """Rows of one stage, kept in a file from the first on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path: Path = args.out
        self.device: str = args.device
        self.only: str = args.only
        self.quick: bool = args.quick
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.plan = run.Plan(
            device=self.device, rounds=3 if self.quick else 11, seconds=2.0, gather=True
        )
        self.found: dict[str, Any] = {"rows": []}
        if not self.only and self.path.exists():
            self.found = json.loads(self.path.read_text())
            failed = [_place(r) for r in run.bad(own(self.found["rows"]))]
            self.found["rows"] = [r for r in self.found["rows"] if _place(r) not in failed]

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def size(self, n: int, d: int, f: int, k: int) -> Size:
        if self.quick:
            n, d, f, k = max(16, n >> 7), max(8, d >> 7), max(128, f >> 8), max(2, k >> 4)
        return Size(n, d, f, k, self.dtype, self.device)

    def has(self, size: Size, op: str = "", backend: str = "") -> bool:
        wanted = run.row_of(op, backend, size)
        return any(
            all(value in ("", r[key]) for key, value in wanted.items()) for r in self.found["rows"]
        )

    def measure(self, size: Size, op: str, names: Sequence[str], *, together: bool = False) -> None:
        """What of an op's contenders is not there yet, each in a process of its own or together."""
        left = [n for n in names if not self.has(size, op, n)]
        if together and left:  # compared with one another: all of them in one run
            again = [_place(run.row_of(op, n, size)) for n in names]
            self.found["rows"] = [r for r in self.found["rows"] if _place(r) not in again]
            jobs = [Job(size, op, tuple(names), alone=True)]
        else:
            jobs = [Job(size, op, (n,), alone=True) for n in left]

        def on_row(row: dict[str, Any]) -> None:
            if row["op"] == op or not self.has(size, row["op"], row["backend"]):
                self.add([row])

        measured(jobs, self.plan, on_row)

    def apart(self, piece: str, size: Size, names: Sequence[str]) -> None:
        """A piece's training steps, each in a process of its own: one may take the device along,
        and two may not fit on it."""
        for name in names:
            if self.has(size, "training_step", name):
                continue
            rows: list[dict[str, Any]] = []
            arguments = [piece, "--only", name, "--device", self.device, "--out", os.devnull]
            path = os.pathsep.join([str(h.HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
            why = _isolated.rows(
                "gpu_targets", arguments + ["--quick"] * self.quick, rows.append,
                limit_s=STEP_LIMIT_S, env={"PYTHONPATH": path},
            )  # fmt: skip
            if why is not None:
                note = " ".join(why.split())[-200:]
                failed = run.row_of("training_step", name, size)
                rows = [failed | {"verified": False, "note": note, "error": note}]
            self.add(rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.only:  # the child of `apart`
            for row in rows:
                print(json.dumps(row), flush=True)
            return
        self.found["rows"] += rows
        self.found["machine"] = h.machine(self.device)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(temporary, self.path)
        print(run.table(rows), flush=True)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["op"], row["N"], row["D"], row["F"], row["K"], row["backend"])


def ceilings(piece: Piece) -> None:
    if "ceilings" not in piece.found:
        piece.found["ceilings"] = run.ceilings(piece.device, piece.dtype, piece.quick)


def bench(piece: Piece) -> None:
    """Every op on every kernel, at the narrow target shape."""
    ceilings(piece)
    size = piece.size(*NARROW)
    for op in CASES:
        piece.measure(size, op, _kernels(op, size, piece))


def _kernels(op: str, size: Size, piece: Piece) -> list[str]:
    """Without the reference, which at these sizes takes the time of all others."""
    return [n for n in run.names(op, size, piece.plan) if n != "reference"]


BOUNDED, FUSED = ("triton bounded",), ("triton fused", "triton fp8")  # fp32, and 16 bits


def encode(piece: Piece) -> None:
    """Backends, and designs of the Triton encoder, forced: their order in
    triton_kernels/topk_encode/ is a prediction until these rows decide it."""
    ceilings(piece)
    for shape in (BIG, NARROW):
        size = piece.size(*shape)
        names = _kernels("topk_encode", size, piece)
        if "triton" in names:
            wide = size.dtype == torch.float32
            names += ["triton chunked", *(BOUNDED if wide else FUSED)]
        piece.measure(size, "topk_encode", names)


def hopper(piece: Piece) -> None:
    """The design with a product in CUDA C++, apart: what never ran on a device may hang on one."""
    for shape in (BIG, NARROW):
        size = piece.size(*shape)
        if "triton" in run.usable("topk_encode", piece.device, size.dtype):
            piece.measure(size, "topk_encode", ["triton hopper"])


def grid(piece: Piece) -> None:
    for shape in GRID:
        piece.measure(piece.size(*shape), "topk_encode", [run.EAGER, run.AUTO], together=True)


def gather(piece: Piece) -> None:
    """The ops that read K rows a token, and torch's gather of the same rows beside each."""
    ceilings(piece)
    size = piece.size(*BIG)
    for op in GATHERING:
        piece.measure(size, op, _kernels(op, size, piece))


def _tokens(size: Size) -> list[torch.Tensor]:
    return Inputs(size).x[:1]


def _own(size: Size, **options: Any) -> Callable[[torch.Tensor], float]:
    sae = fastsae.nn.TopKSAE(size.d, size.f, size.k, dtype=size.dtype, device=size.device)
    return own_step(sae, fastsae.optim.FusedAdam(sae.parameters(), lr=1e-3, **options))


FEW_BITS = {"moments": "8bit", "master_weights": True}


def _verified(device: str) -> str:
    """Two fp32 steps of a small SAE against dense PyTorch on the same device."""
    size = Size(256, 64, 1024, 8, torch.float32, device)
    sae = fastsae.nn.TopKSAE(size.d, size.f, size.k, device=device, seed=0)
    step = own_step(sae, fastsae.optim.FusedAdam(sae.parameters(), lr=1e-3))
    with torch.device(device):
        dense = peers.DenseTopK(size.d, size.f, size.k)
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
                getattr(dense, name).copy_(getattr(sae, name))
        truth = peers.eager_step(size.d, size.f, size.k, model=dense)
    (x,) = _tokens(size)
    for _ in range(2):
        ours, theirs = step(x), truth(x)[0]
        if not abs(ours - theirs) <= 1e-3 * abs(theirs):
            raise h.WrongError(f"loss {ours:.6f}, dense PyTorch {theirs:.6f}")
    return "2 small fp32 steps as dense PyTorch"


def _made(make: Callable[[], Any], size: Size) -> Any:
    """A training step whose tensors have the size's dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(size.device):
            return make()
    finally:
        torch.set_default_dtype(before)


STEPS = (
    "fastsae", "fastsae, 8-bit moments and masters", "dense eager", "dense compiled", "sparsify",
)  # fmt: skip


def step(piece: Piece) -> None:
    """A whole training step by each of STEPS, beside the product in the same process."""
    size = piece.size(*BIG)
    if not piece.only:
        piece.apart("step", size, STEPS)
        return
    xs, w = _tokens(size), Inputs(size).w[:1]
    d, f, k = size.d, size.f, size.k

    def dense(**options: Any) -> Callable[[], peers.Step]:
        return lambda: peers.eager_step(d, f, k, **options)

    makers: dict[str, Callable[[], Any]] = {
        "fastsae": lambda: _own(size),
        "fastsae, 8-bit moments and masters": lambda: _own(size, **FEW_BITS),
        "dense eager": dense(),
        "dense compiled": dense(compiled=True),
        "sparsify": lambda: peers.sparsify_step(d, f, k, optimizer="adam", device=size.device),
    }
    name = piece.only
    built: list[Any] = []

    def call(i: int) -> Any:
        if not built:
            built.append(_made(makers[name], size))
        return built[0](xs[0])

    mine = name.startswith("fastsae")
    check = (lambda _: _verified(size.device)) if mine else peer_check(size.n, k)
    contenders = [Contender("product", lambda i: xs[0] @ w[0].T), Contender(name, call, check)]
    results = measure(contenders, rounds=5, seconds=6.0, clock=piece.plan.clock())
    piece.add([_step_row(name, size, *results)])


def _step_row(name: str, size: Size, unit: Measurement, m: Measurement) -> dict[str, Any]:
    row = run.row_of("training_step", name, size)
    run._fill(
        row, m, run.Case(lambda i: None, lambda r: "", 6.0 * size.n * size.d * size.f, 0), unit
    )
    row.pop("gbps", None)
    row.pop("tflops", None)
    return row | {"tflops": 0.0, "gbps": 0.0} if "ms" in row else row


def largest(piece: Piece) -> None:
    """A step with 1,048,576 latents, and whether the dense one, all in bf16, has room for it."""
    size = piece.size(1024, 4096, 1048576, 64)
    makers: dict[str, Callable[[], Any]] = {
        "fastsae": lambda: _own(size, **FEW_BITS),
        "dense eager": lambda: peers.eager_step(size.d, size.f, size.k),
    }
    if piece.only:
        piece.add([_first_steps(piece.only, size, makers[piece.only], piece)])
    else:
        piece.apart("largest", size, tuple(makers))


def _first_steps(name: str, size: Size, make: Callable[[], Any], piece: Piece) -> dict[str, Any]:
    row = {**run.row_of("training_step", name, size), "verified": False, "note": ""}
    (x,), losses = _tokens(size), []
    if piece.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        train, clock = _made(make, size), piece.plan.clock()

        def once() -> None:
            result = train(x)
            losses.append(result[0] if isinstance(result, tuple) else result)

        seconds = [clock.seconds(once) for _ in range(4)]
        ms = 1e3 * statistics.median(seconds[1:])
        fell = losses[-1] < losses[0]
        row |= {"ms": ms, "p20": ms, "p80": ms, "tflops": 0.0, "gbps": 0.0, "verified": fell}
        row["note"] = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}"
        if not fell:
            row["wrong"] = row["note"]
    except torch.OutOfMemoryError as error:
        row["error"] = row["note"] = str(error).splitlines()[0][:120]
    if piece.cuda:
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


# ---- report -----------------------------------------------------------------------------------


def _best(rows: Sequence[dict[str, Any]], op: str) -> dict[str, Any] | None:
    own = [r for r in rows if r["op"] == op and "ms" in r and r["backend"] in OWN]
    return min(own, key=lambda r: r["ms"], default=None)


OWN = ("cuda", "triton", "cpu", "reference", "fastsae", run.AUTO)


def own(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The project's rows, "triton fused" and "fastsae, 8-bit ..." too: none may be wrong."""
    return [r for r in rows if re.split("[ ,]", r["backend"])[0] in OWN]


def reached(pieces: dict[str, dict[str, Any]]) -> list[str]:
    """The cells beside TARGETS; "–" where nothing was measured."""
    rows = {name: found.get("rows", []) for name, found in pieces.items()}
    cells: list[str] = []

    def cell(value: float | None, form: str = "{:.3f}") -> None:
        cells.append("–" if value is None else form.format(value))

    encoded = rows.get("encode", [])
    widths = sorted({r["D"] for r in encoded}, reverse=True)
    for d in (*widths, None, None)[:2]:  # the wider target first
        best = _best([r for r in encoded if r["D"] == d], "topk_encode")
        cell(best and best.get("of_product"))
    likely = [r for r in encoded if r["D"] == max(widths) and r["backend"] == "triton fp8"]
    cell(likely[0].get("of_product") if likely else None)
    cell(likely[0].get("recall") if likely else None, "{:.7f}")
    speedups = []
    shapes: dict[tuple[int, ...], dict[str, float]] = {}
    for r in rows.get("grid", []):
        if r["op"] == "topk_encode" and "ms" in r:
            shapes.setdefault((r["N"], r["D"], r["F"], r["K"]), {})[r["backend"]] = r["ms"]
    for times in shapes.values():
        if "eager" in times and run.AUTO in times:
            speedups.append(times["eager"] / times[run.AUTO])
    cell(min(speedups, default=None), f"{{:.2f}} of {len(speedups)} shapes")
    cell(statistics.median(speedups) if speedups else None, "{:.2f}")
    exact = [r for r in encoded if r["op"] == "topk_encode"] + rows.get("grid", [])
    peaks = [r["peak_mb"] for r in exact if r["backend"] in OWN[:2] + OWN[-1:] and "peak_mb" in r]
    cell(max(peaks, default=None), "{:.0f}")
    for op in GATHERING[:3]:
        best = _best(rows.get("gather", []), op)
        cell(best and best.get("of_gather"))
    steps = {r["backend"]: r for r in rows.get("step", []) if "ms" in r}
    mine = steps.get("fastsae")
    cell(mine and mine.get("of_product"))
    for name in ("dense eager", "dense compiled", "sparsify"):
        other = steps.get(name)
        both = other and mine and "of_product" in other and "of_product" in mine
        cell(other["of_product"] / mine["of_product"] if both else None, "{:.2f}")
    trained = [r["F"] for r in own(rows.get("largest", [])) if r["verified"]]
    cell(max(trained, default=None), "{:.0f}")
    return cells


def report(args: argparse.Namespace) -> None:
    names = tuple(PIECES)
    files = {name: args.state / f"{name}.json" for name in names}
    pieces = {name: json.loads(p.read_text()) for name, p in files.items() if p.exists()}
    if not pieces:
        raise SystemExit(f"gpu_targets.py: no results in {args.state}")
    limits = next((p["ceilings"] for p in pieces.values() if "ceilings" in p), {})
    picked = [r["gbps"] for r in pieces.get("gather", {}).get("rows", [])
              if r["op"] == run.GATHER and "gbps" in r]  # fmt: skip
    plain = max(picked, default=None)
    print("ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in limits.items()))
    print(f"plain gather of the same rows: {plain:.4g} GB/s" if plain else "no gather measured")
    for name, piece in pieces.items():
        print(f"\n## {name}\n{run.table(piece['rows'])}")
        for r in own(piece["rows"]):
            if "ms" in r and limits and r["gbps"]:
                print(
                    f"{r['op']:24s} {r['backend']:14s} {r['N']}x{r['D']}x{r['F']}: "
                    f"{r['tflops'] / limits['tflops']:.2f} of the product's TFLOP/s, "
                    f"{r['gbps'] / limits['copy_gbps']:.2f} of the copy's GB/s"
                )
    cells = reached(pieces)
    print("\n## targets")
    for (what, target), got in zip(TARGETS, cells):
        print(f"{what:48s} {target:>10s}  {got}")
    found = next(p["machine"] for p in pieces.values() if "machine" in p)
    device = re.sub(r"[^a-z0-9]+", "-", found.get("gpu", "cpu").lower()).removeprefix("nvidia-")
    path = args.results / device / f"{found['date']}-{found['commit'].rstrip('+')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = [{"what": w, "target": t, "reached": c} for (w, t), c in zip(TARGETS, cells)]
    whole = {"schema": run.SCHEMA, "machine": found, "ceilings": limits, "targets": targets}
    path.write_text(json.dumps({**whole, "pieces": pieces}, indent=1) + "\n")
    print(f"wrote {path}")


PIECES = {f.__name__: f for f in (bench, encode, grid, gather, step, largest, hopper)}


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("piece", choices=[*PIECES, "report"])
    p.add_argument("--out", type=Path)
    p.add_argument("--state", type=Path)
    p.add_argument("--results", type=Path, default=h.HERE / "results")
    p.add_argument("--device", default="cuda")
    p.add_argument("--quick", action="store_true", help="toy sizes")
    p.add_argument("--only", default="", help="one training step, as rows of JSON")
    args = p.parse_args(argv)
    if args.piece == "report":
        if args.state is None:
            p.error("report needs --state")
        report(args)
        return
    if args.out is None:
        p.error(f"{args.piece} needs --out")
    piece = Piece(args)
    if not piece.only:
        print(h.header(args.device), flush=True)
    PIECES[args.piece](piece)
    if piece.only:
        return
    if run.bad(own(piece.found["rows"])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
