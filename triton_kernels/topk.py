"""topk: a filter with a sorted buffer for every row, or radix selection by digits of the order.

The filter reads a row once in one program; k up to MAX_SORTED. The radix selection takes any k and
spreads a row over programs: histograms of 11 bits of (order, place) find the k-th best, at which
every row stops as soon as it is known, then what reaches it is collected and sorted. Which of the
two, and every size, follows from the shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from .topk_encode.keys import MAX_SORTED, BestKeys, key_column, order_keys

_WORKSPACE = 160 << 20
_DIGIT = 11
_BINS = tl.constexpr(1 << _DIGIT)
_SPAN, _BLOCK = 32768, 2048  # elements of a program, and of one step of it
# Order bits of a dtype: the order of the same number in fp32, without the bits that never differ.
_ORDER_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 19}


@triton.jit
def _rank(x_ptr, at, M, shift, ORDER_BITS: tl.constexpr):
    """Keys of a row's elements `at` [BLOCK] int64, and the same order in the fewest bits, >= 0; -1
    outside of the row."""
    value = tl.load(x_ptr + at, mask=at < M, other=0.0).to(tl.float32)
    key = order_keys(value, at.to(tl.int32))
    order = ((key >> 32) + 2147483648) >> (32 - ORDER_BITS)
    return key, tl.where(at < M, (order << shift) | (M - 1 - at), -1)


@triton.jit(do_not_specialize=["column_bits", "upper", "lower"])
def _count_digits_kernel(
    x_ptr,  # [R, M]
    kth_ptr,  # [R] int64: the k-th best rank, its bits from `upper` on
    need_ptr,  # [R] int32: how many with these bits are taken; 0: all
    bins_ptr,  # [R, BINS] int32
    M,
    spans,  # programs of a row
    column_bits,
    upper,
    lower,  # the digit: bits lower to upper of a rank
    ORDER_BITS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // spans
    begin = (tl.program_id(0).to(tl.int64) % spans) * SPAN
    if tl.load(need_ptr + row) > 0:
        leading = tl.load(kth_ptr + row) >> upper
        counts = tl.zeros((_BINS,), tl.int32)
        for start in range(0, SPAN, BLOCK):
            if begin + start < M:
                at = begin + start + tl.arange(0, BLOCK)
                _, rank = _rank(x_ptr + row * M, at, M, column_bits, ORDER_BITS)
                digit = ((rank >> lower) - (leading << (upper - lower))).to(tl.int32)
                same = (rank >> upper) == leading
                counts += tl.histogram(tl.where(same, digit, 0), _BINS, mask=same)
        bin = bins_ptr + row * _BINS + tl.arange(0, _BINS)
        tl.atomic_add(bin, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["lower"])
def _pick_digit_kernel(kth_ptr, need_ptr, bins_ptr, lower):
    """The digit in which the k-th best lies; clears the bins."""
    row = tl.program_id(0).to(tl.int64)
    need = tl.load(need_ptr + row)
    if need > 0:
        digit = tl.arange(0, _BINS)
        mine = tl.load(bins_ptr + row * _BINS + digit)
        above = tl.sum(mine) - tl.cumsum(mine)
        here = (above < need) & (need <= above + mine)
        need -= tl.sum(tl.where(here, above, 0))
        all_taken = tl.sum(tl.where(here, mine, 0)) == need
        found = tl.sum(tl.where(here, digit, 0)).to(tl.int64) << lower
        tl.store(kth_ptr + row, tl.load(kth_ptr + row) | found)
        tl.store(need_ptr + row, tl.where(all_taken, 0, need))
        tl.store(bins_ptr + row * _BINS + digit, tl.zeros_like(mine))


@triton.jit(do_not_specialize=["column_bits"])
def _collect_kernel(
    x_ptr,  # [R, M]
    kth_ptr,  # [R] int64
    taken_ptr,  # [R] int32
    keys_ptr,  # [R, K] int64, any order
    M,
    K,
    spans,
    column_bits,
    ORDER_BITS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // spans
    begin = (tl.program_id(0).to(tl.int64) % spans) * SPAN
    kth = tl.load(kth_ptr + row)
    for start in range(0, SPAN, BLOCK):
        if begin + start < M:
            at = begin + start + tl.arange(0, BLOCK)
            key, rank = _rank(x_ptr + row * M, at, M, column_bits, ORDER_BITS)
            wanted = rank >= kth
            count = tl.sum(wanted.to(tl.int32))
            if count > 0:
                first = tl.atomic_add(taken_ptr + row, count, sem="relaxed")
                slot = first + tl.cumsum(wanted.to(tl.int32)) - 1
                tl.store(keys_ptr + row * K + slot, key, mask=wanted)


@triton.jit
def _write_kernel(
    x_ptr,  # [R, M]
    keys_ptr,  # [R, >= K] int64 in order, row stride `stride`
    values_ptr,  # [R, K]
    indices_ptr,  # [R, K] int32
    M,
    stride,
    K,
    BLOCK: tl.constexpr,
):
    """The elements themselves: a key does not tell -0 from 0."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = key_column(tl.load(keys_ptr + row * stride + at, mask=at < K, other=0x7FFFFFFF))
    tl.store(indices_ptr + row * K + at, column, mask=at < K)
    tl.store(values_ptr + row * K + at, tl.load(x_ptr + row * M + column, mask=at < K), mask=at < K)


