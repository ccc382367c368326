"""From token ids to text that is sent as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lm.tokens import Growing


class TextStream:
    """Text of one completion, in pieces that are never taken back.

    Prompt and completion, side by side, are the decoding of all tokens: the completion is what
    decoding adds to the end of the prompt, whose tokens a decoder may need (sentencepiece drops the
    space that a text begins with).

    Held back: bytes of an unfinished character, and the beginning of what may become a stop string.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        def decode(ids: list[int]) -> str:
            text: str = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return text

        self._growing, self._stops = Growing(decode, prompt), tuple(stops)
        self._text = ""
        self._sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; after a stop string nothing."""
        if not self.stopped:
            self._text += self._growing.push(token)
        return self._ready(final=False)

    def end(self) -> str:
        """What was held back."""
        if not self.stopped:
            self._text += self._growing.end()
        return self._ready(final=True)

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
