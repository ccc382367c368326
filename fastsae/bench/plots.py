"""Roofline and scaling plots of a run, as PNG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import Size
from .run import AUTO, Plan

INK, GRID = "#222222", "#dddddd"
PRODUCT_LINE = ("product", "", "#555555", "--", "o")
EAGER_LINE = ("topk_encode", "eager", "#9a9a9a", "--", "s")
COLOURS = {
    "topk_encode": "#d1495b",
    "topk": "#8d5a97",
    "topk_member": "#b56576",
    "sparse_decode": "#2e86ab",
    "sparse_grad_values": "#3bb273",
    "sparse_grad_weight": "#e1a730",
    "sparse_grad_weight_rows": "#8a6d1f",
    "sparse_adam_step": "#1b4965",
    "steer": "#5f7a61",
}
NOT_SCALED = ("topk", "topk_member", "sparse_grad_weight_rows", "steer")
MARKERS = {"cpu": "o", "cuda": "o", "triton": "D", "reference": "x", "eager": "s"}
MARKERS |= {"torch": "^", "torch onednn": "v"}


def ladders(size: Size, quick: bool) -> dict[str, list[Size]]:
    """The sizes of the two scaling plots: F grows at fixed N, N grows at fixed F."""
    steps = range(-3, 2)
    most = size.f * (1 if quick else 2)
    fs = [f for f in (int(size.f * 2.0**s) for s in steps) if size.k <= f <= most]
    ns = [n for n in (int(size.n * 2.0**s) for s in range(-5, 1)) if n >= 1]
    return {"F": [size.at(f=f) for f in fs], "N": [size.at(n=n) for n in ns]}


def plan_of(plan: Plan) -> Plan:
    """The plan of the scaling runs: the backend that a call takes, fewer rounds."""
    ops = [op for op in plan.ops if op not in NOT_SCALED]
    return replace(
        plan, ops=ops or plan.ops, backends=(AUTO,), rounds=min(plan.rounds, 7),
        seconds=plan.seconds / 2,
    )  # fmt: skip


def write(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    scaling: Mapping[str, Sequence[dict[str, Any]]],
    limits: dict[str, float],
    caption: str,
) -> list[Path]:
    """roofline.png, scaling_F.png, scaling_N.png; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": INK, "text.color": INK}):
        for name, draw in (
            ("roofline", lambda axes: _roofline(axes, rows, limits)),
            ("scaling_F", lambda axes: _scaling(axes, scaling["F"], "F")),
            ("scaling_N", lambda axes: _scaling(axes, scaling["N"], "N")),
        ):
            figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
            draw(axes)
            axes.grid(True, which="major", color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            figure.supxlabel(caption.lstrip("# "), fontsize=7, color="#777777")
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            pyplot.close(figure)
    return paths


def _timed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if "ms" in r]


def _roofline(axes: Any, rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    points = [r for r in _timed(rows) if r["flops"]]
    at = [r["flops"] / r["bytes"] for r in points] or [1.0]
    left, right = min(at) / 3, max(max(at), 1e3 * limits["tflops"] / limits["copy_gbps"]) * 3
    for name, style in (("copy", "-"), ("gather", ":")):
        slope = limits[f"{name}_gbps"] / 1e3  # TFLOP/s for one FLOP a byte
        ridge = limits["tflops"] / slope
        axes.plot(
            [left, ridge, right], [left * slope, limits["tflops"], limits["tflops"]],
            style, color=INK, linewidth=1.4,
            label=f"{name} {limits[name + '_gbps']:.3g} GB/s, product "
            f"{limits['tflops']:.3g} TFLOP/s",
        )  # fmt: skip
    for row in points:
        colour = COLOURS.get(row["op"], "#555555")
        backend = row["backend"]
        marker = MARKERS.get(backend, MARKERS.get(backend.split()[0], "o"))
        axes.plot(
            row["flops"] / row["bytes"], row["tflops"], marker, color=colour,
            markersize=8, alpha=0.85, label=f"{row['op']}, {row['backend']}",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=(left, right),
        xlabel="FLOPs per byte of the floor", ylabel="TFLOP/s",
        title="Roofline: what each call reached, and what this device gave in the same run",
    )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))  # several sizes share one entry
    axes.legend(
        unique.values(), unique.keys(), fontsize=7.5, frameon=False, loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip


def _scaling(axes: Any, rows: Sequence[dict[str, Any]], axis: str) -> None:
    timed = _timed(rows)
    lines = [PRODUCT_LINE, EAGER_LINE]
    for op in dict.fromkeys(r["op"] for r in timed if r["backend"] == AUTO):
        lines.append((op, AUTO, COLOURS.get(op, "#555555"), "-", "o"))
    for op, backend, colour, style, marker in lines:
        best: dict[int, dict[str, Any]] = {}  # the faster of torch's libraries at each size
        for r in timed:
            if r["op"] == op and (r["backend"] == backend or op == "product"):
                known = best.get(r[axis])
                best[r[axis]] = r if known is None or r["ms"] < known["ms"] else known
        if not best:
            continue
        x = sorted(best)
        label = {"product": "product x @ W.T", "eager": "eager torch topk"}.get(
            op if op == "product" else backend, f"fastsae {op}"
        )
        axes.plot(
            x, [best[v]["ms"] for v in x], style, marker=marker, markersize=4, color=colour,
            linewidth=2.4 if op == "topk_encode" and backend == AUTO else 1.5, label=label,
        )  # fmt: skip
        axes.fill_between(
            x, [best[v]["p20"] for v in x], [best[v]["p80"] for v in x], color=colour, alpha=0.12,
            linewidth=0,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if timed:
        ticks = sorted({r[axis] for r in timed})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        first = timed[0]
        fixed = f"N={first['N']:,}" if axis == "F" else f"F={first['F']:,}"
        axes.set_title(
            f"Time against {axis} at {fixed}, D={first['D']}, K={first['K']}, {first['dtype']}"
        )
    axes.set_xlabel("latents F" if axis == "F" else "tokens N")
    axes.set_ylabel("milliseconds (median, band p20–p80)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
