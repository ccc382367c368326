"""What FusedAdam keeps for a parameter: step, moments in their format, master; made and loaded."""

from __future__ import annotations

from typing import Any

import torch

from .._memory import advise_huge_pages
from ..reference import moments
from ..reference.moments import Moments

# Names in the state of what `Moments` holds. Codes have names of their own: torch.optim.Adam, which
# would read them as moments, does not find any.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CODES = ("exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_scale", "exp_avg_sq_scale")
_WIDE_ELEMENTS = 1 << 24  # of a weight whose moments are widened at a time


def wide_dtype(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def has_master(param: torch.Tensor, group: dict[str, Any]) -> bool:
    return bool(group["master_weights"]) and param.dtype in (torch.bfloat16, torch.float16)


def stored_as(param: torch.Tensor, group: dict[str, Any]) -> str:
    return str(group["moments"]) if param.dim() == 2 else "fp32"


def _names(fmt: str) -> tuple[str, ...]:
    return _CODES if fmt == "8bit" else _MOMENTS


def _dtypes(param: torch.Tensor, fmt: str) -> tuple[torch.dtype, ...]:
    wide = wide_dtype(param)
    codes = moments.dtypes(fmt)
    return (*codes, wide, wide) if fmt == "8bit" else (wide, wide) if fmt == "fp32" else codes


def has_moments(state: dict[str, Any]) -> bool:
    return "exp_avg" in state or "exp_avg_8bit" in state


def slices(param: torch.Tensor) -> list[Any]:
    """Some rows of a weight at a time, so that what is widened stays small; all of any other."""
    if param.dim() != 2:
        return [...]
    f, d = param.shape
    size = max(1, _WIDE_ELEMENTS // max(1, d))
    return [slice(begin, min(begin + size, f)) for begin in range(0, f, size)]


def new_master(param: torch.Tensor) -> torch.Tensor:
    wide = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    return advise_huge_pages(wide).copy_(param.detach())


def new_state(param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Step 0 and moments of zero; without a master."""
    state: dict[str, Any] = {"step": _step_tensor(param, group)}
    fmt = stored_as(param, group)
    for name, dtype in zip(_names(fmt), _dtypes(param, fmt), strict=True):
        shape = list(param.shape)
        if name.endswith("_scale"):
            shape[1] = moments.n_blocks(shape[1])
        zeros = torch.empty(shape, dtype=dtype, device=param.device)
        state[name] = advise_huge_pages(zeros).zero_()
    return state


def loaded(
    param: torch.Tensor, group: dict[str, Any], saved: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """A saved state in the format that the group has here."""
    given = Moments(*(saved[n] for n in (_MOMENTS if "exp_avg" in saved else _CODES)))
    for tensor in given[:2]:
        if tensor.shape != param.shape:
            raise ValueError(
                f"FusedAdam: saved moments {list(tensor.shape)} are not of a parameter "
                f"{list(param.shape)}"
            )
    state, fmt = new_state(param, group), stored_as(param, group)
    state["step"].fill_(float(saved["step"]))
    stored = moments_of(param, group, state)
    for at in slices(param):
        part = Moments(*(None if t is None else t[at].to(param.device) for t in given))  # type: ignore[arg-type]
        if fmt != moments.format_of(part.exp_avg):
            m, v = (t.to(wide_dtype(param)) for t in moments.load(part))
            few = fmt != "fp32"
            rows = torch.arange(at.start, at.stop, device=param.device) if few else m
            part = moments.store(m, v, fmt, max(int(saved["step"]), 1), rows)
        for to, t in zip(stored, part, strict=True):
            if to is not None:
                assert t is not None
                to[at].copy_(t)
    if has_master(param, group):
        state["master"] = new_master(param)
        if "master" in saved:
            state["master"].copy_(saved["master"])
    if group["capturable"]:  # a captured graph writes into what is there
        for name, t in state.items():
            old = before.get(name)
            if old is not None and old.dtype == t.dtype and old.shape == t.shape:
                state[name] = old.copy_(t) if old.device == t.device else t
    return state


def moments_of(param: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> Moments:
    return Moments(*(state[name] for name in _names(stored_as(param, group))))


def _step_tensor(param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    # in bf16, which a default dtype may be, counting ends at 256
    device = param.device if group["capturable"] else "cpu"
    return torch.zeros((), dtype=torch.float32, device=device)
