"""From token ids to text that is sent as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TAIL = 8  # tokens decoded again with each new one: the bytes of a character span fewer


class TextStream:
    """Text of one sequence, in pieces that are never taken back.

    Held back: bytes of an unfinished character, and the beginning of what may become a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._read = 0  # tokens whose text is in `_text`
        self._text = ""
        self._sent = 0
        self.stopped = False

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def push(self, token: int) -> str:
        """The text that this token completes; after a stop string nothing."""
        self._ids.append(token)
        self._grow(final=False)
        return self._ready(final=False)

    def end(self) -> str:
        """What was held back."""
        self._grow(final=True)
        return self._ready(final=True)

    def _grow(self, final: bool) -> None:
        if self.stopped:
            return
        first = max(0, self._read - _TAIL)
        known = self._decode(self._ids[first : self._read])
        text = self._decode(self._ids[first:])
        if len(text) > len(known) and (final or not text.endswith("\ufffd")):
            self._text += text[len(known) :]
            self._read = len(self._ids)

    def _ready(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [
            at for at in (self._text.find(s, self._searched()) for s in self._stops) if at >= 0
        ]
        if found:
            self.stopped = True
            upto = min(found)
        elif final or not self._stops:
            upto = len(self._text)
        else:
            upto = max(self._sent, len(self._text) - max(len(s) for s in self._stops) + 1)
        piece = self._text[self._sent : upto]
        self._sent = max(self._sent, upto)
        return piece

    def _searched(self) -> int:
        """A stop string cannot begin in what was sent."""
        return self._sent
