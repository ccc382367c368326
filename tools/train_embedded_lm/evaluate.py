"""Held-out loss of a model directory: the stored fp16 weights, products in bf16 on a CPU."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from corpus import encode, held_out_windows
from model import GPT2
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm


def _batches(
    documents: Sequence[np.ndarray], context: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [n, length] and which targets to score [n, length - 1]; equal lengths together."""
    windows = [w for d in documents for w in held_out_windows(d, context, context)]
    windows.sort(key=lambda w: -len(w[0]))
    while windows:
        length = len(windows[0][0])
        taken = [w for w in windows[:size] if len(w[0]) == length]
        windows = windows[len(taken) :]
        first = torch.tensor([[f] for _, f in taken])
        yield (
            torch.from_numpy(np.stack([w for w, _ in taken])),
            torch.arange(length - 1)[None] >= first,
        )


def _load(folder: Path) -> tuple[GPT2, int]:
    config = json.loads((folder / "config.json").read_text())
    model = GPT2(
        config["vocab_size"],
        config["n_positions"],
        config["n_layer"],
        config["n_embd"],
        config["n_head"],
    )
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("transformer."): v for k, v in stored.items()})
    return model, config["n_positions"]


@torch.no_grad()
def held_out(folder: Path, texts: Sequence[str]) -> dict[str, float]:
    """Every token of `texts` scored once, in windows of the context that do not overlap.

    The first token of a window has only its position to go by, so this is an upper bound of
    what the model reaches with a sliding window. Bits a byte count the text's UTF-8 bytes.
    transformers' class in fp32 takes six times as long; `compare` measures what bf16 changes.
    """
    model, context = _load(folder)
    ids = encode(Tokenizer.from_file(str(folder / "tokenizer.json")), texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    nats, count = 0.0, 0
    for tokens, scored in tqdm(list(_batches(ids, context, 16)), desc="held-out", mininterval=10):
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(tokens[:, :-1], tokens[:, 1:])
        nats += losses.view_as(scored)[scored].double().sum().item()
        count += int(scored.sum())
    return {
        "bits_per_byte": round(nats / math.log(2) / n_bytes, 4),
        "nats_per_token": round(nats / count, 4),
        "tokens": count,
        "bytes": n_bytes,
    }


@torch.no_grad()
def compare(folder: Path, text: str) -> tuple[float, float]:
    """Nats a token on the beginning of `text`: as `held_out` computes, and transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model, context = _load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = encode(Tokenizer.from_file(str(folder / "tokenizer.json")), [text])[0]
    count = min(8, (len(ids) - 1) // context)
    inputs = torch.from_numpy(ids[: count * context]).view(count, context)
    targets = torch.from_numpy(ids[1 : count * context + 1]).view(count, context)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(inputs, targets).mean().item()
    logits = reference(input_ids=inputs).logits
    return ours, F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
