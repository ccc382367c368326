"""Adam's moments in 16 or 8 bits, as `fastsae.reference.moments` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # elements of a row that share a scale
_FINITE = tl.constexpr(0x7F7FFFFF)  # bits of the largest number


@triton.jit
def _mix(h):  # uint32
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _random_bits(step, latent, d):
    """32 bits for each column d: the low 16 round exp_avg, the high 16 exp_avg_sq."""
    key = _mix(_mix(step.to(tl.uint32)) ^ latent.to(tl.uint32))
    return _mix(key ^ (d.to(tl.uint32) * 0x9E3779B1))


@triton.jit
def _round_bf16(x, r):
    """Bits of x in bf16, up with the probability of its distance from the lower neighbour."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where(x != x, 0x40, 0).to(tl.uint32)
    return tl.where(finite, (bits + r) >> 16, (bits >> 16) | quiet).to(tl.int16)


@triton.jit
def _widen_bf16(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale):
    """1 / scale; 0 where the block is zero, not finite, or too small for it."""
    inverse = 1.0 / tl.where(scale > 0, scale, float("inf"))
    return tl.where(inverse < float("inf"), inverse, 0.0)


@triton.jit
def _store_codes(
    code_ptr, scale_ptr, latent, d, in_row, D, x, r, ROOT: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Codes of x and the scales of its blocks. ROOT: x is sqrt(v), else the mean. r: 16 bits."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF  # compares as an integer, NaN above all
    largest = tl.max(tl.reshape(size, (BLOCK_D // BLOCK, BLOCK)), 1, keep_dims=True)
    scale = largest.to(tl.float32, bitcast=True)  # [BLOCK_D / BLOCK, 1]
    n = tl.arange(0, BLOCK_D // BLOCK)[:, None]
    first = tl.min(d, 0) // BLOCK
    reached = (first + n) * BLOCK < D
    tl.store(scale_ptr + latent * tl.cdiv(D, BLOCK) + first + n, scale, mask=reached)
    finite = tl.minimum(size, _FINITE).to(tl.float32, bitcast=True)
    q = tl.reshape(finite, (BLOCK_D // BLOCK, BLOCK)) * _inverse(scale)
    q = tl.reshape(q, (BLOCK_D,))
    if ROOT:
        q *= 65536.0
        code = tl.minimum(tl.maximum(tl.sqrt(q).to(tl.int32), 1), 255)
        c = code.to(tl.float32)
        here = (c * c) * (c * c)
        above = ((c + 1) * (c + 1)) * ((c + 1) * (c + 1))
        up = r.to(tl.float32) * (1.0 / 65536) * (above - here) < q * q - here
        code = code + up.to(tl.int32) - 1
        tl.store(code_ptr + latent * D + d, code.to(tl.uint8), mask=in_row)
    else:
        q *= 16129.0
        code = tl.minimum(tl.sqrt(q).to(tl.int32), 126)
        c = code.to(tl.float32)
        up = r.to(tl.float32) * (1.0 / 65536) * (2 * c + 1) < q - c * c
        code += up.to(tl.int32)
        code = tl.where(bits < 0, -code, code)
        tl.store(code_ptr + latent * D + d, code.to(tl.int8), mask=in_row)


@triton.jit
def load_moments(
    mean_ptr, square_ptr, mean_scale_ptr, root_scale_ptr, latent, d, in_row, D, BITS: tl.constexpr
):
    """Both moments of columns d of a latent's row, in fp32."""
    at = latent * D + d
    if BITS == 8:
        block = latent * tl.cdiv(D, BLOCK) + d // BLOCK
        mean_unit = tl.load(mean_scale_ptr + block, mask=in_row, other=0.0) * (1.0 / 16129)
        root_unit = tl.load(root_scale_ptr + block, mask=in_row, other=0.0) * (1.0 / 65536)
        code = tl.load(mean_ptr + at, mask=in_row, other=0).to(tl.float32)
        m = code * tl.abs(code) * mean_unit
        code = tl.load(square_ptr + at, mask=in_row, other=0).to(tl.float32) + 1
        root = code * code * root_unit
        v = root * root
    elif BITS == 16:
        m = _widen_bf16(tl.load(mean_ptr + at, mask=in_row, other=0))
        v = _widen_bf16(tl.load(square_ptr + at, mask=in_row, other=0))
    else:
        m = tl.load(mean_ptr + at, mask=in_row, other=0.0)
        v = tl.load(square_ptr + at, mask=in_row, other=0.0)
    return m, v


@triton.jit
def store_moments(
    mean_ptr, square_ptr, mean_scale_ptr, root_scale_ptr, latent, d, in_row, D, m, v, step,
    BITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d: BLOCK_D consecutive columns from a multiple of BLOCK; m and v are 0 beyond the row."""
    at = latent * D + d
    if BITS == 32:
        tl.store(mean_ptr + at, m, mask=in_row)
        tl.store(square_ptr + at, v, mask=in_row)
    else:
        bits = _random_bits(step, latent, d)
        low, high = bits & 0xFFFF, bits >> 16
        if BITS == 16:
            tl.store(mean_ptr + at, _round_bf16(m, low), mask=in_row)
            tl.store(square_ptr + at, _round_bf16(v, high), mask=in_row)
        else:
            _store_codes(mean_ptr, mean_scale_ptr, latent, d, in_row, D, m, low, False, BLOCK_D)
            _store_codes(
                square_ptr, root_scale_ptr, latent, d, in_row, D, tl.sqrt(v), high, True, BLOCK_D
            )
