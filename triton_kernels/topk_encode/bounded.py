"""topk_encode of fp32 inputs, filtered by scores of bf16 copies with a proven error bound.

With x^, w^ the bf16 roundings, s the product of these summed in fp32 and e the fp32 score of the
pair, every pair satisfies

    |s - e| <= |x - x^| |w| + |x^| |w - w^| + g |x| |w|        (Cauchy-Schwarz, twice)

where g holds the rounding of both sums. A row keeps the pairs whose upper bound is above T, the
k-th largest lower bound so far (columns ascend: an equal one loses); what remains after the last
column is scored in fp32, and the k best of that are the k best of all. When too many remain, the
program scores them at once and goes on with the k best: nothing is dropped for want of room. Norms
that are not finite make the bound infinite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._configuration import Configuration
from .chunked import Chunks, chunks_of
from .keys import (
    MAX_SORTED,
    FilterConfig,
    inner_products,
    keep_best,
    key_column,
    kth_largest,
    larger,
    order_keys,
    order_of,
    order_rows,
    rank_scores,
)
from .product import Product

_EMPTY = tl.constexpr(-(2**63))
_LOWEST = tl.constexpr(-(2**31))
_EPS, _TINY = tl.constexpr(2.0**-20), tl.constexpr(2.0**-100)
_LARGEST = tl.constexpr(3.4e38)  # next to fp32's

GROUP, _FEW = 8, 4  # candidates scored at a time: at the end, and by a filter short of registers
_PROGRAMS = 16  # that share a row's candidates at the end
_BLOCK_D, _HALVINGS = 128, tl.constexpr(7)


def accumulation(d: int) -> float:
    """g: an error of 2^-22 of the sum of sizes for each of D terms on the tensor cores, which may
    truncate, and of 2^-24 for the fp32 score."""
    return (d + 64) * 1.25 * 2.0**-22


@triton.jit
def _round_rows_kernel(
    rows_ptr,  # [R, D] fp32
    rounded_ptr,  # [R, D] bf16
    norms_ptr,  # [2, R] fp32: at least |r| and |r^|, at least |r - r^|
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    residual = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        r = tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0)
        low = r.to(tl.bfloat16)
        off = r - low.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(r))
        square += r * r
        residual += off * off
        tl.store(rounded_ptr + row * D + d, low, mask=d < D)
    # roundings of the sums, and squares that underflowed; a row of zeros lost nothing
    grow = 1.0 + (D + 32) * 2.0**-23
    lost = tl.where(tl.max(largest) > 0.0, D * 2.0**-125, 0.0)
    off = tl.sqrt(tl.sum(residual) * grow + lost) * (1.0 + _EPS)
    size = tl.sqrt(tl.sum(square) * grow + lost) * (1.0 + _EPS) + off
    # beyond 2^40 something could overflow on the way: nothing is known
    size = tl.where(size <= 2.0**40, size * (1.0 + _EPS), float("inf"))
    tl.store(norms_ptr + row, size)
    tl.store(norms_ptr + tl.num_programs(0) + row, tl.where(size <= 2.0**41, off, float("inf")))


def round_rows(rows: torch.Tensor, rounded: torch.Tensor, norms: torch.Tensor) -> None:
    """bf16 copies of rows [R, D], and norms [2, R]: of the rows, of what the copies left out."""
    d = rows.shape[1]
    block = min(1024, max(64, triton.next_power_of_2(d)))
    _round_rows_kernel[(len(rows),)](rows, rounded, norms, d, BLOCK_D=block)


@triton.jit
def _exact_keys(
    x_row, W_ptr, bias_ptr, scale_ptr, column, inside, D, GROUP: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Keys of the fp32 scores of some latents [GROUP]."""
    sums = inner_products(x_row, W_ptr, column, inside, D, GROUP, BLOCK_D, _HALVINGS)
    rank = rank_scores(sums, column, inside, bias_ptr, scale_ptr)
    return order_keys(rank, column)


@triton.jit
def _drop_below(
    lower_ptr, upper_ptr, held, threshold, K, CAPACITY: tl.constexpr, PIECE: tl.constexpr
):
    """Raises the threshold to the K-th largest lower bound; keeps what can still reach it."""
    tl.debug_barrier()  # other threads of this program stored candidates
    slot = tl.arange(0, CAPACITY)
    lower = (tl.load(lower_ptr + slot, mask=slot < held, other=_EMPTY) >> 32).to(tl.int32)
    t, _ = kth_largest(lower, K)
    threshold = tl.maximum(threshold, tl.min(tl.where(lower >= t, lower, 2147483647)))
    kept = 0
    for start in range(0, held, PIECE):
        piece = start + tl.arange(0, PIECE)
        low = tl.load(lower_ptr + piece, mask=piece < held, other=_EMPTY)
        high = tl.load(upper_ptr + piece, mask=piece < held, other=_LOWEST)
        keep = (piece < held) & (high >= threshold)
        to = kept + tl.cumsum(keep.to(tl.int32)) - 1
        tl.debug_barrier()
        tl.store(lower_ptr + to, low, mask=keep)
        tl.store(upper_ptr + to, high, mask=keep)
        kept += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()
    return kept, threshold


