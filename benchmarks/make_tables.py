"""Writes the measured tables into README.md and docs/benchmarks.md, from benchmarks/results/cpu.

    python benchmarks/make_tables.py [--check]

Each table replaces what stands between `<!-- table:NAME -->` and `<!-- /table -->`, and the picture
is drawn anew when its figures changed. Nothing is measured here. `--check` writes nothing: it ends
with 1 when something is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _picture

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu"
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")
PICTURE = HERE.parent / "docs" / "step-and-memory.png"
Row = dict[str, Any]
DEFAULT, ONEDNN = "product, default", "product, oneDNN"


def load(name: str) -> list[Row]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def grouped(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows of one shape together, by contender; fp32 and large batches first."""
    out: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        key = (r["dtype"] != "float32", -r["N"], -r["D"] if r["N"] > 1024 else 0, r["F"], r["K"])
        out.setdefault(key, {})[r["contender"]] = r
    return dict(sorted(out.items()))


def shape(group: dict[str, Row]) -> str:
    r = next(iter(group.values()))
    dtype = "" if r["dtype"] == "float32" else f" {r['dtype']}"
    return f"{r['N']}, {r['D']}, {r['F']}, {r['K']}{dtype}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ms(row: Row | None, ratio: str | None = None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return row["failed"].split(":")[0]
    cell = number(row["ms"])
    return f"{cell} ({row[ratio]:.2f})" if ratio and ratio in row else cell


def slower(row: Row | None) -> str:
    """Milliseconds and how many times fastsae's time that is, in the same run."""
    if row is None or "failed" in row or "of_own" not in row:
        return ms(row)
    return f"{number(row['ms'])} ({number(row['of_own'])}×)"


def table(columns: list[str], lines: list[list[str]]) -> str:
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    rows = [[columns[i] for i in used], ["---"] * len(used)]
    rows += [[line[i] or "–" for i in used] for line in lines]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def where(rows: Iterable[Row]) -> str:
    rows = list(rows)

    def span(name: str) -> str:
        found = sorted({str(r[name]) for r in rows if name in r})
        return found[0] if len(found) == 1 else ", ".join(found)

    return (
        f"{span('cpu')}, {span('cores')} cores, {span('threads')} threads, torch {span('torch')}, "
        f"fastsae {span('fastsae')} at {span('commit')}, {span('date')}."
    )


# The README's rows: what, results, fastsae's contender and the other's, its name, and where the row
# is not of the headline's shape in fp32.
BF16 = {"dtype": "bfloat16"}
HOOK = {"N": 512}
TINY = {"op": "generate step", "N": 1, "D": 256, "F": 2048, "K": 24}
HEADLINE: list[tuple[str, str, str, str, str, Row]] = [
    ("training step", "training_step", "fastsae", ONEDNN, "`x @ W_enc.T` alone", {}),
    ("", "training_step", "fastsae", "sparsify, oneDNN", "sparsify", {}),
    ("", "training_step", "fastsae", "dictionary_learning, oneDNN", "dictionary_learning", {}),
    ("", "training_step", "fastsae", "SAELens, oneDNN", "SAELens", {}),
    ("", "training_step", "fastsae", "dense PyTorch, fused Adam, oneDNN",
     "dense PyTorch, fused Adam", {}),
    ("encode", "topk_encode", "fastsae", ONEDNN, "`x @ W_enc.T` alone", {}),
    ("", "topk_encode", "fastsae", "eager torch, oneDNN", "product, ReLU, `torch.topk`", {}),
    ("encode, bf16", "topk_encode", "fastsae", ONEDNN, "`x @ W_enc.T` alone, bf16", BF16),
    ("the same without bf16 instructions", "topk_encode", "fastsae, avx2", ONEDNN,
     "`x @ W_enc.T` alone, with them", BF16),
    ("decode", "sparse_decode", "fastsae", "torch embedding_bag", "`embedding_bag`", {}),
    ("Adam on W_dec, gradient formed inside", "sparse_adam_step", "fastsae, unit norm",
     "torch Adam only, fused", "torch's fused Adam, gradient given", {}),
    ("one latent clamped in 512 tokens", "steer", "fastsae, hook, TopK",
     "SAELens, error term, TopK", "SAELens", HOOK),
    ("a small model's token, clamped", "generate", "one clamp, TopK", "unsteered",
     "unsteered", TINY),
]  # fmt: skip


