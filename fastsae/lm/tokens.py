"""Tokens as a reader sees them."""

from __future__ import annotations

from typing import Any


class TokenText:
    """The text of single tokens, exactly as they stand in running text.

    `tokenizer.decode([i])` alone drops the leading space of many vocabularies; decoding after
    another token does not.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._prefix = self._decode(self._anchor)
        self._cache: dict[int, str] = {}

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def __getitem__(self, token: int) -> str:
        if token not in self._cache:
            text = self._decode([*self._anchor, token])
            self._cache[token] = text[len(self._prefix) :]
        return self._cache[token]

    def text(self, tokens: list[int]) -> str:
        """A run of tokens, decoded together (bytes of one character meet)."""
        return self._decode([*self._anchor, *tokens])[len(self._prefix) :]


def is_word(text: str) -> bool:
    """Three letters or a digit: enough for a reader to see what it is."""
    return sum(c.isalpha() for c in text) >= 3 or any(c.isdigit() for c in text)
