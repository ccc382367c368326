"""Gradients in factored form, and what else a parameter carries for its optimizer.

The gradient of a weight row is a sum over pairs, dW[i] = sum_{n, j: indices[n, j] = i} v[n, j] *
rows[n]. A parameter that an optimizer of `fastsae.optim` owns carries a list, and the backward pass
appends (v, indices, rows) to it instead of forming dW. The optimizer consumes the list.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from .._stamp import stamp
from ._common import flat

_ATTRIBUTE = "_fastsae_factors"
_UNIT_NORM = "_fastsae_unit_norm"


@dataclass
class Factor:
    """One backward call's contribution to a weight gradient, and the stamp of each tensor."""

    values: torch.Tensor  # [N, K]
    indices: torch.Tensor  # [N, K] int32
    rows: torch.Tensor  # [N, D]

    def __post_init__(self) -> None:
        self._stamps = self._now()

    def _now(self) -> tuple[tuple[int, int], ...]:
        return stamp(self.values), stamp(self.indices), stamp(self.rows)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a tensor was written to after backward recorded it."""
        if self._stamps != self._now():
            raise RuntimeError(
                "FusedAdam: a tensor that the gradient of a weight depends on was modified in "
                "place between backward() and step() (often the batch's input buffer); step "
                "first, or give each backward its own batch"
            )


class _Sink(list[Factor]):
    """The list. It is not part of the parameter's value: pickled, it is no list of factors."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # a type that torch.load(weights_only=True) takes


def own(param: torch.Tensor) -> None:
    """Makes the backward pass record factors for `param` from now on."""
    if factors(param) is None:
        setattr(param, _ATTRIBUTE, _Sink())


def disown(param: torch.Tensor) -> None:
    """Gives `param` ordinary gradients again."""
    if factors(param) is not None:
        delattr(param, _ATTRIBUTE)


def factors(param: torch.Tensor) -> list[Factor] | None:
    """The recorded factors of a parameter; None when nothing owns it."""
    sink = getattr(param, _ATTRIBUTE, None)
    return sink if isinstance(sink, _Sink) else None


def set_unit_norm(param: torch.Tensor, value: bool = True) -> None:
    """Marks a [F, D] parameter whose rows `FusedAdam` keeps at norm 1.

    The mark is an attribute of the parameter object; `fastsae.nn` modules set it again on the
    parameters that deepcopy, `.to` or `load_state_dict(assign=True)` create.
    """
    setattr(param, _UNIT_NORM, value)


def has_unit_norm(param: torch.Tensor) -> bool:
    """Whether `set_unit_norm` marked this parameter."""
    return bool(getattr(param, _UNIT_NORM, False))


def is_recorded(param: torch.Tensor) -> bool:
    """Whether this call's gradient of `param` is to be recorded, not formed.

    Inside torch.compile the backward is traced ahead of time and cannot append to a list: there
    the gradient is formed as usual, and the optimizer takes it from `param.grad`.
    """
    return (
        factors(param) is not None
        and param.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _contribute(
    ctx: Any, values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor | None:
    """Records a contribution to the weight, the second input of the function.

    Who owns the weight is asked now: when its optimizer is gone since the forward pass, the
    ordinary gradient is returned.

    Nothing happens when only other gradients were asked for, as by `torch.autograd.grad(loss, x)`
    or `loss.backward(inputs=[x])`, or when the weight was frozen since: torch would leave its
    gradient alone as well.
    """
    node = ctx.next_functions[1][0]
    try:
        wanted = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asked for the weight itself: refused as unused
        return None
    if not wanted or not node.variable.requires_grad:
        return None
    factor = Factor(flat(values.detach()), flat(indices), flat(rows.detach()))
    sink = factors(node.variable)
    if sink is None:
        grad: torch.Tensor = torch.ops.fastsae.sparse_grad_weight(
            factor.values, factor.indices, factor.rows, node.variable.shape[0]
        )
        return grad
    sink.append(factor)
    return None


class _RecordEncode(torch.autograd.Function):
    """Identity on the values; backward records the factors of dW_enc."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        W_enc: torch.Tensor,
        indices: torch.Tensor,
        x: torch.Tensor,
        relu: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, indices, x)
        ctx.relu = relu
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        values, indices, x = ctx.saved_tensors
        grad_pre = grad * (values > 0) if ctx.relu else grad
        return grad, _contribute(ctx, grad_pre, indices, x), None, None, None


class _RecordDecode(torch.autograd.Function):
    """Identity on the output; backward records the factors of dW_dec."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        W_dec: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, indices)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        values, indices = ctx.saved_tensors
        return grad, _contribute(ctx, values, indices, grad), None, None


def record_encode(
    values: torch.Tensor, W_enc: torch.Tensor, indices: torch.Tensor, x: torch.Tensor, relu: bool
) -> torch.Tensor:
    """Values whose backward records the factors of W_enc's gradient."""
    return _RecordEncode.apply(values, W_enc, indices, x, relu)  # type: ignore[no-untyped-call]


def record_decode(
    out: torch.Tensor, W_dec: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Output whose backward records the factors of W_dec's gradient."""
    return _RecordDecode.apply(out, W_dec, values, indices)  # type: ignore[no-untyped-call]
