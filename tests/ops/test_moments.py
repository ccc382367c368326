"""The 16- and 8-bit formats of Adam's moments: what reference.moments promises."""

from __future__ import annotations

import pytest
import torch
from common import randn

from fastsae.reference import moments

FEW = ("bf16", "8bit")


def spread(r, d):
    """Moments over many binades; one block of zeros."""
    m = randn(r, d, seed=1) * randn(r, d, seed=2).mul(2).exp()
    v = (randn(r, d, seed=3) * randn(r, d, seed=4).mul(2).exp()).square()
    m[0, :128] = v[0, :128] = 0
    return m, v


@pytest.mark.parametrize("fmt", FEW)
@pytest.mark.parametrize("d", [1, 127, 128, 300])
def test_rounding_has_no_bias(fmt, d):
    """The mean over 2000 steps is the value, within five standard errors (and what a neighbour
    that never came up in 2000 steps can be worth: 5 / 2000 of 1%)."""
    m, v = spread(3, d)
    n = 2000
    sums = [torch.zeros(3, d, dtype=torch.float64) for _ in range(4)]
    for step in range(1, n + 1):
        for i, t in enumerate(moments.load(moments.store(m, v, fmt, step, torch.arange(3)))):
            sums[i] += t
            sums[2 + i] += t.double().square()
    for total, square, truth in ((sums[0], sums[2], m), (sums[1], sums[3], v)):
        mean = total / n
        error = ((square / n - mean.square()).clamp(min=0) / n).sqrt()
        floor = 0.0
        if fmt == "8bit" and truth is v:  # below the smallest code: rounded up, never to zero
            most = moments._blocks(v).amax(2).repeat_interleave(128, 1)[:, :d]
            floor = most * 2.0**-32
        assert ((mean - truth.double()).abs() <= 5 * error + 3e-5 * truth.abs() + floor).all()


@pytest.mark.parametrize("fmt", FEW)
def test_rounding_goes_to_a_neighbour(fmt):
    """At most one step of the format away, exact for what the format holds, and v > 0 stays so."""
    m, v = spread(5, 700)
    stored = moments.store(m, v, fmt, 3, torch.arange(5))
    got_m, got_v = moments.load(stored)
    assert not got_m[m == 0].any() and torch.equal(got_v == 0, v == 0)
    again = moments.store(got_m, got_v, fmt, 4, torch.arange(5))
    if fmt == "bf16":
        for a, b in zip(stored[:2], again[:2], strict=True):
            assert torch.equal(a, b)
        for got, truth in ((got_m, m), (got_v, v)):
            assert ((got - truth).abs() <= 2.0**-7 * truth.abs()).all()
        return
    m_scale, v_scale = (moments._expand(s, 700) for s in stored[2:])
    # neighbours of q = (c / 127)^2 are (2 c + 1) / 127^2 apart
    c = (m.abs() / m_scale.clamp(min=1e-30)).sqrt() * 127
    assert ((got_m - m).abs() <= m_scale * (2 * c + 1.01) / 127**2).all()
    root = v.sqrt()
    c = (root / v_scale.clamp(min=1e-30)).sqrt().clamp(min=1 / 256) * 256
    assert ((got_v.sqrt() - root).abs() <= v_scale * (2 * c + 1.01) / 256**2).all()
    torch.testing.assert_close(got_m.abs().amax(1), m.abs().amax(1))  # a block's largest is kept


@pytest.mark.parametrize("fmt", FEW)
def test_v_decays(fmt):
    """0.999 a step is less than half of the distance between two values of either format."""
    _, v = spread(4, 512)
    v[:, ::128] = v.amax() * 4  # a constant largest, so that only rounding moves the others
    latents = torch.arange(4)
    zero = torch.zeros_like(v)
    stored = moments.store(zero, v, fmt, 1, latents)
    begin = moments.load(stored)[1]
    for step in range(2, 1002):
        wide = moments.load(stored)[1] * 0.999
        wide[:, ::128] = v[:, ::128]
        stored = moments.store(zero, wide, fmt, step, latents)
    end = moments.load(stored)[1]
    large = begin > begin.amax() * 1e-4
    large[:, ::128] = False
    ratio = (end / begin)[large]
    assert len(ratio) > 100 and abs(float(ratio.mean()) - 0.999**1000) < 0.02


def test_noise_is_a_hash_of_step_row_and_column():
    bits = moments.noise(5, torch.arange(64), 256)
    assert torch.equal(bits, moments.noise(torch.tensor(5.0), torch.arange(64), 256))
    assert torch.equal(bits[7:9, :9], moments.noise(5, torch.tensor([7, 8]), 9))
    assert (bits != moments.noise(6, torch.arange(64), 256)).float().mean() > 0.999
    assert len(bits.unique()) > 0.999 * bits.numel()
    for half in (bits & 0xFFFF, bits >> 16):
        uniform = (half.double() + 0.5) / 65536
        assert abs(float(uniform.mean()) - 0.5) < 0.01
        assert abs(float(uniform.var()) - 1 / 12) < 0.003
    low, high = (bits & 0xFFFF).double().flatten(), (bits >> 16).double().flatten()
    assert abs(float(torch.corrcoef(torch.stack([low, high]))[0, 1])) < 0.03


def test_bytes():
    """2.06 bytes a weight in 8 bits, 4 in bf16."""
    m, v = spread(2, 1024)
    for fmt, expected in (("fp32", 8), ("bf16", 4), ("8bit", 2 + 8 / 128)):
        stored = moments.store(m, v, fmt, 1, torch.arange(2))
        assert sum(t.nbytes for t in stored if t is not None) == expected * m.numel()
