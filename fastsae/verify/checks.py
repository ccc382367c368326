"""Runs known answers on a kernel: bit for bit, between guard bands, in this process."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._verified import Check
from .answers import Answer, answers

_BAND = 4096  # bytes before and after every allocation
_SENTINEL = 0xA5


class WrongError(Exception):
    """A kernel's result is not the known one."""


class GuardBands(TorchDispatchMode):
    """Places what is allocated inside between bands that nobody may write to.

    It sees launchers written in Python, and C++ ones where the operator is called below the modes'
    dispatch key (`_compiled`).
    """

    _FRESH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros",
              "zeros_like", "new_zeros", "full", "new_full", "full_like")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, and to say so to torch._dynamo means a second to load it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (name.startswith("aten::") and name[6:] in self._FRESH):
            return result
        if not result.is_contiguous() or not result.numel():
            return result
        return self.fenced(result, filled="empty" not in name)

    def fenced(self, tensor: torch.Tensor, filled: bool = True) -> torch.Tensor:
        """A tensor like this one, between bands."""
        with torch.utils._python_dispatch._disable_current_modes():
            block = torch.full(
                (tensor.nbytes + 2 * _BAND,), _SENTINEL, dtype=torch.uint8, device=tensor.device
            )
            self.blocks.append(block)
            inside = block[_BAND:-_BAND].view(tensor.dtype).view(tensor.shape)
            return inside.copy_(tensor) if filled else inside

    def check(self) -> None:
        """Raises WrongError when a band was written to."""
        for block in self.blocks:
            for band in (block[:_BAND], block[-_BAND:]):
                if bool((band != _SENTINEL).any()):
                    raise WrongError("a write outside the result's memory")
        self.blocks.clear()


def kernel(check: Check, device: torch.device) -> Callable[..., Any]:
    """The kernel of a check. A CPU level comes into force in this process."""
    if check.backend == "triton":
        stem = "sparse_grad_weight" if check.op == "sparse_grad_weight_rows" else check.op
        launch = getattr(importlib.import_module(f"fastsae.triton_kernels.{stem}"), check.op)
        if check.design == "default":
            return launch  # type: ignore[no-any-return]
        return lambda *args: launch(*args, design=check.design)
    if check.backend == "cpu":
        torch.ops.fastsae._set_cpu_level(check.design)
    overload = getattr(torch.ops.fastsae, f"{check.op}_{check.backend}").default
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.type.upper()))
    return lambda *args: overload.redispatch(key, *args)


def takes(check: Check, args: Sequence[Any]) -> bool:
    """Whether a call is one for this design."""
    if check.op != "topk_encode" or check.backend != "triton":
        return True
    module = importlib.import_module("fastsae.triton_kernels.topk_encode")
    x, w, _, k = args[:4]
    return module.named(check.design).refuses(x, w, k) is None


def run(
    check: Check,
    device: torch.device,
    *,
    scale: str,
    repeat: int = 1,
    bands: bool = True,
) -> int:
    """Runs every known answer of a check; returns how many calls were right.

    Args:
        scale: size of the data, one of `answers.SCALES`.
        repeat: times that every call is made, for races.
        bands: whether memory is fenced; tools that look for stray accesses do without.

    Raises:
        WrongError: a result is wrong; says which. Whatever the kernel raises is not caught.
    """
    calls, launch = 0, kernel(check, device)
    for answer in answers(check.op, check.design, getattr(torch, check.dtype), scale):
        if answer.refused and check.backend == "cpu":
            continue
        for shifted in (False, True) if answer.shifted else (False,):
            for _ in range(1 if shifted else repeat):
                guard = GuardBands()
                args = _arguments(answer, device, shifted, guard if bands else None)
                if not takes(check, args):
                    continue
                try:
                    _once(launch, answer, args, guard if bands else None)
                except WrongError as error:
                    where = f"{answer.label}{', unaligned views' * shifted}"
                    raise WrongError(f"{where}: {error}") from None
                calls += 1
    if not calls:
        raise WrongError("no known answer is one for this design")
    return calls


def _arguments(
    answer: Answer, device: torch.device, shifted: bool, guard: GuardBands | None
) -> list[Any]:
    """Copies on the device; what the call writes to lies between bands."""
    args = list(answer.args)
    for i, argument in enumerate(args):
        if not isinstance(argument, torch.Tensor):
            continue
        args[i] = argument.to(device, copy=True, memory_format=torch.contiguous_format)
        if guard is not None and i in answer.written:
            args[i] = guard.fenced(args[i])
        elif shifted and i in answer.shifted:
            args[i] = _shifted(args[i])
    return args


def _once(
    launch: Callable[..., Any], answer: Answer, args: list[Any], guard: GuardBands | None
) -> None:
    with guard or contextlib.nullcontext():
        result = launch(*args)
    returned = result if isinstance(result, (tuple, list)) else () if result is None else (result,)
    _compare([*returned, *(args[i] for i in answer.written)], answer.expected, answer.ulps)
    if guard is not None:
        guard.check()


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, beginning one element behind a boundary."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def _compare(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], ulps: int) -> None:
    if len(got) != len(expected):
        raise WrongError(f"{len(got)} results, {len(expected)} expected")
    for i, (result, truth) in enumerate(zip(got, expected)):
        if result.shape != truth.shape or result.dtype != truth.dtype:
            raise WrongError(
                f"result {i} is {list(result.shape)} {result.dtype}, not {list(truth.shape)} "
                f"{truth.dtype}"
            )
        result = result.cpu()
        wrong = result != truth
        if truth.is_floating_point():
            wrong &= ~(result.isnan() & truth.isnan())
            if ulps:
                slack = ulps * torch.finfo(truth.dtype).eps
                wrong &= ~((result - truth).abs() <= slack * truth.abs().clamp(min=1e-3))
        if bool(wrong.any()):
            at = tuple(int(j) for j in wrong.nonzero()[0])
            raise WrongError(
                f"result {i} is wrong in {int(wrong.sum())} of {wrong.numel()} places: at "
                f"{list(at)} {result[at].item()}, not {truth[at].item()}"
            )
