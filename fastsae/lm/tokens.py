"""From text to tokens, and tokens as a reader sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character
_LONGEST = 8  # tokens: the bytes of a character span fewer
_CONTEXT = 4  # pieces that the next one is decoded behind


def encoded(tokenizer: Any, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a text as the model reads it, everywhere in fastsae. No text: none.

    The tokenizer's BOS stands in front, once: it is not added when the text begins with it already
    (what a chat template rendered, or a decoded generation). A tokenizer without a BOS gets no
    substitute. GPT-2 and Pythia have one (their end of text) and are given it, although their
    tokenizers do not by themselves: the first token is an attention sink whatever it is, and
    harvested windows begin with it too.

    Args:
        bos: False: the text's own tokens only.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*head(tokenizer), *ids] if bos and ids and ids[:1] != head(tokenizer) else ids


def head(tokenizer: Any) -> list[int]:
    """The BOS, when the tokenizer has one."""
    first = tokenizer.bos_token_id
    return [] if first is None else [first]


class TokenText:
    """The text of tokens, exactly as they stand in running text.

    `tokenizer.decode([i])` alone drops the leading space of many vocabularies; decoding after
    another token does not.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._prefix = self._decode(self._anchor)
        self._cache: dict[int, str] = {}

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def __getitem__(self, token: int) -> str:
        """The text of a single token; bytes that are no whole character as `\\xf0`."""
        if token not in self._cache:
            text = self.text([token])
            if _UNFINISHED in text:
                text = self._in_bytes(token) or text
            self._cache[token] = text
        return self._cache[token]

    def _in_bytes(self, token: int) -> str | None:
        """Of a byte-level vocabulary, and of the bytes `<0xF0>` of the others."""
        raw = self._tokenizer.convert_ids_to_tokens([token])[0]
        if raw.startswith("<0x") and len(raw) == 6:
            return f"\\x{raw[3:5].lower()}"
        if not all(c in _BYTES for c in raw):
            return None
        return bytes(_BYTES[c] for c in raw).decode("utf-8", "backslashreplace")

    def text(self, tokens: Sequence[int]) -> str:
        """A run of tokens, decoded together (bytes of one character meet)."""
        return self._decode([*self._anchor, *tokens])[len(self._prefix) :]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """A string for every token of a run; side by side they read as its text.

        A character whose bytes are spread over several tokens belongs to the one that completes
        it; those before it get "".
        """
        growing = Growing(self.text)
        found = [growing.push(token) for token in tokens]
        if found:
            found[-1] += growing.end()
        return found


class Growing:
    """The text of a growing run of tokens, in pieces that are never taken back.

    A piece ends where a character does, or after eight tokens that are none. Each is decoded
    behind some that came before it: a decoder may drop the space that a text begins with, or
    refuse bytes that begin inside a character.

    Args:
        decode: of a list of tokens.
        before: tokens whose text is there already.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids, read = _whole(decode, list(before[-2 * _LONGEST :]))
        self._ends = [0, read] if read else [0]  # where pieces ended

    def push(self, token: int) -> str:
        """What this token completes."""
        self._ids.append(token)
        return self._piece(final=len(self._ids) - self._ends[-1] >= _LONGEST)

    def end(self) -> str:
        """The bytes that were held back."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        read = self._ends[-1]
        first = self._ends[max(0, len(self._ends) - 1 - _CONTEXT)]
        text = self._decode(self._ids[first:])
        if text.endswith(_UNFINISHED) and not final:
            return ""
        piece = text[len(self._decode(self._ids[first:read])) :] if first < read else text
        if piece:
            self._ends.append(len(self._ids))
        return piece


def _whole(decode: Callable[[list[int]], str], tokens: list[int]) -> tuple[list[int], int]:
    """The tokens from where a character begins, and how many of them are whole characters."""
    for read in range(len(tokens), max(-1, len(tokens) - _LONGEST), -1):
        for first in range(read):
            if _UNFINISHED not in decode(tokens[first:read]):
                return tokens[first:], read - first
    return tokens, len(tokens)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019): the
    byte's own where that is printable, the others from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()


def is_word(text: str) -> bool:
    """Three letters or a digit: enough for a reader to see what it is."""
    return sum(c.isalpha() for c in text) >= 3 or any(c.isdigit() for c in text)
