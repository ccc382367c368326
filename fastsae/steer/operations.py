"""What can be done to an activation: operations on an SAE's latents and on directions.

A program is a list of them for one sequence. Every f_j is read from the same activation x and the
edits are summed, so the order of a program does not matter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import _steer_codes as codes
from .._errors import not_a_tensor

RAW_UNIT, MAX_UNIT = "raw", "max"


@dataclass(frozen=True)
class Gate:
    """Opens where latent's activation exceeds `above`."""

    latent: int
    above: float
    unit: str


@dataclass(frozen=True)
class Operation:
    """One edit. Made by the functions below, not by hand.

    Attributes:
        opcode: of `ops.steer`.
        latent: j, or None for an operation on a direction.
        vector: [D], the direction, or None.
        value: the clamp's target, the scale's factor, or the amount added.
        unit: of the value, "raw" or "max" (times the latent's maximum activation).
        when: acts only where this gate is open.
    """

    opcode: int
    latent: int | None
    vector: torch.Tensor | None
    value: float
    unit: str = RAW_UNIT
    when: Gate | None = None


Program = Sequence[Operation]


def _latent(name: str, latent: int) -> int:
    try:
        whole = None if isinstance(latent, bool) else operator.index(latent)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name}: latent must be an int, got {type(latent).__name__}")
    latent = whole
    if latent < 0:
        raise ValueError(f"{name}: latent must be 0 or more, got {latent}")
    return latent


def _number(name: str, value: float, unit: str) -> float:
    if unit not in (RAW_UNIT, MAX_UNIT):
        raise ValueError(f"{name}: unit must be 'raw' or 'max', got {unit!r}")
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: the value must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: the value must be finite, got {value}")
    return float(value)


def _direction(name: str, vector: torch.Tensor) -> torch.Tensor:
    if not isinstance(vector, torch.Tensor):
        raise TypeError(f"{name}: the vector: {not_a_tensor(vector)}")
    if vector.dim() != 1 or not vector.is_floating_point():
        raise ValueError(f"{name}: the vector must be [D] and floating, got {tuple(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name}: the vector has NaN or inf in it")
    return vector.detach()


def _on_latent(
    name: str, opcode: int, latent: int, value: float, unit: str, when: Gate | None
) -> Operation:
    return Operation(opcode, _latent(name, latent), None, _number(name, value, unit), unit, when)


def active(latent: int, above: float = 0.0, unit: str = RAW_UNIT) -> Gate:
    """A gate for `when=`: open where the latent's activation exceeds `above`."""
    return Gate(_latent("active", latent), _number("active", above, unit), unit)


def clamp(latent: int, value: float, unit: str = RAW_UNIT, when: Gate | None = None) -> Operation:
    """f_j = value at every token, active or not: the clamp of "Scaling Monosemanticity".

    With unit="max" the value is in units of the latent's maximum activation over a corpus; it may
    be negative. `when=active(j)` of the same latent makes it conditional.
    """
    return _on_latent("clamp", codes.CLAMP, latent, value, unit, when)


def min_clamp(
    latent: int, value: float, unit: str = RAW_UNIT, when: Gate | None = None
) -> Operation:
    """f_j = max(f_j, value)."""
    return _on_latent("min_clamp", codes.MIN_CLAMP, latent, value, unit, when)


def scale(latent: int, factor: float, when: Gate | None = None) -> Operation:
    """f_j = factor * f_j."""
    return _on_latent("scale", codes.SCALE, latent, factor, RAW_UNIT, when)


def ablate(latent: int, when: Gate | None = None) -> Operation:
    """f_j = 0."""
    return _on_latent("ablate", codes.SCALE, latent, 0.0, RAW_UNIT, when)


def add(latent: int, amount: float, unit: str = RAW_UNIT, when: Gate | None = None) -> Operation:
    """f_j + amount: the decoder row times `amount` is added, the encoder is not asked."""
    return _on_latent("add", codes.ADD, latent, amount, unit, when)


def add_vector(vector: torch.Tensor, amount: float = 1.0, when: Gate | None = None) -> Operation:
    """x + amount * vector, e.g. a difference of means. Needs no SAE."""
    vector = _direction("add_vector", vector)
    return Operation(codes.ADD, None, vector, _number("add_vector", amount, RAW_UNIT), when=when)


def project_out(direction: torch.Tensor, when: Gate | None = None) -> Operation:
    """x - (x . r) r with r the direction at norm 1. Needs no SAE."""
    return replace(project_clamp(direction, 0.0), when=when)


def project_clamp(direction: torch.Tensor, value: float, when: Gate | None = None) -> Operation:
    """x with its projection on the direction (at norm 1) set to `value`. Needs no SAE."""
    vector = _direction("project_clamp", direction)
    norm = vector.double().norm()
    if float(norm) == 0.0:
        raise ValueError("project_clamp: the direction is zero")
    unit = (vector.double() / norm).to(vector.dtype)
    return Operation(codes.CLAMP, None, unit, _number("project_clamp", value, RAW_UNIT), when=when)
