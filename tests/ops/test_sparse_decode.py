"""sparse_decode on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from common import assert_close, device_of, randn, tokens
from pairs import SHAPES, problem

from fastsae import ops, reference

OP = "sparse_decode"


def truth(values, indices, W, b):
    rows = W.double()[indices.long()]
    out = (values.double()[..., None] * rows).sum(-2)
    return out if b is None else out + b.double()


@pytest.mark.parametrize("n,d,f,k", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_matches_the_definition(backend, dtype, n, d, f, k, bias):
    n = tokens(backend, n)
    values, indices, W, b = problem(n, d, f, k, dtype, device_of(backend))
    b = b if bias else None
    out = ops.sparse_decode(values, indices, W, b)
    plain = reference.sparse_decode(values, indices, W, b)
    assert_close(out, truth(values, indices, W, b), plain, dtype, scale=2 * k**0.5)


def test_repeated_indices_add_up(backend, dtype):
    values, indices, W, b = problem(9, 20, 50, 6, dtype, device_of(backend))
    indices[:] = 7
    out = ops.sparse_decode(values, indices, W, b)
    plain = reference.sparse_decode(values, indices, W, b)
    assert_close(out, truth(values, indices, W, b), plain, dtype, scale=6)


def test_leading_dimensions_strides_and_int64(backend):
    values, indices, W, b = problem(24, 30, 90, 5, torch.float32, device_of(backend))
    out = ops.sparse_decode(values, indices, W, b)
    shaped = ops.sparse_decode(values.view(2, 3, 4, 5), indices.long().view(2, 3, 4, 5), W, b)
    assert shaped.shape == (2, 3, 4, 30) and torch.equal(shaped.view(24, 30), out)
    assert torch.equal(ops.sparse_decode(values[0], indices[0], W, b), out[0])
    strided = ops.sparse_decode(values.T.contiguous().T, indices, W.T.contiguous().T, b)
    assert torch.equal(strided, out)


@pytest.mark.parametrize("n,k", [(0, 4), (3, 0), (0, 0)])
def test_empty(backend, n, k):
    values, indices, W, b = problem(n, 30, 90, k, torch.float32, device_of(backend))
    out = ops.sparse_decode(values, indices, W, b)
    assert torch.equal(out, b.expand(n, 30))


def test_not_finite(backend, dtype):
    values, indices, W, b = problem(9, 20, 50, 6, dtype, device_of(backend))
    values[2, 3] = float("nan")
    W[indices[4, 1]] = float("inf")
    out = ops.sparse_decode(values, indices, W, b)
    expected = reference.sparse_decode(values, indices, W, b)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out.isnan().any() and out.isfinite().any()


@pytest.mark.parametrize("bad", [-1, 90, 2**31 - 1, 2**32 + 5, -(2**40)])
def test_index_out_of_range(bad):
    values, indices, W, b = problem(9, 30, 90, 6, torch.float32, "cpu")
    indices = indices.long()
    indices[8, 5] = bad
    with pytest.raises(RuntimeError, match=r"sparse_decode: .*\[0, 90\)"):
        ops.sparse_decode(values, indices, W, b)


def test_triton_and_cuda_take_an_index_out_of_range_as_absent(gpu_backend):
    values, indices, W, b = problem(4, 30, 90, 6, torch.float32, device_of(gpu_backend))
    expected = values.clone()
    indices[1, :5] = torch.tensor([-1, 90, 2**31 - 1, -(2**31), 91], device=W.device)
    expected[1, :5] = 0
    out = ops.sparse_decode(values, indices, W, b)
    kept = indices.clamp(0, 89)
    kept[1, :5] = 0
    assert torch.equal(out, ops.sparse_decode(expected, kept, W, b))


def test_repeatable(backend, dtype):
    args = problem(tokens(backend, 90), 100, 300, 20, dtype, device_of(backend))
    assert torch.equal(ops.sparse_decode(*args), ops.sparse_decode(*args))


def test_gradients(backend):
    values, indices, W, b = problem(12, 20, 100, 8, torch.float32, device_of(backend))
    inputs = [t.requires_grad_() for t in (values, W, b)]
    g = randn(12, 20, seed=5).to(W.device)
    got = torch.autograd.grad(ops.sparse_decode(values, indices, W, b), inputs, g)
    v64, W64, b64 = (t.detach().double().requires_grad_() for t in inputs)
    expected = torch.autograd.grad(truth(v64, indices, W64, b64), (v64, W64, b64), g.double())
    for a, t in zip(got, expected, strict=True):
        assert_close(a, t, t.float(), torch.float32, scale=10)


def test_gradcheck_and_double_backward():
    values, indices, W, b = problem(5, 6, 20, 4, torch.float64, "cpu")
    inputs = [t.requires_grad_() for t in (values, W, b)]
    decode = lambda v, W, b: ops.sparse_decode(v, indices, W, b)  # noqa: E731
    assert torch.autograd.gradcheck(decode, inputs)
    with pytest.raises(RuntimeError, match="sparse_decode: double backward is not supported"):
        torch.autograd.grad(decode(*inputs).square().sum(), values, create_graph=True)


def test_opcheck(backend):
    values, indices, W, b = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    args = (values.requires_grad_(), indices, W.requires_grad_(), b.requires_grad_())
    torch.library.opcheck(torch.ops.fastsae.sparse_decode.default, args)
    torch.library.opcheck(torch.ops.fastsae.sparse_decode.default, (*args[:3], None))


def test_compile_fullgraph(backend):
    args = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    compiled = torch.compile(ops.sparse_decode, fullgraph=True)
    assert torch.equal(compiled(*args), ops.sparse_decode(*args))


def test_autocast_runs_in_the_dtype_of_the_weights(backend):
    values, indices, W, b = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    expected = ops.sparse_decode(values.bfloat16().float(), indices, W, b)
    with torch.autocast(W.device.type, torch.bfloat16):
        out = ops.sparse_decode(values.bfloat16(), indices, W, b)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(values=torch.zeros(4, 3)), ValueError, r"values \[4, 3\] and indices \[4, 2\] must"),
        (dict(W_dec=torch.zeros(9)), ValueError, r"W_dec must be \[F, D\]"),
        (dict(b_dec=torch.zeros(4)), ValueError, r"b_dec must be \[D\] = \[5\]"),
        (dict(indices=torch.zeros(4, 2)), TypeError, "indices must be int32 or int64"),
        (dict(values=torch.zeros(4, 2).half()), TypeError, "values is torch.float16"),
        (dict(values=torch.tensor(0.0), indices=torch.tensor(0)), ValueError, "must have the same"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    args = dict(
        values=torch.zeros(4, 2),
        indices=torch.zeros(4, 2, dtype=torch.int32),
        W_dec=torch.zeros(9, 5),
        b_dec=torch.zeros(5),
    )
    with pytest.raises(error, match="sparse_decode: .*" + message):
        ops.sparse_decode(**{**args, **change})
