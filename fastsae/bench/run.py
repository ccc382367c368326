"""Runs the cases on every backend that the device has: rows, a table, JSON."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import _dispatch, _explain
from .cases import CASES, Case, Inputs, Size, eager, largest_tensors, product
from .machine import has_onednn_in_fp32, machine
from .timing import WRONG, Clock, Contender, EventClock, Measurement, WallClock, measure

SCHEMA = 1
PRODUCTS = ("default", "onednn")
SKIPPED = "skipped"
AUTO = "auto"  # the backend that a call takes
EAGER, HAVE_EAGER = "eager", ("topk", "topk_encode")
GATHER, GATHERING = "gather", (
    "sparse_decode", "sparse_grad_values", "sparse_grad_weight", "sparse_grad_weight_rows",
    "sparse_adam_step",
)  # fmt: skip


@dataclass
class Plan:
    """What to measure, and for how long."""

    device: str = "cpu"
    ops: Sequence[str] = tuple(CASES)
    backends: Sequence[str] = ()  # none given: every usable one
    rounds: int = 15
    seconds: float = 5.0  # one op at one size
    gather: bool = False  # beside the ops that read K rows a token, torch's gather of those rows

    def clock(self) -> Clock:
        return EventClock(self.device) if torch.device(self.device).type == "cuda" else WallClock()


def free_bytes(device: str) -> int:
    """Memory that can still be taken on the device."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 1 << 62


