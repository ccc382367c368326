"""Random tables for `steer`."""

from __future__ import annotations

import torch
from common import generator, randn

from fastsae import _steer_codes as rules

CODES = [
    rules.CLAMP, rules.MIN_CLAMP, rules.CLAMP_IF_ACTIVE, rules.SCALE, rules.ADD, rules.PROBE,
]  # fmt: skip


def tables(S: int, P: int, D: int, dtype: torch.dtype, seed: int = 0):
    """Random lists with every opcode, flag and gate."""
    g = generator(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    enc = randn(S, P, D, dtype=dtype, seed=seed + 1) / D**0.5
    dec = randn(S, P, D, dtype=dtype, seed=seed + 2) / D**0.5
    param = torch.randn(S, P, 6, generator=g, dtype=torch.float64).to(wide) / 2
    opcode = torch.tensor(CODES)[torch.randint(len(CODES), (S, P), generator=g)]
    opcode[:, P // 2 :] *= torch.rand(S, P - P // 2, generator=g) < 0.8  # some lists end early
    flags = torch.randint(8, (S, P), generator=g)
    gate = torch.randint(-P, P + 2, (S, P), generator=g).clamp(min=-1)
    return enc, dec, param, torch.stack([opcode, flags, gate], -1).int()
