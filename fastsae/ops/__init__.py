"""Public operators. One file each: schema, checks, fake, autograd, docstring."""

from .sparse_adam_step import sparse_adam_step
from .sparse_decode import sparse_decode
from .sparse_grad_values import sparse_grad_values
from .sparse_grad_weight import sparse_grad_weight
from .steer import steer, steer_
from .topk import topk
from .topk_encode import topk_encode
from .topk_member import topk_member, topk_screen

__all__ = [
    "sparse_adam_step",
    "sparse_decode",
    "sparse_grad_values",
    "sparse_grad_weight",
    "steer",
    "steer_",
    "topk",
    "topk_encode",
    "topk_member",
    "topk_screen",
]
