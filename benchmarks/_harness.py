"""What every benchmark shares: verify, then time interleaved, then print and keep rows.

An op's inputs, its floor and its check are those of `fastsae bench` (fastsae/bench/cases.py);
bench_<op>.py adds peers to them, and rows of its own.

A round runs every contender once (A B C A B C ...), so that a disturbance of the machine hits all
of them; a reported ratio is the median over the rounds of the ratio within a round (the ratio of
the medians where too few rounds are shared). Rows live in results/<device>/<name>.json,
one per key (CPU, op, shape, dtype, contender): a later run of the same key replaces the row, so a
table can be measured in short pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # without a GPU its Triton import fails

from fastsae.bench.cases import CASES, Inputs, Size  # noqa: E402
from fastsae.bench.inputs import (  # noqa: E402, F401
    CACHE_BYTES,
    normal,
    random_pairs,
    rotations,
    unit_rows,
)
from fastsae.bench.machine import (  # noqa: E402, F401
    at_level,
    cpu_kernel_level,
    cpu_level,
    header,
    levels,
    machine,
    product_library,
)
from fastsae.bench.timing import (  # noqa: E402, F401
    PRODUCT_DEFAULT,
    PRODUCT_ONEDNN,
    Contender,
    Measurement,
    WrongError,
    measure,
    peak_extra_mb,
    peak_mb,
    products,
    rss_mb,
    verify,
)

SHAPES = ((2048, 768, 24576), (2048, 384, 12288), (1024, 2048, 32768))
QUICK_SHAPES = ((256, 64, 1024),)
KS = (32, 64)
RATIOS = ("of_default", "of_onednn", "of_own")


# ---- rows -------------------------------------------------------------------------------------


def results_path(name: str) -> Path:
    return HERE / "results" / "cpu" / f"{name}.json"


def load_rows(name: str) -> list[dict[str, Any]]:
    path = results_path(name)
    return json.loads(path.read_text()) if path.exists() else []


def _key(row: dict[str, Any]) -> str:
    names = ("cpu", "threads", "op", "data", "N", "D", "F", "K", "dtype", "contender")
    return json.dumps([row.get(n) for n in names])


def keep(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Merges rows into results/cpu/<name>.json by key; written atomically."""
    merged = {_key(r): r for r in load_rows(name)}
    for row in rows:
        merged[_key(row)] = row
    path = results_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    body = ",\n".join("  " + json.dumps(r) for r in merged.values())
    temporary.write_text(f"[\n{body}\n]\n")
    os.replace(temporary, path)


def rows_of(
    results: Sequence[Measurement],
    *,
    op: str,
    shape: tuple[int, int, int],
    k: int,
    dtype: str = "float32",
    data: str = "random",
    units: tuple[str, ...] = (PRODUCT_DEFAULT, PRODUCT_ONEDNN),
    own: str = "fastsae",
) -> list[dict[str, Any]]:
    """One row per measurement, with its ratios to the units and to fastsae in the same rounds."""
    by_name = {m.name: m for m in results}
    base = machine()
    rows = []
    for m in results:
        row: dict[str, Any] = {
            **base,
            "op": op,
            "data": data,
            **dict(zip(("N", "D", "F"), shape)),
            "K": k,
            "dtype": dtype,
            "contender": m.name,
        }
        if m.failed:
            row["failed"] = m.failed
        else:
            row |= {
                "ms": round(m.median_ms(), 3),
                "p20": round(m.ms(0.2), 3),
                "p80": round(m.ms(0.8), 3),
                "rounds": len(m.times),
                "others": round(m.others, 3),
            }
            for label, unit in zip(RATIOS, (units[0], units[-1], own)):
                ratio = m.ratio(by_name.get(unit))
                if ratio is not None:
                    row[label] = round(ratio, 4)
        if m.note:
            row["note"] = m.note
        rows.append(row)
    return rows


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ("contender", "ms", "p20–p80", "/default", "/oneDNN", "/fastsae", "others", "note")
    lines = [columns]
    for r in rows:
        if "failed" in r:
            lines.append((r["contender"], *["–"] * 6, r["failed"]))
            continue
        ratios = [f"{r[c]:.3f}" if c in r else "–" for c in RATIOS]
        spread = f"{r['p20']:.1f}–{r['p80']:.1f}"
        times = (r["contender"], f"{r['ms']:.1f}", spread)
        lines.append((*times, *ratios, f"{r['others']:.0%}", r.get("note", "")))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(f"\n## {title}")
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [line[i].rjust(widths[i]) for i in range(1, len(columns) - 1)]
        print("  ".join([*cells, line[-1]]).rstrip())
    sys.stdout.flush()


