"""A title for a latent, in words, from the places where it is strongest."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from .excerpts import LINE_END, SPACE, Around

_NAMES = {
    LINE_END: "line end", SPACE: "space", "/": "slash", "\\": "backslash", "_": "underscore",
    "-": "hyphen", "#": "hash", "@": "at sign", "`": "backtick", "+": "plus", "=": "equals",
    "'": "quote", '"': "double quote", "<": "less than", ">": "greater than",
    "(": "opening bracket", ")": "closing bracket", "{": "opening brace", "}": "closing brace",
    "[": "opening square bracket", "]": "closing square bracket",
}  # fmt: skip


def title(around: Iterable[Around], weights: Iterable[float]) -> str:
    """Names a latent by the words at the places where it is strongest.

    Where they are marks or white space, the word before or after them is told too, and where they
    are many, what they have in common: the words that come before or after.

    Args:
        around: of each place.
        weights: of each place, such as the activation there.
    """
    places = list(zip(around, weights))
    if not places:
        return ""
    here, share = _ranked(((a.unit, w) for a, w in places), 3)
    words = ", ".join(map(named, here))
    if share >= 0.5 and any(is_wordlike(unit) for unit in here):
        return words
    after, near = _ranked(((a.before, w) for a, w in places), 2)
    before, far = _ranked(((a.after, w) for a, w in places), 2)
    relation, units = ("after", after) if near >= far else ("before", before)
    if max(near, far) < 0.5 or not all(units):
        return words if share >= 0.5 else words + " …"
    common = f"{relation} " + ", ".join(map(named, units))
    return f"{words} {common}" if share >= 0.5 else common


def is_wordlike(unit: str) -> bool:
    """Whether a unit of text is a word or a number, not marks or white space."""
    return any(c.isalnum() for c in unit)


def named(unit: str) -> str:
    """How a unit of text is written in a title."""
    if is_wordlike(unit):
        return unit
    if len(unit) > 1:
        return f"“{unit[:8]}”"
    return _NAMES.get(unit) or unicodedata.name(unit, f"“{unit}”").lower()


def _ranked(units: Iterable[tuple[str, float]], count: int) -> tuple[list[str], float]:
    """The `count` heaviest units, each in its most frequent spelling, and their share. Of two or
    more, those are left out that say little beside the first."""
    mass: dict[str, float] = {}
    spelt: list[tuple[str, str]] = []
    for unit, weight in units:
        folded = unit.casefold()
        mass[folded] = mass.get(folded, 0.0) + weight
        spelt.append((folded, unit))
    order = sorted(mass, key=lambda unit: -mass[unit])[:count]
    order = [unit for unit in order if mass[unit] >= 0.15 * mass[order[0]]]
    share = sum(mass[unit] for unit in order) / (sum(mass.values()) or 1.0)
    named_as = [[own for folded, own in spelt if folded == unit] for unit in order]
    return [max(own, key=own.count) for own in named_as], share