def headline() -> str:
    """One shape, whole steps first, losses like wins."""
    used: list[Row] = []
    lines = []
    for what, name, own, other, beside, apart in HEADLINE:
        of = {"N": 2048, "D": 768, "F": 24576, "K": 32, "dtype": "float32"} | apart
        rows = [r for r in load(name) if all(r[k] == v for k, v in of.items())]
        found = {r["contender"]: r for r in rows}
        pair = [found[own], found[other]]
        scale = 1000 if pair[0].get("unit") == "us" else 1
        times = [number(r["ms"] / scale) for r in pair]
        ratio = pair[1]["of_own"] / pair[0]["of_own"]
        shown = f"**{times[0]}**" if what else ""
        lines.append([what or " ", shown or " ", beside, times[1], number(ratio)])
        used += pair
    return (
        where(used) + " Milliseconds, fp32 unless said; 2048 tokens of width 768, 24,576 latents, "
        "32 active (the last row: D = 256, F = 2048, K = 24). × is how many times fastsae's time "
        "the other takes in the same run: below 1 fastsae is slower. Products through oneDNN, "
        "other libraries at their defaults.\n\n"
        + table([" ", "**fastsae**", "beside it", "ms", "×"], lines)
    )


def picture() -> str:
    """The README's picture with what it says in words, and on what it was measured."""
    steps, memory = load("training_step"), load("memory")
    data = _picture.figures(steps, memory)
    latents, mb = list(data["memory_mb"]["fastsae"].items())[-1]
    words = (
        f"A training step takes {data['step_ms']['fastsae']} ms; sparsify's takes "
        f"{data['times']['sparsify']} times as long, SAELens's {data['times']['SAELens']} times. "
        f"One encode with {int(latents):,} latents takes {mb} MB."
    )
    r = steps[0]
    return (
        f"![{words}](docs/{PICTURE.name})\n\n*{r['cpu']}, {r['cores']} cores, torch {r['torch']}, "
        f"fp32, {r['date']}. Left: 2048 tokens of width 768, 24,576 latents, 32 active; other "
        "libraries at their defaults, products through oneDNN. Right: 2048 tokens of width "
        f"{memory[0]['D']}.*"
    )


def encode() -> str:
    rows = [r for r in load("topk_encode") if r["data"] == "random"]
    if not rows:
        return ""
    columns = [
        "N, D, F, K", "product, default", "product, oneDNN", "**fastsae**", "rows exact",
        "plain fp32 path", "AVX2", "eager, default", "eager, oneDNN",
        "sparsify", "SAELens", "dictionary_learning",
    ]  # fmt: skip
    peers = ("sparsify", "SAELens", "dictionary_learning")
    lines = []
    for g in grouped(rows).values():
        own = g.get("fastsae", {})
        lines.append([
            shape(g), ms(g.get(DEFAULT)), ms(g.get(ONEDNN)),
            f"**{ms(g.get('fastsae'), 'of_onednn')}**", own.get("note", "").split(" ")[0],
            ms(g.get("fastsae, plain fp32 (avx512)"), "of_onednn"),
            ms(g.get("fastsae, avx2"), "of_onednn"),
            slower(g.get("eager torch, default")), slower(g.get("eager torch, oneDNN")),
            *(slower(g.get(f"{p}, oneDNN")) for p in peers),
        ])  # fmt: skip
    text = (
        where(rows) + " Milliseconds; fastsae's own rows with the ratio to the oneDNN product, the "
        "others with how many times fastsae's time they take (peers through oneDNN). "
        '"Rows exact" counts the rows whose selection is the fp64 one.\n\n'
    )
    text += table(columns, lines)
    real = [r for r in load("topk_encode") if r["data"] != "random"]
    if real:
        lines = []
        for g in grouped(real).values():
            own = g.get("fastsae", {})
            lines.append([
                shape(g), ms(g.get(ONEDNN)), f"**{ms(g.get('fastsae'))}**",
                own.get("note", "").split(" ")[0],
                ms(g.get("fastsae, plain fp32 (avx512)")),
                f"**{own['of_plain']:.2f}**" if "of_plain" in own else "",
                slower(g.get("eager torch, oneDNN")),
            ])  # fmt: skip
        text += (
            "\n\nReal activations (MiniLM layer 3, held-out text) and weights trained on them:\n\n"
        )
        text += table(
            ["N, D, F, K", "product, oneDNN", "**fastsae**", "rows exact", "plain fp32 path",
             "**fastsae / plain**", "eager, oneDNN"],
            lines,
        )  # fmt: skip
    return text


