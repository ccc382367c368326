"""Steering a language model: an SAE's latents, or any direction, turned up or down as it runs."""

from ..nn import Description, MaxActivations
from . import positions
from .attach import Steerer, attach
from .describe import describe
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
from .vectors import (
    Everywhere,
    ablate_direction,
    attach_everywhere,
    difference_of_means,
    prompt_activations,
)

__all__ = [
    "Description",
    "Everywhere",
    "Gate",
    "MaxActivations",
    "Operation",
    "Program",
    "Steerer",
    "ablate",
    "ablate_direction",
    "active",
    "add",
    "add_vector",
    "attach",
    "attach_everywhere",
    "clamp",
    "describe",
    "difference_of_means",
    "min_clamp",
    "positions",
    "project_clamp",
    "project_out",
    "prompt_activations",
    "scale",
]
