"""Frozen dataclasses that go into files: plain numbers, strings and tuples only."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

_KINDS: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}


def make_plain(config: Any) -> None:
    """For `__post_init__`: NumPy and PyTorch scalars, which no file keeps, become Python's.

    Raises:
        TypeError: a field holds another type than its annotation says.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = [kind.partition("[")[0] for kind in str(field.type).split(" | ")]
        if value is None and "None" in kinds:
            continue
        plain = _plain(value, kinds[0])
        if type(plain) is not _KINDS[kinds[0]]:
            raise TypeError(
                f"{type(config).__name__}: {field.name} must be {kinds[0]}, got {value!r}"
            )
        object.__setattr__(config, field.name, plain)


def _plain(value: Any, kind: str) -> Any:
    if kind == "tuple" and isinstance(value, list | tuple):
        return tuple(_plain(one, "") for one in value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return float(value) if kind == "float" and type(value) is int else value


def plain_numbers(value: Any) -> Any:
    """Dicts, lists and tuples with Python's numbers in place of NumPy's; all else as it is."""
    if isinstance(value, dict):
        return {key: plain_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_numbers(one) for one in value)
    return value.item() if type(value).__module__ == "numpy" and value.shape == () else value