def selection() -> str:
    """`topk` of dense rows, and whether one latent is among the K."""
    rows = load("topk")
    lines = []
    for g in grouped(rows).values():
        own, read = g["fastsae"], g["read once (sum)"]
        lines.append([
            f"{own['N']}, {own['F']}, {own['K']}", f"**{ms(own)}**", ms(read),
            slower(g["torch.topk"]),
        ])  # fmt: skip
    text = where(rows) + " Milliseconds; in brackets how many times fastsae's time it takes.\n\n"
    text += table(["N, M, K", "**topk**", "a sum over x", "torch.topk"], lines)
    members = load("topk_member")
    lines = []
    for g in grouped(members).values():
        lines.append([
            shape(g), f"**{ms(g['fastsae, active'])}**", slower(g["topk_encode"]),
            slower(g["fastsae, no screen, active"]), slower(g["read once (sum)"]),
            ms(g["fastsae, inactive"]),
        ])  # fmt: skip
    text += (
        "\n\nWhether one latent is among the K of each token: one that is, and in the last column "
        f"one that is not. {where(members)}\n\n"
    )
    heads = ["topk_encode", "without a screen", "a sum over W_enc", "not active"]
    return text + table(["N, D, F, K", "**topk_member, active**", *heads], lines)


def backward() -> str:
    parts = {
        name: grouped(load(name))
        for name in (
            "sparse_decode",
            "sparse_grad_values",
            "sparse_grad_weight",
            "sparse_adam_step",
        )
    }
    keys = sorted({k for groups in parts.values() for k in groups})
    if not keys:
        return ""
    columns = [
        "N, D, F, K", "product, default", "decode", "embedding_bag", "value gradients",
        "gather + bmm", "weight gradient", "row-sparse", "index_add", "dense product, oneDNN",
        "Adam step, unit norm", "torch Adam alone, fused", "**whole backward with Adam**",
    ]  # fmt: skip
    lines = []
    for key in keys:
        dec, gv, gw, adam = (parts[n].get(key, {}) for n in parts)
        some = dec or gv or gw or adam
        lines.append([
            shape(some), ms(adam.get(DEFAULT) or some.get(DEFAULT)),
            ms(dec.get("fastsae")), slower(dec.get("torch embedding_bag")),
            ms(gv.get("fastsae")), slower(gv.get("torch gather + bmm")),
            ms(gw.get("fastsae")), ms(gw.get("fastsae, row-sparse result")),
            slower(gw.get("torch index_add")), slower(gw.get("dense product, oneDNN")),
            ms(adam.get("fastsae, unit norm")), ms(adam.get("torch Adam only, fused")),
            f"**{ms(adam.get('fastsae, whole backward with Adam'), 'of_default') or '–'}**",
        ])  # fmt: skip
    rows = [r for name in parts for r in load(name)]
    return (
        where(rows) + " Milliseconds; in brackets how many times fastsae's time it takes, and for "
        "the whole backward the ratio to the default product. The whole backward is the value "
        "gradients, then one Adam step each on W_dec (unit norm, parallel gradient removed) and "
        "W_enc, gradients formed inside; torch's Adam alone is one weight with its gradient given."
        "\n\n" + table(columns, lines)
    )


