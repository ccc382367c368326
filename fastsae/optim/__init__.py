"""Optimizers that consume weight gradients in factored form."""

from .fused_adam import FusedAdam, has_unit_norm, set_unit_norm

__all__ = ["FusedAdam", "has_unit_norm", "set_unit_norm"]
