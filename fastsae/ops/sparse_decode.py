"""sparse_decode: the SAE decoder's product over the active latents only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _dispatch
from . import _common, _factors

_OP = "sparse_decode"


def sparse_decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""The decoder's output from sparse activations.

    .. math:: out_n = \sum_k values_{nk} W_{dec, indices_{nk}} + b_{dec}

    Args:
        values: [..., K] activations, dtype of W_dec.
        indices: [..., K] int32 or int64 in [0, F). Repeated indices add up.
        W_dec: [F, D], one row per latent, fp32, bf16, fp16 (fp64 on the CPU).
        b_dec: [D] or None.

    Returns:
        [..., D] in the dtype of W_dec. Sums run in fp32 (fp64 for fp64) in a fixed order and are
        rounded once; runs are repeatable bit for bit, and a token's output does not depend on the
        other tokens of the call nor on the number of threads.

    Gradients reach values, W_dec and b_dec. Inside autocast, values are cast to the dtype of W_dec.
    Under `torch.vmap` a batch of pairs is one call; torch.func's gradient transforms are refused.
    [N, K, D] is never allocated.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: dtypes differ or are not supported.
        RuntimeError: an index out of range (found on the CPU before anything is read; the GPU
            kernels cannot raise without a sync: there it adds nothing).

    Source: the sparse decoder of Gao et al. 2024, section 2.
    """
    _common.refuse_transforms(_OP, values, W_dec, b_dec, indices)
    if _factors.is_recorded(W_dec):
        out = torch.ops.fastsae.sparse_decode(values, indices, W_dec.detach(), b_dec)
        return _factors.record_decode(out, W_dec, values.to(W_dec.dtype), indices)
    result: torch.Tensor = torch.ops.fastsae.sparse_decode(values, indices, W_dec, b_dec)
    return result


class Arguments(NamedTuple):
    """Of `sparse_decode`."""

    values: torch.Tensor
    indices: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor | None = None


def _check(a: Arguments) -> None:
    values, indices, W_dec, b_dec = a
    _common.check_floats(_OP, W_dec=W_dec, values=values, b_dec=b_dec)
    _common.check_matrix(_OP, "W_dec", W_dec, "[F, D]")
    _common.check_pairs(_OP, values, indices)
    _common.check_vector(_OP, "b_dec", b_dec, W_dec.shape[1], "D")


def _compute(a: Arguments) -> torch.Tensor:
    values, indices, W_dec, b_dec = a
    out: torch.Tensor = _dispatch.select(_OP, W_dec)(
        _common.flat(values),
        _common.flat_indices(indices, W_dec.shape[0]),
        W_dec.contiguous(),
        None if b_dec is None else b_dec.contiguous(),
    )
    return _common.unflat(out, values)


def _fake(a: Arguments) -> torch.Tensor:
    return a.W_dec.new_empty(*a.values.shape[:-1], a.W_dec.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, indices, W_dec, b_dec = inputs
    ctx.has_bias = b_dec is not None
    ctx.save_for_backward(values, indices, W_dec)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing frees what was unpacked
    _common.refuse_double_backward(_OP, (grad, *saved))
    values, indices, W_dec = saved
    dvalues = dW_dec = db_dec = None
    if ctx.needs_input_grad[0]:
        dvalues = torch.ops.fastsae.sparse_grad_values(grad, indices, W_dec)
    if ctx.needs_input_grad[2]:
        dW_dec = torch.ops.fastsae.sparse_grad_weight(values, indices, grad, W_dec.shape[0])
    if ctx.has_bias and ctx.needs_input_grad[3]:
        db_dec = grad.reshape(-1, grad.shape[-1]).sum(0)
    return dvalues, None, dW_dec, db_dec


def _autocast(a: Arguments) -> Arguments:
    return a._replace(values=a.values.to(a.W_dec.dtype))


_run = _common.register(
    _OP, Arguments, check=_check, compute=_compute, fake=_fake, autocast=_autocast,
    backward=_backward, setup_context=_setup_context, vmap_batched=2,
)  # fmt: skip
