"""sparse_adam_step: Adam on a weight whose gradient exists only in factored form."""

from __future__ import annotations

import torch

from .. import _dispatch
from . import _common

_OP = "sparse_adam_step"


def sparse_adam_step(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    lazy: bool = False,
    unit_norm: bool = False,
) -> None:
    r"""One Adam step in place; the gradient is formed row by row and never stored.

    .. math::
        g_i &= \sum_{n, k:\, indices_{nk} = i} values_{nk} \, rows_n + weight\_decay \cdot p_i \\
        m_i &\leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \quad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2) g_i^2 \\
        p_i &\leftarrow p_i - \frac{lr}{1 - \beta_1^t} \cdot
            \frac{m_i}{\sqrt{v_i} / \sqrt{1 - \beta_2^t} + \epsilon}

    Args:
        param: [F, D], updated in place. fp32, bf16, fp16 (fp64 on the CPU), contiguous.
        exp_avg, exp_avg_sq: [F, D], fp32 (fp64 for an fp64 param), updated in place, contiguous.
        values: [..., K], indices: [..., K] in [0, F), rows: [..., D]: the factors of the gradient,
            as in `sparse_grad_weight`; values and rows in the dtype of param.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.Adam` (L2, not decoupled).
        step: t, the number of this step, from 1.
        lazy: only latents that occur in indices are updated; the moments of the others stay as
            they are (`torch.optim.SparseAdam`). Otherwise every row decays and moves, exactly as in
            `torch.optim.Adam` with a dense gradient that is zero there.
        unit_norm: remove from g_i its component along p_i before the moments, and scale every
            updated row to norm 1 afterwards (a zero row stays zero). weight_decay pulls along p_i,
            so it has no effect here.

    Equal to `torch.optim.Adam` to rounding; repeatable bit for bit. One pass over param and
    moments.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, layout or hyperparameters do not fit.
        RuntimeError: an index out of range (found on the CPU before anything is written; the GPU
            kernels cannot raise without a sync: there it touches no row).

    Source: Kingma & Ba 2015; projection as in Bricken et al. 2023, "Towards Monosemanticity".
    """
    torch.ops.fastsae.sparse_adam_step(
        param, exp_avg, exp_avg_sq, values, indices, rows,
        lr, beta1, beta2, eps, weight_decay, step, lazy, unit_norm,
    )  # fmt: skip


def _check(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    lazy: bool,
    unit_norm: bool,
) -> None:
    _common.check_floats(_OP, param=param, values=values, rows=rows)
    _common.check_matrix(_OP, "param", param, "[F, D]")
    moment = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if state.shape != param.shape or state.device != param.device:
            raise ValueError(
                f"{_OP}: {name} {_common.shape(state)} on {state.device} must match param "
                f"{_common.shape(param)} on {param.device}"
            )
        if state.dtype != moment:
            raise TypeError(
                f"{_OP}: {name} must be {moment} for a {param.dtype} param, got {state.dtype}"
            )
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous():
            raise ValueError(f"{_OP}: {name} is written in place and must be contiguous")
    _common.check_pairs(_OP, values, indices)
    _common.check_last(_OP, "rows", rows, param.shape[1], "D")
    if rows.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{_OP}: rows {_common.shape(rows)} and values {_common.shape(values)} must agree in "
            "all but the last dimension"
        )
    for name, value, ok in (
        ("lr", lr, lr >= 0),
        ("beta1", beta1, 0 <= beta1 < 1),
        ("beta2", beta2, 0 <= beta2 < 1),
        ("eps", eps, eps >= 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
        ("step", step, step >= 1),
    ):
        if not ok:
            raise ValueError(f"{_OP}: {name} is out of range, got {value}")


def _run(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    lazy: bool,
    unit_norm: bool,
) -> None:
    _check(
        param, exp_avg, exp_avg_sq, values, indices, rows,
        lr, beta1, beta2, eps, weight_decay, step, lazy, unit_norm,
    )  # fmt: skip
    if unit_norm:  # computing p * decay and projecting it out again would leave rounding noise
        weight_decay = 0.0
    _dispatch.select(_OP, param)(
        param,
        exp_avg,
        exp_avg_sq,
        _common.flat(values),
        _common.flat_indices(indices, param.shape[0]),
        _common.flat(rows),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        lazy,
        unit_norm,
    )


_common.register(_OP, _run, _check)
