"""Pieces of text around a place where a latent fires, and the words that stand there."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..lm.harvest import Windows
from ..lm.tokens import TokenText

_UNIT = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # a word, or what stands between words
_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character
_LONGEST = 24  # characters of a word that is taken whole
LINE_END, SPACE = "\n", " "


@dataclass(frozen=True)
class Example:
    """A piece of text around a place where a latent fires.

    Attributes:
        document: where it is from.
        pieces: the text, cut into the tokens where the latent fires and the stretches between
            them. White space is one space or one line end, and lines are neither empty nor
            indented; where the latent fires on a line end that is left out, the piece is `↵`.
        activations: the latent's activation on each piece, 0 on a stretch.
        peak: which of the pieces is the place.
    """

    document: str
    pieces: list[str]
    activations: list[float]
    peak: int


class Around(NamedTuple):
    """The word or mark that a token belongs to, and its neighbours; "" where there are none.

    A token of white space is `LINE_END` or `SPACE`.
    """

    unit: str
    before: str
    after: str


@dataclass(frozen=True)
class _Text:
    """A window's text, tidy: without indentation, empty lines and runs of spaces.

    Attributes:
        text: without the positions that are left out.
        starts: where each token begins, and the end.
        units: (begin, end) of its words and marks.
        raw: the tokens as they were.
    """

    text: str
    starts: list[int]
    units: list[tuple[int, int]]
    raw: list[str]

    def unit(self, number: int) -> str:
        """A word or mark; "" beyond the first and the last."""
        if not 0 <= number < len(self.units):
            return ""
        low, high = self.units[number]
        return self.text[low:high]


class Reader:
    """Reads windows at places, numbers of tokens as in `lm.harvest.Store`.

    Every window that is asked for is decoded once.
    """

    def __init__(self, windows: Windows, text: TokenText) -> None:
        self.windows = windows
        self._tokens: list[list[int]] = windows.kept.tolist()
        self._length = windows.kept.shape[1]
        self._token_text = text
        self._whole: dict[int, str | None] = {}  # text of tokens that are whole characters
        self._tidy: dict[str, str] = {}
        self._texts: dict[int, _Text] = {}

    def document(self, place: int) -> str:
        """The document that a place is in."""
        return self.windows.documents[place // self._length]

    def wording(self, place: int) -> tuple[int, ...]:
        """The token at a place and the four before it."""
        window, position = divmod(place, self._length)
        return tuple(self._tokens[window][max(0, position - 4) : position + 1])

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """As `TokenText.pieces`, token by token where every token is whole characters."""
        for token in {*tokens} - self._whole.keys():
            alone = self._token_text[token]
            if "\\x" in alone:  # perhaps a byte that is no character
                alone = self._token_text.text([token])
            self._whole[token] = None if _UNFINISHED in alone else alone
        pieces = [self._whole[token] for token in tokens]
        if None in pieces:
            return self._token_text.pieces(tokens)
        return pieces  # type: ignore[return-value]

    def _text(self, window: int) -> _Text:
        if window in self._texts:
            return self._texts[window]
        raw = self._pieces(self._tokens[window])
        pieces, starts, last = [], [0], "\n"
        for token in raw:
            piece = self._tidy.get(token)
            if piece is None:
                lines = re.sub(r"\s*\n\s*", "\n", token)
                piece = self._tidy[token] = re.sub(r"[^\S\n]+", " ", lines)
            if last == "\n":
                piece = piece.lstrip()
            elif last == " ":
                piece = piece.lstrip(" ")
            pieces.append(piece)
            starts.append(starts[-1] + len(piece))
            last = piece[-1:] or last
        text = "".join(pieces)
        units = [found.span() for found in _UNIT.finditer(text)]
        self._texts[window] = _Text(text, starts, units, raw)
        return self._texts[window]

    def around(self, place: int) -> Around:
        """The word at a place: the whole word, where the token is a piece of one; the token alone
        where that would be long, as in a script without spaces."""
        window, position = divmod(place, self._length)
        here = self._text(window)
        low, high = here.starts[position : position + 2]
        token, raw = here.text[low:high], here.raw[position]
        core = _core(token)
        at = bisect_right(here.units, (low + (core or 0), len(here.text))) - 1
        if at >= 0 and (core is not None or not raw):  # no text: the first bytes of a character
            unit, before, after = here.unit(at), here.unit(at - 1), here.unit(at + 1)
        else:
            unit = LINE_END if "\n" in raw else SPACE
            before, after = here.unit(at), here.unit(at + 1)
        return Around(unit if len(unit) <= _LONGEST else token.strip(), before, after)

    def example(
        self,
        place: int,
        fires_at: Sequence[int],
        activations: Sequence[float],
        *,
        before: int = 64,
        after: int = 44,
    ) -> Example:
        """The text around a place, from the beginning of a word or line to the end of a word.

        Args:
            fires_at, activations: the places around where the latent fires, in order, this one
                among them, and how strongly.
            before, after: characters around the token; fewer, to begin and end with a word.
        """
        window, position = divmod(place, self._length)
        here = self._text(window)
        text, starts, first = here.text, here.starts, window * self._length
        begin = _begin(here, starts[position], before)
        end = _end(here, starts[position + 1], after)
        pieces: list[str] = []
        values: list[float] = []
        at, peak = begin, 0
        for spot, value in zip(fires_at, activations):
            if not 0 <= spot - first < self._length:
                continue
            low, high = starts[spot - first], starts[spot - first + 1]
            if spot != place and (high <= begin or low >= end):
                continue
            low, high = max(low, begin), min(high, end)
            if low > at:
                pieces.append(text[at:low])
                values.append(0.0)
            if spot == place:
                peak = len(pieces)
            pieces.append(text[low:high] or _left_out(here.raw[spot - first]))
            values.append(value)
            at = max(at, high)
        rest = text[at:end].rstrip()
        if rest:
            pieces.append(rest)
            values.append(0.0)
        elif pieces[-1].endswith("\n"):
            pieces[-1] = pieces[-1][:-1] + "↵"
        if pieces[0][:1].isspace():
            pieces[0] = pieces[0].lstrip() or _left_out(pieces[0])
        return Example(self.windows.documents[window], pieces, values, peak)


@lru_cache(1 << 16)
def _core(token: str) -> int | None:
    """Where a token's first word begins, else its first mark; None where it is white space."""
    found = re.search(r"\w", token) or re.search(r"\S", token)
    return found.start() if found else None


