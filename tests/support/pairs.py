"""Values and indices of the active latents, for the ops that take them."""

from __future__ import annotations

import pytest
import torch
from common import generator, randn

SHAPES = [
    pytest.param(1, 1, 1, 1, id="all-one"),
    pytest.param(1, 64, 300, 7, id="one-token"),
    pytest.param(5, 7, 13, 13, id="k=F"),
    pytest.param(33, 65, 517, 1, id="k=1"),
    pytest.param(70, 129, 1037, 32, id="odd"),
    pytest.param(64, 768, 1024, 64, id="even"),
]


def problem(n, d, f, k, dtype, device, seed=0):
    values = randn(n, k, dtype=dtype, seed=seed)
    indices = torch.randint(0, f, (n, k), generator=generator(seed), dtype=torch.int32)
    W = randn(f, d, dtype=dtype, seed=seed + 1)
    b = randn(d, dtype=dtype, seed=seed + 2)
    return tuple(t.to(device) for t in (values, indices, W, b))


def weight_gradient(values, indices, rows, f):
    out = torch.zeros(f, rows.shape[-1], dtype=torch.float64)
    pairs = (values.double()[..., None] * rows.double()[..., None, :]).flatten(0, -2)
    return out.index_add_(0, indices.long().flatten().cpu(), pairs.cpu())
