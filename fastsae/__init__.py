"""fastsae: fused kernels for sparse autoencoders.

`fastsae.ops` holds the operators, `fastsae.nn` the modules, `fastsae.optim` the optimizers that
consume gradients in factored form. `fastsae.use_backend`, `fastsae.explain` and `fastsae.info`
choose and show backends.
"""

from . import nn, ops, optim
from ._dispatch import explain, use_backend
from ._version import __version__
from ._warnings import SlowFallbackWarning
from .info import info

__all__ = [
    "SlowFallbackWarning",
    "__version__",
    "explain",
    "info",
    "nn",
    "ops",
    "optim",
    "use_backend",
]
