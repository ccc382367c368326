"""Plain PyTorch definitions of the operators: what each one means, and the fallback everywhere.

Every function takes what the compiled backends take: x [N, D], values and indices [N, K],
contiguous and checked. Sums run in fp32 (fp64 for fp64) and are rounded once, at the end.
"""

from .sparse_adam_step import sparse_adam_step
from .sparse_decode import sparse_decode
from .sparse_grad_values import sparse_grad_values
from .sparse_grad_weight import sparse_grad_weight, sparse_grad_weight_rows
from .steer import steer
from .topk import topk
from .topk_encode import topk_encode
from .topk_member import topk_member

__all__ = [
    "sparse_adam_step",
    "sparse_decode",
    "sparse_grad_values",
    "sparse_grad_weight",
    "sparse_grad_weight_rows",
    "steer",
    "topk",
    "topk_encode",
    "topk_member",
]