def _by_digits(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keys [R, k] in order."""
    rows, m = x.shape
    order_bits, column_bits = _ORDER_BITS[x.dtype], (m - 1).bit_length()
    spans = triton.cdiv(m, _SPAN)
    kth = torch.zeros(rows, dtype=torch.int64, device=x.device)
    need = torch.full((rows,), k, dtype=torch.int32, device=x.device)
    taken = torch.zeros(rows, dtype=torch.int32, device=x.device)
    bins = torch.zeros(rows, _BINS.value, dtype=torch.int32, device=x.device)
    sizes = dict(ORDER_BITS=order_bits, SPAN=_SPAN, BLOCK=_BLOCK)
    for upper in range(order_bits + column_bits, 0, -_DIGIT):
        lower = max(0, upper - _DIGIT)
        _count_digits_kernel[(rows * spans,)](
            x, kth, need, bins, m, spans, column_bits, upper, lower, **sizes
        )
        _pick_digit_kernel[(rows,)](kth, need, bins, lower)
    keys = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    _collect_kernel[(rows * spans,)](x, kth, taken, keys, m, k, spans, column_bits, **sizes)
    return keys.sort(dim=1, descending=True).values


def _by_filter(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keys [R, >= k] with the k best in order in front."""
    best = BestKeys(len(x), k, x.device)
    best.add(x, None, None, 0, 0)
    return best.finish()


def filter_pays(n: int, m: int, k: int) -> bool:
    """Whether a program a row is enough. A prediction, unverified on a GPU: 20 microseconds for
    every 16384 elements of a row, against a dozen launches that share rows between programs."""
    return k <= MAX_SORTED and (n >= 128 or m <= 1 << 16) and m < 1 << 30


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk`. No host sync; unverified on a GPU."""
    n, m = x.shape
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int32)
    if n * k == 0:
        return values, indices
    filtered = filter_pays(n, m, k)
    per_row = BestKeys.bytes_per_row(k) if filtered else 4 * _BINS.value + 72 * k
    step, block = max(1, _WORKSPACE // per_row), min(1024, triton.next_power_of_2(k))
    with on_device(x):
        for begin in range(0, n, step):
            some = x[begin : begin + step]
            keys = _by_filter(some, k) if filtered else _by_digits(some, k)
            _write_kernel[(len(some), triton.cdiv(k, block))](
                some, keys, values[begin:], indices[begin:], m, keys.stride(0), k, BLOCK=block
            )
    return values, indices


def configurations() -> list[Configuration]:
    """Each dtype, rows on 16 bytes and odd ones."""
    result = []
    sizes = dict(SPAN=_SPAN, BLOCK=_BLOCK)
    for dtype, pointer in POINTERS.items():
        constants = dict(sizes, ORDER_BITS=_ORDER_BITS[dtype])
        for m in ("i32:16", "i32"):
            label = pointer[1:] + (" odd M" if m == "i32" else "")
            common = dict(x_ptr=pointer, kth_ptr="*i64", M=m, spans="i32", column_bits="i32")
            count = common | dict(need_ptr="*i32", bins_ptr="*i32", upper="i32", lower="i32")
            collect = common | dict(taken_ptr="*i32", keys_ptr="*i64", K="i32")
            write = dict(
                x_ptr=pointer, keys_ptr="*i64", values_ptr=pointer, indices_ptr="*i32",
                M=m, stride="i32", K="i32",
            )  # fmt: skip
            result += [
                Configuration(_count_digits_kernel, label, count, constants),
                Configuration(_collect_kernel, label, collect, constants),
                Configuration(_write_kernel, label, write, dict(BLOCK=1024)),
            ]
    signature = dict(kth_ptr="*i64", need_ptr="*i32", bins_ptr="*i32", lower="i32")
    result.append(Configuration(_pick_digit_kernel, "", signature))
    return result
