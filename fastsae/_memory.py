"""Huge pages for large tensors on Linux."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks for huge pages behind a large CPU tensor that has not been written yet; returns it.

    A step over the weights and moments touches gigabytes: with pages of 4 kB a third of it is
    spent on address translation. Only advice: nothing happens where the system has none to give.
    """
    real = type(tensor) is torch.Tensor  # fake tensors have no address
    if real and tensor.device.type == "cpu" and tensor.is_contiguous() and _madvise() is not None:
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if end - begin >= 4 * _HUGE:
            _madvise()(begin, end - begin, _MADV_HUGEPAGE)
    return tensor
