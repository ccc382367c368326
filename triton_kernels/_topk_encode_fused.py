"""topk_encode with the filter in the epilogue of the product: scores are never stored.

Columns in phases that grow geometrically. In a phase a persistent product (TMA descriptors) appends
the keys above each row's threshold to the row's buffer, then a kernel keeps the k best and raises
the threshold. A row whose buffer overflowed takes no further part and is left to the caller, all of
its columns: its scores then come from one other kernel, so that equal latents still tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._blocks import POINTERS
from ._configuration import Configuration
from ._topk_encode_keys import BestKeys, FilterConfig, keep_best, order_keys, rank_scores, top_of

_EMPTY, _FULL = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


_BUFFER = FilterConfig(1024, 512, 4)


@dataclass(frozen=True)
class FusedConfig:
    """Tile of the product, and the buffer of a row."""

    block_n: int = 128
    block_f: int = 256
    block_d: int = 64
    num_warps: int = 8
    num_stages: int = 3
    buffer: FilterConfig = _BUFFER
    growth: int = 8  # seen columns grow by at most this in a phase

    def phases(self, k: int, f: int) -> list[tuple[int, int]]:
        """Column ranges. In random order a phase appends k (growth - 1): half of the buffer."""
        end = self.buffer.capacity // self.block_f * self.block_f  # the first keeps every key
        result = [(0, min(f, end))]
        growth = max(2, min(self.growth, self.buffer.capacity // (2 * k)))
        while end < f:
            begin, end = end, end * growth
            result.append((begin, min(f, end)))
        return result


MAX_FUSED = 256  # largest k that leaves a phase half of the buffer


@triton.jit
def _append(acc, row, column, R, end, bias_ptr, scale_ptr, keys_ptr, held_ptr, threshold_ptr,
            CAPACITY: tl.constexpr):  # fmt: skip
    inside = column < end
    acc = rank_scores(acc, column[None, :], inside[None, :], bias_ptr, scale_ptr)
    # A key's high word alone: columns ascend from phase to phase, so an equal score ranks lower.
    threshold = (tl.load(threshold_ptr + row, mask=row < R, other=0) >> 32).to(tl.int32)
    key = order_keys(acc, column[None, :])
    wanted = ((key >> 32).to(tl.int32) > threshold[:, None]) & inside[None, :] & (row < R)[:, None]
    held = held_ptr + row[:, None] + tl.zeros_like(column)[None, :]
    # The order of slots varies, the set of keys does not.
    slot = tl.atomic_add(held, 1, mask=wanted, sem="relaxed")
    at = keys_ptr + row.to(tl.int64)[:, None] * CAPACITY + slot
    tl.store(at, key, mask=wanted & (slot < CAPACITY))


@triton.jit
def _append_parts(acc, row, first, R, end, bias_ptr, scale_ptr, keys_ptr, held_ptr, threshold_ptr,
                  CAPACITY: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """32 columns at a time: registers for slots and addresses of a few scores only."""
    if WIDTH > 32:
        HALF: tl.constexpr = WIDTH // 2
        left, right = acc.reshape(BLOCK_N, 2, HALF).permute(0, 2, 1).split()
        _append_parts(left, row, first, R, end, bias_ptr, scale_ptr, keys_ptr, held_ptr,
                      threshold_ptr, CAPACITY, BLOCK_N, HALF)  # fmt: skip
        _append_parts(right, row, first + HALF, R, end, bias_ptr, scale_ptr, keys_ptr, held_ptr,
                      threshold_ptr, CAPACITY, BLOCK_N, HALF)  # fmt: skip
    else:
        _append(acc, row, first + tl.arange(0, WIDTH), R, end, bias_ptr, scale_ptr, keys_ptr,
                held_ptr, threshold_ptr, CAPACITY)  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "R"])
def _append_kernel(
    x,  # [R, D] descriptor
    W,  # [F, D] descriptor
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32
    threshold_ptr,  # [R] int64
    R,
    D,
    begin,
    end,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row_blocks = tl.cdiv(R, BLOCK_N)
    tiles = row_blocks * tl.cdiv(end - begin, BLOCK_F)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row = tile % row_blocks * BLOCK_N  # x stays in L2, W passes once
        first = begin + tile // row_blocks * BLOCK_F
        acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(x.load([first_row, d]), W.load([first, d]).T, acc)
        row = first_row + tl.arange(0, BLOCK_N)
        _append_parts(acc, row, first, R, end, bias_ptr, scale_ptr, keys_ptr, held_ptr,
                      threshold_ptr, CAPACITY, BLOCK_N, BLOCK_F)  # fmt: skip


@triton.jit
def _reselect_kernel(
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32
    threshold_ptr,  # [R] int64
    overflow_ptr,  # [R] int32
    K,
    CAPACITY: tl.constexpr,
    TOP: tl.constexpr,
    LAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    held = tl.load(held_ptr + row)
    if (held > CAPACITY) | (held == 0):  # now or before: the first phase leaves no row empty
        tl.store(overflow_ptr + row, 1)
        tl.store(held_ptr + row, 0)
        # nothing passes a full threshold; after the last phase the row begins anew
        tl.store(threshold_ptr + row, _EMPTY if LAST else _FULL)
    else:
        threshold = keep_best(keys_ptr + row * CAPACITY, held, K, CAPACITY, TOP)
        tl.store(threshold_ptr + row, threshold)
        tl.store(held_ptr + row, tl.minimum(held, K))


def fused_keys(
    x: torch.Tensor,  # [R, D], 16-byte rows
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    config: FusedConfig,
    programs: int,
) -> tuple[BestKeys, torch.Tensor]:
    """The k best of every row, in order in front, and [R] int32: 1 where a row is still to do."""
    (rows, d), f = x.shape, W_enc.shape[0]
    capacity = config.buffer.capacity
    best = BestKeys(rows, k, x.device, config.buffer)
    overflow = torch.zeros(rows, dtype=torch.int32, device=x.device)
    x_tiles = TensorDescriptor.from_tensor(x, [config.block_n, config.block_d])
    W_tiles = TensorDescriptor.from_tensor(W_enc, [config.block_f, config.block_d])
    for begin, end in config.phases(k, f):
        tiles = triton.cdiv(rows, config.block_n) * triton.cdiv(end - begin, config.block_f)
        _append_kernel[(min(programs, tiles),)](
            x_tiles, W_tiles, b_enc, rank_scale, best.keys, best.held, best.threshold,
            rows, d, begin, end,
            BLOCK_N=config.block_n, BLOCK_F=config.block_f, BLOCK_D=config.block_d,
            CAPACITY=capacity, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        _reselect_kernel[(rows,)](
            best.keys, best.held, best.threshold, overflow, k,
            CAPACITY=capacity, TOP=top_of(k), LAST=end == f, num_warps=config.buffer.num_warps,
        )  # fmt: skip
    return best, overflow


def configurations() -> list[Configuration]:
    """bf16 with bias and scale, fp16 without; TMA exists on sm_90 and later only."""
    result = []
    config = FusedConfig()
    for dtype, extras in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)):
        pointer = POINTERS[dtype]
        tiles = [
            f"tensordesc<{pointer[1:]}[{rows},{config.block_d}]>"
            for rows in (config.block_n, config.block_f)
        ]
        signature = dict(
            x=tiles[0], W=tiles[1], keys_ptr="*i64", held_ptr="*i32", threshold_ptr="*i64",
            R="i32", D="i32:16", begin="i32", end="i32",
        )  # fmt: skip
        constants = dict(
            BLOCK_N=config.block_n, BLOCK_F=config.block_f, BLOCK_D=config.block_d,
            CAPACITY=config.buffer.capacity,
        )  # fmt: skip
        optional = ("bias_ptr", "scale_ptr")
        signature |= dict.fromkeys(optional, pointer) if extras else {}
        constants |= {} if extras else dict.fromkeys(optional)
        label = pointer[1:] + (" bias, scale" if extras else "")
        result.append(
            Configuration(
                _append_kernel, label, signature, constants, config.num_warps, config.num_stages,
                tensor_cores=True, tma=True, targets=("sm_90", "sm_100"),
            )
        )  # fmt: skip
    signature = dict(
        keys_ptr="*i64", held_ptr="*i32", threshold_ptr="*i64", overflow_ptr="*i32", K="i32"
    )
    for k in (64, MAX_FUSED):
        sizes = dict(CAPACITY=config.buffer.capacity, TOP=top_of(k), LAST=True)
        result.append(Configuration(_reselect_kernel, f"k={k}", signature, sizes))
    return result
