"""Pieces of text around a place where a latent fires, and the words that stand there."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

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
            them. White space is one space or one line end; a line end that would make an empty
            line, or end the text, is `↵` where the latent fires on it.
        activations: the latent's activation on each piece, 0 on a stretch.
        peak: which of the pieces is the place.
    """

    document: str
    pieces: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class Around:
    """The word or mark that a token belongs to, and its neighbours; "" where there are none.

    A token of white space is `LINE_END` or `SPACE`.
    """

    unit: str
    before: str
    after: str


@dataclass(frozen=True)
class _Text:
    """A window's text.

    Attributes:
        text: without the positions that are left out.
        starts: where each token begins, and the end.
        units: (begin, end) of its words and marks.
    """

    text: str
    starts: list[int]
    units: list[tuple[int, int]]


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
            alone = self._token_text.text([token])
            self._whole[token] = None if _UNFINISHED in alone else alone
        pieces = [self._whole[token] for token in tokens]
        if None in pieces:
            return self._token_text.pieces(tokens)
        return pieces  # type: ignore[return-value]

    def _text(self, window: int) -> _Text:
        if window not in self._texts:
            starts, pieces = [0], self._pieces(self._tokens[window])
            for piece in pieces:
                starts.append(starts[-1] + len(piece))
            text = "".join(pieces)
            self._texts[window] = _Text(text, starts, [m.span() for m in _UNIT.finditer(text)])
        return self._texts[window]

    def around(self, place: int) -> Around:
        """The word at a place: the whole word, where the token is a piece of one; the token alone
        where that would be long, as in a script without spaces."""
        window, position = divmod(place, self._length)
        here = self._text(window)
        low, high = here.starts[position : position + 2]
        token = here.text[low:high]
        first = re.search(r"\w", token) or re.search(r"\S", token)
        at = bisect_right(here.units, (low + (first.start() if first else 0), len(here.text))) - 1
        if at >= 0 and (first or not token):  # no text: the first bytes of a character
            unit, near = here.text[slice(*here.units[at])], (at - 1, at + 1)
        else:
            unit, near = LINE_END if "\n" in token else SPACE, (at, at + 1)
        before, after = (
            here.text[slice(*here.units[i])] if 0 <= i < len(here.units) else "" for i in near
        )
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
        starts, first = here.starts, window * self._length
        begin = _begin(here, starts[position], before)
        end = _end(here, starts[position + 1], after)
        pieces: list[str] = []
        values: list[float] = []
        at, peak = begin, 0
        for spot, value in zip(fires_at, activations):
            if not 0 <= spot - first < self._length:
                continue
            low, high = max(starts[spot - first], at), min(starts[spot - first + 1], end)
            if low >= high and spot != place:
                continue
            if spot == place:
                peak = len(pieces) + 1
            pieces += [here.text[at:low], here.text[low:high]]
            values += [0.0, value]
            at = max(at, high)
        pieces.append(here.text[at:end])
        values.append(0.0)
        tidied = tidy(pieces, [value != 0 for value in values])
        kept = [i for i, piece in enumerate(tidied) if piece or values[i] != 0]
        return Example(
            document=self.windows.documents[window],
            pieces=[tidied[i] for i in kept],
            activations=[values[i] for i in kept],
            peak=kept.index(peak),
        )


def _begin(here: _Text, at: int, before: int) -> int:
    """Where an excerpt begins that is to show the character `at` and `before` ones in front of it:
    with a line, where that leaves half of them, else with a word."""
    text, latest = here.text, at
    inside = bisect_right(here.units, (at, -1)) - 1
    if inside >= 0 and here.units[inside][1] > at:
        latest = here.units[inside][0]
    first = bisect_left(here.units, (max(1, at - before), 0))  # at 0 a window may cut a word
    begins = [low for low, _ in here.units[first : bisect_right(here.units, (latest, len(text)))]]
    lines = [low for low in begins if text[:low].rstrip(" \t").endswith("\n")]
    if lines and at - lines[0] >= before // 2:
        return lines[0]
    if not begins:
        return max(latest, at - before)
    spaced = [low for low in begins if text[low - 1].isspace()]
    worded = [low for low in spaced if text[low].isalnum()]
    return (worded or spaced or begins)[0]


def _end(here: _Text, at: int, after: int) -> int:
    """Where an excerpt ends that is to show what lies before `at` and `after` characters more."""
    text, last = here.text, min(len(here.text), at + after)
    inside = bisect_left(here.units, (at, 0)) - 1
    earliest = max(at, here.units[inside][1]) if inside >= 0 else at
    ends = [high for low, high in here.units[max(0, inside) :][:after] if earliest <= high <= last]
    spaced = [high for high in ends if text[high : high + 1].isspace()]
    return spaced[-1] if spaced else ends[-1] if ends else min(earliest, last)


def tidy(pieces: Sequence[str], fires: Sequence[bool]) -> list[str]:
    """Pieces of an excerpt without indentation, empty lines and white space around it.

    Where a latent fires on a line end that goes, the piece is `↵`.
    """
    out: list[str] = []
    last = -1  # the last piece that has text
    for i, (piece, active) in enumerate(zip(pieces, fires)):
        piece = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", piece))
        fresh = last < 0 or out[last].endswith(("\n", "↵"))
        if fresh and (not active or piece.strip()):
            piece = piece.lstrip()
        elif fresh and piece.startswith("\n"):
            if last >= 0 and not fires[last]:
                out[last] = out[last].rstrip()
            else:
                piece = "↵" + piece[1:]
        elif not fresh and out[last].endswith(" ") and piece[:1].isspace():
            if not fires[last]:
                out[last] = out[last].rstrip()
            elif not active:
                piece = piece.lstrip(" ")
        out.append(piece)
        last = i if piece else last
    for i in reversed(range(len(out))):
        if fires[i]:
            out[i] = re.sub(r"\n$", "↵", out[i])
        else:
            out[i] = out[i].rstrip()
        if out[i]:
            break
    return out
