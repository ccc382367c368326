"""What only the CUDA kernels can get wrong: bad indices, heavy latents, digits, unaligned rows.

They run on the GPU, or without one on the CPU against tests/support/cuda_on_host.h.
"""

from __future__ import annotations

import cuda_host
import pytest
import torch
from common import ON_HOST, assert_close, randn

import fastsae
from fastsae import _library, ops, reference

DEVICE = "cpu" if ON_HOST else "cuda"


@pytest.fixture(autouse=True)
def cuda_kernels():
    why = cuda_host.load() if ON_HOST else _library.CUDA_MISSING
    if why is not None:
        pytest.skip(why)


def factors(n, k, d, f, dtype=torch.float32):
    """Pairs of which a third belong to three heavy latents."""
    g = torch.Generator().manual_seed(n)
    indices = torch.randint(f, (n, k), generator=g, dtype=torch.int32)
    heavy = torch.rand(n, k, generator=g) < 0.3
    indices[heavy] = torch.tensor([0, f // 2, f - 1], dtype=torch.int32)[
        torch.randint(3, (int(heavy.sum()),), generator=g)
    ]
    return randn(n, k, dtype=dtype), indices, randn(n, d, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n,k,d,f",
    [(700, 4, 24, 50), (513, 3, 7, 600), (40, 60, 300, 1)],
    ids=["heavy", "odd", "one-latent"],
)
def test_sums_of_heavy_and_light_latents(n, k, d, f, dtype):
    values, indices, rows = factors(n, k, d, f, dtype)
    truth = reference.sparse_grad_weight(values.double(), indices, rows.double(), f)
    plain = reference.sparse_grad_weight(values, indices, rows, f)
    with fastsae.use_backend("cuda"):
        args = values.to(DEVICE), indices.to(DEVICE), rows.to(DEVICE), f
        got = ops.sparse_grad_weight(*args)
        latents, touched = ops.sparse_grad_weight(*args, layout="rows")
        again = ops.sparse_grad_weight(*args)
    # fp32 sums over hundreds of pairs: the parts of a heavy latent round in another order
    assert_close(got.cpu(), truth, plain, dtype, scale=8)
    assert torch.equal(got, again)
    assert torch.equal(latents.cpu().long(), indices.unique().long())
    assert torch.equal(touched, got[latents.long()])


def test_more_latents_than_two_digits():
    values, indices, rows = factors(260, 2, 4, 300_000)
    with fastsae.use_backend("cuda"):
        args = values.to(DEVICE), indices.to(DEVICE), rows.to(DEVICE), 300_000
        latents, got = ops.sparse_grad_weight(*args, layout="rows")
    expected, truth = reference.sparse_grad_weight_rows(values, indices, rows, 300_000)
    assert torch.equal(latents.cpu(), expected)
    torch.testing.assert_close(got.cpu(), truth)


def bad(indices, f):
    """indices with some out of range on either side, and where."""
    wrong = indices.clone()
    wrong[0, 0], wrong[1, 1], wrong[2, 0] = -1, f, 2**31 - 1
    wrong[3, 1] = -(2**31)
    return wrong.to(DEVICE), (wrong < 0) | (wrong >= f)


def test_bad_indices_are_not_followed():
    n, k, d, f = 50, 3, 40, 20
    values, indices, rows = (t.to(DEVICE) for t in factors(n, k, d, f))
    W = randn(f, d, seed=2).to(DEVICE)
    wrong, mask = bad(indices.cpu(), f)
    mask = mask.to(DEVICE)
    masked, safe = values.masked_fill(mask, 0), wrong.masked_fill(mask, 0)
    private = torch.ops.fastsae
    for op, args, expected in (
        (private.sparse_decode_cuda, (values, wrong, W, None), (masked, safe, W, None)),
        (private.sparse_grad_weight_cuda, (values, wrong, rows, f), (masked, safe, rows, f)),
    ):
        torch.testing.assert_close(op(*args), op(*expected))
    got = private.sparse_grad_values_cuda(rows, wrong, W)
    expected = private.sparse_grad_values_cuda(rows, safe, W).masked_fill(mask, 0)
    assert torch.equal(got, expected)
    latents, _ = private.sparse_grad_weight_rows_cuda(values, wrong, rows, f)
    assert torch.equal(latents.long(), wrong[~mask].unique().long())
    states = [[W.clone(), torch.zeros_like(W), torch.zeros_like(W)] for _ in range(2)]
    settings = 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, False, False
    private.sparse_adam_step_cuda(*states[0], values, wrong, rows, *settings)
    private.sparse_adam_step_cuda(*states[1], masked, safe, rows, *settings)
    for got, expected in zip(*states):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("unit_norm", [False, True], ids=["plain", "unit-norm"])
@pytest.mark.parametrize("lazy", [False, True], ids=["all", "lazy"])
@pytest.mark.parametrize("d", [24, 37, 2500])
def test_adam_with_heavy_latents(d, lazy, unit_norm):
    f = 30
    values, indices, rows = factors(600, 2, d, f)
    indices[indices == 7] = 8  # one latent never occurs
    start = [randn(f, d, seed=3), randn(f, d, seed=4) / 10, randn(f, d, seed=5) ** 2 / 10]
    settings = 1e-2, 0.9, 0.99, 1e-8, 0.0 if unit_norm else 0.1, 3, lazy, unit_norm
    truth = [t.double() for t in start]
    reference.sparse_adam_step(*truth, values.double(), indices, rows.double(), *settings)
    plain = [t.clone() for t in start]
    reference.sparse_adam_step(*plain, values, indices, rows, *settings)
    got = [t.clone().to(DEVICE) for t in start]
    factor = [t.to(DEVICE) for t in (values, indices, rows)]
    torch.ops.fastsae.sparse_adam_step_cuda(*got, *factor, *settings)
    for g, t, p in zip(got, truth, plain):
        assert_close(g.cpu(), t, p, torch.float32, scale=20)


def test_rows_that_are_not_aligned():
    """D odd, or a parameter that begins between two 16-byte addresses."""
    values, indices, _ = factors(20, 3, 1, 30)
    with fastsae.use_backend("cuda"):
        for d in (64, 66):
            W = torch.cat([randn(1), randn(30 * d, seed=8)])[1:].view(30, d).to(DEVICE)
            shifted = torch.empty(30 * d + 1, device=DEVICE)[1:].view(30, d).copy_(W)
            one = ops.sparse_decode(values.to(DEVICE), indices.to(DEVICE), W.clone())
            two = ops.sparse_decode(values.to(DEVICE), indices.to(DEVICE), shifted)
            assert torch.equal(one, two)


def test_topk_in_segments_and_large():
    """One long row is cut into segments; k beyond shared memory sorts digits."""
    x = randn(1, 200_000).to(DEVICE)
    x[0, ::7] = 1.0
    for k in (1, 1000, 4096, 4097):
        with fastsae.use_backend("cuda"):
            values, indices = ops.topk(x, k)
        expected, expected_index = reference.topk(x.cpu(), k)
        assert torch.equal(indices.cpu(), expected_index) and torch.equal(values.cpu(), expected)
