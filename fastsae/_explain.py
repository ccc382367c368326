"""What a call would take, and why not the rest: nothing is run, checked or chosen here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _dispatch, _library, _verified
from ._verified import FAILED, PASSED, Check


@dataclass(frozen=True)
class Choice:
    """One backend's verdict for one call: usable when `missing` is None.

    `designs` says of each design whether it has passed its check on this device.
    """

    backend: str
    missing: str | None
    designs: dict[str, str] = field(default_factory=dict)


_LATER = "not checked"


def _states(checks: list[Check], device: torch.device) -> dict[str, str]:
    """What the record says of the designs that a call may take; nothing is run."""
    if not checks or not _dispatch._is_guarded(device, checks[0].backend):
        return {}
    record = _verified.record(device)
    record.refresh()
    found = {}
    for check in checks:
        result = record[check]
        until, tried = _dispatch._put_off.get((check, device), (0.0, result))
        left = until - time.monotonic()
        if result.state in (PASSED, FAILED):
            found[check.design] = result.state + (f": {result.reason}" if result.reason else "")
        elif left > 0:
            found[check.design] = f"{_LATER}: {tried.reason}; tried again in {left:.0f} s"
        else:
            found[check.design] = "unknown: checked at first use"
        if check.backend == "cpu" and result.state != FAILED:
            break  # the level that a call would take
    return found


def _is_usable(state: str) -> bool:
    """Whether a call would take a design in this state, if what is not yet checked passes."""
    return not state.startswith((FAILED, _LATER))


def verdicts(op: str, device: torch.device | str, dtype: torch.dtype) -> list[Choice]:
    """Every backend's verdict for `op`, in order of preference. Nothing is checked by it."""
    device = _dispatch._device(device)
    order = _dispatch.ORDER[op].get(device.type, ("reference",))
    order += tuple(b for b in _dispatch.BACKENDS if b not in order)
    found = []
    for backend in order:
        missing, states = _dispatch._missing(op, backend, device, dtype), {}
        if missing is None and backend != "reference":
            cpu = backend == "cpu"
            own = (
                _dispatch._levels(op, dtype)
                if cpu
                else _dispatch._candidates(op, backend, device, dtype)
            )
            states = _states(own, device)
            inner = _states(_dispatch._within(op, backend, device, dtype), device)
            missing = _unproved(states) or _unproved(inner, "the kernel that it calls ")
        found.append(Choice(backend, missing, states))
    return found


def _unproved(states: dict[str, str], whose: str = "") -> str | None:
    """Why none of the designs in these states would be used; None when one would."""
    if not states or any(map(_is_usable, states.values())):
        return None
    failed = all(state.startswith(FAILED) for state in states.values())
    why = "failed its known-answer check" if failed else "could not be checked"
    return f"{whose}{why} on this device"