def _left_out(token: str) -> str:
    """What stands for a token whose text is left out."""
    return "↵" if "\n" in token else token[:1]


def _begin(here: _Text, at: int, before: int) -> int:
    """Where an excerpt begins that is to show the character `at` and `before` ones in front of it:
    with a line, where that leaves half of them, else with a word."""
    text, latest = here.text, at
    inside = bisect_right(here.units, (at, -1)) - 1
    if inside >= 0 and here.units[inside][1] > at:
        latest = here.units[inside][0]
    least = 0 if here.raw[0][:1].isspace() else 1  # else the window may begin inside a word
    first = bisect_left(here.units, (max(least, at - before), 0))
    begins = [low for low, _ in here.units[first : bisect_right(here.units, (latest, len(text)))]]
    if not begins:
        return max(latest, at - before)
    line = next((low for low in begins if text[low - 1 : low] == "\n"), at)
    if at - line >= before // 2:
        return line
    spaced = [low for low in begins if low == 0 or text[low - 1].isspace()]
    return next((low for low in spaced if text[low].isalnum()), (spaced or begins)[0])


def _end(here: _Text, at: int, after: int) -> int:
    """Where an excerpt ends that is to show what lies before `at` and `after` characters more."""
    text, last = here.text, min(len(here.text), at + after)
    inside = bisect_left(here.units, (at, 0)) - 1
    earliest = max(at, here.units[inside][1]) if inside >= 0 else at
    beyond = bisect_right(here.units, (last, 0))
    ends = [high for _, high in here.units[max(0, inside) : beyond] if earliest <= high <= last]
    spaced = (high for high in reversed(ends) if text[high : high + 1].isspace())
    return next(spaced, ends[-1] if ends else min(earliest, last))
