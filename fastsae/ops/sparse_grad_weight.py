"""sparse_grad_weight: weight gradients summed per active latent, dense or row-sparse."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from .. import _dispatch
from . import _common

_OP = "sparse_grad_weight"
_OP_ROWS = "sparse_grad_weight_rows"


def sparse_grad_weight(
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    n_latents: int,
    *,
    layout: str = "dense",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The gradient of a [F, D] weight from the pairs that used it.

    .. math:: grad_i = \sum_{n, k:\, indices_{nk} = i} values_{nk} \, rows_n

    W_dec: values are the activations, rows the output's gradient. W_enc: values are the gradients
    of the pre-activations, rows the encoder's input.

    Args:
        values: [..., K], dtype of rows.
        indices: [..., K] int32 or int64 in [0, n_latents).
        rows: [..., D] fp32, bf16, fp16 (fp64 on the CPU).
        n_latents: F.
        layout: "dense" for a [F, D] tensor; "rows" for the touched rows only.

    Returns:
        "dense": [F, D], zero where a latent does not occur. "rows": latents [M] int32 ascending,
        those that occur in indices, and grads [M, D] (M depends on the data, so a GPU must sync).

        In the dtype of rows; sums in fp32 (fp64 for fp64) over segments in the order of n, rounded
        once. No atomics: runs are repeatable bit for bit, with any number of threads. It has no
        derivative.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or layout do not fit.
        RuntimeError: an index out of range (found on the CPU before anything is read; the GPU
            kernels cannot raise without a sync: there it adds nothing).
    """
    _common.refuse_transforms(_OP, values, rows, indices)
    if layout == "dense":
        dense: torch.Tensor = torch.ops.fastsae.sparse_grad_weight(values, indices, rows, n_latents)
        return dense
    if layout == "rows":
        latents, grads = torch.ops.fastsae.sparse_grad_weight_rows(values, indices, rows, n_latents)
        return latents, grads
    raise ValueError(f"{_OP}: layout must be 'dense' or 'rows', got {layout!r}")


class Arguments(NamedTuple):
    """Of `sparse_grad_weight`, dense or rows."""

    values: torch.Tensor
    indices: torch.Tensor
    rows: torch.Tensor
    n_latents: int


def _check(op: str, a: Arguments) -> None:
    values, indices, rows, n_latents = a
    _common.check_floats(op, rows=rows, values=values)
    _common.check_pairs(op, values, indices)
    if rows.dim() < 1 or rows.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{op}: rows {_common.shape(rows)} and values {_common.shape(values)} must agree in "
            "all but the last dimension"
        )
    if n_latents < 0:
        raise ValueError(f"{op}: n_latents must not be negative, got {n_latents}")


def _compute(op: str, a: Arguments) -> Any:
    values, indices, rows, n_latents = a
    return _dispatch.select(op, rows)(
        _common.flat(values),
        _common.flat_indices(indices, n_latents),
        _common.flat(rows),
        n_latents,
    )


def _fake(a: Arguments) -> torch.Tensor:
    return a.rows.new_empty(a.n_latents, a.rows.shape[-1])


def _fake_rows(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    latents = a.rows.new_empty(touched, dtype=torch.int32)
    return latents, a.rows.new_empty(touched, a.rows.shape[-1])


def _autocast(a: Arguments) -> Arguments:
    wide = torch.promote_types(a.values.dtype, a.rows.dtype)
    return a._replace(values=a.values.to(wide), rows=a.rows.to(wide))


_run, _run_rows = (
    _common.register(
        op, Arguments, check=partial(_check, op), compute=partial(_compute, op), fake=fake,
        autocast=_autocast, backward=_common.no_gradient(op), vmap_batched=batched,
    )
    for op, fake, batched in ((_OP, _fake, 0), (_OP_ROWS, _fake_rows, None))
)  # fmt: skip