def step() -> str:
    rows = load("training_step")
    if not rows:
        return ""
    others = [
        "dense PyTorch, default", "dense PyTorch, oneDNN", "dense PyTorch, fused Adam, oneDNN",
        "dense PyTorch, compiled, oneDNN", "sparsify, oneDNN", "sparsify, Adam, oneDNN",
        "SAELens, oneDNN", "SAELens, sparse activations, oneDNN", "dictionary_learning, oneDNN",
    ]  # fmt: skip
    heads = [c.removesuffix(", oneDNN") if "dense" not in c else c for c in others]
    lines = []
    for g in grouped(rows).values():
        lines.append([
            shape(g), ms(g.get(DEFAULT)), ms(g.get(ONEDNN)),
            f"**{ms(g.get('fastsae'), 'of_onednn')}**", *(slower(g.get(c)) for c in others),
        ])  # fmt: skip
    return (
        where(rows) + " Milliseconds a step; fastsae's with the ratio to the oneDNN product, the "
        "others with how many times fastsae's time they take in the same run. The libraries run "
        "their own trainers' steps at their defaults, with torch's products through oneDNN (the "
        "faster library here).\n\n"
        + table(["N, D, F, K", "product, default", "product, oneDNN", "**fastsae**", *heads], lines)
    )


def memory() -> str:
    rows = load("memory")
    encode_rows = [r for r in rows if r["op"] == "encode memory"]
    if not rows:
        return ""
    text = where(rows) + "\n\n"
    if encode_rows:
        systems = list(dict.fromkeys(r["contender"] for r in encode_rows))
        lines = []
        for g in grouped(encode_rows).values():
            r = next(iter(g.values()))
            lines.append(
                [f"{r['F']:,}", f"{r['N'] * r['F'] * 4 / 2**20:,.0f}"]
                + [
                    f"{g[s]['extra_mb']:,.0f}" if "extra_mb" in g.get(s, {})
                    else g.get(s, {}).get("failed", "")
                    for s in systems
                ]
            )  # fmt: skip
        r = encode_rows[0]
        text += (
            f"Memory of one encode beyond its inputs, MB (N={r['N']}, D={r['D']}, K={r['K']}); "
            "fastsae's figure includes the outputs and its packed bf16 tiles.\n\n"
        )
        text += table(["F", "[N, F] fp32 once", *systems], lines)
    for r in rows:
        if r["op"] == "step memory" and "peak_mb" in r:
            text += (
                f"\n\nA whole training step with F = {r['F']:,}, D = {r['D']}, N = {r['N']}, "
                f"K = {r['K']}: {r['peak_mb'] / 1024:.1f} GB of resident memory in all (weights "
                f"and Adam's moments are {6 * 4 * r['F'] * r['D'] / 2**30:.1f} GB of it), "
                f"{r['ms'] / 1e3:.2f} s a step. Dense activations alone would be "
                f"{r['N'] * r['F'] * 4 / 2**30:.1f} GB a copy."
            )
    return text


def quality() -> str:
    rows = load("quality_minilm")
    if not rows:
        return ""
    groups: dict[tuple[bool, int, str], list[Row]] = {}
    for r in rows:
        name = "dense PyTorch, torch.optim.Adam" if r["method"] == "plain" else "**fastsae**"
        moments, dtype = r["config"].get("moments", "fp32"), r.get("dtype", "float32")
        name += ", bf16 weights with fp32 masters" * (dtype == "bfloat16")
        name += "" if moments == "fp32" else f", {moments.replace('8bit', '8-bit')} moments"
        groups.setdefault((r["text"] == "code", r["F"], name), []).append(r)
    lines = []
    for (code, f, name), runs in sorted(groups.items()):
        fvus = [r["fvu"] for r in runs]
        lines.append([
            "code" if code else "prose", f"{f}", name, f"{len(runs)}",
            f"{sum(fvus) / len(fvus):.4f}",
            f"{min(fvus):.4f}–{max(fvus):.4f}" if len(runs) > 1 else "",
            f"{sum(r['dead_fraction'] for r in runs) / len(runs):.2%}",
            f"{sum(r['initial_fvu'] for r in runs) / len(runs):.2f}",
        ])  # fmt: skip
    dense = (
        " The dense rows train the same SAE by the same schedule with dense products, autograd and "
        "torch's Adam: they say what a text allows."
    )
    return (
        "MiniLM layer-3 activations (D = 384) of two texts, Python's standard library as it is "
        "(code) and the docstrings of it, numpy and torch (prose): 400,000 training tokens, 40,000 "
        "of other files held out; K = 32, 1500 steps of 2048 tokens. Figures on other text are not "
        "comparable."
        + (dense if any(r["method"] == "plain" for r in rows) else "")
        + "\n\n"
        + table(
            [
                "text",
                "F",
                "trained by",
                "seeds",
                "held-out FVU",
                "range",
                "dead",
                "before training",
            ],
            lines,
        )
    )


