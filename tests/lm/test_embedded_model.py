"""The shipped language model: loads offline, is small, knows its text, keeps every byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastsae
from fastsae.lm.text import stdlib_documents

transformers = pytest.importorskip("transformers")

FOLDER = Path(fastsae.__file__).parent / "assets" / "tiny_python_lm"
REPORT = json.loads((FOLDER / "training_report.json").read_text())
# Held-out modules that every Python has; the rest of the split is in the report.
SLICE = ("json/decoder.py", "json/encoder.py", "sched.py")
SLICE_BITS_PER_BYTE = 1.40  # 1.27 on the files of 3.11


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


def test_at_most_ten_megabytes():
    files = {f.name: f.stat().st_size for f in FOLDER.iterdir()}
    assert sum(files.values()) <= 10_000_000, files
    assert {"README.md", "config.json", "generation_config.json"} <= set(files)


def test_is_gpt2_and_computes_in_fp32(model):
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float32
    assert model.config.n_positions == 256
    assert model.lm_head.weight is model.transformer.wte.weight


def test_report_and_card_agree():
    loss = REPORT["held_out"]["all"]
    assert loss["bits_per_byte"] < 1.45
    bits = loss["nats_per_token"] * loss["tokens"] / math.log(2) / loss["bytes"]
    assert bits == pytest.approx(loss["bits_per_byte"], abs=1e-3)
    card = (FOLDER / "README.md").read_text()
    assert f"**{loss['bits_per_byte']:.3f} bits per byte**" in card
    assert "PSF" in card


@torch.inference_mode()
def test_held_out_loss_on_modules_of_every_python(model, tokenizer):
    texts = dict(stdlib_documents("heldout", include_tests=False))
    nats, n_bytes = 0.0, 0
    for name in SLICE:
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(texts[name])["input_ids"]]])
        for at in range(0, tokens.shape[1] - 1, 256):
            window = tokens[:, at : at + 257]
            logits = model(window[:, :-1]).logits[0]
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        n_bytes += len(texts[name].encode())
    assert nats / math.log(2) / n_bytes < SLICE_BITS_PER_BYTE


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn 'ü ☃ 🐍'  \r\n\n\n    # end\n",
        "".join(map(chr, range(32))) + "\x7f\x80\xff\ufeff\u2028",
        "   leading and trailing   \n \n",
        "<|endoftext|>class A:",
        "1234567890" * 3 + "__init__._x..y" + "'" * 7,
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_round_trips_every_byte(tokenizer):
    alphabet = tokenizer.backend_tokenizer.get_vocab()
    assert len(alphabet) == 4096
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer(every_byte)["input_ids"]) == every_byte


def test_documents_begin_with_end_of_text(tokenizer):
    assert tokenizer("<|endoftext|>import os")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("import os")["input_ids"][0] != tokenizer.bos_token_id


def test_generates(model, tokenizer):
    torch.manual_seed(0)
    tokens = tokenizer("<|endoftext|>import os\n", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(tokens, max_new_tokens=40)[0, tokens.shape[1] :])
    assert len(text.split()) > 5
