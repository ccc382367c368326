"""topk: the exact, canonical top-k of every row of a dense tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _dispatch
from . import _common

_OP = "topk"


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The k largest elements of every row, in canonical order.

    .. math:: indices_n = \operatorname{argtopk}_m x_{nm}, \quad values_n = x_{n, indices_n}

    Args:
        x: [..., M], any leading shape, fp32, bf16, fp16 (fp64 on the CPU), M < 2^31. Row-major;
            another layout is copied.
        k: 0 <= k <= M.

    Returns:
        values [..., k] in the dtype of x and indices [..., k] int32, descending, ties by lowest
        index on every backend (`torch.topk` leaves ties open and does not repeat between devices).
        NaN ranks above +inf, as in `torch.topk`; every NaN ties with every other, and -0 with +0.
        Exact; runs are repeatable bit for bit, and a row does not depend on the others.

    The gradient of x is [..., M] and dense by definition: zero but at the chosen places. Under
    `torch.vmap` a batch is one call; torch.func's gradient transforms are refused.

    Raises:
        ValueError: x has no dimension, k or M does not fit.
        TypeError: x is not of a supported floating dtype.

    Source: `torch.topk`; the definition of ties is that of `topk_encode`.
    """
    _common.refuse_transforms(_OP, x)
    values, indices = torch.ops.fastsae.topk(x, k)
    return values, indices


class Arguments(NamedTuple):
    """Of `topk`."""

    x: torch.Tensor
    k: int


def _check(a: Arguments) -> None:
    _common.check_floats(_OP, x=a.x)
    if a.x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., M], got {_common.shape(a.x)}")
    m = a.x.shape[-1]
    if m >= 2**31:
        raise ValueError(f"{_OP}: indices are int32: M must be below 2^31, got {m}")
    if not 0 <= a.k <= m:
        raise ValueError(f"{_OP}: k must lie in [0, {m}] (M), got {a.k}")


def _compute(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x, k = a
    values, indices = _dispatch.select(_OP, x)(_common.flat(x), k)
    return _common.unflat(values, x), _common.unflat(indices, x)


def _fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    size = (*a.x.shape[:-1], a.k)
    return a.x.new_empty(size), a.x.new_empty(size, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.size = inputs[0].shape
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(
    ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None
    (indices,) = ctx.saved_tensors
    # linear in grad and made of PyTorch's own operators: it has a derivative itself
    return grad.new_zeros(ctx.size).scatter(-1, indices.long(), grad), None


_run = _common.register(
    _OP, Arguments, check=_check, compute=_compute, fake=_fake, backward=_backward,
    setup_context=_setup_context, vmap_batched=1,
)  # fmt: skip
