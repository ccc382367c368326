"""Sort keys of topk_encode, and the kernels that keep the k best of a row of scores.

A score and its column are one int64: the order-preserving bits of the fp32 score above, the column
inverted below. Keys of a row are distinct and their descending order is the canonical one (ties by
lowest index, NaN above +inf), so every selection has one result whatever order keys arrive in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._configuration import Configuration

EMPTY, LOWEST = -(2**63), -(2**31)  # below every key, below the order of every score
_EMPTY, _LOWEST = tl.constexpr(EMPTY), tl.constexpr(LOWEST)
MAX_SORTED = 1024  # largest k that a program selects; above it torch.topk merges keys


@triton.jit
def order_of(score):
    """Order-preserving int32 of a score: -0 ties with 0, every NaN is above all."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = tl.where(score != score, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def order_keys(score, column):
    return (order_of(score).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def key_column(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def score_of(order):
    """The score of an order; NaN for -2^31, which no score has."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_scores(score, column, inside, bias_ptr, scale_ptr):
    """(score + bias) * scale, the number that latents are ranked by; outside, the score."""
    if bias_ptr is not None:
        score += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        score *= tl.load(scale_ptr + column, mask=inside, other=1.0).to(tl.float32)
    return score


@triton.jit
def inner_products(
    x_row, W_ptr, latent, inside, D,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """<x, W_enc[latent]> of some latents [GROUP], fp32. Every kernel gives a pair one score, to the
    bit: the order of the sum is written out, which tl.sum leaves to GROUP, warps and layout.
    HALVINGS: log2 of BLOCK_D."""
    sums = tl.zeros((GROUP, BLOCK_D), tl.float32)
    at = W_ptr + latent.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        used = inside[:, None] & (d < D)[None, :]
        x = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(at + d[None, :], mask=used, other=0.0).to(tl.float32)
        sums = tl.fma(w, x[None, :], sums)
    for _ in tl.static_range(HALVINGS):
        sums = tl.sum(tl.reshape(sums, (GROUP, sums.shape[1] // 2, 2)), axis=2)
    return tl.reshape(sums, (GROUP,))


@triton.jit
def larger(a, b):
    """The larger of two scores; NaN is above all."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kth_largest(values, K):
    """Of int32 `values`, at least K of them above -2^31: a t that at least K values reach, exactly
    K where ties allow it, and how many do. Bit by bit, from the highest."""
    t = _LOWEST
    count = 2147483647
    bit = 31
    while (bit >= 0) & (count != K):
        candidate = t ^ (1 << bit)
        reached = tl.sum((values >= candidate).to(tl.int32))
        t = tl.where(reached >= K, candidate, t)
        count = tl.where(reached >= K, reached, count)
        bit -= 1
    return t, count


@triton.jit
def keep_best(keys_ptr, held, K, CAPACITY: tl.constexpr, PIECE: tl.constexpr):
    """Leaves the K best of a row's `held` >= K keys in front, as they followed each other. Returns
    the order of the K-th best."""
    tl.debug_barrier()  # keys were stored by other threads of this program
    slot = tl.arange(0, CAPACITY)
    order = (tl.load(keys_ptr + slot, mask=slot < held, other=_EMPTY) >> 32).to(tl.int32)
    t, count = kth_largest(order, K)
    low = _LOWEST
    if count != K:  # more equal the K-th than there is room for: those of lowest column
        column = tl.load(keys_ptr + slot, mask=slot < held, other=_EMPTY) & 0x7FFFFFFF
        above = tl.sum((order > t).to(tl.int32))
        low, count = kth_largest(tl.where(order == t, column.to(tl.int32), _LOWEST), K - above)
    kth = tl.min(tl.where(order >= t, order, 2147483647))
    kept = 0
    for start in range(0, held, PIECE):
        piece = start + tl.arange(0, PIECE)
        keys = tl.load(keys_ptr + piece, mask=piece < held, other=_EMPTY)
        rank = (keys >> 32).to(tl.int32)
        keep = (rank > t) | ((rank == t) & ((keys & 0x7FFFFFFF).to(tl.int32) >= low))
        to = kept + tl.cumsum(keep.to(tl.int32)) - 1
        tl.debug_barrier()
        tl.store(keys_ptr + to, keys, mask=keep)
        kept += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()
    return kth


@triton.jit
def append_keys(
    keys_ptr, held, threshold, order, column, K,
    CAPACITY: tl.constexpr, PIECE: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """Adds the keys of orders above the threshold, at most CAPACITY - K of them, to a row's `held`.
    Before there are too many, the K best stay and the threshold is raised: with TIES, where a later
    column need not be a higher one, to just below the K-th best."""
    count = tl.sum((order > threshold).to(tl.int32))
    if held + count > CAPACITY:
        threshold = keep_best(keys_ptr, held, K, CAPACITY, PIECE)
        if TIES:
            threshold -= 1
        held = K
        count = tl.sum((order > threshold).to(tl.int32))
    wanted = order > threshold
    slot = held + tl.cumsum(wanted.to(tl.int32)) - 1
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    tl.store(keys_ptr + slot, key, mask=wanted)
    return held + count, threshold


@triton.jit(do_not_specialize=["fresh"])
def _filter_kernel(
    scores_ptr,  # [R, C], row stride `stride`
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32: keys in use
    threshold_ptr,  # [R] int32: order of the K-th best so far; columns ascend, so equal ones lose
    only_ptr,  # [R] int32 or None: not 0 where a row is to be looked at
    stride,
    first,  # column of scores_ptr[0, 0]
    fresh,  # columns before this one have been seen
    C,
    K,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if only_ptr is not None:  # noqa: SIM102 - the first is decided by the compiler
        if tl.load(only_ptr + row) == 0:
            return
    keys_ptr += row * CAPACITY
    held = tl.load(held_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    scores_ptr += row * stride
    at = tl.arange(0, BLOCK)
    coming = tl.load(scores_ptr + at, mask=at < C, other=float("-inf"))
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = first + at
        score = rank_scores(coming.to(tl.float32), column, at < C, bias_ptr, scale_ptr)
        # the next block is on its way while this one is looked at
        coming = tl.load(scores_ptr + at + BLOCK, mask=at + BLOCK < C, other=float("-inf"))
        # most blocks end here: the largest score alone, one instruction for each
        most = tl.reduce(score, 0, larger)
        if order_of(most) > threshold:
            order = tl.where((at >= fresh) & (at < C), order_of(score), _LOWEST)
            held, threshold = append_keys(
                keys_ptr, held, threshold, order, column, K, CAPACITY, PIECE, False
            )
    tl.store(held_ptr + row, held)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _order_kernel(
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32
    CAPACITY: tl.constexpr,
    TOP: tl.constexpr,
):
    """The TOP best of a row's keys to the front, in order."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * CAPACITY
    slot = tl.arange(0, CAPACITY)
    keys = tl.load(keys_ptr + slot, mask=slot < tl.load(held_ptr + row), other=_EMPTY)
    best = tl.topk(keys, TOP)
    tl.debug_barrier()
    tl.store(keys_ptr + tl.arange(0, TOP), best)


def order_rows(keys: torch.Tensor, held: torch.Tensor, k: int) -> None:
    """The k best of each row's `held` keys [R, CAPACITY] to the front, in order."""
    rows, capacity = keys.shape
    top = max(16, triton.next_power_of_2(k))
    warps = _order_warps(capacity)
    _order_kernel[(rows,)](keys, held, CAPACITY=capacity, TOP=top, num_warps=warps)


def _order_warps(capacity: int) -> int:
    """Eight keys a thread."""
    return max(1, capacity // 256)


@triton.jit(do_not_specialize=["first", "fresh", "C"])
def _keys_kernel(
    scores_ptr,  # [R, C] fp32, row stride `stride`
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [R, C] int64, row stride `keys_stride`
    stride,
    keys_stride,
    first,
    fresh,
    C,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + row * stride + at, mask=at < C, other=0.0)
    column = first + at
    score = rank_scores(score, column, at < C, bias_ptr, scale_ptr)
    key = tl.where(at >= fresh, order_keys(score, column), _EMPTY)
    tl.store(keys_ptr + row * keys_stride + at, key, mask=at < C)


@triton.jit
def _decode_keys_kernel(
    keys_ptr,  # [R, >= K] int64, row stride `stride`
    values_ptr,  # [R, K], or None: the key's score is not the value
    indices_ptr,  # [R, K] int32
    stride,
    K,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row * stride + at, mask=at < K, other=0)
    tl.store(indices_ptr + row * K + at, key_column(key), mask=at < K)
    if values_ptr is not None:
        value = score_of((key >> 32).to(tl.int32))
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)  # NaN stays
        tl.store(values_ptr + row * K + at, value.to(values_ptr.dtype.element_ty), mask=at < K)


@dataclass(frozen=True)
class FilterConfig:
    """Keys that a row holds, and scores looked at in one step; capacity >= K + block."""

    capacity: int
    block: int
    num_warps: int

    def sizes(self) -> dict[str, int]:
        return dict(CAPACITY=self.capacity, BLOCK=self.block, PIECE=128 * self.num_warps)


FEW_ROWS = 1024


def filter_config(k: int, rows: int) -> FilterConfig:
    """A warp a row, which no barrier holds up, as long as there are rows for all warps."""
    capacity = 512 if k <= 256 else 1024 if k <= 512 else 2048
    if rows < FEW_ROWS:
        capacity = 2048
    return FilterConfig(capacity, capacity // 2, capacity // 512)


class BestKeys:
    """The k best keys of `rows` rows, for k up to MAX_SORTED."""

    def __init__(self, rows: int, k: int, device: torch.device, config: FilterConfig | None = None):
        self.config = config or filter_config(k, rows)
        assert k + self.config.block <= self.config.capacity
        self.k = k
        self.keys = torch.empty(rows, self.config.capacity, dtype=torch.int64, device=device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=device)
        self.threshold = torch.full((rows,), LOWEST, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_per_row(k: int) -> int:
        return 8 * filter_config(k, FEW_ROWS).capacity + 12

    def add(
        self,
        scores: torch.Tensor,  # [R, C]
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        first: int,
        fresh: int,
        only: torch.Tensor | None = None,
    ) -> None:
        """Columns first + fresh to first + C. only: [R] int32, 0 for rows to be left alone."""
        rows, columns = scores.shape
        _filter_kernel[(rows,)](
            scores, bias, scale, self.keys, self.held, self.threshold, only,
            scores.stride(0), first, fresh, columns, self.k,
            **self.config.sizes(), num_warps=self.config.num_warps,
        )  # fmt: skip

    def finish(self) -> torch.Tensor:
        """Keys [R, >= k] with the k best in order in front."""
        order_rows(self.keys, self.held, self.k)
        return self.keys


class MergedKeys:
    """The same for any k: each chunk's keys are merged with the best so far by torch.topk."""

    def __init__(self, rows: int, k: int, columns: int, device: torch.device):
        self.k = k
        self.keys = torch.full((rows, k + columns), EMPTY, dtype=torch.int64, device=device)

    @staticmethod
    def bytes_per_row(k: int) -> int:
        """Without the chunk: keys, values and indices of topk, the final sort with its scratch."""
        return 72 * k

    def add(
        self,
        scores: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        first: int,
        fresh: int,
        last: bool,
    ) -> None:
        rows, columns = scores.shape
        _keys_kernel[(rows, triton.cdiv(columns, 1024))](
            scores, bias, scale, self.keys[:, self.k :], scores.stride(0), self.keys.stride(0),
            first, fresh, columns, BLOCK=1024,
        )  # fmt: skip
        best = torch.topk(self.keys[:, : self.k + columns], self.k, dim=1, sorted=False).values
        self.keys[:, : self.k] = best.sort(dim=1, descending=True).values if last else best


def decode_keys(
    keys: torch.Tensor, values: torch.Tensor | None, indices: torch.Tensor, relu: bool
) -> None:
    """Sorted keys [R, >= K] to indices [R, K] and, unless None, values [R, K]."""
    rows, k = indices.shape
    block = min(1024, triton.next_power_of_2(k))
    _decode_keys_kernel[(rows, triton.cdiv(k, block))](
        keys, values, indices, keys.stride(0), k, RELU=relu, BLOCK=block
    )


def configurations() -> list[Configuration]:
    """Every filter size, with bias and scale and without; topk's elements as scores."""
    result = []
    for k, pointer, scores in (
        (64, "*bf16", "*fp32"), (64, None, "*fp32"), (MAX_SORTED // 2, None, "*fp32"),
        (MAX_SORTED, "*fp32", "*fp32"), (64, None, "*bf16"), (MAX_SORTED, None, "*fp16"),
    ):  # fmt: skip
        config = filter_config(k, FEW_ROWS)
        signature = dict(
            scores_ptr=scores, keys_ptr="*i64", held_ptr="*i32", threshold_ptr="*i32",
            stride="i32:16", first="i32:16", fresh="i32", C="i32:16", K="i32",
        )  # fmt: skip
        constants: dict[str, object] = dict(config.sizes())
        if (k, pointer) == (64, "*bf16"):
            signature["only_ptr"] = "*i32"
        else:
            constants["only_ptr"] = None
        _optional(signature, constants, pointer)
        label = f"k={k} {pointer and pointer[1:]}" + (f" {scores[1:]} scores" * (scores != "*fp32"))
        result.append(Configuration(_filter_kernel, label, signature, constants, config.num_warps))
        if (pointer is None and scores == "*fp32") or k == MAX_SORTED:
            signature = dict(keys_ptr="*i64", held_ptr="*i32")
            constants = dict(CAPACITY=config.capacity, TOP=k)
            warps = _order_warps(config.capacity)
            result.append(Configuration(_order_kernel, label, signature, constants, warps))
    signature = dict(
        scores_ptr="*fp32", keys_ptr="*i64", stride="i32:16", keys_stride="i32",
        first="i32", fresh="i32", C="i32",
    )  # fmt: skip
    constants = dict(BLOCK=1024)
    _optional(signature, constants, "*bf16")
    result.append(Configuration(_keys_kernel, "large k", signature, constants))
    signature = dict(
        keys_ptr="*i64", values_ptr="*bf16", indices_ptr="*i32", stride="i32:16", K="i32"
    )
    constants = dict(RELU=True, BLOCK=64)
    result.append(Configuration(_decode_keys_kernel, "bf16", signature, constants))
    return result


def _optional(signature: dict[str, str], constants: dict[str, object], pointer: str | None) -> None:
    for name in ("bias_ptr", "scale_ptr"):
        if pointer is None:
            constants[name] = None
        else:
            signature[name] = pointer