# ---- command line -----------------------------------------------------------------------------


def shape_arg(text: str) -> tuple[int, int, int]:
    parts = tuple(int(p) for p in text.lower().split("x"))
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"a shape is NxDxF, e.g. 2048x768x24576, got {text!r}")
    return parts  # type: ignore[return-value]


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc.strip().split("\n")[0])
    p.add_argument("--shapes", nargs="+", type=shape_arg, metavar="NxDxF", default=list(SHAPES))
    p.add_argument("--k", nargs="+", type=int, default=list(KS))
    p.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    p.add_argument("--only", help="regular expression: keep and time only these contenders' rows")
    p.add_argument("--rounds", type=int, default=defaults.get("rounds", 15))
    p.add_argument("--seconds", type=float, default=defaults.get("seconds", 50.0), help="a table")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="a small shape, few rounds, nothing kept")
    p.add_argument("--no-keep", action="store_true", help="print only")
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.quick:
        args.shapes, args.rounds, args.k, args.no_keep = list(QUICK_SHAPES), 5, [16], True
    print(header(), flush=True)
    return args


def chosen(
    contenders: Sequence[Contender], only: str | None, always: Sequence[str] = ()
) -> list[Contender]:
    """The contenders whose name matches, with the units that their ratios need."""
    if only is None:
        return list(contenders)
    needed = {PRODUCT_DEFAULT, PRODUCT_ONEDNN, "fastsae", *always}
    return [c for c in contenders if c.name in needed or re.search(only, c.name)]


def finish(
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """Prints the table; keeps the rows that were asked for."""
    print_table(title, rows)
    if not args.no_keep:
        keep(name, [r for r in rows if args.only is None or re.search(args.only, r["contender"])])


# ---- the benchmark of an op -------------------------------------------------------------------

Make = Callable[[Size, Inputs], list[Contender]]


def own(op: str, size: Size, given: Inputs) -> Contender:
    """The op's own case."""
    case = CASES[op](size, given)
    return Contender("fastsae", case.run, case.check)


def units(given: Inputs, every: int = 10) -> list[Contender]:
    """The products that ratios are to, in every so many rounds."""
    result = products(given.x, given.w)
    for c in result:
        c.every = every
    return result


def bench(op: str, make: Make, args: argparse.Namespace, **labels: Any) -> None:
    """Every shape, K and dtype that was asked for: a table each."""
    for n, d, f in args.shapes:
        for k in args.k:
            for dtype in args.dtype:
                size = Size(n, d, f, k, getattr(torch, dtype))
                every = chosen(make(size, Inputs(size, every_row=True)), args.only)
                results = measure(every, rounds=args.rounds, seconds=args.seconds)
                rows = rows_of(results, op=op, shape=(n, d, f), k=k, dtype=dtype, **labels)
                finish(op, f"{op} {size} {dtype}", rows, args)


def at_a_small_size(benchmark: Any, op: str, dtype: torch.dtype, **sizes: int) -> None:
    """The op's case by pytest-benchmark."""
    size = Size(**{"n": 256, "d": 64, "f": 1024, "k": 16, **sizes}, dtype=dtype)
    case = CASES[op](size, Inputs(size))
    case.check(case.run(0))
    benchmark(case.run, 0)