def usable(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that can run an op, best first."""
    kind = torch.device(device).type
    return [c.backend for c in _explain.verdicts(op, kind, dtype) if c.missing is None]


def _forced(backend: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    if backend == AUTO:
        return call

    def run(argument: Any) -> Any:
        with _dispatch.use_backend(backend):
            return call(argument)

    return run


def row_of(op: str, backend: str, size: Size) -> dict[str, Any]:
    return {
        "op": op,
        "backend": backend,
        "N": size.n,
        "D": size.d,
        "F": size.f,
        "K": size.k,
        "dtype": str(size.dtype).removeprefix("torch."),
    }


def _fill(row: dict[str, Any], m: Measurement, case: Case, unit: Measurement | None) -> None:
    if m.peak_mb is not None:
        row["peak_mb"] = round(m.peak_mb, 1)
    row["verified"] = not m.failed
    row["note"] = m.failed or m.note
    if m.failed:
        row["wrong" if m.failed.startswith(WRONG) else "error"] = m.failed
        return
    seconds = m.median_ms() / 1e3
    row |= {
        "ms": m.median_ms(),
        "p20": m.ms(0.2),
        "p80": m.ms(0.8),
        "rounds": len(m.times),
        "others": round(m.others, 3),
        "flops": case.flops,
        "bytes": case.bytes,
        "tflops": case.flops / seconds / 1e12,
        "gbps": case.bytes / seconds / 1e9,
    }
    ratio = m.ratio(unit)
    if ratio is not None:
        row["of_product"] = ratio


def names(op: str, size: Size, plan: Plan) -> list[str]:
    """The contenders of an op beside the product: eager torch where it applies, every backend."""
    can = usable(op, size.device, size.dtype)
    chosen = [b for b in plan.backends or can if b == AUTO or b in can]
    return [EAGER, *chosen] if op in HAVE_EAGER else chosen


def one(
    op: str,
    size: Size,
    given: Inputs,
    plan: Plan,
    clock: Clock,
    only: Sequence[str] | None = None,
    begin: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Rows of one op at one size: the product, and its contenders.

    Args:
        only: `names` of the contenders, or "triton fused" for one of the encoder's designs; None:
            all of them.
        begin: as in `measure`.
    """
    free = free_bytes(size.device)
    rows: list[dict[str, Any]] = []

    def too_big(name: str, backend: str, kind: str) -> bool:
        need = largest_tensors(kind, size)
        if need > 0.8 * free:
            note = f"{SKIPPED}: needs {need / 2**30:.0f} GB"
            rows.append({**row_of(name, backend, size), "verified": False, "note": note})
            return True
        return False

    if too_big(op, "all", op):
        return rows
    unit_case, case = product(size, given), CASES[op](size, given)
    contenders: list[tuple[dict[str, Any], Case, Contender]] = []

    def add(name: str, backend: str, of: Case, contender: Contender) -> None:
        contenders.append((row_of(name, backend, size), of, contender))

    both = size.device == "cpu" and size.dtype == torch.float32 and has_onednn_in_fp32()
    every = 4 if op != "topk_encode" and unit_case.flops > 1e10 else 1  # it would take the time
    if not too_big("product", "torch", "product"):
        for library in PRODUCTS if both else PRODUCTS[:1]:
            name = f"torch {library}" if both else "torch"
            run = Contender(name, unit_case.run, unit_case.check, library, every)
            add("product", name, unit_case, run)
    wanted = names(op, size, plan) if only is None else list(only)
    plain = eager(op, size, given) if EAGER in wanted else None
    if plain is not None and not too_big(op, EAGER, EAGER):
        # eager low precision keeps rounded scores, and may reduce partial sums in that precision
        rounded = op == "topk_encode" and size.dtype != torch.float32
        check = partial(case.check, roundings=4) if rounded else case.check
        library = PRODUCTS[-1] if both else PRODUCTS[0]
        add(op, EAGER, case, Contender(EAGER, plain, check, library))
    if plan.gather and op in GATHERING:
        picked = Case(plain_gather(given), lambda r: "", 0.0, 2.0 * size.gathered)
        add(GATHER, "torch", picked, Contender(GATHER, picked.run))
    for backend in (name for name in wanted if name != EAGER):
        rare = 3 if backend == "reference" and case.flops > 1e10 else 1  # takes seconds on a CPU
        if " " in backend:
            call, check = design(backend.split(" ")[1], size, given), case.check
        else:
            call, check = _forced(backend, case.run), _forced(backend, case.check)
        add(op, backend, case, Contender(backend, call, check, every=rare))
    measured = measure(
        [c for _, _, c in contenders], rounds=plan.rounds, seconds=plan.seconds, clock=clock,
        begin=begin,
    )  # fmt: skip
    units = [m for (row, _, _), m in zip(contenders, measured) if row["op"] == "product"]
    unit = min((m for m in units if m.times), key=Measurement.median_ms, default=None)
    for (row, of, contender), m in zip(contenders, measured):
        _fill(row, m, of, unit)
        if contender.name.endswith(" fp8") and not m.failed:
            row["recall"] = recall(design("chunked", size, given)(0)[1], contender.run(0)[1])
        rows.append(row)
    gathered = next((r["gbps"] for r in rows if r["op"] == GATHER and "gbps" in r), None)
    for row in rows:
        if gathered and row["op"] == op and "gbps" in row:
            row["of_gather"] = row["gbps"] / gathered
    return rows


def plain_gather(given: Inputs) -> Callable[[int], Any]:
    """torch's gather of the rows that the pairs name."""
    size, picks = given.size, given.pairs[0][1].flatten()
    out = torch.empty(len(picks), size.d, dtype=size.dtype, device=size.device)
    return lambda i: torch.index_select(given.w[0], 0, picks, out=out)


def design(name: str, size: Size, given: Inputs) -> Callable[[int], Any]:
    """The Triton encoder by one of its designs, whichever its table would take."""
    x, w = given.x[0], given.w[0]

    def call(i: int) -> Any:
        kernels = importlib.import_module("fastsae.triton_kernels.topk_encode")
        if (why := kernels.named(name).refuses(x, w, size.k)) is not None:
            raise NotImplementedError(f"design {name!r}: {why}")
        return kernels.topk_encode(x, w, given.b, size.k, True, None, design=name)

    return call


def recall(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Share of the exact latents [N, K] that are among those found."""
    hits = sum(
        int((a[:, :, None] == b[:, None, :]).any(2).sum())
        for a, b in zip(exact.split(1024), found.split(1024))
    )
    return hits / exact.numel()


def sweep(sizes: Sequence[Size], plan: Plan, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Rows of every op at every size, as they are measured, in this process.

    `fastsae.bench.isolated` does the same in processes of their own. A product is told once a size.
    """
    clock = plan.clock()
    for size in sizes:
        given, told = Inputs(size), set()
        for op in plan.ops:
            for row in one(op, size, given, plan, clock):
                key = row["backend"] if row["op"] == "product" else ""
                if key not in told:
                    on_row(row)
                    told |= {key} - {""}
        del given
        if torch.device(plan.device).type == "cuda":
            torch.cuda.empty_cache()


def bad(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are wrong or ended in an error. Skipped ones are not."""
    return [r for r in rows if "wrong" in r or "error" in r]


# ---- what the machine can do ------------------------------------------------------------------


def ceilings(device: str, dtype: torch.dtype, quick: bool = False) -> dict[str, float]:
    """The most that this run's device gave: a square product, a copy, a gather of rows.

    Bandwidths count bytes read plus bytes written. The gather reads random rows of 8 KB, N·K of
    them, from a table larger than the cache.
    """
    cuda = torch.device(device).type == "cuda"
    side = 8192 if cuda else (512 if quick else 2048)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    megabytes = 1024 if cuda else (64 if quick else 256)
    table = torch.ones(
        (megabytes << 20) // 8192, 8192 // dtype.itemsize, dtype=dtype, device=device
    )
    target = torch.empty_like(table)
    picks = torch.randperm(len(table), device=device)
    runs: dict[str, tuple[Callable[[], Any], float]] = {
        "tflops": (lambda: a @ b, 2.0 * side**3 / 1e12),
        "copy_gbps": (lambda: target.copy_(table), 2 * table.nbytes / 1e9),
        "gather_gbps": (lambda: torch.index_select(table, 0, picks, out=target),
                        2 * table.nbytes / 1e9),
    }  # fmt: skip
    clock: Clock = EventClock(device) if cuda else WallClock()
    found = {}
    for name, (run, work) in runs.items():
        run()
        best = min(clock.seconds(run) for _ in range(5 if quick else 9))
        found[name] = work / best
    return found


# ---- output -----------------------------------------------------------------------------------

COLUMNS = (
    "op", "backend", "shape", "dtype", "ms", "p20–p80", "TFLOP/s", "GB/s", "peak MB",
    "of product", "verified",
)  # fmt: skip


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    shape = f"{row['N']}x{row['D']}x{row['F']} k={row['K']}"
    start = (row["op"], row["backend"], shape, row["dtype"])
    if "ms" not in row:
        return (*start, *["–"] * 6, row["note"])
    return (
        *start,
        number(row["ms"]),
        f"{number(row['p20'])}–{number(row['p80'])}",
        number(row["tflops"]) if row["tflops"] else "–",
        number(row["gbps"]),
        number(row["peak_mb"]) if "peak_mb" in row else "–",
        f"{row['of_product']:.3f}" if "of_product" in row else "–",
        "yes: " + row["note"],
    )


WIDTHS = (23, 14, 0, 8, 7, 11, 8, 7, 7, 10)


def aligned(line: Sequence[str], shapes: int) -> str:
    """One line of the table, its shapes `shapes` wide: rows can be printed as they come."""
    parts = []
    for i, (cell, width) in enumerate(zip(line, WIDTHS)):
        parts.append(cell.ljust(width or shapes) if i < 4 else cell.rjust(width))
    return "  ".join([*parts, line[-1]]).rstrip()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [COLUMNS, *(cells(r) for r in rows)]
    shapes = max(len(line[2]) for line in lines)
    return "\n".join(aligned(line, shapes) for line in lines)


def write_json(
    path: Path, plan: Plan, rows: Sequence[dict[str, Any]], limits: dict[str, float]
) -> None:
    """The whole run as one JSON object; written atomically."""
    found = {
        "schema": SCHEMA,
        "device": plan.device,
        "machine": machine(plan.device),
        "ceilings": limits,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)
