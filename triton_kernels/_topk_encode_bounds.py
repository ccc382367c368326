"""The filter of topk_encode for fp32 inputs: scores of bf16 copies, with a proven error bound.

With x^, w^ the bf16 roundings, s the product of these summed in fp32 and e the fp32 score of the
pair, every pair satisfies

    |s - e| <= |x - x^| |w| + |x^| |w - w^| + g |x| |w|        (Cauchy-Schwarz, twice)

where g holds the rounding of both sums. A row keeps the pairs whose upper bound reaches T, the k-th
largest lower bound so far; what remains after the last column is scored in fp32, and the k best of
that are the k best of all. When too many remain, the program scores them at once and goes on with
the k best: nothing is dropped for want of room. Norms that are not finite make the bound infinite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._configuration import Configuration
from ._topk_encode_keys import MAX_SORTED, filter_config, keep_best, order_keys, rank_scores, top_of

_EMPTY = tl.constexpr(-(2**63))
_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
_EPS, _TINY = tl.constexpr(2.0**-20), tl.constexpr(2.0**-100)

GROUP = 8  # candidates that a program scores at a time
_BLOCK_D = 128


def accumulation(d: int) -> float:
    """g: an error of 2^-22 of the sum of sizes for each of D terms on the tensor cores, which may
    truncate, and of 2^-24 for the fp32 score."""
    return (d + 64) * 1.25 * 2.0**-22


@triton.jit
def _round_rows_kernel(
    rows_ptr,  # [R, D] fp32
    rounded_ptr,  # [R, D] bf16
    norms_ptr,  # [R, 2] fp32: at least |r| and |r^|, at least |r - r^|
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK_D,), tl.float32)
    residual = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        r = tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0)
        low = r.to(tl.bfloat16)
        off = r - low.to(tl.float32)
        square += r * r
        residual += off * off
        tl.store(rounded_ptr + row * D + d, low, mask=d < D)
    # roundings of the sums, and squares that underflowed
    grow = 1.0 + (D + 32) * 2.0**-23
    off = tl.sqrt(tl.sum(residual) * grow + D * 2.0**-125) * (1.0 + _EPS)
    size = tl.sqrt(tl.sum(square) * grow + D * 2.0**-125) * (1.0 + _EPS) + off
    # beyond 2^40 something could overflow on the way: nothing is known
    size = tl.where(size <= 2.0**40, size * (1.0 + _EPS), float("inf"))
    tl.store(norms_ptr + row * 2, size)
    tl.store(norms_ptr + row * 2 + 1, tl.where(size <= 2.0**41, off, float("inf")))


def round_rows(rows: torch.Tensor, rounded: torch.Tensor, norms: torch.Tensor) -> None:
    """bf16 copies of rows [R, D], and norms [R, 2]: of the rows, of what the copies left out."""
    d = rows.shape[1]
    block = min(1024, max(64, triton.next_power_of_2(d)))
    _round_rows_kernel[(len(rows),)](rows, rounded, norms, d, BLOCK_D=block)


@triton.jit
def _orders(rank):
    """Order-preserving int32 of fp32; NaN is above all."""
    rank = tl.where(rank == 0.0, 0.0, rank)
    bits = tl.where(rank != rank, 0x7FFFFFFF, rank.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _exact_keys(
    x_row, W_ptr, bias_ptr, scale_ptr, column, inside, D, GROUP: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Keys of the fp32 scores of some latents [GROUP]."""
    sums = tl.zeros((GROUP, BLOCK_D), tl.float32)
    at = W_ptr + column.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        used = inside[:, None] & (d < D)[None, :]
        x = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(at + d[None, :], mask=used, other=0.0).to(tl.float32)
        sums += tl.where(used, w * x[None, :], 0.0)
    rank = rank_scores(tl.sum(sums, axis=1), column, inside, bias_ptr, scale_ptr)
    return order_keys(rank, column)


