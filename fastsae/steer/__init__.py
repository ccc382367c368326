"""Steering a language model: an SAE's latents, or any direction, turned up or down as it runs."""

from . import positions
from .attach import Steerer, attach
from .describe import MaxActivations, SAEDescription, describe
from .operations import (
    Gate,
    Operation,
    Program,
    ablate,
    active,
    add,
    add_vector,
    clamp,
    min_clamp,
    project_clamp,
    project_out,
    scale,
)

__all__ = [
    "Gate",
    "MaxActivations",
    "Operation",
    "Program",
    "SAEDescription",
    "Steerer",
    "ablate",
    "active",
    "add",
    "add_vector",
    "attach",
    "clamp",
    "describe",
    "min_clamp",
    "positions",
    "project_clamp",
    "project_out",
    "scale",
]
