"""The README's picture: a training step beside other libraries, and memory against F."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SIZES = (2048, 768, 24576, 32)
STEPS = {
    "fastsae": "fastsae",
    "sparsify, oneDNN": "sparsify",
    "SAELens, sparse activations, oneDNN": "SAELens, sparse",
    "dense PyTorch, fused Adam, oneDNN": "dense PyTorch, fused Adam",
    "dictionary_learning, oneDNN": "dictionary_learning",
    "SAELens, oneDNN": "SAELens",
}
OWN, OTHER, INK = "#c8445a", "#9aa5b1", "#222222"


def figures(steps: list[Row], memory: list[Row]) -> dict[str, Any]:
    """All that the picture shows."""
    found = {r["contender"]: r for r in steps if tuple(r[k] for k in "NDFK") == SIZES}
    encode = [r for r in memory if r["op"] == "encode memory"]
    return {
        "step_ms": {name: round(found[c]["ms"]) for c, name in STEPS.items()},
        "times": {name: round(found[c]["of_own"], 1) for c, name in STEPS.items()},
        "product_ms": round(found["product, oneDNN"]["ms"]),
        "memory_mb": {
            contender: {str(r["F"]): round(r["extra_mb"]) for r in encode
                        if r["contender"] == contender and "extra_mb" in r}
            for contender in ("fastsae", "eager torch")
        },
    }  # fmt: skip


def is_drawn(path: Path, data: dict[str, Any]) -> bool:
    """Whether the file at `path` was drawn from these figures: it carries them as text."""
    return path.exists() and json.dumps(data).encode() in path.read_bytes()


def draw(path: Path, data: dict[str, Any]) -> None:
    """Writes the picture, on white, so that it can be read on a dark page too."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 11, "text.color": INK, "axes.edgecolor": "#888888"}
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.4), width_ratios=(1.3, 1), facecolor="white", layout="constrained"
    )
    names = list(data["step_ms"])[::-1]
    ms = [data["step_ms"][n] for n in names]
    left.barh(names, ms, color=[OWN if n == "fastsae" else OTHER for n in names], height=0.66)
    for i, name in enumerate(names):
        times = "" if name == "fastsae" else f"  ({data['times'][name]:g}×)"
        left.text(ms[i] + 60, i, f"{ms[i]:,} ms{times}", va="center",
                  bbox={"pad": 1.5, "color": "white"})  # fmt: skip
    product = data["product_ms"]
    left.axvline(product, color=INK, lw=1, ls=":")
    left.text(product + 60, len(names) - 0.42, f"x @ W_enc.T alone: {product} ms", fontsize=9.5)
    left.set(xlim=(0, max(ms) * 1.34), ylim=(-0.6, len(names) - 0.1))
    left.set_title("one training step, everything included", loc="left", fontsize=11.5)
    left.tick_params(axis="y", length=0)
    left.set_xticks([])

    for name, label, color in (
        ("eager torch", "eager torch", "#5b6773"),
        ("fastsae", "fastsae", OWN),
    ):
        points = {int(f): mb for f, mb in data["memory_mb"][name].items()}
        right.plot(list(points), list(points.values()), "o-", color=color, lw=2)
        f, mb = list(points.items())[-1]
        right.annotate(f"{label}: {mb:,} MB", (f, mb), (8, 10), textcoords="offset points",
                       ha="right", color=color)  # fmt: skip
    latents = sorted(int(f) for f in data["memory_mb"]["fastsae"])
    right.set(xscale="log", yscale="log", ylim=(5, 30_000), xlim=(8e3, 2.4e6))
    right.set_xticks(latents, [f"{f:,}" for f in latents], fontsize=9)
    right.minorticks_off()
    right.set_yticks([10, 100, 1000, 10_000], ["10 MB", "100 MB", "1 GB", "10 GB"])
    right.set_xlabel("latents")
    right.set_title("memory of one encode", loc="left", fontsize=11.5)
    right.grid(color="#e5e5e5", lw=0.7)
    right.set_axisbelow(True)
    for axes, sides in ((left, ("top", "right", "bottom")), (right, ("top", "right"))):
        axes.spines[list(sides)].set_visible(False)
    fig.savefig(path, dpi=110, metadata={"Comment": json.dumps(data), "Software": None})
    plt.close(fig)
