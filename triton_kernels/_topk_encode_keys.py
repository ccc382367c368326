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

from ._configuration import Configuration

EMPTY = -(2**63)  # below every key
_EMPTY = tl.constexpr(EMPTY)
MAX_SORTED = 1024  # largest k that a program sorts; above it torch.topk merges keys


@triton.jit
def order_keys(score, column):
    score = tl.where(score == 0.0, 0.0, score)  # -0 ties with 0
    bits = tl.where(score != score, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))  # one NaN
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rank.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def key_column(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def key_score(key):
    rank = (key >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_scores(score, column, inside, bias_ptr, scale_ptr):
    """(score + bias) * scale, the number that latents are ranked by."""
    if bias_ptr is not None:
        score += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        score *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return score


@triton.jit
def keep_best(keys_ptr, held, K, CAPACITY: tl.constexpr, TOP: tl.constexpr):
    """Sorts the `held` keys of a row; its TOP >= K best stay in front. Returns the K-th."""
    tl.debug_barrier()  # keys were stored by other threads of this program
    slot = tl.arange(0, CAPACITY)
    best = tl.topk(tl.load(keys_ptr + slot, mask=slot < held, other=_EMPTY), TOP)
    rank = tl.arange(0, TOP)
    tl.debug_barrier()
    tl.store(keys_ptr + rank, best)
    tl.debug_barrier()
    return tl.max(tl.where(rank == K - 1, best, _EMPTY))


@triton.jit(do_not_specialize=["first", "fresh", "C"])
def _filter_kernel(
    scores_ptr,  # [R, C], row stride `stride`
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] or None
    keys_ptr,  # [R, CAPACITY] int64
    held_ptr,  # [R] int32: keys in use
    threshold_ptr,  # [R] int64: K-th best key so far
    only_ptr,  # [R] int32 or None: not 0 where a row is to be looked at
    stride,
    first,  # column of scores_ptr[0, 0]
    fresh,  # columns before this one have been seen
    C,
    K,
    CAPACITY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,  # leave the K best sorted in front
):
    row = tl.program_id(0).to(tl.int64)
    if only_ptr is not None:  # noqa: SIM102 - the first is decided by the compiler
        if tl.load(only_ptr + row) == 0:
            return
    keys_ptr += row * CAPACITY
    held = tl.load(held_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + row * stride + at, mask=at < C, other=0.0).to(tl.float32)
        column = first + at
        score = rank_scores(score, column, at < C, bias_ptr, scale_ptr)
        key = order_keys(score, column)
        wanted = (at >= fresh) & (at < C) & (key > threshold)
        count = tl.sum(wanted.to(tl.int32))
        if count > 0:
            if held + count > CAPACITY:
                threshold = keep_best(keys_ptr, held, K, CAPACITY, TOP)
                held = tl.minimum(held, K)
                wanted = wanted & (key > threshold)
                count = tl.sum(wanted.to(tl.int32))
            slot = held + tl.cumsum(wanted.to(tl.int32)) - 1
            tl.store(keys_ptr + slot, key, mask=wanted)
            held += count
    if LAST:
        threshold = keep_best(keys_ptr, held, K, CAPACITY, TOP)
        held = tl.minimum(held, K)
    tl.store(held_ptr + row, held)
    tl.store(threshold_ptr + row, threshold)


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
        value = key_score(key)
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)  # NaN stays
        tl.store(values_ptr + row * K + at, value.to(values_ptr.dtype.element_ty), mask=at < K)


@dataclass(frozen=True)
class FilterConfig:
    """Keys that a row holds, and scores looked at in one step; capacity >= K + block."""

    capacity: int
    block: int
    num_warps: int


def filter_config(k: int) -> FilterConfig:
    """A reselection every capacity - k candidates: two or three in a row of 131072 at k = 64."""
    return FilterConfig(1024, 512, 4) if k <= 512 else FilterConfig(2048, 1024, 8)


def top_of(k: int) -> int:
    return max(16, triton.next_power_of_2(k))


class BestKeys:
    """The k best keys of `rows` rows, for k up to MAX_SORTED."""

    def __init__(self, rows: int, k: int, device: torch.device, config: FilterConfig | None = None):
        self.config = config or filter_config(k)
        assert k + self.config.block <= self.config.capacity
        self.k = k
        self.keys = torch.empty(rows, self.config.capacity, dtype=torch.int64, device=device)
        self.held = torch.zeros(rows, dtype=torch.int32, device=device)
        self.threshold = torch.full((rows,), EMPTY, dtype=torch.int64, device=device)

    @staticmethod
    def bytes_per_row(k: int) -> int:
        return 8 * filter_config(k).capacity + 12

    def add(
        self,
        scores: torch.Tensor,  # [R, C]
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        first: int,
        fresh: int,
        last: bool,
        only: torch.Tensor | None = None,
    ) -> None:
        """Columns first + fresh to first + C; with `last` the k best are then in order in front.
        only: [R] int32, 0 for rows to be left alone."""
        rows, columns = scores.shape
        _filter_kernel[(rows,)](
            scores, bias, scale, self.keys, self.held, self.threshold, only,
            scores.stride(0), first, fresh, columns, self.k,
            CAPACITY=self.config.capacity, TOP=top_of(self.k),
            BLOCK=self.config.block, LAST=last, num_warps=self.config.num_warps,
        )  # fmt: skip


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
    """Both filter sizes, with bias and scale and without; topk's elements as scores."""
    result = []
    for k, pointer, scores in (
        (64, "*bf16", "*fp32"), (64, None, "*fp32"), (MAX_SORTED, "*fp32", "*fp32"),
        (64, None, "*bf16"), (MAX_SORTED, None, "*fp16"),
    ):  # fmt: skip
        config = filter_config(k)
        signature = dict(
            scores_ptr=scores, keys_ptr="*i64", held_ptr="*i32", threshold_ptr="*i64",
            stride="i32:16", first="i32", fresh="i32", C="i32", K="i32",
        )  # fmt: skip
        constants = dict(CAPACITY=config.capacity, TOP=top_of(k), BLOCK=config.block, LAST=True)
        if (k, pointer) == (64, "*bf16"):
            signature["only_ptr"] = "*i32"
        else:
            constants["only_ptr"] = None
        _optional(signature, constants, pointer)
        label = f"k={k} {pointer and pointer[1:]}" + (f" {scores[1:]} scores" * (scores != "*fp32"))
        result.append(Configuration(_filter_kernel, label, signature, constants, config.num_warps))
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
