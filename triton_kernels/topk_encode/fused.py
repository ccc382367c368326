"""topk_encode with the filter in the epilogue of the product: scores are never stored. bf16, fp16.

Columns in phases that grow geometrically. In a phase a persistent product (TMA descriptors)
compares the largest of 8 scores that one thread holds with the row's threshold, and records the 8
where it is above; then a kernel keeps the k best and raises the threshold. A row whose records
overflowed takes no further part and is left to the caller, all of its columns: its scores then come
from one other kernel, so that equal latents still tie.

The 8 scores of a record are those of columns c + {0, 1, 8, 9, 16, 17, 24, 25}: what a thread holds
of 32 columns of a wgmma accumulator. Rows are renumbered so that the plain layout of the stores is
the accumulator's, and nothing passes through shared memory.

"hopper" is the same with the product of csrc/cuda/topk_encode.cu: sm_90, where the CUDA library is
built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._blocks import POINTERS
from .._configuration import Configuration
from .chunked import Chunks, add_columns
from .keys import (
    FEW_ROWS,
    LOWEST,
    BestKeys,
    append_keys,
    filter_config,
    keep_best,
    larger,
    order_of,
    score_of,
)
from .product import tile_scores

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(2**31 - 1)
_APART = tl.constexpr(8)  # counters of rows lie on sectors of their own


@dataclass(frozen=True)
class FusedConfig:
    """Tile of the product, columns that its epilogue takes at a time, and records of a row."""

    block_n: int = 128
    block_f: int = 256
    block_d: int = 64
    width: int = 256
    num_warps: int = 8
    num_stages: int = 3
    records: int = 512
    growth: int = 8  # seen columns grow by at most this in a phase

    def phases(self, k: int, f: int) -> list[tuple[int, int]]:
        """Column ranges. In random order a phase records k (growth - 1): half of what there is."""
        end = 8 * self.records // self.block_f * self.block_f  # the first keeps every score
        result = [(0, min(f, end))]
        growth = max(2, min(self.growth, self.records // (2 * k)))
        while end < f:
            begin, end = end, end * growth
            result.append((begin, min(f, end)))
        return result

    def bytes_per_row(self, k: int) -> int:
        """Records, their columns and count, keys, overflow."""
        return self.records * 36 + 4 * _APART.value + BestKeys.bytes_per_row(k) + 4


# The first row whose device and Triton fit. triton_offline.py compiles them under each version.
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
CONFIGS = (
    # capability from, Triton before, tile
    ((10, 0), None, FusedConfig(width=64)),  # accumulators in tensor memory: 256 spill 320 bytes
    (
        (9, 0),
        (3, 7),
        FusedConfig(width=64),
    ),  # 256 spill 208 to 440 bytes; 64 take 224 to 232 registers
    ((9, 0), None, FusedConfig()),
)


def fused_config(
    capability: tuple[int, int], version: tuple[int, ...] = _TRITON
) -> FusedConfig | None:
    """The tile for a device under a version of Triton; None where the design cannot run."""
    for least, before, config in CONFIGS:
        if capability >= least and (before is None or version < before):
            return config
    return None


MAX_K = 256  # largest k that leaves a phase half of the buffer


@triton.jit
def _record(
    acc, first_row, first, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr, recorded_ptr,
    threshold_ptr, RECORDS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = WIDTH // 32
    WARPS: tl.constexpr = BLOCK_N // 16
    # A thread holds the two columns 2t and 2t + 1 of every 8, of rows l and l + 8 of its warp's 16:
    # [w, h, l, 32 columns, j, t, b] to [32 columns, j, row, t, b], rows in the order (h, w, l).
    acc = acc.reshape(WARPS, 2, 8, PARTS, 4, 4, 2).permute(3, 4, 1, 0, 2, 5, 6)
    acc = acc.reshape(PARTS, 4, BLOCK_N, 4, 2)
    row = tl.arange(0, BLOCK_N)
    row = first_row + row // 8 % WARPS * 16 + row // (8 * WARPS) * 8 + row % 8
    pair = first + 32 * tl.arange(0, PARTS)[:, None] + 2 * tl.arange(0, 4)[None, :]  # [parts, t]
    j, b = tl.arange(0, 4)[None, :, None, None], tl.arange(0, 2)[None, None, None, :]
    column = pair[:, None, :, None] + 8 * j + b  # [parts, j, t, b]
    # beyond F the score is 0: it may be recorded, and is not looked at
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
        acc += bias[:, :, None]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=column < F, other=0.0).to(tl.float32)
        acc *= scale[:, :, None]
    most = tl.reduce(tl.reduce(acc, 4, larger), 1, larger)  # [parts, row, t]
    order = tl.load(threshold_ptr + row, mask=row < R, other=0)
    bar = tl.where(order == _HIGHEST, float("inf"), score_of(order))  # NaN for the lowest: all
    wanted = ((most > bar[None, :, None]) | (most != most) | (bar != bar)[None, :, None]) & (
        row < R
    )[None, :, None]
    counter = recorded_ptr + _APART * row[None, :, None] + tl.zeros_like(pair)[:, None, :]
    # The order of records varies, the set of them does not.
    slot = tl.atomic_add(counter, 1, mask=wanted, sem="relaxed")
    wanted = wanted & (slot < RECORDS)
    at = row.to(tl.int64)[None, :, None] * RECORDS + slot
    tl.store(columns_ptr + at, pair[:, None, :] + tl.zeros_like(slot), mask=wanted)
    at = (scores_ptr + at * 8)[:, None, :, :, None] + (2 * j + b)[:, :, None]
    tl.store(at, acc, mask=wanted[:, None, :, :, None])


@triton.jit
def _record_parts(
    acc, first_row, first, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr, recorded_ptr,
    threshold_ptr, RECORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH columns at a time."""
    if BLOCK_F > WIDTH:
        HALF: tl.constexpr = BLOCK_F // 2
        left, right = acc.reshape(BLOCK_N, 2, HALF).permute(0, 2, 1).split()
        _record_parts(
            left, first_row, first, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr,
            recorded_ptr, threshold_ptr, RECORDS, BLOCK_N, HALF, WIDTH,
        )  # fmt: skip
        _record_parts(
            right, first_row, first + HALF, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr,
            recorded_ptr, threshold_ptr, RECORDS, BLOCK_N, HALF, WIDTH,
        )  # fmt: skip
    else:
        _record(
            acc, first_row, first, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr,
            recorded_ptr, threshold_ptr, RECORDS, BLOCK_N, BLOCK_F,
        )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "R"])
