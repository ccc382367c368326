"""Checks at a kernel's first use on a device, for want of a record.

On a GPU in a process of its own, which a faulty kernel may crash or hang. On a CPU in this process:
what is checked there is an instruction-set level, in milliseconds, and a note is left before it
begins, so that a level that ends the process is not tried again by the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import _verified
from .._capture import is_capturing
from .._verified import FAILED, PASSED, RUNNING, UNKNOWN, Check, Result
from . import run, worker

# references that read sizes or scalars from the device
_WAITS = ("sparse_grad_weight", "sparse_grad_weight_rows", "sparse_adam_step")


def check(unknown: list[Check], device: torch.device) -> dict[Check, Result]:
    """Results for checks that the record has none of; recorded where they are certain, those of
    interpreted kernels for this process only."""
    record = _verified.record(device)
    if unknown[0].backend == "cpu":
        return {c: _in_process(c, device) for c in unknown}
    if is_capturing(device):
        return {c: Result(UNKNOWN, reason="a CUDA graph is being captured") for c in unknown}
    with _verified.lock(device):
        record.refresh()  # another process of this job may have been first
        left = [c for c in unknown if record[c].state not in (PASSED, FAILED)]
        interpret = device.type != "cuda"
        scale = "tiny" if interpret else "production"
        found = run.isolated(left, device, scale=scale, interpret=interpret) if left else {}
        certain = {c: r for c, r in found.items() if r.state in (PASSED, FAILED)}
        if interpret:  # says nothing about the device that the record is of
            record.results |= certain
        else:
            record.write(certain)
    return {c: found.get(c, record[c]) for c in unknown}


def _in_process(one: Check, device: torch.device) -> Result:
    record = _verified.record(device)
    note = _Note.of_this_process()
    before = record[one]
    if before.state == RUNNING:
        left = _Note.read(before.reason)
        if left.boot == note.boot and not left.is_alive():
            # once may have been a signal from outside, which nothing here can tell apart
            note = note._replace(ended=left.ended + 1)
    if note.ended > 1:
        result = Result(FAILED, 0.0, "the process ended while this check ran, twice")
        record.write({one: result})
        return result
    record.write({one: Result(RUNNING, reason=str(note))})
    result = Result(UNKNOWN, reason="interrupted")
    try:
        with _uninterrupted(), _undisturbed():
            result = Result(*worker.verdict(one, device, scale="small"))
        if result.state == FAILED and not result.reason.startswith(worker.WRONG):
            # raised for a reason of this process: no memory, a mode, a patch
            result.state = UNKNOWN
    finally:
        record.write({one: result})
    return result


class _Note(NamedTuple):
    """Whose check is under way, in the record: a process that is gone has not finished it."""

    boot: str  # and the namespace of its ids, which a container has of its own
    pid: int
    start: str  # of the process, in ticks since boot
    ended: int = 0  # processes that have ended in this check before

    @classmethod
    def of_this_process(cls) -> _Note:
        boot = _first_line("/proc/sys/kernel/random/boot_id")
        with contextlib.suppress(OSError):
            boot += " " + os.readlink("/proc/self/ns/pid")
        return cls(boot, os.getpid(), _start(os.getpid()))

    @classmethod
    def read(cls, text: str) -> _Note:
        try:
            boot, pid, start, ended = text.split("/")
            return cls(boot, int(pid), start, int(ended))
        except ValueError:
            return cls("?", 0, "")

    def __str__(self) -> str:
        return "/".join(map(str, self))

    def is_alive(self) -> bool:
        if self.start:
            return _start(self.pid) == self.start
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


def _start(pid: int) -> str:
    """When a process began; "" where that cannot be known, or it is gone."""
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Handlers written in Python, Ctrl-C's first of all, wait for the end of the check, which would
    take what they raise for an error of the kernel."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    before = {n: handler for n, handler in before.items() if callable(handler)}
    try:
        for n in before:
            signal.signal(n, lambda number, frame: came.append(number))
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        for n in came:
            signal.raise_signal(n)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the caller's modes and default device, and on one thread: idle neighbours would only
    be waited for."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        with (
            torch._C.DisableTorchFunction(),
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def reference(unproved: Check, run: Callable[..., Any], *args: Any) -> Any:
    """The reference in place of kernels that cannot be checked now, where its memory is there.

    Raises:
        RuntimeError: it would not fit; names the command that checks the kernels.
    """
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    need, free = _bytes(unproved.op, args), _free(device)
    why = None
    if need > free:
        why = f"needs {need / 2**30:.1f} GB, {free / 2**30:.1f} are free"
    elif unproved.op in _WAITS and is_capturing(device):
        why = "waits for the device, which a CUDA graph that is being captured cannot"
    if why is not None:
        raise RuntimeError(
            f"{unproved.op}: the kernel {unproved} has not been checked on {device} and cannot be "
            f"checked now; the reference in its place {why}. Run `fastsae verify` once on this "
            "machine."
        )
    return run(*args)


def _bytes(op: str, args: tuple[Any, ...]) -> int:
    """What the reference allocates, roughly: wide copies of its inputs, and scores."""
    wide = 4 * sum(a.numel() for a in args if isinstance(a, torch.Tensor))
    if op in ("topk_encode", "topk_member"):
        x, w = args[:2]
        tokens = x.numel() // w.shape[1]
        return wide + 24 * min(tokens * len(w), max(1 << 24, len(w)))
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
