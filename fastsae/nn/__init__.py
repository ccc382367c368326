"""Sparse autoencoders as modules over `fastsae.ops`."""

from .base import CoderConfig, SparseCoder
from .code import Code, Loss, fvu
from .description import Description, MaxActivations
from .origin import Origin
from .topk import TopKConfig, TopKSAE

# By the tag in their files: one line for each.
ARCHITECTURES: dict[str, type[SparseCoder]] = {
    "topk": TopKSAE,
}

__all__ = [
    "ARCHITECTURES", "Code", "CoderConfig", "Description", "Loss", "MaxActivations", "Origin",
    "SparseCoder", "TopKConfig", "TopKSAE", "fvu",
]  # fmt: skip
