"""sparse_grad_weight: weight gradients summed per active latent, dense or row-sparse."""

from __future__ import annotations

from typing import Any

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
    _common.refuse_transforms(_OP, values, rows)
    if layout == "dense":
        dense: torch.Tensor = torch.ops.fastsae.sparse_grad_weight(values, indices, rows, n_latents)
        return dense
    if layout == "rows":
        latents, grads = torch.ops.fastsae.sparse_grad_weight_rows(values, indices, rows, n_latents)
        return latents, grads
    raise ValueError(f"{_OP}: layout must be 'dense' or 'rows', got {layout!r}")


def _check(
    op: str, values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> None:
    _common.check_floats(op, rows=rows, values=values)
    _common.check_pairs(op, values, indices)
    if rows.dim() < 1 or rows.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{op}: rows {_common.shape(rows)} and values {_common.shape(values)} must agree in "
            "all but the last dimension"
        )
    if n_latents < 0:
        raise ValueError(f"{op}: n_latents must not be negative, got {n_latents}")


def _launch(
    op: str, values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> Any:
    _check(op, values, indices, rows, n_latents)
    return _dispatch.select(op, rows)(
        _common.flat(values),
        _common.flat_indices(indices, n_latents),
        _common.flat(rows),
        n_latents,
    )


def _run(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> torch.Tensor:
    out: torch.Tensor = _launch(_OP, values, indices, rows, n_latents)
    return out


def _fake(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> torch.Tensor:
    _check(_OP, values, indices, rows, n_latents)
    return rows.new_empty(n_latents, rows.shape[-1])


def _run_rows(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    latents, grads = _launch(_OP_ROWS, values, indices, rows, n_latents)
    return latents, grads


def _fake_rows(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(_OP_ROWS, values, indices, rows, n_latents)
    touched = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(touched, dtype=torch.int32), rows.new_empty(touched, rows.shape[-1])


def _autocast(
    values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n_latents: int
) -> tuple[Any, ...]:
    wide = torch.promote_types(values.dtype, rows.dtype)
    return values.to(wide), indices, rows.to(wide), n_latents


_common.register(
    _OP,
    _run,
    _fake,
    backward=_common.no_gradient(_OP),
    autocast=_autocast,
    vmap_batched=0,
)
_common.register(
    _OP_ROWS, _run_rows, _fake_rows, backward=_common.no_gradient(_OP_ROWS), autocast=_autocast
)
