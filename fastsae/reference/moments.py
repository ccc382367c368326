"""How Adam's moments are stored in 16 or 8 bits: what every backend of sparse_adam_step does.

Formats ("fp32", "bf16", "8bit"; Dettmers et al. 2021, "8-bit Optimizers via Block-wise
Quantization", has the blocks and the root-like codes; the codes and the rounding are our own):

- bf16: both moments in bfloat16.
- 8bit: for each block of 128 elements of a row one fp32 scale, and a code for each element.
  exp_avg: int8 c, the value is ``scale * c * |c| / 127^2``; scale is the largest |m| of the block.
  exp_avg_sq: uint8 c, the value is ``(scale * (c + 1)^2 / 256^2)^2``; scale is the largest sqrt(v).
  So sqrt(v) has steps of 0.8% at the block's largest and its smallest value is scale / 65536,
  never zero: a small v cannot turn into a division by eps (where its square is an fp32 number). An
  element 1e5 times smaller than its block's largest learns more slowly
  (benchmarks/notes/sparse_adam_step.md).

Both are rounded at random between the two neighbours so that the expected value is exact. Rounding
to the nearest would stop v from ever decaying: beta2 = 0.999 changes it by a quarter of the
distance between two bf16 numbers. The random bits are a hash of (step, row, column), so a step is
repeatable. A block of codes with a moment that is not finite has none that is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128
FORMATS = ("fp32", "bf16", "8bit")
_MASK = 0xFFFFFFFF


class Moments(NamedTuple):
    """exp_avg and exp_avg_sq [R, D] as stored, with scales [R, ceil(D / 128)] for 8 bits."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    exp_avg_scale: torch.Tensor | None = None
    exp_avg_sq_scale: torch.Tensor | None = None


def n_blocks(d: int) -> int:
    return -(-d // BLOCK)


def dtypes(fmt: str) -> tuple[torch.dtype, torch.dtype]:
    """Storage dtypes of exp_avg and exp_avg_sq."""
    return {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "8bit": (torch.int8, torch.uint8),
    }[fmt]


def format_of(exp_avg: torch.Tensor) -> str:
    """fp64 moments count as "fp32": wide."""
    return {torch.bfloat16: "bf16", torch.int8: "8bit"}.get(exp_avg.dtype, "fp32")


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit integers, held in int64 (constants: C. Wellons, hash-prospector)."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D & _MASK
    h = h ^ (h >> 15)
    h = h * 0x846CA68B & _MASK
    return h ^ (h >> 16)


def noise(step: int | torch.Tensor, latents: torch.Tensor, d: int) -> torch.Tensor:
    """[R, D] of 32 random bits in int64: the low 16 round exp_avg, the high 16 exp_avg_sq."""
    device = latents.device
    step = torch.as_tensor(step, device=device).long() & _MASK
    row = _mix(_mix(step) ^ (latents.long() & _MASK))
    column = torch.arange(d, device=device) * 0x9E3779B1 & _MASK
    return _mix(row[:, None] ^ column)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[R, D] as [R, blocks, 128], zeros at the end."""
    r, d = x.shape
    return torch.nn.functional.pad(x, (0, n_blocks(d) * BLOCK - d)).view(r, n_blocks(d), BLOCK)


def _expand(scale: torch.Tensor, d: int) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 1)[:, :d]


def load(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments in fp32 (fp64 stays)."""
    m, v, m_scale, v_scale = moments
    if format_of(m) == "8bit":
        assert m_scale is not None and v_scale is not None
        code, root = m.float(), v.float() + 1
        m = code * code.abs() * _expand(m_scale * (1 / 127**2), m.shape[1])
        s = root * root * _expand(v_scale * (1 / 256**2), v.shape[1])
        return m, s * s
    return (m, v) if m.dtype == torch.float64 else (m.float(), v.float())


def store(
    m: torch.Tensor,
    v: torch.Tensor,
    fmt: str,
    step: int | torch.Tensor,
    latents: torch.Tensor,
) -> Moments:
    """Rounds wide moments [R, D] of rows `latents`."""
    if fmt == "fp32":
        return Moments(m, v)
    d = m.shape[1]
    bits = noise(step, latents, d)
    low, high = bits & 0xFFFF, bits >> 16
    if fmt == "bf16":
        return Moments(_round_bf16(m, low), _round_bf16(v, high))
    magnitude, root = m.abs(), v.sqrt()
    m_scale, v_scale = (_blocks(x).amax(2) for x in (magnitude, root))
    # q in [0, 1] of the block's largest; code between two neighbours of its root
    q = magnitude * _expand(_inverse(m_scale), d) * 127**2
    code = q.sqrt().nan_to_num(0).floor().clamp(0, 126)
    up = low.to(q.dtype) * 2.0**-16 * (2 * code + 1) < q - code * code
    codes = (code + up) * m.sign().nan_to_num(0)
    q = root * _expand(_inverse(v_scale), d) * 256**2
    code = q.sqrt().nan_to_num(0).floor().clamp(1, 255)
    here, above = (code * code).square(), ((code + 1) * (code + 1)).square()
    up_v = high.to(q.dtype) * 2.0**-16 * (above - here) < q * q - here
    return Moments(codes.to(torch.int8), (code + up_v - 1).to(torch.uint8), m_scale, v_scale)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where the block is zero or too small for it."""
    inverse = 1 / scale
    return torch.where(scale > 0, inverse, 0).nan_to_num(0, posinf=0)


def _round_bf16(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x in bf16, up with the probability of its distance from the lower neighbour (16 bits)."""
    raw = x.contiguous().view(torch.int32)
    rounded = raw + bits.to(torch.int32)  # the carry goes up through mantissa and exponent
    high = (rounded >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), high, x.to(torch.bfloat16))
