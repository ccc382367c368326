"""steer: one program a token reads its list's entries, then writes the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration

# The numbers of fastsae/_steer_codes.py.
_END, _CLAMP, _MIN_CLAMP, _CLAMP_IF_ACTIVE = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
)
_SCALE, _ADD = tl.constexpr(4), tl.constexpr(5)
_RAW, _SIGNED, _MEMBER = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_LAYER_NORM = tl.constexpr(1)

_TILE = 2048  # elements of a tile of entries and columns: 16 a thread at 4 warps


@triton.jit
def _steer_kernel(
    x_ptr,  # [M, D]
    enc_ptr,  # [S, O, D]
    dec_ptr,  # [S, O, D]
    param_ptr,  # [S, O, 6]
    code_ptr,  # [S, O, 3]
    slots_ptr,  # [B]
    mask_ptr,  # [M] or None
    member_ptr,  # [M, O] or None
    out_ptr,  # [M, D], may be x
    S,
    n_ops,
    D,
    run,  # tokens of a sequence
    eps,
    NORM: tl.constexpr,
    BLOCK_O: tl.constexpr,  # all entries
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + m // run).to(tl.int64)
    live = (slot >= 0) & (slot < S)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + m) != 0)
    slot = tl.where(live, slot, 0)
    o = tl.arange(0, BLOCK_O)
    entry = slot * n_ops + o  # [BLOCK_O]
    opcode = tl.load(code_ptr + entry * 3, mask=(o < n_ops) & live, other=0)
    flags = tl.load(code_ptr + entry * 3 + 1, mask=o < n_ops, other=0)
    gate = tl.load(code_ptr + entry * 3 + 2, mask=o < n_ops, other=-1)
    count = tl.min(tl.where(opcode == _END, o, n_ops), axis=0)
    listed = o < count
    x_row, out_row = x_ptr + m * D, out_ptr + m * D

    mean = 0.0
    divisor = 1.0
    back = 1.0
    if NORM != 0:
        if NORM == _LAYER_NORM:
            total = tl.zeros((BLOCK_D,), tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                total += tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
            mean = tl.sum(total, axis=0) / D
        squares = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            v = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
            v = tl.where(d < D, v - mean, 0.0)
            squares += v * v
        if NORM == _LAYER_NORM:
            back = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(D - 1, 1))
            divisor = back + eps
        else:
            back = tl.sqrt(tl.sum(squares, axis=0) / D)
            divisor = back

    raw = (flags & _RAW) != 0
    reads = listed & (opcode != _ADD)
    shift = tl.where(raw, 0.0, mean)
    p = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
        e = tl.load(
            enc_ptr + entry[:, None] * D + d[None, :],
            mask=reads[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_O, BLOCK_D]
        # a column or row that is masked out must not bring inf * 0
        used = reads[:, None] & (d < D)[None, :]
        p += tl.sum(tl.where(used, e * (v[None, :] - shift[:, None]), 0.0), axis=1)
    p = tl.where(raw, p, p / divisor)

    bias = tl.load(param_ptr + entry * 6, mask=listed, other=0.0)
    theta = tl.load(param_ptr + entry * 6 + 1, mask=listed, other=0.0)
    gain = tl.load(param_ptr + entry * 6 + 2, mask=listed, other=0.0)
    offset = tl.load(param_ptr + entry * 6 + 3, mask=listed, other=0.0)
    value = tl.load(param_ptr + entry * 6 + 4, mask=listed, other=0.0)
    tau = tl.load(param_ptr + entry * 6 + 5, mask=listed, other=0.0)
    on = p + bias > theta
    if member_ptr is not None:
        selected = tl.load(member_ptr + m * n_ops + o, mask=listed, other=0) != 0
        on = on & (((flags & _MEMBER) == 0) | selected)
    else:
        on = on & ((flags & _MEMBER) == 0)
    f = gain * p + offset
    f = tl.where(((flags & _SIGNED) != 0) | (f > 0.0), f, 0.0)
    f = tl.where(on, f, 0.0)

    # [BLOCK_O, BLOCK_O]: row i picks the activation of its gate
    is_gate = gate[:, None] == o[None, :]
    opened = tl.sum(tl.where(is_gate & listed[None, :] & (f[None, :] > tau[:, None]), 1, 0), axis=1)
    is_open = (gate < 0) | (opened > 0)
    delta = tl.where(opcode == _CLAMP, value - f, 0.0)
    delta = tl.where((opcode == _MIN_CLAMP) & (value - f > 0.0), value - f, delta)
    delta = tl.where((opcode == _CLAMP_IF_ACTIVE) & (f > 0.0), value - f, delta)
    delta = tl.where(opcode == _SCALE, (value - 1.0) * f, delta)
    delta = tl.where(opcode == _ADD, value, delta)
    delta = tl.where(listed & is_open, delta, 0.0)
    moves = delta != 0.0
    touched = tl.max(moves.to(tl.int32), axis=0) != 0
    delta = tl.where(raw, delta, delta * back)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row + d, mask=d < D)
        if touched:
            w = tl.load(
                dec_ptr + entry[:, None] * D + d[None, :],
                mask=moves[:, None] & (d < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            step = tl.sum(tl.where(moves[:, None], delta[:, None] * w, 0.0), axis=0)
            x = (x.to(tl.float32) + step).to(x_ptr.dtype.element_ty)
        tl.store(out_row + d, x, mask=d < D)


def _blocks(n_ops: int) -> tuple[int, int, int]:
    """BLOCK_O, BLOCK_D, num_warps. From 64 entries on, the table of gates needs more threads."""
    block_o = max(2, triton.next_power_of_2(n_ops))
    return block_o, max(16, min(1024, _TILE // block_o)), 4 if block_o < 64 else 8


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
    """See `fastsae.ops.steer`. A slot out of range leaves its sequence alone."""
    (S, n_ops, D), M = enc.shape, x.numel() // max(enc.shape[2], 1)
    if x.numel() == 0:
        return
    block_o, block_d, warps = _blocks(n_ops)
    with on_device(x):
        _steer_kernel[(M,)](
            x, enc, dec, param, code, slots,
            None if mask is None else mask.view(torch.uint8),
            None if member is None else member.view(torch.uint8),
            out, S, n_ops, D, M // len(slots), eps,
            NORM=norm, BLOCK_O=block_o, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip


def configurations() -> list[Configuration]:
    """The tables that `steer.attach` makes, and small and large ones."""
    result = []
    for pointer in POINTERS.values():
        for d, n_ops, norm in ((4096, 32, 0), (768, 1, 0), (2304, 32, 1), (769, 128, 2)):
            block_o, block_d, warps = _blocks(n_ops)
            signature = dict(
                x_ptr=pointer, enc_ptr=pointer, dec_ptr=pointer, param_ptr="*fp32",
                code_ptr="*i32", slots_ptr="*i32", mask_ptr="*u8", member_ptr="*u8",
                out_ptr=pointer, S="i32", n_ops="i32", D="i32:16" if d % 16 == 0 else "i32",
                run="i32", eps="fp32",
            )  # fmt: skip
            constants = dict(NORM=norm, BLOCK_O=block_o, BLOCK_D=block_d)
            if norm == 0:
                constants |= dict(mask_ptr=None, member_ptr=None)
            label = f"{pointer[1:]} D={d} O={n_ops} norm={norm}"
            made = Configuration(_steer_kernel, label, signature, constants, num_warps=warps)
            result.append(made)
    return result
