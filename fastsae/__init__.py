"""fastsae: fused kernels for sparse autoencoders.

`fastsae.ops` holds the operators, `fastsae.nn` the modules, `fastsae.optim` the optimizers that
consume gradients in factored form. `fastsae.use_backend`, `fastsae.explain` and `fastsae.info`
choose and show backends; `fastsae verify` checks every kernel on this machine.
"""

from . import nn, ops, optim
from ._dispatch import explain, use_backend
from ._version import __version__
from ._warnings import KernelCheckWarning, SlowFallbackWarning
from .info import info
from .nn import TopKSAE
from .optim import FusedAdam

__all__ = [
    "FusedAdam",
    "KernelCheckWarning",
    "SlowFallbackWarning",
    "TopKSAE",
    "__version__",
    "explain",
    "info",
    "nn",
    "ops",
    "optim",
    "use_backend",
]
