"""What holds of every selection of the k best latents, and data that decides it to the bit."""

from __future__ import annotations

import torch
from common import device_of

from fastsae import reference


def integers(n, d, f, dtype=torch.bfloat16):
    """Every order of summation is exact, so selections must be identical."""
    g = torch.Generator().manual_seed(n + d + f)
    x, W = torch.randint(-3, 4, (n, d), generator=g), torch.randint(-2, 3, (f, d), generator=g)
    b = torch.randint(-2, 3, (f,), generator=g)
    scale = torch.randint(-1, 3, (f,), generator=g)  # zero and negative too
    return [t.to(dtype).to(device_of("triton")) for t in (x, W, b, scale)]


def expected(x, W, b, k, scale=None, relu=False):
    """Values and indices by the reference, on the CPU."""
    b, scale = (None if t is None else t.cpu() for t in (b, scale))
    return reference.topk_encode(x.cpu(), W.cpu(), b, k, relu, scale)


def scores64(x, W, b, rank_scale=None):
    """Pre-activations and what they are ranked by."""
    x, W, b, rank_scale = (None if t is None else t.double().cpu() for t in (x, W, b, rank_scale))
    pre = x @ W.T if b is None else x @ W.T + b
    return pre, pre if rank_scale is None else pre * rank_scale


def assert_selection(values, indices, x, W, b, k, relu=True, rank_scale=None):
    """In range, distinct, in order, and the k best up to the rounding of sums."""
    n, f = len(x), len(W)
    assert values.shape == indices.shape == (n, k)
    assert indices.dtype == torch.int32 and values.dtype == x.dtype
    index = indices.long().cpu()
    assert ((index >= 0) & (index < f)).all()
    assert (index.sort(1).values.diff(dim=1) > 0).all(), "an index repeats"
    pre, rank = scores64(x, W, b, rank_scale)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.double().norm(dim=1) * W.double().norm(dim=1).max()).cpu()[:, None] + 1e-30
    size = size * (1 if rank_scale is None else float(rank_scale.abs().max()))
    slack = 8 * torch.finfo(acc).eps * size
    chosen = rank.gather(1, index)
    best = rank.sort(1, descending=True).values[:, :k]
    assert ((best - chosen).abs() <= slack).all(), "not the k best, or not in order"
    truth = pre.gather(1, index)
    truth = truth.relu() if relu else truth
    limit = slack + torch.finfo(x.dtype).eps * truth.abs()
    assert ((values.double().cpu() - truth).abs() <= limit).all()


def assert_is_reference(got, x, W, b, k, relu=False, scale=None):
    """Values and indices to the bit."""
    values, indices = expected(x, W, b, k, scale, relu)
    assert torch.equal(got[1].cpu(), indices)
    assert torch.equal(got[0].cpu(), values)
