"""Optimizers that consume weight gradients in factored form."""

from ..ops._factors import has_unit_norm, set_unit_norm
from .fused_adam import FusedAdam

__all__ = ["FusedAdam", "has_unit_norm", "set_unit_norm"]
