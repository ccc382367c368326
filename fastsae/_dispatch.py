"""The only file that chooses a backend.

Per op and device there is an ordered tuple of backends, first usable wins. The order is data; the
comment beside a row names the benchmark that justifies it. A kernel is used only where its
known-answer check has passed on this very device (`_verified`, `fastsae verify`): one whose check
is not on record is checked at first use, in a process of its own on a GPU.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from . import _library, _verified
from ._capture import is_capturing
from ._verified import FAILED, PASSED, UNKNOWN, Check, Result
from ._warnings import KernelCheckWarning, warn_slow

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = tuple(_library.PRIVATE_SCHEMAS)

# C++ beats the reference in every row of benchmarks/bench_<op>.py on every CPU tried.
_ON_CPU = ("cpu", "reference")
# Unverified on a GPU, no row measured: CUDA C++ exists only where it is expected to win.
_ON_GPU = ("cuda", "triton", "reference")
ORDER: dict[str, dict[str, tuple[str, ...]]] = {op: {"cpu": _ON_CPU, "cuda": _ON_GPU} for op in OPS}

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_GPU = (8, 0)  # what the kernels are compiled for: bf16 products, asynchronous copies

# Ops that Triton kernels compute by one of several designs: the op whose kernel has their table,
# which says what each needs and takes, and where in a call k stands. topk_member's kernel calls
# that of topk_encode. The one design of any other op is "default".
_DESIGNED = {"topk_encode": ("topk_encode", 3), "topk_member": ("topk_encode", 4)}

# Kinds of device whose kernels must have passed their checks; tests add to it.
GUARDED = {"cpu", "cuda"}


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
def _too_old(device: torch.device) -> str | None:
    """Why no GPU kernel can run on this device; None when they can, and on a CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST_GPU:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} is sm_{capability[0]}{capability[1]}; the GPU kernels need sm_80 or later"


@cache
def _no_image(device: torch.device) -> str | None:
    """Why the CUDA library cannot run on this device, asked of the driver; None when it can."""
    if device.type != "cuda" or _library.CUDA_MISSING is not None:
        return None
    if not _has_kernel("_cuda_image", "CompositeExplicitAutograd"):
        return None
    why: str = torch.ops.fastsae._cuda_image(_index(device))
    return f"the CUDA library has no code for this GPU: {why}" if why else None


def _has_kernel(operator: str, key: str) -> bool:
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsae::{operator}", key)
    return has


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _device(device: torch.device | str) -> torch.device:
    """With an index where there can be several, so that each is judged by itself."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@cache
def _missing(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on this device and dtype; None when it can."""
    device = torch.device(device)
    kind = device.type
    if backend == "reference":
        return None
    if backend == "cpu":
        if kind != "cpu":
            return f"the C++ CPU kernels need CPU tensors, got {kind}"
        if dtype not in _CPU_DTYPES:
            return f"the C++ CPU kernels do not take {dtype}"
        return _library.CPU_MISSING
    if dtype not in _GPU_DTYPES:
        return f"the {backend} kernels do not take {dtype}"
    if backend == "triton":
        module = _triton_module(op)
        if isinstance(module, str):
            return f"no Triton kernel for {op}: {module}"
        if kind != "cuda" and not (kind == "cpu" and _triton_interprets()):
            return (
                f"the triton kernels need a GPU tensor, got {kind} (with TRITON_INTERPRET=1 in "
                "the environment CPU tensors run in Triton's interpreter: slow, for tests)"
            )
        return _too_old(device)
    # the tests build the same kernels for CPU tensors (tests/support/cuda_host.py)
    if not _has_kernel(f"{op}_cuda", kind.upper()):
        if kind != "cuda":
            return f"the cuda kernels need a GPU tensor, got {kind}"
        return _library.cuda_missing(op)
    return _too_old(device) or _no_image(device)


def _table(op: str, backend: str) -> tuple[Any, ...]:
    """The designs of `op` itself in a backend; () where it has one."""
    if backend != "triton" or _DESIGNED.get(op, ("",))[0] != op:
        return ()
    table: tuple[Any, ...] = getattr(_triton_module(op), "DESIGNS", ())
    return table


def designs(op: str, backend: str, device: torch.device) -> dict[str, tuple[torch.dtype, ...]]:
    """The ways in which `backend` can compute `op` on a device, and the dtypes of each: what there
    is to check. On a CPU they are the instruction-set levels."""
    if backend == "cpu":
        if device.type != "cpu" or _library.CPU_MISSING is not None:
            return {}
        return dict.fromkeys(torch.ops.fastsae._cpu_levels().split(), _CPU_DTYPES)
    if _missing(op, backend, device, torch.float32) is not None and not (
        device.type == "cpu" and backend == "triton" and not isinstance(_triton_module(op), str)
    ):  # a process of its own can interpret the Triton kernels
        return {}
    table = [d for d in _table(op, backend) if d.unavailable(device) is None]
    return {d.name: d.dtypes for d in table} or {"default": _GPU_DTYPES}


# ---- what has been proved ---------------------------------------------------------------------


