"""Sparse autoencoders as modules over `fastsae.ops`."""

from .topk_sae import TopKSAE

__all__ = ["TopKSAE"]