def chosen(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that a call would take, if what is not yet checked passes."""
    if _dispatch._forced is not None:
        return _dispatch._forced
    return next(c.backend for c in verdicts(op, device, dtype) if c.missing is None)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend and design `fastsae.ops.<op>(*args)` would take, and why not the others.

    Args:
        op: name of an operator, e.g. "topk_encode".
        *args, **kwargs: the call's arguments; only devices, dtypes and strides are looked at, and
            for an op with several designs the shapes. Without a tensor among them, fp32 on the CPU
            is assumed.

    Nothing is run: a kernel without a record of its check is taken to pass it.

    Raises:
        ValueError: unknown op or design.
    """
    if op not in _dispatch.OPS:
        raise ValueError(f"explain: unknown op {op!r}, one of {', '.join(_dispatch.OPS)}")
    names = [a.name for a in getattr(torch.ops.fastsae, op).default._schema.arguments]
    call = dict(zip(names, args)) | kwargs
    tensors = [a for a in call.values() if isinstance(a, torch.Tensor)]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    device, dtype = like.device, like.dtype
    asked, backend, lines = call.get("design"), None, []
    for choice in verdicts(op, device, dtype):
        designs, missing = choice.designs, choice.missing
        if backend is None and asked is None and _dispatch._forced in (None, choice.backend):
            designs, missing = _told(op, choice, call)
            if missing is None or _dispatch._forced is not None:
                backend = choice.backend
                levels = [level for level, state in choice.designs.items() if _is_usable(state)]
        lines.append(f"  {choice.backend}: {missing or 'usable'}")
        lines += [f"    {design}: {state}" for design, state in designs.items()]
    what = f"{backend} (forced)" if _dispatch._forced else backend
    if asked is not None:
        what = _named(op, asked, call)
    lines.insert(0, f"{op} on {device}, {dtype}: {what}")
    if backend == "cpu" and _library.CPU_MISSING is None:
        lines.append(f"  C++ level: {levels[0] if levels else torch.ops.fastsae._cpu_level()}")
        given = _given(op, call) if op == "topk_encode" else None
        if given is not None and given[0].device.type == "cpu" and given[0].numel():
            rows = given[0].reshape(-1, given[0].shape[-1])
            design = torch.ops.fastsae._topk_encode_design(rows, len(given[1]), given[2])
            lines.append(f"  C++ design: {design} (all of them give the same bits)")
    copies = [tuple(t.shape) for t in tensors if not t.is_contiguous()]
    if copies:
        lines.append(f"  copied first, not contiguous: {', '.join(map(str, copies))}")
    return "\n".join(lines)


def _told(op: str, choice: Choice, call: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """Of each design of a backend whether a call takes it, or why not; and why it takes none."""
    given = _given(op, call)
    if choice.missing is not None or choice.backend != "triton" or given is None:
        return choice.designs, choice.missing
    inner, device, dtype = (
        _dispatch._DESIGNED[op][0],
        _dispatch._device(given[0].device),
        given[0].dtype,
    )
    wanted = [] if _dispatch._forced else _dispatch._candidates(inner, "triton", device, dtype)
    states = _states(wanted, device)
    found, before = {} if inner == op else dict(choice.designs), None
    for design in _dispatch._table(inner, "triton"):
        state = states.get(design.name, "")
        why = design.refuses(*given) or design.why_not(*given)
        if why is None and not _is_usable(state):
            why = state
        if why is None and before is not None:
            why = f"{before} comes before it"
        if why is None:
            before, why = design.name, f"takes this call{f' ({state})' if state else ''}"
        found[design.name if inner == op else f"{inner} {design.name}"] = why
    return found, None if before is not None else "no design that may be used takes this call"


def _named(op: str, design: str, call: dict[str, Any]) -> str:
    """What comes of a call that names its design."""
    given = _given(op, call)
    why, state = None, ""
    if given is not None:
        x = given[0]
        why = _dispatch._cannot(op, design, *given)
        check = Check(op, "triton", design, str(x.dtype).removeprefix("torch."))
        state = _states([check], _dispatch._device(x.device)).get(design, "")
        if why is None and not _is_usable(state):
            why = state
    if why is not None:
        return f"design {design!r} was asked for and cannot run: {why}"
    return f"triton, design {design!r} (asked for)" + (f", {state}" if state else "")


def _given(op: str, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """x, W_enc and k of a call of an op with several designs, W_enc as the kernel gets it; None for
    another op, and where one of them is not given."""
    x, W_enc, k = (call.get(name) for name in ("x", "W_enc", "k"))
    if op not in _dispatch._DESIGNED or not (
        isinstance(x, torch.Tensor) and isinstance(W_enc, torch.Tensor) and isinstance(k, int)
    ):
        return None
    some = call.get("latents") if op == "topk_encode" else None
    if some is not None or not W_enc.is_contiguous():
        # the kernel gets a copy, of which a design looks at shape and address
        rows = len(W_enc if some is None else some)
        W_enc = torch.empty(rows, W_enc.shape[1], dtype=W_enc.dtype, device="meta")
    return x, W_enc, k