def steer() -> str:
    """One latent through the op, a hook and SAELens; then generation, steered against unsteered."""

    def beside(group: dict[str, Row], kind: str) -> str:
        row, own = group.get(f"SAELens, error term, {kind}"), group.get(f"fastsae, hook, {kind}")
        if row is None or own is None or "ms" not in row or "ms" not in own:
            return ms(row)
        return f"{row['ms']:,.0f} ({row['of_own'] / own['of_own']:,.1f}×)"

    rows = load("steer")
    steps = [r for r in load("generate") if r["op"] == "generate step"]
    if not rows:
        return ""
    lines = [
        [
            shape(g), ms(g.get("fastsae")), f"**{ms(g.get('fastsae, hook, JumpReLU'))}**",
            beside(g, "JumpReLU"), f"**{ms(g.get('fastsae, hook, TopK'))}**", beside(g, "TopK"),
        ]
        for g in reversed(grouped(rows).values())
    ]  # fmt: skip
    text = (
        where(rows) + " Microseconds to clamp one latent, SAELens's error-term path with how many "
        "times the hook's time it takes. The hook is timed as a whole call of a model that is "
        "nothing but the site. TopK is with exact membership, the latent active in one token.\n\n"
    )
    heads = ["op", "**hook, JumpReLU**", "SAELens, JumpReLU", "**hook, TopK**", "SAELens, TopK"]
    text += table(["tokens, D, F, K", *heads], lines)
    if steps:
        names = [f"{n}, {k}" for k in ("JumpReLU", "TopK") for n in ("one clamp", "four clamps")]
        lines = []
        for g in reversed(grouped(steps).values()):
            plain = g["unsteered"]
            cells = [
                f"{g[n]['of_own'] - 1:+.1%} ({g[n]['low']:+.1%} to {g[n]['high']:+.1%})"
                for n in ("unsteered again", *names)
            ]
            lines.append([f"{plain['N']}", f"{plain['ms']:.2f}", *cells])
        text += (
            "\n\nA step of generation with the embedded model (D = 256, a random SAE of "
            f"{steps[0]['F']} latents): what a hook adds to it, and the 95% interval of that "
            "median. The model without a hook is timed twice, which shows what chance leaves.\n\n"
        )
        text += table(["batch", "a step, ms", "unsteered again", *names], lines)
    return text


TABLES: dict[str, Callable[[], str]] = {
    "picture": picture,
    "headline": headline,
    "encode": encode,
    "selection": selection,
    "backward": backward,
    "step": step,
    "memory": memory,
    "steer": steer,
    "quality": quality,
}


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--check", action="store_true", help="exit 1 if something is not up to date")
    args = p.parse_args()
    stale, missing = [], set(TABLES)
    for page in PAGES:
        text = before = page.read_text()
        for name, make in TABLES.items():
            pattern = re.compile(rf"(<!-- table:{name} -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
            if pattern.search(text):
                missing.discard(name)
                body = make()
                if not body:  # nothing was measured yet
                    continue
                text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[3]}", text)
        if text != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(text)
    data = _picture.figures(load("training_step"), load("memory"))
    if not _picture.is_drawn(PICTURE, data):
        stale.append(PICTURE.name)
        if not args.check:
            _picture.draw(PICTURE, data)
    if missing:
        print(f"no page has markers for: {', '.join(sorted(missing))}", file=sys.stderr)
    if stale:
        print(("not up to date: " if args.check else "written: ") + ", ".join(stale))
    return int(bool(missing) or (args.check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