def _record_kernel(
    x,  # [R, D] descriptor
    W,  # [F, D] descriptor
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    scores_ptr,  # [R, RECORDS, 8] fp32
    columns_ptr,  # [R, RECORDS] int32: of the first score
    recorded_ptr,  # [R, APART] int32, the first of each
    threshold_ptr,  # [R] int32: order of the K-th best so far
    R,
    D,
    F,
    begin,
    end,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    RECORDS: tl.constexpr,
):
    row_blocks = tl.cdiv(R, BLOCK_N)
    tiles = row_blocks * tl.cdiv(end - begin, BLOCK_F)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row = tile % row_blocks * BLOCK_N  # x stays in L2, W passes once
        first = begin + tile // row_blocks * BLOCK_F
        acc = tile_scores(x, W, first_row, first, D, BLOCK_N, BLOCK_F, BLOCK_D)
        _record_parts(
            acc, first_row, first, R, F, bias_ptr, scale_ptr, scores_ptr, columns_ptr,
            recorded_ptr, threshold_ptr, RECORDS, BLOCK_N, BLOCK_F, WIDTH,
        )  # fmt: skip


@triton.jit
def _reselect_kernel(
    scores_ptr,  # [R, RECORDS, 8] fp32
    columns_ptr,  # [R, RECORDS] int32
    recorded_ptr,  # [R, APART] int32
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32
    threshold_ptr,  # [R] int32
    overflow_ptr,  # [R] int32
    K,
    F,
    RECORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    LAST: tl.constexpr,
):
    """The K best of a row's keys and of what was recorded."""
    row = tl.program_id(0).to(tl.int64)
    recorded = tl.load(recorded_ptr + _APART * row)
    overflowed = (recorded > RECORDS) | (tl.load(overflow_ptr + row) != 0)
    tl.debug_barrier()  # every warp has loaded what one thread now stores
    tl.store(recorded_ptr + _APART * row, 0)
    if overflowed:
        tl.store(overflow_ptr + row, 1)
        tl.store(held_ptr + row, 0)
        # nothing but NaN passes the highest; after the last phase the row begins anew
        tl.store(threshold_ptr + row, _LOWEST if LAST else _HIGHEST)
    else:
        keys_ptr += row * CAPACITY
        scores_ptr += row * RECORDS * 8
        columns_ptr += row * RECORDS
        held = tl.load(held_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        for start in range(0, 8 * recorded, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < 8 * recorded
            score = tl.load(scores_ptr + at, mask=inside, other=0.0)
            column = tl.load(columns_ptr + at // 8, mask=inside, other=0)
            column += 8 * (at % 8 // 2) + at % 2
            order = tl.where(inside & (column < F), order_of(score), _LOWEST)
            held, threshold = append_keys(
                keys_ptr, held, threshold, order, column, K, CAPACITY, PIECE, True
            )
        tl.store(threshold_ptr + row, keep_best(keys_ptr, held, K, CAPACITY, PIECE))
        tl.store(held_ptr + row, K)


def fused_keys(
    x: torch.Tensor,  # [R, D], 16-byte rows
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    config: FusedConfig,
    programs: int,
    hopper: bool = False,
) -> tuple[BestKeys, torch.Tensor]:
    """The k best of every row, in no order, and [R] int32: 1 where a row is still to do.

    hopper: by the CUDA C++ product; of the config it takes `records` and the phases.
    """
    (rows, d), f = x.shape, W_enc.shape[0]
    best = BestKeys(rows, k, x.device)
    scores = torch.empty(rows, config.records, 8, dtype=torch.float32, device=x.device)
    columns = torch.empty(rows, config.records, dtype=torch.int32, device=x.device)
    recorded = torch.zeros(rows, _APART.value, dtype=torch.int32, device=x.device)
    overflow = torch.zeros(rows, dtype=torch.int32, device=x.device)
    if not hopper:
        x_tiles = TensorDescriptor.from_tensor(x, [config.block_n, config.block_d])
        W_tiles = TensorDescriptor.from_tensor(W_enc, [config.block_f, config.block_d])
    for begin, end in config.phases(k, f):
        if hopper:
            torch.ops.fastsae.topk_encode_record_cuda(
                x, W_enc, b_enc, rank_scale, best.threshold, begin, end, scores, columns, recorded
            )
        else:
            tiles = triton.cdiv(rows, config.block_n) * triton.cdiv(end - begin, config.block_f)
            _record_kernel[(min(programs, tiles),)](
                x_tiles, W_tiles, b_enc, rank_scale, scores, columns, recorded, best.threshold,
                rows, d, f, begin, end,
                BLOCK_N=config.block_n, BLOCK_F=config.block_f, BLOCK_D=config.block_d,
                WIDTH=config.width, RECORDS=config.records,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        _reselect_kernel[(rows,)](
            scores, columns, recorded, best.keys, best.held, best.threshold, overflow, k, f,
            RECORDS=config.records, LAST=end == f, **best.config.sizes(),
            num_warps=best.config.num_warps,
        )  # fmt: skip
    return best, overflow


def unavailable(device: torch.device) -> str | None:
    """Why a device cannot run the product."""
    if device.type != "cuda":
        return None  # the interpreter
    if torch.version.hip is not None:
        return "AMD GPUs have no TMA"
    if fused_config(torch.cuda.get_device_capability(device)) is None:
        return f"{torch.cuda.get_device_name(device)} is older than sm_90 and has no TMA"
    return None


def hopper_unavailable(device: torch.device) -> str | None:
    """Why a device cannot run the CUDA C++ product; tests build it for the CPU as well
    (support/cuda_host.py)."""
    key, op = device.type.upper(), "fastsae::topk_encode_record_cuda"
    if key not in ("CUDA", "CPU") or not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return f"its product in CUDA C++ is not built for {device.type} tensors"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"its product is for sm_90, which {torch.cuda.get_device_name(device)} is not"
    return None


# Few launches rather than a slab in L2: where no row overflowed, all of them are empty.
CHUNKS = Chunks(rows=4096, slab=1 << 25)


def select(
    x: torch.Tensor,  # [R, D] bf16 or fp16
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
    config: FusedConfig | None = None,
    hopper: bool = False,
) -> torch.Tensor:
    """See `Design.select`. Rows that overflowed are then taken through the chunks, by launches that
    find nothing to do where there are none."""
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        capability = torch.cuda.get_device_capability(x.device)
    else:
        programs, capability = 3, (9, 0)  # interpreted: what this Triton compiles for sm_90
    config = config or fused_config(capability)
    assert config is not None  # `unavailable` elsewhere
    best, overflow = fused_keys(x, W_enc, b_enc, k, rank_scale, config, programs, hopper)
    columns = chunks.columns(len(x), len(W_enc))
    slab = torch.empty(len(x), columns, dtype=torch.float32, device=x.device)
    add_columns(best, slab, x, W_enc, b_enc, rank_scale, overflow)
    return best.finish()


def configurations() -> list[Configuration]:
    """bf16 with and without bias and scale, fp16 without; TMA exists on sm_90 and later only."""
    result = []
    optional = ("bias_ptr", "scale_ptr")
    for target, dtype, extras in (
        ("sm_90", torch.bfloat16, optional), ("sm_90", torch.bfloat16, optional[:1]),
        ("sm_90", torch.bfloat16, optional[1:]), ("sm_90", torch.bfloat16, ()),
        ("sm_90", torch.float16, ()), ("sm_100", torch.bfloat16, optional),
        ("sm_100", torch.bfloat16, ()), ("sm_100", torch.float16, ()),
    ):  # fmt: skip
        config = fused_config((int(target[3:-1]), 0))
        assert config is not None
        pointer = POINTERS[dtype]
        tiles = [
            f"tensordesc<{pointer[1:]}[{rows},{config.block_d}]>"
            for rows in (config.block_n, config.block_f)
        ]
        signature = dict(
            x=tiles[0], W=tiles[1], scores_ptr="*fp32", columns_ptr="*i32", recorded_ptr="*i32",
            threshold_ptr="*i32", R="i32", D="i32:16", F="i32", begin="i32", end="i32",
        )  # fmt: skip
        constants = dict(
            BLOCK_N=config.block_n, BLOCK_F=config.block_f, BLOCK_D=config.block_d,
            WIDTH=config.width, RECORDS=config.records,
        )  # fmt: skip
        signature |= dict.fromkeys(extras, pointer)
        constants |= dict.fromkeys(name for name in optional if name not in extras)
        names = ", ".join(name.removesuffix("_ptr") for name in extras)
        label = " ".join([pointer[1:], names]).rstrip()
        result.append(
            Configuration(
                _record_kernel, label, signature, constants, config.num_warps, config.num_stages,
                tensor_cores=True, tma=True, targets=(target,),
            )
        )  # fmt: skip
    signature = dict(
        scores_ptr="*fp32", columns_ptr="*i32", recorded_ptr="*i32", keys_ptr="*i64",
        held_ptr="*i32", threshold_ptr="*i32", overflow_ptr="*i32", K="i32", F="i32",
    )  # fmt: skip
    for rows in (1, FEW_ROWS):
        keys = filter_config(MAX_K, rows)
        sizes = dict(keys.sizes(), RECORDS=FusedConfig().records, LAST=True)
        label = f"{keys.capacity} keys"
        result.append(Configuration(_reselect_kernel, label, signature, sizes, keys.num_warps))
    return result