@triton.jit
def _columns_of(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _drop_below(
    lower_ptr, upper_ptr, held, threshold, K, CAPACITY: tl.constexpr, TOP: tl.constexpr
):
    """Raises the threshold to the K-th largest lower bound; keeps what can still reach it."""
    tl.debug_barrier()  # other threads of this program stored candidates
    slot = tl.arange(0, CAPACITY)
    lower = tl.load(lower_ptr + slot, mask=slot < held, other=_EMPTY)
    upper = tl.load(upper_ptr + slot, mask=slot < held, other=_LOWEST)
    rank = tl.arange(0, TOP)
    kth = tl.max(tl.where(rank == K - 1, tl.topk(lower, TOP), _EMPTY))
    threshold = tl.maximum(threshold, (kth >> 32).to(tl.int32))
    kept = (slot < held) & (upper >= threshold)
    to = tl.cumsum(kept.to(tl.int32)) - 1
    tl.debug_barrier()
    tl.store(lower_ptr + to, lower, mask=kept)
    tl.store(upper_ptr + to, upper, mask=kept)
    tl.debug_barrier()
    return tl.sum(kept.to(tl.int32)), threshold


@triton.jit
def _settle(
    x_row, W_ptr, bias_ptr, scale_ptr, lower_ptr, upper_ptr, held, K, D,
    CAPACITY: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores all candidates in fp32; the K best stay. Returns the K-th's order."""
    for start in range(0, held, GROUP):
        slot = start + tl.arange(0, GROUP)
        column = _columns_of(tl.load(lower_ptr + slot, mask=slot < held, other=0))
        key = _exact_keys(x_row, W_ptr, bias_ptr, scale_ptr, column, slot < held, D, GROUP, BLOCK_D)
        tl.store(lower_ptr + slot, key, mask=slot < held)
    kth = keep_best(lower_ptr, held, K, CAPACITY, TOP)
    rank = tl.arange(0, TOP)
    best = tl.load(lower_ptr + rank)
    tl.store(upper_ptr + rank, (best >> 32).to(tl.int32))
    tl.debug_barrier()
    return (kth >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["first", "fresh", "C"])
def _bounds_kernel(
    scores_ptr,  # [R, C] fp32 sums of bf16 products, row stride `stride`
    x_norms_ptr,  # [R, 2], or [R, 3] where LIKELY
    W_norms_ptr,  # [C, 2], or [C, 3]
    x_ptr,  # [R, D]
    W_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    lower_ptr,  # [R, CAPACITY] int64: lower bound's order above, column inverted below
    upper_ptr,  # [R, CAPACITY] int32: upper bound's order
    held_ptr,  # [R] int32: candidates
    threshold_ptr,  # [R] int32: order of the K-th largest lower bound so far
    stride,
    first,  # column of scores_ptr[0, 0]
    fresh,  # columns before this one have been seen
    C,
    K,
    D,
    g,
    sigmas,
    CAPACITY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,
    LIKELY: tl.constexpr,  # errors as of independent roundings, sigmas times; else the bound
):
    NORMS: tl.constexpr = 3 if LIKELY else 2
    row = tl.program_id(0).to(tl.int64)
    lower_ptr += row * CAPACITY
    upper_ptr += row * CAPACITY
    held = tl.load(held_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    x_size = tl.load(x_norms_ptr + row * NORMS)
    x_off = tl.load(x_norms_ptr + row * NORMS + 1)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        new = (at >= fresh) & (at < C)
        column = first + at
        rank = tl.load(scores_ptr + row * stride + at, mask=new, other=0.0)
        w_size = tl.load(W_norms_ptr + at * NORMS, mask=new, other=0.0)
        w_off = tl.load(W_norms_ptr + at * NORMS + 1, mask=new, other=0.0)
        if LIKELY:
            by_x = x_off * tl.load(W_norms_ptr + at * NORMS + 2, mask=new, other=0.0)
            by_w = tl.load(x_norms_ptr + row * NORMS + 2) * w_off
            most = tl.maximum(by_x, by_w)
            ratio = tl.minimum(by_x, by_w) / tl.maximum(most, _TINY)  # squares would underflow
            margin = sigmas * most * tl.sqrt(1.0 + ratio * ratio)
        else:
            margin = x_off * w_size + x_size * w_off
        # the last terms: roundings that follow the sums, here and in the exact rank
        margin += g * x_size * w_size + tl.abs(rank) * _EPS + _TINY
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=new, other=0.0).to(tl.float32)
            rank += bias
            margin += tl.abs(bias) * _EPS
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + column, mask=new, other=0.0).to(tl.float32)
            rank *= scale
            margin = margin * tl.abs(scale) + tl.abs(rank) * _EPS + _TINY
        margin *= 1.0 + _EPS
        low = rank - margin
        low = tl.where(low != low, _LOWEST, _orders(low))
        high = _orders(rank + margin)
        wanted = new & (high >= threshold)
        count = tl.sum(wanted.to(tl.int32))
        if count > 0:
            if held + count > CAPACITY:
                held, threshold = _drop_below(
                    lower_ptr, upper_ptr, held, threshold, K, CAPACITY, TOP
                )
                if held > CAPACITY - BLOCK:
                    kth = _settle(
                        x_ptr + row * D, W_ptr, bias_ptr, scale_ptr, lower_ptr, upper_ptr, held,
                        K, D, CAPACITY, TOP, GROUP, BLOCK_D,
                    )  # fmt: skip
                    threshold = tl.maximum(threshold, kth)
                    held = tl.minimum(held, K)
                wanted = wanted & (high >= threshold)
                count = tl.sum(wanted.to(tl.int32))
            slot = held + tl.cumsum(wanted.to(tl.int32)) - 1
            key = (low.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
            tl.store(lower_ptr + slot, key, mask=wanted)
            tl.store(upper_ptr + slot, high, mask=wanted)
            held += count
    if LAST:
        held, threshold = _drop_below(lower_ptr, upper_ptr, held, threshold, K, CAPACITY, TOP)
    tl.store(held_ptr + row, held)
    tl.store(threshold_ptr + row, threshold)


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
    slot = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    held = tl.load(held_ptr + row)
    if tl.program_id(1) * GROUP < held:
        keys_ptr += row * CAPACITY
        column = _columns_of(tl.load(keys_ptr + slot, mask=slot < held, other=0))
        key = _exact_keys(
            x_ptr + row * D, W_ptr, bias_ptr, scale_ptr, column, slot < held, D, GROUP, BLOCK_D
        )
        tl.store(keys_ptr + slot, key, mask=slot < held)


@triton.jit
def _best_kernel(
    keys_ptr,  # [R, CAPACITY]
    held_ptr,  # [R]
    K,
    CAPACITY: tl.constexpr,
    TOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keep_best(keys_ptr + row * CAPACITY, tl.load(held_ptr + row), K, CAPACITY, TOP)


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
        self.config = filter_config(k)
        self._round()
        size = (rows, self.config.capacity)
        self.keys = torch.empty(size, dtype=torch.int64, device=x.device)
        self.upper = torch.empty(size, dtype=torch.int32, device=x.device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=x.device)
        self.threshold = torch.full((rows,), -(2**31), dtype=torch.int32, device=x.device)

    def _round(self) -> None:
        self.g = accumulation(self.x.shape[1])
        self.rounded = torch.empty_like(self.x, dtype=torch.bfloat16)
        self.norms = torch.empty(len(self.x), 2, dtype=torch.float32, device=self.x.device)
        round_rows(self.x, self.rounded, self.norms)

    @staticmethod
    def bytes_per_row(k: int, d: int) -> int:
        return 12 * filter_config(k).capacity + 16 + 2 * d

    def add(
        self, scores: torch.Tensor, norms: torch.Tensor, first: int, fresh: int, last: bool
    ) -> None:
        """Columns first + fresh to first + C of the scores; norms [C, 2] are those of W."""
        rows, d = self.x.shape
        _bounds_kernel[(rows,)](
            scores, self.norms, norms, self.x, self.W, self.bias, self.scale,
            self.keys, self.upper, self.held, self.threshold,
            scores.stride(0), first, fresh, scores.shape[1], self.k, d, self.g,
            self.sigmas,
            CAPACITY=self.config.capacity, TOP=top_of(self.k), BLOCK=self.config.block,
            GROUP=GROUP, BLOCK_D=_BLOCK_D, LAST=last, LIKELY=self.sigmas > 0,
            num_warps=self.config.num_warps,
        )  # fmt: skip

    def finish(self) -> torch.Tensor:
        """Keys [R, CAPACITY] with the k best in order in front."""
        (rows, d), capacity = self.x.shape, self.config.capacity
        _rescore_kernel[(rows, triton.cdiv(capacity, GROUP))](
            self.x, self.W, self.bias, self.scale, self.keys, self.held, d,
            CAPACITY=capacity, GROUP=GROUP, BLOCK_D=_BLOCK_D,
        )  # fmt: skip
        _best_kernel[(rows,)](
            self.keys, self.held, self.k, CAPACITY=capacity, TOP=top_of(self.k),
            num_warps=self.config.num_warps,
        )  # fmt: skip
        return self.keys


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
        config = filter_config(k)
        common = dict(
            x_ptr=pointer, W_ptr=pointer, bias_ptr=pointer, scale_ptr=pointer,
            held_ptr="*i32", D=d,
        )  # fmt: skip
        shared = dict(CAPACITY=config.capacity, GROUP=GROUP, BLOCK_D=_BLOCK_D)
        if not extras:
            shared |= dict(bias_ptr=None, scale_ptr=None)
        likely = pointer != "*fp32"  # the filter in fp8
        label = f"k={k} " + ("bias, scale" if extras else "odd D") + " bf16, likely" * likely
        signature = dict(
            scores_ptr="*fp32", x_norms_ptr="*fp32", W_norms_ptr="*fp32", **common,
            lower_ptr="*i64", upper_ptr="*i32", threshold_ptr="*i32", stride="i32:16",
            first="i32", fresh="i32", C="i32", K="i32", g="fp32", sigmas="fp32",
        )  # fmt: skip
        constants = dict(shared, TOP=top_of(k), BLOCK=config.block, LAST=True, LIKELY=likely)
        result += [
            Configuration(_bounds_kernel, label, signature, constants, config.num_warps),
            Configuration(_rescore_kernel, label, dict(common, keys_ptr="*i64"), shared),
            Configuration(
                _best_kernel, label, dict(keys_ptr="*i64", held_ptr="*i32", K="i32"),
                dict(CAPACITY=config.capacity, TOP=top_of(k)), config.num_warps,
            ),
        ]  # fmt: skip
    return result
