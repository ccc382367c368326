"""sparse_grad_values: the decoder's gradient with respect to the active values."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _dispatch
from . import _common

_OP = "sparse_grad_values"


def sparse_grad_values(
    grad_out: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    r"""Inner products of each token's gradient with the rows of its active latents.

    .. math:: out_{nk} = \langle grad\_out_n, W_{dec, indices_{nk}} \rangle

    Args:
        grad_out: [..., D], dtype of W_dec.
        indices: [..., K] int32 or int64 in [0, F), leading shape of grad_out.
        W_dec: [F, D] fp32, bf16, fp16 (fp64 on the CPU).

    Returns:
        [..., K] in the dtype of W_dec; sums in fp32 (fp64 for fp64), rounded once, repeatable. A
        token's values do not depend on the other tokens of the call nor on the number of threads.

    It has no derivative. It is also "pre-activations of given latents": with W_enc for W_dec it
    evaluates K chosen latents of every token.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        RuntimeError: an index out of range (found on the CPU before anything is read; the GPU
            kernels cannot raise without a sync: there it gives 0).
    """
    _common.refuse_transforms(_OP, grad_out, W_dec, indices)
    out: torch.Tensor = torch.ops.fastsae.sparse_grad_values(grad_out, indices, W_dec)
    return out


class Arguments(NamedTuple):
    """Of `sparse_grad_values`."""

    grad_out: torch.Tensor
    indices: torch.Tensor
    W_dec: torch.Tensor


def _check(a: Arguments) -> None:
    grad_out, indices, W_dec = a
    _common.check_floats(_OP, W_dec=W_dec, grad_out=grad_out)
    _common.check_matrix(_OP, "W_dec", W_dec, "[F, D]")
    _common.check_last(_OP, "grad_out", grad_out, W_dec.shape[1], "D")
    _common.check_indices(_OP, indices, W_dec, "W_dec")
    if indices.shape[:-1] != grad_out.shape[:-1] or indices.dim() < 1:
        raise ValueError(
            f"{_OP}: indices {_common.shape(indices)} and grad_out {_common.shape(grad_out)} must "
            "agree in all but the last dimension"
        )


def _compute(a: Arguments) -> torch.Tensor:
    grad_out, indices, W_dec = a
    out: torch.Tensor = _dispatch.select(_OP, W_dec)(
        _common.flat(grad_out), _common.flat_indices(indices, W_dec.shape[0]), W_dec.contiguous()
    )
    return _common.unflat(out, indices)


def _fake(a: Arguments) -> torch.Tensor:
    return a.W_dec.new_empty(a.indices.shape)


def _autocast(a: Arguments) -> Arguments:
    return a._replace(grad_out=a.grad_out.to(a.W_dec.dtype))


_run = _common.register(
    _OP, Arguments, check=_check, compute=_compute, fake=_fake, autocast=_autocast,
    backward=_common.no_gradient(_OP), vmap_batched=2,
)  # fmt: skip
