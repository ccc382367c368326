"""fastsae: fused kernels for sparse autoencoders.

`fastsae.ops` holds the operators, `fastsae.nn` the modules, `fastsae.optim` the optimizers that
consume gradients in factored form. `fastsae.use_backend`, `fastsae.explain` and `fastsae.info`
choose and show backends; `fastsae verify` checks every kernel on this machine.
"""

from ._waiting import wait_passively

wait_passively()  # before torch is loaded

from . import nn, ops, optim  # noqa: E402
from ._dispatch import use_backend  # noqa: E402
from ._explain import explain  # noqa: E402
from ._version import __version__  # noqa: E402
from ._warnings import KernelCheckWarning, SlowFallbackWarning  # noqa: E402
from .info import info  # noqa: E402
from .nn import TopKSAE  # noqa: E402
from .optim import FusedAdam  # noqa: E402

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