@triton.jit
def _settle(
    x_row, W_ptr, bias_ptr, scale_ptr, lower_ptr, upper_ptr, held, K, D,
    CAPACITY: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores all candidates in fp32; the K best stay. Returns the K-th's order."""
    for start in range(0, held, GROUP):
        slot = start + tl.arange(0, GROUP)
        column = key_column(tl.load(lower_ptr + slot, mask=slot < held, other=0x7FFFFFFF))
        key = _exact_keys(x_row, W_ptr, bias_ptr, scale_ptr, column, slot < held, D, GROUP, BLOCK_D)
        tl.store(lower_ptr + slot, key, mask=slot < held)
    kth = keep_best(lower_ptr, held, K, CAPACITY, PIECE)
    for start in range(0, K, PIECE):
        piece = start + tl.arange(0, PIECE)
        key = tl.load(lower_ptr + piece, mask=piece < K, other=0)
        tl.store(upper_ptr + piece, (key >> 32).to(tl.int32), mask=piece < K)
    tl.debug_barrier()
    return kth


@triton.jit(do_not_specialize=["fresh"])
def _bounds_kernel(
    scores_ptr,  # [R, C] fp32 sums of bf16 products, row stride `stride`
    x_norms_ptr,  # [2, R], or [3, R] where LIKELY
    W_norms_ptr,  # [2, C], or [3, C]
    x_ptr,  # [R, D]
    W_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    lower_ptr,  # [R, CAPACITY] int64: lower bound's order above, column inverted below
    upper_ptr,  # [R, CAPACITY] int32: upper bound's order
    held_ptr,  # [R] int32: candidates
    threshold_ptr,  # [R] int32: order of the K-th largest lower bound so far; an equal one loses
    stride,
    first,  # column of scores_ptr[0, 0]
    fresh,  # columns before this one have been seen
    C,
    K,
    D,
    g,
    sigmas,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIKELY: tl.constexpr,  # errors as of independent roundings, sigmas times; else the bound
):
    row, R = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lower_ptr += row * CAPACITY
    upper_ptr += row * CAPACITY
    scores_ptr += row * stride
    held = tl.load(held_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    x_size = tl.load(x_norms_ptr + row)
    x_off = tl.load(x_norms_ptr + R + row)
    eps = tl.where(x_size == 0.0, 0.0, _EPS)  # a row of zeros: every rank is exact, all may tie
    tiny = tl.where(x_size == 0.0, 0.0, _TINY)
    at = tl.arange(0, BLOCK)
    coming = tl.load(scores_ptr + at, mask=at < C, other=0.0)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside, column = at < C, first + at
        rank = coming
        coming = tl.load(scores_ptr + at + BLOCK, mask=at + BLOCK < C, other=0.0)
        w_size = tl.load(W_norms_ptr + at, mask=inside, other=0.0)
        w_off = tl.load(W_norms_ptr + C + at, mask=inside, other=0.0)
        if LIKELY:
            by_x = x_off * tl.load(W_norms_ptr + 2 * C + at, mask=inside, other=0.0)
            by_w = tl.load(x_norms_ptr + 2 * R + row) * w_off
            most = tl.maximum(by_x, by_w)
            ratio = tl.minimum(by_x, by_w) / tl.maximum(most, _TINY)  # squares would underflow
            margin = sigmas * most * tl.sqrt(1.0 + ratio * ratio)
        else:
            margin = x_off * w_size + x_size * w_off
        # the last terms: roundings that follow the sums, here and in the exact rank
        margin += g * x_size * w_size + tl.abs(rank) * eps + tiny
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            rank += bias
            margin += tl.minimum(tl.abs(bias), _LARGEST) * eps  # an infinite one rounds nothing
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
            rank *= scale
            margin = margin * tl.abs(scale) + tl.abs(rank) * eps + tiny
        margin *= 1.0 + _EPS
        if order_of(tl.reduce(rank + margin, 0, larger)) > threshold:  # most blocks end here
            low = rank - margin
            low = tl.where(low != low, _LOWEST, order_of(low))
            high = order_of(rank + margin)
            wanted = (at >= fresh) & inside & (high > threshold)
            count = tl.sum(wanted.to(tl.int32))
            if held + count > CAPACITY:
                held, threshold = _drop_below(
                    lower_ptr, upper_ptr, held, threshold, K, CAPACITY, PIECE
                )
                if held > CAPACITY - BLOCK:
                    kth = _settle(
                        x_ptr + row * D, W_ptr, bias_ptr, scale_ptr, lower_ptr, upper_ptr, held,
                        K, D, CAPACITY, PIECE, GROUP, BLOCK_D,
                    )  # fmt: skip
                    threshold = tl.maximum(threshold, kth)
                    held = tl.minimum(held, K)
                wanted = wanted & (high > threshold)
                count = tl.sum(wanted.to(tl.int32))
            slot = held + tl.cumsum(wanted.to(tl.int32)) - 1
            key = (low.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
            tl.store(lower_ptr + slot, key, mask=wanted)
            tl.store(upper_ptr + slot, high, mask=wanted)
            held += count
    tl.store(held_ptr + row, held)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _drop_kernel(
    lower_ptr,  # [R, CAPACITY] int64
    upper_ptr,  # [R, CAPACITY] int32
    held_ptr,  # [R] int32
    threshold_ptr,  # [R] int32
    K,
    CAPACITY: tl.constexpr,
    PIECE: tl.constexpr,
):
    """What can be one of the K best after the last column."""
    row = tl.program_id(0).to(tl.int64)
    held, _ = _drop_below(
        lower_ptr + row * CAPACITY, upper_ptr + row * CAPACITY, tl.load(held_ptr + row),
        tl.load(threshold_ptr + row), K, CAPACITY, PIECE,
    )  # fmt: skip
    tl.store(held_ptr + row, held)


@triton.jit
def _rescore_kernel(
    x_ptr,  # [R, D]
    W_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [R, CAPACITY] int64: in, columns; out, keys of the fp32 scores
    held_ptr,  # [R]
    D,
    CAPACITY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    held = tl.load(held_ptr + row)
    keys_ptr += row * CAPACITY
    for start in range(tl.program_id(1) * GROUP, held, tl.num_programs(1) * GROUP):
        slot = start + tl.arange(0, GROUP)
        column = key_column(tl.load(keys_ptr + slot, mask=slot < held, other=0x7FFFFFFF))
        key = _exact_keys(
            x_ptr + row * D, W_ptr, bias_ptr, scale_ptr, column, slot < held, D, GROUP, BLOCK_D
        )
        tl.store(keys_ptr + slot, key, mask=slot < held)


def bounds_config(k: int) -> FilterConfig:
    """Room for all that a bound leaves: some 480 of 65,536 at D = 4096, k = 64."""
    capacity = 1024 if k <= 512 else 2048
    return FilterConfig(capacity, capacity // 4, capacity // 1024)


class BoundedKeys:
    """The k best of `rows` rows of x, from scores of bf16 copies; k up to MAX_SORTED."""

    sigmas = 0.0  # the bound is proven

    def __init__(
        self,
        x: torch.Tensor,  # [R, D] fp32 (a subclass: any)
        W: torch.Tensor,  # [F, D]
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        k: int,
    ):
        rows = len(x)
        assert k <= MAX_SORTED
        self.x, self.W, self.bias, self.scale, self.k = x, W, bias, scale, k
        self.config = bounds_config(k)
        self._round()
        size = (rows, self.config.capacity)
        self.keys = torch.empty(size, dtype=torch.int64, device=x.device)
        self.upper = torch.empty(size, dtype=torch.int32, device=x.device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=x.device)
        self.threshold = torch.full((rows,), -(2**31), dtype=torch.int32, device=x.device)

    def _round(self) -> None:
        self.g = accumulation(self.x.shape[1])
        self.rounded = torch.empty_like(self.x, dtype=torch.bfloat16)
        self.norms = torch.empty(2, len(self.x), dtype=torch.float32, device=self.x.device)
        round_rows(self.x, self.rounded, self.norms)

    @staticmethod
    def bytes_per_row(k: int, d: int) -> int:
        return 12 * bounds_config(k).capacity + 16 + 2 * d

    def add(self, scores: torch.Tensor, norms: torch.Tensor, first: int, fresh: int) -> None:
        """Columns first + fresh to first + C of the scores; norms [2, C] are those of W."""
        rows, d = self.x.shape
        _bounds_kernel[(rows,)](
            scores, self.norms, norms, self.x, self.W, self.bias, self.scale,
            self.keys, self.upper, self.held, self.threshold,
            scores.stride(0), first, fresh, scores.shape[1], self.k, d, self.g,
            self.sigmas,
            **self.config.sizes(), GROUP=_FEW, BLOCK_D=_BLOCK_D, LIKELY=self.sigmas > 0,
            num_warps=self.config.num_warps,
        )  # fmt: skip

    def finish(self) -> torch.Tensor:
        """Keys [R, CAPACITY] with the k best in order in front."""
        (rows, d), capacity = self.x.shape, self.config.capacity
        sizes = self.config.sizes()
        _drop_kernel[(rows,)](
            self.keys, self.upper, self.held, self.threshold, self.k,
            CAPACITY=capacity, PIECE=sizes["PIECE"], num_warps=self.config.num_warps,
        )  # fmt: skip
        _rescore_kernel[(rows, _PROGRAMS)](
            self.x, self.W, self.bias, self.scale, self.keys, self.held, d,
            CAPACITY=capacity, GROUP=GROUP, BLOCK_D=_BLOCK_D,
        )  # fmt: skip
        order_rows(self.keys, self.held, self.k)
        return self.keys


def rows_that_fit(chunks: Chunks, k: int, d: int) -> int:
    """Tokens of a pass whose candidates there is room for."""
    return (chunks.keys_bytes - chunks.copy_bytes) // BoundedKeys.bytes_per_row(k, d)


def select(
    x: torch.Tensor,  # [R, D] fp32
    W_enc: torch.Tensor,  # [F, D] fp32
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """See `Design.select`. A chunk of W_enc is copied to bf16 just before its product."""
    (rows, d), f = x.shape, W_enc.shape[0]
    columns = chunks.columns(rows, f)
    columns = min(columns, max(16, chunks.copy_bytes // (2 * d) // 16 * 16))
    best = BoundedKeys(x, W_enc, b_enc, rank_scale, k)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    copy = torch.empty(columns, d, dtype=torch.bfloat16, device=x.device)
    norms = torch.empty(2, columns, dtype=torch.float32, device=x.device)
    product = Product(best.rounded, copy)
    for first, fresh, _ in chunks_of(f, columns):
        round_rows(W_enc[first : first + columns], copy, norms)
        product(slab)
        best.add(slab, norms, first, fresh)
    return best.finish()


def configurations() -> list[Configuration]:
    """Both capacities, with bias and scale and without, aligned rows and odd ones."""
    result = []
    for d in ("i32:16", "i32"):
        signature = dict(rows_ptr="*fp32", rounded_ptr="*bf16", norms_ptr="*fp32", D=d)
        label = "aligned" if d == "i32:16" else "odd D"
        result.append(Configuration(_round_rows_kernel, label, signature, dict(BLOCK_D=1024)))
    for k, d, extras, pointer in (
        (64, "i32:16", True, "*fp32"), (64, "i32", False, "*fp32"),
        (MAX_SORTED, "i32:16", True, "*fp32"), (64, "i32:16", True, "*bf16"),
    ):  # fmt: skip
        config = bounds_config(k)
        common = dict(
            x_ptr=pointer, W_ptr=pointer, bias_ptr=pointer, scale_ptr=pointer,
            held_ptr="*i32", D=d,
        )  # fmt: skip
        shared = dict(BLOCK_D=_BLOCK_D)
        if not extras:
            shared |= dict(bias_ptr=None, scale_ptr=None)
        likely = pointer != "*fp32"  # the filter in fp8
        label = f"k={k} " + ("bias, scale" if extras else "odd D") + " bf16, likely" * likely
        signature = dict(
            scores_ptr="*fp32", x_norms_ptr="*fp32", W_norms_ptr="*fp32", **common,
            lower_ptr="*i64", upper_ptr="*i32", threshold_ptr="*i32", stride="i32:16",
            first="i32:16", fresh="i32", C="i32:16", K="i32", g="fp32", sigmas="fp32",
        )  # fmt: skip
        constants = dict(shared, **config.sizes(), GROUP=_FEW, LIKELY=likely)
        rescore = dict(shared, CAPACITY=config.capacity, GROUP=GROUP)
        drop = dict(
            lower_ptr="*i64", upper_ptr="*i32", held_ptr="*i32", threshold_ptr="*i32", K="i32"
        )
        sizes = {name: size for name, size in config.sizes().items() if name != "BLOCK"}
        result += [
            Configuration(_bounds_kernel, label, signature, constants, config.num_warps),
            Configuration(_rescore_kernel, label, dict(common, keys_ptr="*i64"), rescore),
            Configuration(_drop_kernel, label, drop, sizes, config.num_warps),
        ]  # fmt: skip
    return result
