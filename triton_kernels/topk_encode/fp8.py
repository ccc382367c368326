"""topk_encode filtered by scores in fp8 (e4m3), by name only: nearly certain, never a proof.

Rows of x and of W are scaled to the format's range and rounded, x^ = x + dx, w^ = w + dw. If the
roundings of the D places are independent, the error of a score has the variance

    sum_d dx_d^2 w_d^2 + x^_d^2 dw_d^2  <=  |dx|_4^2 |w|_4^2 + |x^|_4^2 |dw|_4^2 = sigma^2

(Cauchy-Schwarz on the squares; |.|_4 is the norm of fourth powers). Few places that hold most of a
row, as a language model's outlier coordinates do, are in sigma; on even rows it is twice the
deviation. A pair is kept while its score + SIGMAS sigma reaches the k-th best score - SIGMAS sigma;
what is left is scored in fp32 from the rows themselves, so values and order are exact and only a
latent can be missed, by an error of about twice the margin. Measured in emulation by
`benchmarks/fp8_recall.py`. A bound that is proven would leave 500 to 9000 latents a row to score
and could not pay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._blocks import POINTERS
from .._configuration import Configuration
from .bounded import BoundedKeys
from .chunked import Chunks

SIGMAS = 2.0
CAPABILITY = (8, 9)  # the first with tensor cores for e4m3
_TMA_CAPABILITY = (9, 0)  # before it descriptors become loads of single bytes, and registers spill
_EPS = tl.constexpr(2.0**-20)
# Hopper's tensor cores keep some 13 bits of a sum of fp8 products. Sums over BLOCK_D places at a
# time are added in fp32: four steps each, of at most 2^-13 of |x| |w| over those places.
ACCUMULATION = 2.0**-11
_BLOCK_N, _BLOCK_F, _BLOCK_D = 128, 128, 128
_TARGETS = ("sm_89", "sm_90", "sm_100")


@triton.jit
def _round_e4m3(v):
    """v, |v| < 448, as the nearest number of the format, ties to even: the cast that follows is
    then exact (Triton's interpreter truncates and loses carries)."""
    bits = v.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits of mantissa
    small = (v + 24576.0) - 24576.0  # multiples of 2^-9
    return tl.where(tl.abs(v) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit
def _fp8_rows_kernel(
    rows_ptr,  # [R, D]
    codes_ptr,  # [R, STRIDE] e4m3
    norms_ptr,  # [3, R] fp32: of the row and its code, |.|_4 of what the code left out, of both
    units_ptr,  # [R] fp32: a code of 1 stands for this
    D,
    STRIDE,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    finite = tl.full((BLOCK_D,), 1, tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        r = tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        finite = tl.where(tl.abs(r) < 2.0**40, finite, 0)  # NaN as well
        largest = tl.maximum(largest, tl.abs(r))
    known = tl.min(finite) == 1
    most = tl.max(tl.where(finite == 1, largest, 0.0))
    # a power of two: scaling by it rounds nothing
    bits = tl.maximum(most, 2.0**-60).to(tl.int32, bitcast=True)
    unit = ((bits & 0x7F800000) - (7 << 23)).to(tl.float32, bitcast=True)  # most / unit < 256
    square = tl.zeros((BLOCK_D,), tl.float32)
    fourth = tl.zeros((BLOCK_D,), tl.float32)
    residual = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, STRIDE, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        r = tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        r = tl.where(known, r, 0.0) / unit  # in units, where fourth powers fit
        code = _round_e4m3(r).to(codes_ptr.dtype.element_ty)
        low = code.to(tl.float32)
        off = (r - low) * (r - low)
        largest_square = tl.maximum(r * r, low * low)
        square += largest_square
        fourth += largest_square * largest_square
        residual += off * off
        tl.store(codes_ptr + row * STRIDE + d, code, mask=d < STRIDE)
    unit_up = tl.where(known, unit * (1.0 + _EPS), float("inf"))
    # at least what powers lose that underflow; a row of zeros lost nothing
    lost = tl.where(known & (most == 0.0), 0.0, D * 2.0**-125)
    # nothing is known of a row that is not finite: every pair of it is a candidate
    R = tl.num_programs(0)
    tl.store(norms_ptr + row, tl.sqrt(tl.sum(square) + lost) * unit_up)
    tl.store(norms_ptr + R + row, tl.sqrt(tl.sqrt(tl.sum(residual) + lost)) * unit_up)
    tl.store(norms_ptr + 2 * R + row, tl.sqrt(tl.sqrt(tl.sum(fourth) + lost)) * unit_up)
    tl.store(units_ptr + row, unit)


@triton.jit
def _fp8_product_kernel(
    x,  # [R, D] codes: a descriptor with TMA, else a pointer
    W,  # [C, D] the same
    x_units_ptr,  # [R]
    W_units_ptr,  # [C]
    scores_ptr,  # [R, C] fp32, row stride `stride`
    R,
    C,
    D,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    # latents in the grid's first dimension, which alone may exceed 65,535
    first, first_row = tl.program_id(0) * BLOCK_F, tl.program_id(1) * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_D):
        if TMA:
            x_codes, W_codes = x.load([first_row, start]), W.load([first, start]).T
        else:
            d = start + tl.arange(0, BLOCK_D)
            x_at = x + row.to(tl.int64)[:, None] * D + d[None, :]
            W_at = W + column.to(tl.int64)[None, :] * D + d[:, None]
            x_codes = tl.load(x_at, mask=(row[:, None] < R) & (d[None, :] < D), other=0.0)
            W_codes = tl.load(W_at, mask=(column[None, :] < C) & (d[:, None] < D), other=0.0)
        # with this argument the compiler leaves the sum outside of the product's accumulator
        acc += tl.dot(x_codes, W_codes, max_num_imprecise_acc=BLOCK_D)
    acc *= tl.load(x_units_ptr + row, mask=row < R, other=0.0)[:, None]
    acc *= tl.load(W_units_ptr + column, mask=column < C, other=0.0)[None, :]
    at = scores_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, acc, mask=(row[:, None] < R) & (column[None, :] < C))


class Fp8Rows:
    """Room for the codes of up to R rows of width D, with their norms and units."""

    def __init__(self, rows: int, d: int, device: torch.device):
        self.d = d
        stride = triton.cdiv(d, 16) * 16  # rows of a descriptor begin on 16 bytes
        self.codes = torch.empty(rows, stride, dtype=torch.float8_e4m3fn, device=device)
        self.norms = torch.empty(3, rows, dtype=torch.float32, device=device)
        self.units = torch.empty(rows, dtype=torch.float32, device=device)

    def round(self, rows: torch.Tensor) -> None:
        stride = self.codes.shape[1]
        block = min(1024, max(64, triton.next_power_of_2(stride)))
        _fp8_rows_kernel[(len(rows),)](
            rows, self.codes, self.norms, self.units, self.d, stride, BLOCK_D=block
        )

    def tiles(self, block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.codes, [block, _BLOCK_D])


def fp8_product(x: Fp8Rows, W: Fp8Rows, scores: torch.Tensor, tma: bool | None = None) -> None:
    """scores [R, C] of the codes, scaled back. tma: for tests; None asks the device."""
    rows, columns = scores.shape
    if tma is None:
        tma = not scores.is_cuda or torch.cuda.get_device_capability() >= _TMA_CAPABILITY
    _fp8_product_kernel[(triton.cdiv(columns, _BLOCK_F), triton.cdiv(rows, _BLOCK_N))](
        x.tiles(_BLOCK_N) if tma else x.codes, W.tiles(_BLOCK_F) if tma else W.codes,
        x.units, W.units, scores, rows, columns, x.codes.shape[1], scores.stride(0),
        BLOCK_N=_BLOCK_N, BLOCK_F=_BLOCK_F, BLOCK_D=_BLOCK_D, TMA=tma, num_warps=8, num_stages=3,
    )  # fmt: skip


class LikelyKeys(BoundedKeys):
    """BoundedKeys of fp8 codes, whose margin is SIGMAS standard deviations."""

    sigmas = SIGMAS

    def _round(self) -> None:
        self.g = ACCUMULATION
        self.codes = Fp8Rows(*self.x.shape, self.x.device)
        self.codes.round(self.x)
        self.norms = self.codes.norms


def select(
    x: torch.Tensor,  # [R, D]
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """See `Design.select`, but that a latent can be missed."""
    (rows, d), f = x.shape, W_enc.shape[0]
    columns = chunks.columns(rows, f)
    columns = min(columns, max(16, chunks.copy_bytes // d // 16 * 16))
    best = LikelyKeys(x, W_enc, b_enc, rank_scale, k)
    # Whole blocks, and none of them seen twice: what a row misses then does not depend on the
    # width of chunks, which depends on the number of rows.
    block = best.config.block
    columns = min(f, triton.cdiv(columns, block) * block)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    copy = Fp8Rows(columns, d, x.device)
    for first in range(0, f, columns):
        some = min(columns, f - first)
        if some < columns:  # the last
            copy, slab = Fp8Rows(some, d, x.device), slab[:, :some]
        copy.round(W_enc[first : first + some])
        fp8_product(best.codes, copy, slab)
        best.add(slab, copy.norms, first, 0)
    return best.finish()


def unavailable(device: torch.device) -> str | None:
    """Why a device cannot multiply these codes."""
    if device.type != "cuda":
        return None  # the interpreter
    if torch.version.hip is not None:
        return "AMD GPUs have another fp8 format"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than sm_89"
    return None


def configurations() -> list[Configuration]:
    """Rows of each dtype; the product with TMA and without."""
    result = []
    for pointer in POINTERS.values():
        signature = dict(
            rows_ptr=pointer, codes_ptr="*fp8e4nv", norms_ptr="*fp32", units_ptr="*fp32",
            D="i32:16", STRIDE="i32:16",
        )  # fmt: skip
        result.append(
            Configuration(
                _fp8_rows_kernel, pointer[1:], signature, dict(BLOCK_D=1024), targets=_TARGETS
            )
        )
    tile = dict(BLOCK_N=_BLOCK_N, BLOCK_F=_BLOCK_F, BLOCK_D=_BLOCK_D)
    for tma in (True, False):
        signature = dict(
            x=f"tensordesc<fp8e4nv[{_BLOCK_N},{_BLOCK_D}]>" if tma else "*fp8e4nv",
            W=f"tensordesc<fp8e4nv[{_BLOCK_F},{_BLOCK_D}]>" if tma else "*fp8e4nv",
            x_units_ptr="*fp32", W_units_ptr="*fp32", scores_ptr="*fp32",
            R="i32", C="i32", D="i32:16", stride="i32:16",
        )  # fmt: skip
        result.append(
            Configuration(
                _fp8_product_kernel,
                "e4m3" if tma else "e4m3 no TMA",
                signature,
                tile | dict(TMA=tma),
                8,
                3,
                tensor_cores=True,
                tma=tma,
                targets=_TARGETS[1:] if tma else _TARGETS[:1],
            )
        )
    return result
