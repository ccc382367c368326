"""sparse_grad_values on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from common import assert_close, device_of, randn, tokens
from pairs import SHAPES, problem

from fastsae import ops, reference

OP = "sparse_grad_values"


def truth(grad, indices, W):
    return (grad.double()[..., None, :] * W.double()[indices.long()]).sum(-1)


@pytest.mark.parametrize("n,d,f,k", SHAPES)
def test_matches_the_definition(backend, dtype, n, d, f, k):
    n = tokens(backend, n)
    _, indices, W, _ = problem(n, d, f, k, dtype, device_of(backend))
    grad = randn(n, d, dtype=dtype, seed=7).to(W.device)
    out = ops.sparse_grad_values(grad, indices, W)
    plain = reference.sparse_grad_values(grad, indices, W)
    assert_close(out, truth(grad, indices, W), plain, dtype, scale=2 * d**0.5)
    assert torch.equal(out, ops.sparse_grad_values(grad, indices, W))


def test_leading_dimensions_and_int64(backend):
    _, indices, W, _ = problem(24, 30, 90, 5, torch.float32, device_of(backend))
    grad = randn(24, 30, seed=7).to(W.device)
    out = ops.sparse_grad_values(grad, indices, W)
    shaped = ops.sparse_grad_values(grad.view(2, 12, 30), indices.long().view(2, 12, 5), W)
    assert torch.equal(shaped.view(24, 5), out)


@pytest.mark.parametrize("n,k", [(0, 4), (3, 0)])
def test_empty(backend, n, k):
    _, indices, W, _ = problem(n, 30, 90, k, torch.float32, device_of(backend))
    assert ops.sparse_grad_values(W.new_zeros(n, 30), indices, W).shape == (n, k)


def test_not_finite(backend, dtype):
    _, indices, W, _ = problem(9, 20, 50, 6, dtype, device_of(backend))
    grad = randn(9, 20, dtype=dtype, seed=7).to(W.device)
    grad[3, 4] = float("nan")
    out = ops.sparse_grad_values(grad, indices, W)
    assert out[3].isnan().all() and out.isnan().sum() == 6


def test_triton_and_cuda_give_zero_for_an_index_out_of_range(gpu_backend):
    _, indices, W, _ = problem(4, 30, 90, 11, torch.float32, device_of(gpu_backend))
    grad = randn(4, 30, seed=7).to(W.device)
    grad[1, 3] = float("inf")  # times the 0 of an absent row: not NaN
    expected = ops.sparse_grad_values(grad, indices, W)
    indices[1, 2:6] = torch.tensor([-1, 90, 2**31 - 1, -(2**31)], device=W.device)
    expected[1, 2:6] = 0
    assert torch.equal(ops.sparse_grad_values(grad, indices, W), expected)
    assert expected[1].isinf().sum() == 7


@pytest.mark.parametrize("bad", [-1, 90, 2**33])
def test_index_out_of_range(bad):
    _, indices, W, _ = problem(9, 30, 90, 6, torch.float32, "cpu")
    indices = indices.long()
    indices[8, 5] = bad
    with pytest.raises(RuntimeError, match=r"sparse_grad_values: .*\[0, 90\)"):
        ops.sparse_grad_values(torch.zeros(9, 30), indices, W)


def test_has_no_derivative():
    _, indices, W, _ = problem(4, 6, 9, 3, torch.float32, "cpu")
    out = ops.sparse_grad_values(torch.ones(4, 6, requires_grad=True), indices, W)
    with pytest.raises(RuntimeError, match="sparse_grad_values: has no derivative"):
        out.sum().backward()


def test_opcheck_and_compile(backend):
    _, indices, W, _ = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    grad = randn(6, 10).to(W.device)
    torch.library.opcheck(torch.ops.fastsae.sparse_grad_values.default, (grad, indices, W))
    compiled = torch.compile(ops.sparse_grad_values, fullgraph=True)
    assert torch.equal(compiled(grad, indices, W), ops.sparse_grad_values(grad, indices, W))


def test_bad_input():
    indices = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sparse_grad_values: grad_out must be \[\.\.\., D\]"):
        ops.sparse_grad_values(torch.zeros(4, 6), indices, torch.zeros(9, 5))
    with pytest.raises(ValueError, match="sparse_grad_values: indices .* must agree"):
        ops.sparse_grad_values(torch.zeros(3, 5), indices, torch.zeros(9, 5))
    with pytest.raises(TypeError, match="sparse_grad_values: grad_out is torch.float64"):
        ops.sparse_grad_values(torch.zeros(4, 5).double(), indices, torch.zeros(9, 5))
