"""Checks and registration that every op shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from .._errors import not_a_tensor
from .._library import lib

PLAIN = (torch.Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in tensor.shape) + "]"


def check_floats(op: str, **tensors: torch.Tensor | None) -> None:
    """All of one floating dtype, on one device. The first named tensor sets both."""
    given = iter(tensors.values())
    one = next(given)
    if one is not None and one.dtype in FLOATS and one.layout is torch.strided:
        kind, place = one.dtype, one.device
        for other in given:
            if other is not None and (
                other.dtype is not kind
                or other.device != place
                or other.layout is not torch.strided
            ):
                break
        else:
            return
    first = ""
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}")
        if dtype is None:
            first, dtype, device = name, tensor.dtype, tensor.device
        elif tensor.dtype != dtype:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} and {first} is {dtype}; they must have one dtype"
            )
        elif tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and {first} on {device}; move them together"
            )


def check_matrix(op: str, name: str, tensor: torch.Tensor, axes: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be {axes}, got {shape(tensor)}")


def check_vector(op: str, name: str, tensor: torch.Tensor | None, size: Any, axis: str) -> None:
    if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != size):
        raise ValueError(f"{op}: {name} must be [{axis}] = [{size}], got {shape(tensor)}")


def check_indices(
    op: str, indices: torch.Tensor, like: torch.Tensor, name: str, own_name: str = "indices"
) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {own_name} must be int32 or int64, got {indices.dtype}")
    if indices.device != like.device:
        raise ValueError(
            f"{op}: {own_name} is on {indices.device} and {name} on {like.device}; "
            "move them together"
        )


def check_pairs(op: str, values: torch.Tensor, indices: torch.Tensor) -> None:
    if values.shape != indices.shape or not values.dim():
        raise ValueError(
            f"{op}: values {shape(values)} and indices {shape(indices)} must have the same "
            "shape [..., K]"
        )
    check_indices(op, indices, values, "values")


def check_last(op: str, name: str, tensor: torch.Tensor, size: Any, axis: str) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] != size:
        raise ValueError(
            f"{op}: {name} must be [..., {axis}] with {axis} = {size}, got {shape(tensor)}"
        )


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[..., X] as contiguous [N, X]."""
    if tensor.dim() != 2:
        tensor = (
            tensor.reshape(-1, tensor.shape[-1])
            if tensor.numel()
            else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
        )
    return tensor.contiguous()


def unflat(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, X] with the leading dimensions of `like`."""
    if like.dim() == 2:
        return tensor
    return tensor.view(*like.shape[:-1], tensor.shape[-1])


def flat_indices(indices: torch.Tensor, n_latents: int) -> torch.Tensor:
    """[..., K] as contiguous int32 [N, K]; an index that int32 cannot hold stays out of range."""
    if indices.dtype == torch.int64:
        # clamp keeps a huge index out of range instead of wrapping it to a valid one
        indices = indices.clamp(-1, n_latents).to(torch.int32)
    return flat(indices)


def unobserved(*tensors: torch.Tensor) -> bool:
    """Is this a plain eager call: no gradient to record, no tracing, transform, mode or autocast?

    Such a call may skip the dispatcher, whose autograd rule in Python costs 30 us.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or (recording and tensor.requires_grad):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def refuse_double_backward(op: str, grads: tuple[torch.Tensor | None, ...]) -> None:
    """Backward passes of these ops are kernels without a derivative of their own."""
    if torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads):
        raise RuntimeError(f"{op}: double backward is not supported; detach the gradient first")


def refuse_transforms(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuses what is no tensor, and transforms that these ops do not have.

    Forward-mode AD would drop the tangents, and torch.func cannot trace these ops' backward.
    Ordinary backward and torch.vmap (see `register`) work.
    """
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if t is not None and not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {not_a_tensor(t)}")
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            f"{op}: forward-mode differentiation (torch.func.jvp, jacfwd, linearize, "
            "torch.autograd.forward_ad) is not supported; use loss.backward()"
        )
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        and any(t is not None and t.requires_grad for t in tensors)
        and any(
            level.key() == torch._C._functorch.TransformType.Grad
            for level in torch._C._functorch.get_interpreter_stack()
        )
    ):
        raise RuntimeError(
            f"{op}: torch.func.grad, vjp, jacrev and hessian are not supported; use "
            "loss.backward() or torch.autograd.grad (for a Jacobian, one call per output row)"
        )


def _vmap_rule(op: str, batched: int) -> Callable[..., Any]:
    """The op over a batch: one call where only the first `batched` arguments carry it, as one more
    leading dimension; else a call per example."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call = getattr(torch.ops.fastsae, op)
        refuse_transforms(op, *(a for a in args if isinstance(a, torch.Tensor)))
        if all(d is None for d in in_dims[batched:]):
            leading = (
                a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
                for a, d in zip(args[:batched], in_dims, strict=False)
            )
            out = call(*leading, *args[batched:])
            return out, 0 if isinstance(out, torch.Tensor) else (0,) * len(out)
        outs = [
            call(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], torch.Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])

    return rule


def no_gradient(op: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            f"{op}: has no derivative (double backward is not supported); detach its inputs"
        )

    return backward


def register(
    op: str,
    arguments: Any,
    *,
    check: Callable[[Any], None],
    compute: Callable[[Any], Any],
    fake: Callable[[Any], Any] | None = None,
    autocast: Callable[[Any], tuple[Any, ...]] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    vmap_batched: int | None = None,
) -> Callable[..., Any]:
    """Registers an op's implementation, fake, autograd, autocast and vmap rule.

    Args:
        arguments: the op's NamedTuple, in the order and with the defaults of its schema. All that
            follow take one.
        check: raises for what does not fit, before `compute` and `fake`.
        compute: the result.
        fake: the result's shape and dtype; None for an op that only writes in place.
        autocast: what the op runs on inside an autocast region: activations are cast to the
            weights' dtype (never the weights, which would be a copy of them per call).
        backward, setup_context: as `torch.library.register_autograd`.
        vmap_batched: how many of the first arguments take any leading dimensions.

    Returns:
        The implementation, which takes the op's arguments one by one.
    """

    count = len(arguments._fields)
    make = tuple.__new__  # 0.1 us; with defaults to fill in 0.4

    def run(*args: Any) -> Any:
        given = make(arguments, args) if len(args) == count else arguments(*args)
        check(given)
        return compute(given)

    def run_fake(*args: Any) -> Any:
        given = arguments(*args)
        check(given)
        return None if fake is None else fake(given)

    lib.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsae::{op}", run_fake, lib=lib)
    if backward is not None:
        torch.library.register_autograd(
            f"fastsae::{op}", backward, setup_context=setup_context, lib=lib
        )
    if vmap_batched is not None:
        torch.library.register_vmap(f"fastsae::{op}", _vmap_rule(op, vmap_batched), lib=lib)
    if autocast is not None:
        overload = getattr(torch.ops.fastsae, op).default
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

            def run_autocast(*args: Any, _device: str = device) -> Any:
                with torch.autocast(_device, enabled=False):
                    return overload(*autocast(arguments(*args)))

            lib.impl(op, run_autocast, key)
    return run
