"""sparse_adam_step: Adam on a weight whose gradient exists only in factored form."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _dispatch
from ..reference import moments
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
    lr: float | torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int | torch.Tensor,
    lazy: bool = False,
    unit_norm: bool = False,
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
    master: torch.Tensor | None = None,
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
        exp_avg, exp_avg_sq: [F, D], updated in place, contiguous. Both fp32 (fp64 for an fp64
            param), or both bf16, or int8 and uint8 codes. bf16 and codes are rounded at random,
            without bias and repeatably; `fastsae.reference.moments` defines both.
        values: [..., K], indices: [..., K] in [0, F), rows: [..., D]: the factors of the gradient,
            as in `sparse_grad_weight`; values and rows in the dtype of param.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.Adam` (L2, not decoupled).
        step: t, the number of this step, from 1. lr and step may be tensors of one element on
            param's device: the host never reads them, so a CUDA graph can replay the step.
        lazy: only latents that occur in indices are updated; the moments of the others stay as
            they are (`torch.optim.SparseAdam`). Otherwise every row decays and moves, exactly as in
            `torch.optim.Adam` with a dense gradient that is zero there.
        unit_norm: remove from g_i its component along p_i before the moments, and scale every
            updated row to norm 1 afterwards (a zero row stays zero). weight_decay pulls along p_i,
            so it has no effect here.
        exp_avg_scale, exp_avg_sq_scale: [F, ceil(D / 128)] fp32, updated in place: the scales of
            codes; None otherwise.
        master: [F, D] fp32, updated in place: the weights of a bf16 or fp16 param, which only
            receives their rounded copy. Without it small updates of such a param round away.

    Equal to `torch.optim.Adam` to rounding; repeatable bit for bit, with any number of threads. One
    pass over param and moments. The update itself uses the new moments before they are rounded.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, layout or hyperparameters do not fit.
        RuntimeError: an index out of range (found on the CPU before anything is written; the GPU
            kernels cannot raise without a sync: there it touches no row).

    Source: Kingma & Ba 2015; projection as in Bricken et al. 2023, "Towards Monosemanticity".
    """
    schedule = None
    if isinstance(lr, torch.Tensor) or isinstance(step, torch.Tensor):
        schedule = _schedule(lr, step, beta1, beta2, param.device)
        lr, step = 0.0, 1  # the backends read the schedule
    torch.ops.fastsae.sparse_adam_step(
        param, exp_avg, exp_avg_sq, values, indices, rows,
        lr, beta1, beta2, eps, weight_decay, step, lazy, unit_norm,
        exp_avg_scale, exp_avg_sq_scale, master, schedule,
    )  # fmt: skip


def _schedule(
    lr: float | torch.Tensor,
    step: int | torch.Tensor,
    beta1: float,
    beta2: float,
    device: torch.device,
) -> torch.Tensor:
    """[3] fp64: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), t, computed on the device."""
    for name, value in (("lr", lr), ("step", step)):
        if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.device != device):
            raise ValueError(
                f"{_OP}: a tensor as {name} must have one element on {device}, got "
                f"{_common.shape(value)} on {value.device}"
            )
    rate, t = (
        x.detach().reshape(()).double()
        if isinstance(x, torch.Tensor)
        else torch.full((), float(x), dtype=torch.float64, device=device)  # no copy from the host
        for x in (lr, step)
    )
    return torch.stack([rate / (1 - beta1**t), (1 - beta2**t).rsqrt(), t])


# dtypes of exp_avg and exp_avg_sq, by whether the param is fp64
_FORMATS = (
    [(torch.float32, torch.float32), moments.dtypes("bf16"), moments.dtypes("8bit")],
    [(torch.float64, torch.float64)],
)


class Arguments(NamedTuple):
    """Of `sparse_adam_step`."""

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    rows: torch.Tensor
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    lazy: bool
    unit_norm: bool
    exp_avg_scale: torch.Tensor | None = None
    exp_avg_sq_scale: torch.Tensor | None = None
    master: torch.Tensor | None = None
    schedule: torch.Tensor | None = None


def _check(a: Arguments) -> None:
    (
        param, exp_avg, exp_avg_sq, values, indices, rows, lr, beta1, beta2, eps, weight_decay,
        step, _, _, exp_avg_scale, exp_avg_sq_scale, master, schedule,
    ) = a  # fmt: skip
    _common.check_floats(_OP, param=param, values=values, rows=rows)
    _common.check_matrix(_OP, "param", param, "[F, D]")
    formats = _FORMATS[param.dtype == torch.float64]
    if (exp_avg.dtype, exp_avg_sq.dtype) not in formats:
        known = ", ".join(f"({m}, {v})".replace("torch.", "") for m, v in formats)
        raise TypeError(
            f"{_OP}: exp_avg and exp_avg_sq must be one of {known} for a {param.dtype} param, got "
            f"({exp_avg.dtype}, {exp_avg_sq.dtype})"
        )
    f, d = param.shape
    state = [("exp_avg", exp_avg, (f, d)), ("exp_avg_sq", exp_avg_sq, (f, d))]
    for name, scale in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        if (scale is None) == (exp_avg.dtype == torch.int8):
            raise ValueError(f"{_OP}: {name} belongs to int8 and uint8 moments, and only to them")
        if scale is not None:
            _check_fp32(name, scale)
            state.append((name, scale, (f, moments.n_blocks(d))))
    if master is not None:
        if param.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"{_OP}: master belongs to a bf16 or fp16 param, got {param.dtype}")
        _check_fp32("master", master)
        state.append(("master", master, (f, d)))
    for name, tensor, shape in state:
        if tensor.shape != shape or tensor.device != param.device:
            raise ValueError(
                f"{_OP}: {name} {_common.shape(tensor)} on {tensor.device} must match param "
                f"{_common.shape(param)} on {param.device}: {list(shape)} is expected"
            )
    for name, tensor, _ in [("param", param, (f, d)), *state]:
        if not tensor.is_contiguous():
            raise ValueError(f"{_OP}: {name} is written in place and must be contiguous")
    if schedule is not None and (
        schedule.dtype != torch.float64
        or schedule.shape != (3,)
        or schedule.device != param.device
        or not schedule.is_contiguous()
    ):
        raise ValueError(f"{_OP}: schedule must be [3] in float64 on {param.device}")
    _common.check_pairs(_OP, values, indices)
    _common.check_last(_OP, "rows", rows, param.shape[1], "D")
    if rows.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{_OP}: rows {_common.shape(rows)} and values {_common.shape(values)} must agree in "
            "all but the last dimension"
        )
    in_range = lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0
    if not (in_range and weight_decay >= 0 and step >= 1):
        for option, value, ok in (
            ("lr", lr, lr >= 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("step", step, step >= 1),
        ):
            if not ok:
                raise ValueError(f"{_OP}: {option} is out of range, got {value}")


def _check_fp32(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{_OP}: {name} must be torch.float32, got {tensor.dtype}")


def _compute(a: Arguments) -> None:
    if a.unit_norm:  # computing p * decay and projecting it out again would leave rounding noise
        a = a._replace(weight_decay=0.0)
    _dispatch.select(_OP, a.param)(
        *a[:3],
        _common.flat(a.values),
        _common.flat_indices(a.indices, a.param.shape[0]),
        _common.flat(a.rows),
        *a[6:],
    )


_run = _common.register(_OP, Arguments, check=_check, compute=_compute)
