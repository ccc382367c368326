"""Tokens to text and back, with a byte-level vocabulary and one that decodes as sentencepiece."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastsae.lm.harvest import windows_of
from fastsae.lm.load import EMBEDDED_MODEL
from fastsae.lm.tokens import TokenText, encoded
from fastsae.serve.text import TextStream
from fastsae.steer.vectors import prompt_activations  # noqa: F401  (reads by the same `encoded`)

TEXT = "naïve 👩‍👩‍👧 é, two  spaces and\nself.x"


def byte_level():
    if not EMBEDDED_MODEL.exists():
        pytest.skip("the embedded model is not here")
    return AutoTokenizer.from_pretrained(str(EMBEDDED_MODEL))


def sentencepiece():
    """As Llama 2's: a space becomes part of the word after it, bytes where there is no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,\n", "▁a", "▁s", "el", "lf"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "s"), ("e", "l"), ("l", "f")]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=lambda f: f.__name__)


@TOKENIZERS
def test_pieces_side_by_side_are_the_text(make):
    tokenizer = make()
    text = TokenText(tokenizer)
    ids = encoded(tokenizer, TEXT, bos=False)
    pieces = text.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text.text(ids)
    assert "�" not in "".join(pieces) and TEXT in " " + "".join(pieces)
    assert "" in pieces  # bytes of the emoji are tokens of their own
    # cut in the middle of a character: the rest is given up, and nothing else
    broken = ids[: next(i for i, p in enumerate(pieces) if p == "") + 1]
    assert "".join(text.pieces(broken)) == text.text(broken)


@TOKENIZERS
def test_a_single_token_of_half_a_character_shows_its_bytes(make):
    tokenizer = make()
    text = TokenText(tokenizer)
    ids = encoded(tokenizer, "👩", bos=False)
    shown = [text[t] for t in ids if "\\x" in text[t]]
    assert shown and not any("�" in text[t] for t in ids)
    joined = "".join(shown).encode().decode("unicode_escape").encode("latin-1")
    assert joined in "👩".encode()


@TOKENIZERS
@pytest.mark.parametrize("cut", range(1, 14))
def test_prompt_and_completion_are_the_decoding_of_all(make, cut):
    tokenizer = make()
    for whole in (TEXT, "a self a", "  a"):
        ids = encoded(tokenizer, whole)
        prompt, completion = ids[:cut], ids[cut:]

        def decode(some):
            return tokenizer.decode(
                some, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )

        stream = TextStream(tokenizer, prompt=prompt)
        got = "".join([*map(stream.push, completion), stream.end()])
        before = decode(prompt)
        if before.endswith("�"):  # the completion finishes the character
            assert before.rstrip("�") + got == decode(ids)
        else:
            assert before + got == decode(ids)


@TOKENIZERS
def test_the_bos_stands_once(make):
    tokenizer = make()
    first = tokenizer.bos_token_id
    ids = encoded(tokenizer, "a self")
    assert ids[0] == first and ids.count(first) == 1
    again = tokenizer.decode(ids, skip_special_tokens=False)  # a generation that is sent back
    assert again.startswith(tokenizer.bos_token)
    assert encoded(tokenizer, again).count(first) == 1
    assert encoded(tokenizer, "a self", bos=False) == ids[1:]
    assert encoded(tokenizer, "") == []
    windows = windows_of([("d", again + " a self" * 9)], tokenizer, 5)
    assert (windows.tokens[:, 0] == first).all() and not (windows.tokens[:, 1:] == first).any()
    bare = windows_of([("d", " a self" * 9)], tokenizer, 5, bos=False)
    assert bare.tokens.shape[1] == 5 and not (bare.tokens == first).any()


def test_a_tokenizer_without_a_bos_gets_none():
    tokenizer = sentencepiece()
    tokenizer.bos_token = None
    ids = encoded(tokenizer, "a self")
    assert ids == encoded(tokenizer, "a self", bos=False)
    windows = windows_of([("d", "a self" * 9)], tokenizer, 4)
    assert windows.tokens.flatten()[:8].tolist() == encoded(tokenizer, "a self" * 9)[:8]
    assert windows.tokens.dtype == torch.long
