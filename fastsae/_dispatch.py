"""The only file that chooses a backend.

Per op and device there is an ordered tuple of backends, first usable wins. The order is data; the
comment beside a row names the benchmark that justifies it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import _library
from ._warnings import warn_slow

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = tuple(_library.PRIVATE_SCHEMAS)

# C++ beats the reference in every row of benchmarks/bench_<op>.py on every CPU tried.
_ON_CPU = ("cpu", "reference")
# Unverified on a GPU, no row measured: CUDA C++ exists only where it is expected to win.
_ON_GPU = ("cuda", "triton", "reference")
ORDER: dict[str, dict[str, tuple[str, ...]]] = {op: {"cpu": _ON_CPU, "cuda": _ON_GPU} for op in OPS}

_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_GPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


@dataclass(frozen=True)
class Choice:
    """One backend's verdict for one call: usable when `missing` is None."""

    backend: str
    missing: str | None


@cache
def _triton_module(op: str) -> Any:
    stem = "sparse_grad_weight" if op == "sparse_grad_weight_rows" else op
    try:
        return importlib.import_module(f"fastsae.triton_kernels.{stem}")
    except ImportError as error:
        return str(error)


def _triton_interprets() -> bool:
    """Whether the kernels were defined for Triton's interpreter, which runs them on CPU tensors."""
    interprets: bool = importlib.import_module("fastsae.triton_kernels").INTERPRETED
    return interprets


@cache
def _missing(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on this device and dtype; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device != "cpu":
            return f"the C++ CPU kernels need CPU tensors, got {device}"
        if dtype not in _CPU_DTYPES:
            return f"the C++ CPU kernels do not take {dtype}"
        return _library.CPU_MISSING
    if dtype not in _GPU_DTYPES:
        return f"the {backend} kernels do not take {dtype}"
    if backend == "triton":
        module = _triton_module(op)
        if isinstance(module, str):
            return f"no Triton kernel for {op}: {module}"
        if device != "cuda" and not (device == "cpu" and _triton_interprets()):
            return (
                f"the triton kernels need a GPU tensor, got {device} (with TRITON_INTERPRET=1 in "
                "the environment CPU tensors run in Triton's interpreter: slow, for tests)"
            )
        return None
    # the tests build the same kernels for CPU tensors (tests/cuda_host.py)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsae::{op}_cuda", device.upper()):
        if device != "cuda":
            return f"the cuda kernels need a GPU tensor, got {device}"
        return _library.CUDA_MISSING or f"no CUDA C++ kernel for {op}"
    return None


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    if backend == "reference":
        from . import reference

        return getattr(reference, op)
    if backend == "triton":
        return getattr(_triton_module(op), op)
    return getattr(torch.ops.fastsae, f"{op}_{backend}").default


_forced: str | None = None


def _check_backend(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, one of {', '.join(BACKENDS)}, auto")
    return name


_forced = _check_backend(os.environ.get("FASTSAE_BACKEND"), "FASTSAE_BACKEND")


@cache
def _select(op: str, device: str, dtype: torch.dtype, forced: str | None) -> Callable[..., Any]:
    if forced is not None:
        why = _missing(op, forced, device, dtype)
        if why is not None:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for and cannot run: {why}")
        return _implementation(op, forced)
    reasons: list[str] = []
    for backend in ORDER[op].get(device, ("reference",)):
        why = _missing(op, backend, device, dtype)
        if why is None:
            # fp64 on a GPU is for checks: no kernel is missing that a build would bring
            if backend == "reference" and (device == "cpu" or dtype != torch.float64):
                warn_slow(op, torch.device(device), "; ".join(reasons) or f"none for {device}")
            return _implementation(op, backend)
        reasons.append(why)
    raise AssertionError("reference is always usable")


def select(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` for tensors like this one."""
    return _select(op, tensor.device.type, tensor.dtype, _forced)


def required(op: str, backend: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` by one backend, whatever is forced; raises when it cannot run."""
    return _select(op, tensor.device.type, tensor.dtype, backend)


def forced() -> str | None:
    """The backend that `use_backend` asked for."""
    return _forced


@contextmanager
def _restore(previous: str | None) -> Iterator[None]:
    global _forced
    try:
        yield
    finally:
        _forced = previous


def use_backend(name: str | None) -> Any:
    """Forces a backend for every op from now on, or inside a `with` block.

    Args:
        name: "reference", "cpu", "triton", "cuda", or None / "auto" to choose again by data.

    A forced backend that cannot run a call raises RuntimeError and says why. The setting is
    process-wide (autograd runs backward passes on other threads). The environment variable
    `FASTSAE_BACKEND` sets the initial value.
    """
    global _forced
    previous, _forced = _forced, _check_backend(name, "use_backend")
    return _restore(previous)


def verdicts(op: str, device: str, dtype: torch.dtype) -> list[Choice]:
    """Every backend's verdict for `op`, in order of preference."""
    order = ORDER[op].get(device, ("reference",))
    order += tuple(b for b in BACKENDS if b not in order)
    return [Choice(b, _missing(op, b, device, dtype)) for b in order]


def chosen(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that a call would take."""
    if _forced is not None:
        return _forced
    return next(c.backend for c in verdicts(op, device, dtype) if c.missing is None)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend `fastsae.ops.<op>(*args)` would take, and why not the others.

    Args:
        op: name of an operator, e.g. "topk_encode".
        *args, **kwargs: the call's arguments; only devices, dtypes and strides are looked at.
            Without a tensor among them, fp32 on the CPU is assumed.

    Raises:
        ValueError: unknown op.
    """
    if op not in OPS:
        raise ValueError(f"explain: unknown op {op!r}, one of {', '.join(OPS)}")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    device, dtype = like.device.type, like.dtype
    backend = chosen(op, device, dtype)
    lines = [f"{op} on {device}, {dtype}: {backend}" + (" (forced)" if _forced else "")]
    for choice in verdicts(op, device, dtype):
        lines.append(f"  {choice.backend}: {choice.missing or 'usable'}")
    if backend == "cpu" and _library.CPU_MISSING is None:
        lines.append(f"  C++ level: {torch.ops.fastsae._cpu_level()}")
    copies = [tuple(t.shape) for t in tensors if not t.is_contiguous()]
    if copies:
        lines.append(f"  copied first, not contiguous: {', '.join(map(str, copies))}")
    return "\n".join(lines)
