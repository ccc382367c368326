"""sparse_grad_weight, dense and row-sparse, on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from common import assert_close, device_of, generator, latents, randn, tokens
from pairs import SHAPES, problem, weight_gradient

from fastsae import ops, reference

OP = "sparse_grad_weight"


@pytest.mark.parametrize("n,d,f,k", SHAPES)
def test_matches_the_definition(backend, dtype, n, d, f, k):
    n, f = tokens(backend, n), latents(backend, f)
    values, indices, W, _ = problem(n, d, f, k, dtype, device_of(backend))
    rows = randn(n, d, dtype=dtype, seed=7).to(W.device)
    expected = weight_gradient(values, indices, rows, f)
    plain = reference.sparse_grad_weight(values, indices, rows, f)
    scale = 2 * (1 + n * k / f) ** 0.5
    dense = ops.sparse_grad_weight(values, indices, rows, f)
    assert_close(dense, expected, plain, dtype, scale=scale)
    touched, grads = ops.sparse_grad_weight(values, indices, rows, f, layout="rows")
    assert touched.dtype == torch.int32
    assert torch.equal(touched.long(), indices.long().unique())
    assert_close(grads, expected[touched.long().cpu()], plain[touched.long()], dtype, scale=scale)
    again = ops.sparse_grad_weight(values, indices, rows, f, layout="rows")
    assert torch.equal(dense, ops.sparse_grad_weight(values, indices, rows, f))
    assert torch.equal(grads, again[1])


def test_one_hot_latent_takes_every_pair(backend, dtype):
    """All pairs in one segment: repeatable, and as accurate as a sum of that length can be."""
    values, indices, W, _ = problem(300, 33, 50, 6, dtype, device_of(backend))
    indices[:] = 17
    rows = randn(300, 33, dtype=dtype, seed=7).to(W.device)
    dense = ops.sparse_grad_weight(values, indices, rows, 50)
    plain = reference.sparse_grad_weight(values, indices, rows, 50)
    assert_close(dense, weight_gradient(values, indices, rows, 50), plain, dtype, scale=60)
    assert (dense[:17] == 0).all() and (dense[18:] == 0).all()


@pytest.mark.parametrize("n,k", [(0, 4), (3, 0)])
def test_empty(backend, n, k):
    values, indices, W, _ = problem(n, 30, 90, k, torch.float32, device_of(backend))
    rows = W.new_zeros(n, 30)
    assert torch.equal(ops.sparse_grad_weight(values, indices, rows, 90), W.new_zeros(90, 30))
    touched, grads = ops.sparse_grad_weight(values, indices, rows, 90, layout="rows")
    assert touched.shape == (0,) and grads.shape == (0, 30)


def test_triton_and_cuda_leave_out_an_index_out_of_range(gpu_backend):
    values, indices, W, _ = problem(9, 30, 20, 6, torch.float32, device_of(gpu_backend))
    rows = randn(9, 30, seed=7).to(W.device)
    kept, zeroed = indices.clone(), values.clone()
    kept[3, :4], zeroed[3, :4] = 0, 0
    expected = ops.sparse_grad_weight(zeroed, kept, rows, 20)
    indices[3, :4] = torch.tensor([-1, 20, 2**31 - 1, -(2**31)], device=W.device)
    torch.testing.assert_close(ops.sparse_grad_weight(values, indices, rows, 20), expected)
    touched, grads = ops.sparse_grad_weight(values, indices, rows, 20, layout="rows")
    inside = indices[(indices >= 0) & (indices < 20)]
    assert torch.equal(touched.long(), inside.long().unique())
    torch.testing.assert_close(grads, expected[touched.long()])


def test_triton_segments_of_every_length(gpu_backend):
    """Segments that start and end inside, at and beyond the runs that are summed beforehand."""
    lengths = [255, 1, 256, 0, 700, 3, 512, 57]  # 1784 pairs; tiles of 256
    indices = torch.arange(8, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    indices = indices[torch.randperm(1784, generator=generator(3))].view(446, 4)
    values, rows = randn(446, 4), randn(446, 5, seed=7)
    expected = weight_gradient(values, indices, rows, 8)
    place = device_of(gpu_backend)
    dense = ops.sparse_grad_weight(values.to(place), indices.to(place), rows.to(place), 8)
    plain = reference.sparse_grad_weight(values, indices, rows, 8)
    assert_close(dense, expected, plain, torch.float32, scale=20)


@pytest.mark.parametrize("bad", [-1, 90, 2**33])
@pytest.mark.parametrize("layout", ["dense", "rows"])
def test_index_out_of_range(bad, layout):
    values, indices, _, _ = problem(9, 30, 90, 6, torch.float32, "cpu")
    indices = indices.long()
    indices[8, 5] = bad
    with pytest.raises(RuntimeError, match=r"sparse_grad_weight.*\[0, 90\)"):
        ops.sparse_grad_weight(values, indices, torch.zeros(9, 30), 90, layout=layout)


def test_opcheck_and_compile(backend):
    values, indices, W, _ = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    rows = randn(6, 10).to(W.device)
    args = (values, indices, rows, 30)
    torch.library.opcheck(torch.ops.fastsae.sparse_grad_weight.default, args)
    torch.library.opcheck(torch.ops.fastsae.sparse_grad_weight_rows.default, args)
    compiled = torch.compile(ops.sparse_grad_weight, fullgraph=True)
    assert torch.equal(compiled(*args), ops.sparse_grad_weight(*args))


def test_bad_input():
    values, indices = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="sparse_grad_weight: rows .* must agree"):
        ops.sparse_grad_weight(values, indices, torch.zeros(3, 5), 9)
    with pytest.raises(ValueError, match="layout must be"):
        ops.sparse_grad_weight(values, indices, torch.zeros(4, 5), 9, layout="coo")
    with pytest.raises(TypeError, match="values is torch.float32"):
        ops.sparse_grad_weight(values, indices, torch.zeros(4, 5).half(), 9)
    with pytest.raises(ValueError, match="n_latents must not be negative"):
        ops.sparse_grad_weight(values, indices, torch.zeros(4, 5), -1)
