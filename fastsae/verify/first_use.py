"""Checks at a kernel's first use on a device, for want of a record.

On a GPU in a process of its own, which a faulty kernel may crash or hang. On a CPU in this process:
what is checked there is an instruction-set level, in milliseconds, and a note is left before it
begins, so that a level that ends the process is not tried again by the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import _verified
from .._verified import FAILED, PASSED, RUNNING, UNKNOWN, Check, Result
from . import run, worker


def check(unknown: list[Check], device: torch.device) -> dict[Check, Result]:
    """Results for checks that the record has none of; recorded where they are certain."""
    record = _verified.record(device)
    if unknown[0].backend == "cpu":
        return {c: _in_process(c, device) for c in unknown}
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return {c: Result(UNKNOWN, reason="a CUDA graph is being captured") for c in unknown}
    with _verified.lock(device):
        record.refresh()  # another process of this job may have been first
        left = [c for c in unknown if record[c].state not in (PASSED, FAILED)]
        interpret = device.type != "cuda"
        scale = "tiny" if interpret else "production"
        found = run.isolated(left, device, scale=scale, interpret=interpret) if left else {}
        record.write({c: r for c, r in found.items() if r.state in (PASSED, FAILED)})
    return {c: found.get(c, record[c]) for c in unknown}


def _in_process(one: Check, device: torch.device) -> Result:
    record = _verified.record(device)
    before = record[one]
    if before.state == RUNNING and not _is_alive(before.reason):
        result = Result(FAILED, 0.0, "the process ended while this check ran")
    else:
        record.write({one: Result(RUNNING, reason=str(os.getpid()))})
        with _undisturbed():
            state, seconds, reason = worker.verdict(one, device, scale="small")
        result = Result(state, seconds, reason)
    record.write({one: result})
    return result


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the caller's modes, and on one thread: idle neighbours would only be waited for."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def reference(unproved: Check, run: Callable[..., Any], *args: Any) -> Any:
    """The reference in place of kernels that cannot be checked now, where its memory is there.

    Raises:
        RuntimeError: it would not fit; names the command that checks the kernels.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    need, free = _bytes(unproved.op, args), _free(tensors[0].device)
    if need > free:
        raise RuntimeError(
            f"{unproved.op}: the kernel {unproved} has not been checked on {tensors[0].device} and "
            f"cannot be checked now; the reference in its place needs {need / 2**30:.1f} GB, "
            f"{free / 2**30:.1f} are free. Run `fastsae verify` once on this machine."
        )
    return run(*args)


def _bytes(op: str, args: tuple[Any, ...]) -> int:
    """What the reference allocates, roughly: wide copies of its inputs, and scores."""
    wide = 4 * sum(a.numel() for a in args if isinstance(a, torch.Tensor))
    if op == "topk_member":
        x, w = args[:2]
        return wide + 24 * (x.numel() // max(x.shape[-1], 1)) * len(w)
    if op == "topk_encode":
        x, w = args[:2]
        return wide + 24 * min(len(x) * len(w), max(1 << 24, len(w)))
    if op == "topk":
        return 4 * wide
    if op in ("sparse_grad_weight", "sparse_grad_weight_rows"):
        return wide + 8 * int(args[3]) * int(args[2].shape[-1])
    return 3 * wide


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 62
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
