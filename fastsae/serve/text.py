"""From token ids to text that is sent as it grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..lm.tokens import Growing, TokenText, head
from .engine import Score

_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character


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
        self.sent = 0  # characters
        self.stopped = False

    def __len__(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self._text)

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
            upto = max(self.sent, len(self._text) - max(len(s) for s in self._stops) + 1)
        piece = self._text[self.sent : upto]
        self.sent = max(self.sent, upto)
        return piece

    def _searched(self) -> int:
        """A stop string cannot begin in what was sent."""
        return self.sent


@dataclass(frozen=True)
class Placed:
    """A prompt's text, its tokens, and the characters that they begin at."""

    text: str
    ids: list[int]
    starts: list[int]


class ScoreText:
    """Scores of tokens as the OpenAI API writes them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._token = tokenizer, TokenText(tokenizer)
        self._spellings: dict[int, tuple[str, bytes | None, bool]] = {}

    def place(self, prompt: str | list[int], ids: list[int]) -> Placed:
        """A prompt that was read as these tokens. A BOS that was added is none of its text; bytes
        of a character that tokens break off belong to the completion (`TextStream`)."""

        def decode(some: list[int]) -> str:
            text: str = self._tokenizer.decode(some, clean_up_tokenization_spaces=False)
            return text

        bos = head(self._tokenizer)
        added = isinstance(prompt, str) and ids[:1] == bos and not prompt.startswith(decode(bos))
        growing, starts, text = Growing(decode), [0] if added else [], ""
        for token in ids[len(starts) :]:
            starts.append(len(text))
            text += growing.push(token)
        text = prompt if isinstance(prompt, str) else text
        return Placed(text, ids, [min(start, len(text)) for start in starts])

    def completion(
        self, placed: Placed, prompt: list[Score] | None, scores: Sequence[tuple[Score, int]]
    ) -> dict[str, list[Any]]:
        """Of the prompt where it was scored, and of tokens that begin at characters after it."""
        found: list[tuple[int, Score | None, int]] = []
        if prompt is not None:
            found = list(zip(placed.ids, [None, *prompt], placed.starts, strict=True))
        found += [(score.token, score, len(placed.text) + start) for score, start in scores]
        return {
            "tokens": [self._named(token) for token, _, _ in found],
            "token_logprobs": [score and score.logprob for _, score, _ in found],
            "top_logprobs": [score and self._top(score) for _, score, _ in found],
            "text_offset": [start for _, _, start in found],
        }

    def chat(self, scores: Sequence[tuple[Score, int]]) -> dict[str, Any]:
        """Of a message's tokens."""
        content = [
            {
                **self._entry(score.token, score.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in score.top],
            }
            for score, _ in scores
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token's text and the bytes of it; no bytes where the vocabulary does not say which."""
        text, raw, _ = self._spelt(token)
        return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}

    def _top(self, score: Score) -> dict[str, float]:
        """The token itself, then the likeliest ones; the second of one text is called by its id."""
        named = {self._named(score.token): score.logprob}
        for token, logprob in score.top:
            if token != score.token:
                name = self._named(token)
                named[f"token_id:{token}" if name in named else name] = logprob
        return named

    def _named(self, token: int) -> str:
        text, _, whole = self._spelt(token)
        return text if whole else f"bytes:{text}"

    def _spelt(self, token: int) -> tuple[str, bytes | None, bool]:
        """Its text, its bytes where they are known, and whether they are whole characters: those
        that are none stand in the text as `\\xf0`."""
        if token not in self._spellings:
            text = self._token.text([token])
            raw: bytes | None = text.encode()
            whole = _UNFINISHED not in text
            if not whole:
                text = self._token[token]
                raw = None if _UNFINISHED in text else _unescaped(text)
            self._spellings[token] = text, raw, whole
        return self._spellings[token]


def _unescaped(text: str) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), text.encode())
