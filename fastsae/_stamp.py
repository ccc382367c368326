"""Whether a tensor is still the one that something was computed from."""

from __future__ import annotations

import torch


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to (inference tensors do not count that) or its memory is
    another (`Module.to`, `.data = ...`)."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()
