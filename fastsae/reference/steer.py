"""steer in plain PyTorch, one operation of the table at a time so that [M, O, D] never exists."""

from __future__ import annotations

from typing import Any

import torch

from .._steer_codes import (
    ADD,
    CLAMP,
    CLAMP_IF_ACTIVE,
    END,
    MEMBER,
    MIN_CLAMP,
    NORMS,
    RAW,
    SCALE,
    SIGNED,
)
from ._common import acc_dtype


def normalised(x: torch.Tensor, norm: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The SAE's input u [M, D] and the factor 1/s [M, 1] that brings its output back."""
    if norm == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        std = centred.square().sum(-1, keepdim=True).div(max(x.shape[-1] - 1, 1)).sqrt()
        return centred / (std + eps), std
    if norm == "constant_norm":
        back = x.square().sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5
        return x / back, back
    return x, x.new_ones(x.shape[0], 1)


def edits(
    x: torch.Tensor,
    enc: torch.Tensor,
    dec: torch.Tensor,
    param: torch.Tensor,
    code: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    member: torch.Tensor | None,
    norm: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to the rows [M, D], and which rows that touches [M]; differentiable."""
    n_slots, n_ops = code.shape[:2]
    acc = acc_dtype(x.dtype)
    wide = x.to(acc)
    u, back = normalised(wide, norm, eps)
    slot = slots.long().repeat_interleave(x.shape[0] // max(len(slots), 1))
    live = (slot >= 0) & (slot < n_slots)
    if mask is not None:
        live = live & mask.bool()
    slot = slot.clamp(0, n_slots - 1)
    param = param.to(acc)

    opcodes, flags, gates = code[slot].unbind(-1)  # [M, O] each
    listed = (opcodes != END).cummin(-1).values & live[:, None]

    columns: list[torch.Tensor] = []
    for o in range(n_ops):
        bias, theta, gain, offset = param[slot, o, :4].unbind(-1)
        flag = flags[:, o]
        row = enc[slot, o].to(acc)
        p = torch.where(flag & RAW > 0, (row * wide).sum(-1), (row * u).sum(-1))
        p = torch.where(opcodes[:, o] == ADD, torch.zeros_like(p), p)  # its row is not read
        on = p + bias > theta
        selected = torch.zeros_like(live) if member is None else member[:, o]
        on = on & ((flag & MEMBER == 0) | selected)
        f = gain * p + offset
        f = torch.where(flag & SIGNED > 0, f, f.clamp(min=0))
        columns.append(torch.where(on, f, torch.zeros_like(f)))
    values = torch.stack(columns, -1) if columns else wide.new_zeros(len(wide), 0)

    moved = torch.zeros_like(wide)
    touched = torch.zeros_like(live)
    for o in range(n_ops):
        f, v, tau, gate = values[:, o], param[slot, o, 4], param[slot, o, 5], gates[:, o].long()
        zero = torch.zeros_like(f)
        delta = zero
        for opcode, rule in (
            (CLAMP, v - f),
            (MIN_CLAMP, (v - f).clamp(min=0)),
            (CLAMP_IF_ACTIVE, torch.where(f > 0, v - f, zero)),
            (SCALE, (v - 1) * f),
            (ADD, v),
        ):
            delta = torch.where(opcodes[:, o] == opcode, rule, delta)
        at = gate.clamp(0, n_ops - 1)[:, None]
        known = listed.gather(1, at)[:, 0] & (gate < n_ops)
        is_open = (gate < 0) | (known & (values.gather(1, at)[:, 0] > tau))
        delta = torch.where(listed[:, o] & is_open, delta, zero)
        factor = torch.where(flags[:, o] & RAW > 0, torch.ones_like(v), back[:, 0])
        moved = moved + (delta * factor)[:, None] * dec[slot, o].to(acc)
        touched = touched | (delta != 0)
    return moved, touched


def edited(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The edited rows; `rest` as in `edits`."""
    moved, touched = edits(x, *rest)
    return torch.where(touched[:, None], (x.to(moved.dtype) + moved).to(x.dtype), x)


def steer(
    x: torch.Tensor,
    enc: torch.Tensor,
    dec: torch.Tensor,
    param: torch.Tensor,
    code: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    member: torch.Tensor | None,
    norm: int,
    eps: float,
    out: torch.Tensor,
) -> None:
    """See `fastsae.ops.steer`; x [B, ..., D] is contiguous, `out` may be x."""
    n_slots = len(code)
    if slots.device.type == "cpu":  # on a GPU the check would cost a host sync
        low, high = (int(v) for v in slots.aminmax())
        if low < -1 or high >= n_slots:
            raise RuntimeError(
                f"steer: slots must lie in [-1, {n_slots}), got values from {low} to {high}"
            )
    mask = None if mask is None else mask.flatten()
    member = None if member is None else member.flatten(0, -2)
    rows = x.flatten(0, -2)
    out.copy_(
        edited(rows, enc, dec, param, code, slots, mask, member, NORMS[norm], eps).view(x.shape)
    )
