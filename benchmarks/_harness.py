"""What every benchmark shares: verify, then time interleaved, then print and keep rows.

A round runs every contender once (A B C A B C ...), so that a disturbance of the machine hits all
of them; a reported ratio is the median over the rounds of the ratio within a round (the ratio of
the medians where too few rounds are shared). Rows live in results/<device>/<name>.json,
one per key (CPU, op, shape, dtype, contender): a later run of the same key replaces the row, so a
table can be measured in short pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # without a GPU its Triton import fails

import fastsae  # noqa: E402

SHAPES = ((2048, 768, 24576), (2048, 384, 12288), (1024, 2048, 32768))
QUICK_SHAPES = ((256, 64, 1024),)
KS = (32, 64)
PRODUCT_DEFAULT = "product, default"
PRODUCT_ONEDNN = "product, oneDNN"
RATIOS = ("of_default", "of_onednn", "of_own")
CALM = 0.05  # share of the CPUs that other processes may take in a round that counts
CACHE_BYTES = 96 << 20  # rotate inputs until they exceed this: three times a 32 MB last-level cache


class WrongError(Exception):
    """A contender's result failed its check: it is not timed."""


@dataclass
class Contender:
    """One thing to time. `run(i)` works on the i-th set of rotated inputs, returns its result."""

    name: str
    run: Callable[[int], Any]
    # takes run(0)'s result; returns a note for the table, raises WrongError
    check: Callable[[Any], str] | None = None
    library: str = "default"  # torch's fp32 products: "default" or "onednn"
    every: int = 1  # runs in every n-th round only, for contenders that take seconds


@dataclass
class Measurement:
    name: str
    note: str = ""
    failed: str = ""
    others: float = 0.0
    times: dict[int, float] = field(default_factory=dict)  # round -> seconds

    def ms(self, q: float = 0.5) -> float:
        ordered = sorted(self.times.values())
        return 1e3 * ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.times.values())

    def ratio(self, unit: Measurement | None) -> float | None:
        if unit is None or not self.times or not unit.times:
            return None
        shared = self.times.keys() & unit.times.keys()
        if len(shared) < min(5, len(self.times), len(unit.times)):
            return self.median_ms() / unit.median_ms()
        return statistics.median(self.times[r] / unit.times[r] for r in shared)


