"""`fastsae bench`: every operator and backend of this machine, verified, then timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from . import check_writable, fail, fail_missing

CPU_SHAPE, GPU_SHAPE, QUICK_SHAPE = "2048x768x24576", "8192x4096x131072", "256x64x1024"


def bench(
    device: str = typer.Option("cpu", help="Torch device: cpu, cuda, cuda:1."),
    ops: list[str] = typer.Option([], help="Operators, separated by commas.", show_default="all"),  # noqa: B008
    backends: list[str] = typer.Option(  # noqa: B008
        [], help="Backends, or auto for the one a call takes.", show_default="every usable one"
    ),
    shapes: list[str] = typer.Option(  # noqa: B008
        [], help="NxDxF: tokens, width, latents.", show_default="by device"
    ),
    k: list[str] = typer.Option([], help="Active latents.", show_default="32; 64 on a GPU"),  # noqa: B008
    dtype: list[str] = typer.Option(  # noqa: B008
        [], help="float32, bfloat16, float16.", show_default="float32; bfloat16 on a GPU"
    ),
    json: Path | None = typer.Option(None, help="Write everything measured to this file."),  # noqa: B008
    plot: Path | None = typer.Option(  # noqa: B008
        None, help="Folder for PNGs: roofline, time against F and against N (more runs)."
    ),
    quick: bool = typer.Option(False, help="A small shape and few rounds."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads.", show_default="torch's"),
    in_process: bool = typer.Option(
        False, help="Measure in this process, under a debugger or sanitizer."
    ),
) -> None:
    """Verify every operator against fp64, then time it beside the bare product x @ W_enc.T.

    GB/s counts the floor's bytes, TFLOP/s the floor's operations. What crashes or hangs costs its
    own row: on a GPU every op, backend and design is a process, on a CPU all are one, and another
    goes on without what ended it. Exit code 1 when a result is wrong, which is then not timed, or
    something failed.
    """
    import torch

    from .. import _dispatch
    from ..bench import isolated, run
    from ..bench.cases import CASES, Size
    from ..bench.machine import header

    if plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            fail_missing(error)
    for folder in (plot, json and json.parent):
        if folder is not None:
            check_writable(folder)
    cuda = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    plan = run.Plan(
        device=device,
        ops=_chosen("--ops", ops, list(CASES)),
        backends=_chosen("--backends", backends, [*_dispatch.BACKENDS, run.AUTO], none=True),
        rounds=5 if quick else 15,
        seconds=2.0 if quick else 5.0,
    )
    texts = _split(shapes) or [QUICK_SHAPE if quick else GPU_SHAPE if cuda else CPU_SHAPE]
    ks = [_whole("--k", t) for t in _split(k)] or [16 if quick else 64 if cuda else 32]
    names = _chosen("--dtype", dtype, ["float32", "bfloat16", "float16"], none=True)
    dtypes = [getattr(torch, t) for t in names or ["bfloat16" if cuda else "float32"]]
    sizes = [
        Size(*_shape(text), active, kind, device)
        for text in texts for active in ks for kind in dtypes
    ]  # fmt: skip
    for size in sizes:
        if size.k > size.f:
            fail(f"--k {size.k} is more than the {size.f} latents of {size}")
    typer.echo(header(device))
    width = max(len(str(size)) for size in sizes)
    typer.echo(run.aligned(run.COLUMNS, width))
    rows: list[dict[str, Any]] = []

    def sweep(sizes: list[Size], plan: run.Plan, on_row: Callable[[dict[str, Any]], None]) -> None:
        if in_process:
            run.sweep(sizes, plan, on_row)
        else:
            jobs = [isolated.Job(size, op) for size in sizes for op in plan.ops]
            isolated.measured(jobs, plan, on_row)

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        typer.echo(run.aligned(run.cells(row), width))

    sweep(sizes, plan, tell)
    limits = run.ceilings(device, sizes[0].dtype, quick)
    typer.echo(
        f"ceilings in this run ({str(sizes[0].dtype).removeprefix('torch.')}): product "
        f"{run.number(limits['tflops'])} TFLOP/s, copy {run.number(limits['copy_gbps'])} GB/s, "
        f"gather of rows {run.number(limits['gather_gbps'])} GB/s"
    )
    if plot is not None:
        from ..bench import plots

        ladders = plots.ladders(sizes[0], quick)
        scaling: dict[str, list[dict[str, Any]]] = {axis: [] for axis in ladders}
        for axis, ladder in ladders.items():
            sweep(ladder, plots.plan_of(plan), _progress(scaling[axis]))
        for path in plots.write(plot, rows, scaling, limits, header(device)):
            typer.echo(f"wrote {path}")
        rows += [row for ladder in scaling.values() for row in ladder]
    if json is not None:
        run.write_json(json, plan, rows, limits)
        typer.echo(f"wrote {json}")
    wrong = run.bad(rows)
    if wrong:
        typer.echo(f"{len(wrong)} of {len(rows)} rows are wrong or failed", err=True)
        raise typer.Exit(1)


def _progress(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """Collects the rows, told on stderr as they come where that is a terminal."""

    def on_row(row: dict[str, Any]) -> None:
        rows.append(row)
        if sys.stderr.isatty():
            where = f"{row['op']} {row['backend']} {row['N']}x{row['D']}x{row['F']}"
            typer.echo(f"\r{len(rows)} rows, {where}\x1b[K", err=True, nl=False)

    return on_row


def _device(name: str) -> bool:
    """Whether it is a GPU; ends with a line when torch has no such device here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device {name} is no torch device")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {name}: only cpu and cuda devices can be measured")
    if device.type == "cpu":
        return False
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: torch {torch.__version__} finds no such GPU on this machine")
    torch.cuda.set_device(device)
    return True


def _split(texts: list[str]) -> list[str]:
    return [part for text in texts for part in text.replace(",", " ").split()]


def _chosen(option: str, texts: list[str], known: list[str], none: bool = False) -> list[str]:
    given = _split(texts)
    for name in given:
        if name not in known:
            fail(f"{option} {name}: unknown, one of {', '.join(known)}")
    return given or ([] if none else known)


def _whole(option: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        fail(f"{option} {text}: a whole number from 1 is needed")
    return int(text)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        fail(f"--shapes {text}: a shape is NxDxF, e.g. {CPU_SHAPE}")
    n, d, f = map(int, parts)
    return n, d, f
