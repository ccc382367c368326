"""Which checks there are on a device, and running them in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch

from .. import _dispatch, _isolated, _verified
from .._verified import FAILED, RUNNING, UNKNOWN, Check, Result

WORKER = "fastsae.verify.worker"
LIMIT_S = 240.0  # one check: all its kernels compiled for the first time, then milliseconds
INTERPRETED_LIMIT_S = 900.0

# The out-of-memory killer, a scheduler, Ctrl-C: no kernel sends these.
_FROM_OUTSIDE = tuple(f"killed by {name}" for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"))

OnResult = Callable[[Check, Result], None]


def checks(device: torch.device, ops: Iterable[str] = _dispatch.OPS) -> list[Check]:
    """Every check of a device: each op, backend, design and dtype that can run there.

    On a CPU: each instruction-set level that it has, and the Triton kernels for the interpreter.
    """
    found = []
    for op in ops:
        for backend in _dispatch.BACKENDS[1:]:
            for design, dtypes in _dispatch.designs(op, backend, device).items():
                for dtype in dtypes:
                    found.append(Check(op, backend, design, str(dtype).removeprefix("torch.")))
    # the checks of one design in a row, so that they share a process
    return sorted(found, key=lambda c: (c.backend, c.op if c.backend != "cpu" else "", c.design))


def isolated(
    wanted: Sequence[Check],
    device: torch.device,
    *,
    scale: str,
    repeat: int = 1,
    on_result: OnResult = lambda check, result: None,
    interpret: bool = False,
    limit_s: float | None = None,
) -> dict[Check, Result]:
    """Runs checks in a process that the first failure ends; the rest goes on in another.

    A check that hangs for `limit_s` or ends its process has failed. Where no process can be started
    or the device cannot be had there, the results are "unknown".
    """
    results: dict[Check, Result] = {}
    limit = limit_s or (INTERPRETED_LIMIT_S if interpret else LIMIT_S)
    env = {"TRITON_INTERPRET": "1" if interpret else "0"}
    left = list(wanted)
    while left:
        running: list[Check] = []
        ready = False

        def take(row: dict[str, object], running: list[Check] = running) -> None:
            nonlocal ready
            if "ready" in row:
                ready = True
                return
            check = Check(*row["check"])  # type: ignore[misc]
            if row["state"] == RUNNING:
                running[:] = [check]
                return
            running.clear()
            results[check] = Result(row["state"], row["seconds"], row["reason"])  # type: ignore[arg-type]
            on_result(check, results[check])

        names = [":".join(check) for check in left]
        arguments = ["--device", str(device), "--scale", scale, "--repeat", str(repeat), *names]
        try:
            why = _isolated.rows(WORKER, arguments, take, limit_s=limit, env=env)
        except OSError as error:
            why = str(error)
        for check in running:
            why = why or "the process ended without a result"
            state = UNKNOWN if why.startswith(_FROM_OUTSIDE) else FAILED
            results[check] = Result(state, 0.0, why)
            on_result(check, results[check])
        rest = [check for check in left if check not in results]
        if not ready or len(rest) == len(left):
            for check in rest:
                results[check] = Result(UNKNOWN, 0.0, f"could not be checked: {why}")
                on_result(check, results[check])
            break
        left = rest
    return results


def groups(wanted: Sequence[Check]) -> list[list[Check]]:
    """Checks by process: one for each CPU level, and for each op, backend and design of a GPU."""
    found: dict[tuple[str, ...], list[Check]] = {}
    for check in wanted:
        own = (check.backend, check.design) if check.backend == "cpu" else check[:3]
        found.setdefault(own, []).append(check)
    return list(found.values())


def verify(
    device: torch.device,
    ops: Sequence[str] = _dispatch.OPS,
    *,
    repeat: int = 1,
    on_result: OnResult = lambda check, result: None,
) -> dict[Check, Result]:
    """Runs every check of a device, each design in a process of its own, and records the results.

    Args:
        device: a CPU (its instruction-set levels, and Triton's kernels interpreted) or a GPU.
        ops: names of operators.
        repeat: how often every call is made; a race may show in one of many.
        on_result: called with each result as it comes.

    Interpreted results are returned and not recorded: they say nothing about a device.
    """
    results: dict[Check, Result] = {}
    for group in groups(checks(device, ops)):
        interpret = device.type == "cpu" and group[0].backend == "triton"
        scale = "tiny" if interpret else "production" if device.type == "cuda" else "small"
        with contextlib.nullcontext() if interpret else _verified.lock(device):
            found = isolated(
                group, device, scale=scale, repeat=repeat, on_result=on_result, interpret=interpret
            )
            results |= found
            if not interpret:
                known = {c: r for c, r in found.items() if r.state != UNKNOWN}
                _verified.record(device).write(known)
    return results
