"""Tokens as labels: which of them say something alone, and how they are written."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from ..lm.tokens import TokenText, encoded

WORD, PIECE = 0, 1  # what a label takes: whole words and signs; pieces of words where it has none
_UNFINISHED = re.compile(r"\\x[0-9a-f]{2}|\ufffd")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")  # signs around a word
_MARKS = re.compile("^[ĠĊĉ]+")  # what byte-level vocabularies write for the space before it


def shown(text: str) -> str:
    """On one line: a line break is ⏎, a tab ⇥, other space a space; control characters go."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else " " for c in text if c.isprintable() or c.isspace())


class Words:
    """The tokens of a vocabulary by what they say alone, found as they are asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encoding = threading.Lock()  # a call may set the tokenizer's options
        self._text = TokenText(tokenizer)
        self._size = len(tokenizer)
        self._special = set(tokenizer.all_special_tokens)
        self._kinds: dict[str, int | None] = {}

    def __getitem__(self, token: int) -> str:
        """As it stands in running text; "" for a row of the readout that is no token."""
        return self._text[token] if token < self._size else ""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """As `encoded`, from any thread."""
        with self._encoding:
            return encoded(self._tokenizer, text, bos=bos)

    def pieces(self, tokens: list[int]) -> list[str]:
        return self._text.pieces(tokens)

    def kind(self, text: str) -> int | None:
        """WORD, PIECE, or None for what nobody can read: bytes, special tokens, blanks."""
        if text not in self._kinds:
            self._kinds[text] = self._kind_of(text)
        return self._kinds[text]

    def _kind_of(self, text: str) -> int | None:
        if text in self._special or _UNFINISHED.search(text) or not shown(text).strip():
            return None
        if not all(c.isprintable() or c.isspace() for c in text):
            return None
        core = _EDGES.sub("", text)
        if core.lower() == core.upper():
            return WORD  # a sign, a line break, a number, a script without cases
        if len(core) < (2 if text[0] == " " else 3):
            return PIECE
        # what is also a token behind a space begins a word, and does not end one
        return WORD if text[0] == " " or len(self.encode(" " + core, bos=False)) == 1 else PIECE

    def label(self, texts: Iterable[str], count: int) -> list[str]:
        """The first `count` different ones; pieces of words only where there is nothing whole."""
        found: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for text in texts:
            kind = self.kind(text)
            if kind is not None:
                line = re.sub("⏎ +", "⏎", shown(text))
                found[kind].setdefault(line.strip(), line)
        return list((found[WORD] or found[PIECE]).values())[:count]

    def looked_for(self, word: str, most: int = 16) -> list[int]:
        """Tokens of a word that somebody types: those that are it, in any case; else those that
        begin with it; else what its text begins with."""
        core = _EDGES.sub("", word).casefold()
        begun = (self.encode(text, bos=False)[:1] for text in (word, " " + word))
        for tokens in (
            self._cores.get(core, []) if core else [],
            [t for c, ids in self._cores.items() if c.startswith(core) for t in ids]
            if len(core) > 2
            else [],
            [token for ids in begun for token in ids],
        ):
            readable = [t for t in sorted(set(tokens)) if self.kind(self[t]) is not None]
            if readable:
                return readable[:most]
        return []

    @cached_property
    def _cores(self) -> dict[str, list[int]]:
        """The vocabulary by its words, without signs and cases."""
        cores: dict[str, list[int]] = {}
        for raw, token in self._tokenizer.get_vocab().items():
            cores.setdefault(_EDGES.sub("", _MARKS.sub("", raw)).casefold(), []).append(token)
        return cores