# ---- the machine ----------------------------------------------------------------------------


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    git = ["git", "-C", str(HERE.parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "fastsae", "csrc"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def cpu_level() -> str:
    from fastsae import _library

    if _library.CPU_MISSING is not None:
        return "not built"
    return str(torch.ops.fastsae._cpu_level())


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "level": cpu_level(),
        "torch": torch.__version__,
        "fastsae": fastsae.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def header() -> str:
    m = machine()
    return (
        f"# {m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['level']}, "
        f"torch {m['torch']}, fastsae {m['fastsae']} ({m['commit']}), {m['date']}"
    )


@contextlib.contextmanager
def product_library(name: str) -> Iterator[None]:
    """torch's fp32 products through its default library, or through oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if name == "onednn" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def cpu_kernel_level(level: str | None) -> Iterator[None]:
    """fastsae's C++ kernels at a lower level (None: as detected)."""
    if level is None:
        yield
        return
    before = torch.ops.fastsae._cpu_level()
    torch.ops.fastsae._set_cpu_level(level)
    try:
        yield
    finally:
        torch.ops.fastsae._set_cpu_level(before)


def at_level(level: str, run: Callable[[int], Any]) -> Callable[[int], Any]:
    def wrapped(i: int) -> Any:
        with cpu_kernel_level(level):
            return run(i)

    return wrapped


def levels() -> list[str]:
    """The C++ levels this CPU has, lowest first."""
    if cpu_level() == "not built":
        return []
    return re.findall(r"\w+", torch.ops.fastsae._cpu_levels())


# ---- inputs -----------------------------------------------------------------------------------


def rotations(bytes_per_set: int, most: int = 8) -> int:
    """How many input sets make the rotation larger than the cache."""
    return max(2, min(most, -(-CACHE_BYTES // max(1, bytes_per_set))))


def unit_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=g)
    return (w / w.norm(dim=-1, keepdim=True)).to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_pairs(
    n: int, k: int, f: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n, k] and distinct indices [n, k] int32 with the skew of real SAEs.

    A trained SAE's latents fire at very different rates: half of the indices are drawn
    uniformly, half towards low numbers (log-uniform), so that some latents own many pairs.
    """
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 2 * k, generator=g)
    skewed = torch.exp(uniform * torch.log(torch.tensor(float(f)))) - 1
    pick = torch.where(torch.rand(n, 2 * k, generator=g) < 0.5, uniform * f, skewed)
    candidates = pick.long().clamp_(max=f - 1)
    indices = torch.empty(n, k, dtype=torch.int32)
    for row in range(n):
        unique = torch.unique(candidates[row])
        unique = unique[torch.randperm(len(unique), generator=g)][:k]
        while len(unique) < k:  # a rare row with many repeats
            extra = torch.randint(f, (k,), generator=g)
            unique = torch.unique(torch.cat([unique, extra]))[:k]
        indices[row] = unique.int()
    values = torch.rand(n, k, generator=g).to(dtype) + 0.1
    return values, indices


# ---- timing -----------------------------------------------------------------------------------


def verify(contender: Contender) -> Measurement:
    """One untimed run and its check."""
    m = Measurement(contender.name)
    try:
        with product_library(contender.library):
            result = contender.run(0)
        if contender.check is not None:
            m.note = contender.check(result)
    except WrongError as error:
        m.failed = f"wrong, not timed: {error}"
    except (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        m.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return m


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds used on this machine by everything, and by this process."""
    own = os.times()
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(v) for v in fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, own.user + own.system


def measure(
    contenders: Sequence[Contender], *, rounds: int, seconds: float, warmup: int = 1
) -> list[Measurement]:
    """Verifies every contender, then times the right ones in interleaved rounds.

    Stops after `rounds` undisturbed rounds, or after `seconds` once three rounds are complete.
    A round is disturbed when other processes took more than 5% of the CPUs during it: those
    rounds are dropped, as long as five remain, otherwise the calmest half is kept. The share that
    others took in the rounds kept is in every row.
    """
    results = [verify(c) for c in contenders]
    live = [(c, m) for c, m in zip(contenders, results) if not m.failed]
    for m in results:
        if m.failed:
            print(f"  {m.name}: {m.failed}", flush=True)
    for contender, _ in live:
        for i in range(warmup if contender.every == 1 else 0):
            with product_library(contender.library):
                contender.run(i)
    others: dict[int, float] = {}  # round -> share of the CPUs that other processes took
    begin = time.perf_counter()
    for r in range(4 * rounds):
        elapsed = time.perf_counter() - begin
        calm = sum(share <= CALM for share in others.values())
        if calm >= rounds or (r >= 3 and elapsed > seconds):
            break
        round_begin, (busy, own) = time.perf_counter(), _cpu_seconds()
        for contender, m in live:
            if r % contender.every:
                continue
            with product_library(contender.library):
                start = time.perf_counter()
                contender.run(r)
                m.times[r] = time.perf_counter() - start
        busy_after, own_after = _cpu_seconds()
        wall = (time.perf_counter() - round_begin) * (os.cpu_count() or 1)
        others[r] = max(0.0, (busy_after - busy) - (own_after - own)) / wall
    for _, m in live:
        ran = sorted(m.times, key=lambda r: others[r])
        calm = sum(others[r] <= CALM for r in ran)
        kept = ran[: calm if calm >= 5 else max(calm, 3, len(ran) // 2)]
        m.times = {r: m.times[r] for r in sorted(kept)}
        m.others = statistics.mean(others[r] for r in m.times)
    return results


def products(x: Sequence[torch.Tensor], w: Sequence[torch.Tensor]) -> list[Contender]:
    """The two units: torch's product x @ W_enc.T, nothing else."""

    def run(i: int) -> torch.Tensor:
        return x[i % len(x)] @ w[i % len(w)].T

    def check(got: torch.Tensor) -> str:
        rows = slice(0, 64)
        truth = x[0][rows].double() @ w[0].double().T
        error = (got[rows].double() - truth).abs().max().item()
        if x[0].dtype == torch.float32 and error > 1e-4 * truth.abs().max().item():
            raise WrongError(f"max error {error:.1e} is not fp32 accuracy")
        return f"max error {error:.1e}"

    return [
        Contender(PRODUCT_DEFAULT, run, check),
        Contender(PRODUCT_ONEDNN, run, check, library="onednn"),
    ]


# ---- memory -----------------------------------------------------------------------------------


def _status_mb(field_name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """High-water mark of this process's resident memory during run(), above its start, in MB.

    The result's own memory is part of it. Call it in a fresh process, after a small warm-up call.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mb("VmRSS")
    kept = run()
    peak = _status_mb("VmHWM")
    del kept
    return max(0.0, peak - before)


def rss_mb() -> float:
    return _status_mb("VmRSS")


def peak_mb() -> float:
    return _status_mb("VmHWM")


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