def _candidates(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Of `op` itself, the checks that stand between a call that names no design and `backend`."""
    name = str(dtype).removeprefix("torch.")
    if backend == "cpu":
        return [Check(op, backend, torch.ops.fastsae._cpu_level(), name)]
    table = [d for d in _table(op, backend) if d.asked_for is None and dtype in d.dtypes]
    found = [Check(op, backend, d.name, name) for d in table if d.unavailable(device) is None]
    return found or [Check(op, backend, "default", name)]


def _within(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """The checks of the op that `backend`'s kernel of `op` calls; [] where it calls none."""
    inner = _DESIGNED.get(op, (op,))[0] if backend == "triton" else op
    return [] if inner == op else _candidates(inner, backend, device, dtype)


def _is_guarded(device: torch.device, backend: str) -> bool:
    if backend == "reference" or device.type not in GUARDED:
        return False
    # a level that was chosen by hand is forced, as a backend can be
    return backend != "cpu" or not os.environ.get("FASTSAE_CPU_LEVEL")


# Checks that could not be made, and until when (time.monotonic) they are not tried again: each try
# on a GPU is a process.
_put_off: dict[tuple[Check, torch.device], tuple[float, Result]] = {}
_PUT_OFF_S = 60.0


def _results(checks: list[Check], device: torch.device) -> dict[Check, Result]:
    """The record of checks, which are run now where it has none."""
    record, settled = _verified.record(device), (PASSED, FAILED)
    found = {c: record[c] for c in checks}
    unknown = []
    for c in checks:
        if found[c].state in settled:
            continue
        until, result = _put_off.get((c, device), (0.0, found[c]))
        if time.monotonic() < until:
            found[c] = result
        else:
            unknown.append(c)
    if unknown:
        record.refresh()
        found |= {c: record[c] for c in unknown}
        unknown = [c for c in unknown if found[c].state not in settled]
    if not unknown:
        return found
    from .verify import first_use

    if is_capturing(device):
        return found | first_use.check(unknown, device)  # nothing is tried: ask again afterwards
    tried = first_use.check(unknown, device)
    for c, result in tried.items():
        if result.state == UNKNOWN:
            _put_off[c, device] = time.monotonic() + _PUT_OFF_S, result
    return found | tried


_warned: set[Check] = set()


def _warn(check: Check, result: Result, device: torch.device) -> None:
    """Once for each check of a process."""
    if check in _warned:
        return
    _warned.add(check)
    if result.state == FAILED:
        what = f"failed its known-answer check on {device} and is not used there"
        how = "`fastsae verify` repeats the check"
    else:
        what = f"has not been checked on {device} and is not used"
        how = "run `fastsae verify`"
    warnings.warn(
        f"fastsae: the kernel {check} {what} ({result.reason}); {how}",
        KernelCheckWarning,
        stacklevel=2,
    )


# ---- choosing ---------------------------------------------------------------------------------


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

_Key = tuple[str, torch.device, torch.dtype, str | None]
_selected: dict[_Key, tuple[str, Callable[..., Any]]] = {}
# what calls take that the selected backend's proved designs cannot, by the backends left
_next: dict[tuple[_Key, tuple[str, ...]], tuple[str, Callable[..., Any]]] = {}


def forget() -> None:
    """Chooses anew from here on, after a library was loaded or a level changed."""
    _selected.clear()
    _next.clear()
    _put_off.clear()
    for cached in (_missing, _no_image, _too_old):
        cached.cache_clear()


_choosing = threading.RLock()  # a check may bring another CPU level into force


def _unlock() -> None:
    """In a forked child nobody holds the lock: the thread that did is not there."""
    global _choosing
    _choosing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def _select(key: _Key) -> tuple[str, Callable[..., Any]]:
    """The backend's name and its implementation for tensors of one device and dtype."""
    with _choosing:
        return _selected.get(key) or _chosen(key)


def _chosen(key: _Key) -> tuple[str, Callable[..., Any]]:
    op, device, dtype, forced = key
    if forced is not None:
        why = _missing(op, forced, device, dtype)
        if why is not None:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for and cannot run: {why}")
        _selected[key] = forced, _implementation(op, forced)
        return _selected[key]
    found, settled = _first_of(ORDER[op].get(device.type, ("reference",)), key)
    if settled:
        _selected[key] = found
    return found


def _one_of(rest: tuple[str, ...], key: _Key) -> Callable[..., Any]:
    """The implementation for calls that the backends before `rest` cannot take."""
    with _choosing:
        found = _next.get((key, rest))
        if found is None:
            found, settled = _first_of(rest, key)
            if settled:
                _next[key, rest] = found
    return found[1]


def _first_of(order: tuple[str, ...], key: _Key) -> tuple[tuple[str, Callable[..., Any]], bool]:
    """The first backend of `order` that can run and has been proved, and whether that is settled: a
    check that could not be made now may be made later."""
    op, device, dtype, _ = key
    reasons: list[str] = []
    unproved = None
    for i, backend in enumerate(order):
        missing = _missing(op, backend, device, dtype)
        if missing is not None:
            reasons.append(missing)
            continue
        run = _implementation(op, backend)
        if _is_guarded(device, backend):
            results = _proved(op, backend, device, dtype)
            for check, result in results.items():
                if result.state != PASSED:
                    _warn(check, result, device)
                    if result.state == UNKNOWN:
                        unproved = check
            passed = [c for c, r in results.items() if r.state == PASSED]
            if {c.op for c in passed} != {c.op for c in results}:
                reasons.append(f"the {backend} kernels did not pass their checks here")
                continue
            if backend == "triton" and len(passed) < len(results):
                inner = _DESIGNED[op][0]
                trusted = frozenset(c.design for c in passed if c.op == inner)
                run = partial(_some_designs, key, order[i + 1 :], run, trusted)
        elif backend == "reference":
            if unproved is not None:
                from .verify import first_use

                return (backend, partial(first_use.reference, unproved, run)), False
            # fp64 on a GPU is for checks: no kernel is missing that a build would bring
            if device.type != "cuda" or dtype != torch.float64:
                warn_slow(op, device, "; ".join(reasons) or f"there are none for {device.type}")
        return (backend, run), unproved is None
    raise AssertionError("reference is always usable")


def _some_designs(
    key: _Key, rest: tuple[str, ...], run: Callable[..., Any], trusted: frozenset[str], *args: Any
) -> Any:
    """Triton kernels of which some designs failed: calls that need those go to the next backend."""
    inner, k = _DESIGNED[key[0]]
    if _triton_module(inner).design_of(args[0], args[1], args[k], trusted) is None:
        return _one_of(rest, key)(*args)
    return run(*args, trusted=trusted)


def _proved(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> dict[Check, Result]:
    """The checks that stand between a call that names no design and `backend`.

    On a CPU those of its level and, while they fail, of the ones below; the first that passes comes
    into force, for everything.
    """
    if backend != "cpu":
        wanted = _candidates(op, backend, device, dtype) + _within(op, backend, device, dtype)
        return _results(wanted, device)
    results: dict[Check, Result] = {}
    before = torch.ops.fastsae._cpu_level()
    for check in _levels(op, dtype):
        results |= _results([check], device)
        if results[check].state == PASSED:
            if check.design != before:
                forget()
            torch.ops.fastsae._set_cpu_level(check.design)
            return results
        if results[check].state == UNKNOWN:
            break  # may be known later: no reason for another level
    torch.ops.fastsae._set_cpu_level(before)  # for the ops of which it has passed
    return results


def _levels(op: str, dtype: torch.dtype) -> list[Check]:
    """The checks of the CPU level in force and of those below, downwards."""
    levels = torch.ops.fastsae._cpu_levels().split()
    at = levels.index(torch.ops.fastsae._cpu_level())
    name = str(dtype).removeprefix("torch.")
    return [Check(op, "cpu", level, name) for level in reversed(levels[: at + 1])]


def select(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` for tensors like this one."""
    key = op, tensor.device, tensor.dtype, _forced
    return (_selected.get(key) or _select(key))[1]


def backend_of(op: str, tensor: torch.Tensor) -> str:
    """The backend that `select` takes for tensors like this one."""
    key = op, tensor.device, tensor.dtype, _forced
    return (_selected.get(key) or _select(key))[0]


def required(
    op: str, design: str, x: torch.Tensor, W_enc: torch.Tensor, k: int
) -> Callable[..., Any]:
    """The implementation of `op` by a design that the call names, whatever is forced.

    Raises:
        ValueError: there is no such design.
        RuntimeError: it cannot run, or did not pass its check on this device.
    """
    why = _cannot(op, design, x, W_enc, k)
    if why is None and _is_guarded(x.device, "triton"):
        check = Check(op, "triton", design, str(x.dtype).removeprefix("torch."))
        result = _results([check], x.device)[check]
        if result.state != PASSED:
            why = (
                f"it is not proved on {x.device}: {result.reason}. `fastsae verify --op {op}` "
                "checks it"
            )
    if why is not None:
        raise RuntimeError(f"{op}: design {design!r} was asked for and cannot run: {why}")
    return partial(_implementation(op, "triton"), design=design)


def _cannot(op: str, design: str, x: torch.Tensor, W_enc: torch.Tensor, k: int) -> str | None:
    """Why a design cannot run a call; None when it can."""
    table = {d.name: d for d in _table(op, "triton")}
    if table and design not in table:
        raise ValueError(
            f"{op}: design must be None or one of {list(table)} (the C++ kernels choose among "
            f"theirs for themselves), got {design!r}"
        )
    why = _missing(op, "triton", x.device, x.dtype)
    return why if why is not None else table[design].refuses(x, W_enc, k)


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

    A forced backend that cannot run a call raises RuntimeError and says why; whether its kernels
    have passed their checks on this device is not asked. The setting is process-wide (autograd runs
    backward passes on other threads). The environment variable `FASTSAE_BACKEND` sets the initial
    value.
    """
    global _forced
    previous, _forced = _forced, _check_backend(name, "use_backend")
    return _restore(previous)
