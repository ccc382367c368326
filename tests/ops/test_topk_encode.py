"""topk_encode on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from common import assert_close, device_of, randn, tokens
from properties import given, settings, st
from selection import assert_selection, scores64

import fastsae
from fastsae import ops, reference

OP = "topk_encode"

SHAPES = [
    pytest.param(1, 1, 1, 1, id="all-one"),
    pytest.param(1, 64, 300, 7, id="one-token"),
    pytest.param(5, 7, 13, 13, id="k=F"),
    pytest.param(33, 65, 517, 1, id="k=1"),
    pytest.param(70, 129, 1037, 32, id="odd"),
    pytest.param(64, 128, 1024, 64, id="even"),
    pytest.param(3, 40, 2000, 700, id="large-k"),
    pytest.param(200, 384, 4100, 24, id="several-tiles"),
]


def few(backend, n):
    """Where kernels are interpreted, selecting a token's k best takes 50 ms."""
    return n if tokens(backend, n) == n else 4


def problem(n, d, f, dtype, device, seed=0):
    x = randn(n, d, dtype=dtype, seed=seed).to(device)
    W = (randn(f, d, dtype=torch.float64, seed=seed + 1) / d**0.5).to(dtype).to(device)
    b = (randn(f, dtype=torch.float64, seed=seed + 2) / 10).to(dtype).to(device)
    return x, W, b


@pytest.mark.parametrize("n,d,f,k", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_selects_the_k_best(backend, dtype, n, d, f, k, bias):
    x, W, b = problem(few(backend, n), d, f, dtype, device_of(backend))
    b = b if bias else None
    values, indices = ops.topk_encode(x, W, b, k)
    assert_selection(values, indices, x, W, b, k)
    plain = (x.cpu() @ W.cpu().T + (0 if b is None else b.cpu())).relu()
    pre, _ = scores64(x.cpu(), W.cpu(), None if b is None else b.cpu())
    index = indices.long().cpu()
    assert_close(values, pre.relu().gather(1, index), plain.gather(1, index), dtype, scale=4)


def test_identity_and_rank_scale(backend, dtype):
    x, W, b = problem(few(backend, 40), 33, 500, dtype, device_of(backend))
    scale = (0.1 + randn(500, seed=9).abs()).to(dtype).to(x.device)
    values, indices = ops.topk_encode(x, W, b, 450, activation="identity", rank_scale=scale)
    assert (values < 0).any()
    assert_selection(values, indices, x, W, b, 450, relu=False, rank_scale=scale)


def test_ties_go_to_the_lowest_index(backend, dtype):
    device = device_of(backend)
    row = randn(1, 48, dtype=dtype).to(device)
    W = row.repeat(3000, 1)
    x = torch.cat([row, -row, torch.zeros_like(row)])
    values, indices = ops.topk_encode(x, W, None, 50, activation="identity")
    assert indices.cpu().tolist() == [list(range(50))] * 3
    assert (values == values[:, :1]).all()
    if backend == "reference":
        return  # its library product may sum the columns of an edge tile in another order
    # duplicated latents far apart tie exactly, whatever tile they fall in
    x, W, b = problem(few(backend, 20), 100, 1111, dtype, device)
    W2, b2 = torch.cat([W, W, W]), torch.cat([b, b, b])
    values, indices = ops.topk_encode(x, W2, b2, 30)
    groups = indices.long().view(-1, 10, 3)
    assert (groups[..., 1] - groups[..., 0] == 1111).all()
    assert (groups[..., 2] - groups[..., 1] == 1111).all()


@pytest.mark.parametrize("order", ["ascending", "descending", "zero"])
def test_adversarial_column_order(backend, order):
    """Sorted columns defeat a running threshold: still exact."""
    f = 5000
    ramp = torch.arange(f, dtype=torch.float32) / f
    column = {"ascending": ramp, "descending": ramp.flip(0), "zero": ramp * 0}[order]
    W = torch.zeros(f, 32)
    W[:, 0] = column
    x = torch.zeros(few(backend, 70), 32)
    x[:, 0] = 1
    x, W = x.to(device_of(backend)), W.to(device_of(backend))
    _, indices = ops.topk_encode(x, W, None, 40)
    first = torch.arange(40).flip(0) + f - 40 if order == "ascending" else torch.arange(40)
    assert (indices.cpu() == first).all()


def test_leading_dimensions_and_strides(backend):
    device = device_of(backend)
    x, W, b = problem(24, 30, 90, torch.float32, device)
    values, indices = ops.topk_encode(x, W, b, 5)
    v3, i3 = ops.topk_encode(x.view(2, 3, 4, 30), W, b, 5)
    assert v3.shape == i3.shape == (2, 3, 4, 5)
    assert torch.equal(v3.view(24, 5), values) and torch.equal(i3.view(24, 5), indices)
    v1, i1 = ops.topk_encode(x[0], W, b, 5)
    assert v1.shape == (5,) and torch.equal(i1, indices[0])
    wide = torch.randn(24, 60, device=device)
    wide[:, ::2] = x
    vs, ist = ops.topk_encode(wide[:, ::2], W.T.contiguous().T, b, 5)
    assert torch.equal(ist, indices) and torch.equal(vs, values)


@pytest.mark.parametrize("shape", [(0, 30), (3, 0, 30)])
def test_empty(backend, shape):
    _, W, b = problem(1, 30, 90, torch.float32, device_of(backend))
    values, indices = ops.topk_encode(torch.empty(shape, device=W.device), W, b, 4)
    assert values.shape == indices.shape == (*shape[:-1], 4)


@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(backend, dtype, where, bad):
    """Defined as torch's sort ranks it: NaN first, then +inf; indices distinct and in range."""
    x, W, b = problem(few(backend, 70), 40, 700, dtype, device_of(backend))
    {"x": x[3], "W": W[11], "b": b}[where][5] = bad
    values, indices = ops.topk_encode(x, W, b, 9, activation="identity")
    expected, expected_index = reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 9, False, None)
    index = indices.long().cpu()
    assert ((index >= 0) & (index < 700)).all()
    assert (index.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(values.cpu().isnan(), expected.isnan())
    assert torch.equal(values.cpu().isinf(), expected.isinf())
    odd = expected.isnan() | expected.isinf()
    assert torch.equal(indices.cpu()[odd], expected_index[odd])


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e18, 3e37])
def test_extreme_scales(backend, scale):
    """Denormal products and sums near overflow give what fp32 arithmetic gives."""
    x, W, _ = problem(few(backend, 30), 50, 400, torch.float32, device_of(backend))
    values, indices = ops.topk_encode(x, W * scale, None, 6, activation="identity")
    assert_selection_scaled(values, indices, x, W * scale, 6)


def assert_selection_scaled(values, indices, x, W, k):
    pre = x.double().cpu() @ W.double().cpu().T
    best = pre.sort(1, descending=True).values[:, :k]
    size = (x.double().cpu().norm(dim=1) * W.double().cpu().norm(dim=1).max())[:, None]
    chosen = pre.gather(1, indices.long().cpu())
    limit = 8 * torch.finfo(torch.float32).eps * size + 50 * 1.2e-38
    assert ((best - chosen).abs() <= limit).all()
    finite = values.cpu().isfinite()
    assert ((values.double().cpu() - chosen).abs() <= limit)[finite].all()
    assert (chosen[~finite].abs() > 3.4e38 * 0.99).all()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), d=st.integers(1, 70), f=st.integers(1, 300), data=st.data(),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_size_matches_the_reference(n, d, f, data, seed):
    """Integer-valued data: every order of summation is exact, so selections must be identical."""
    k = data.draw(st.integers(1, f))
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d), generator=g).float()
    W = torch.randint(-2, 3, (f, d), generator=g).float()
    b = torch.randint(-2, 3, (f,), generator=g).float()
    values, indices = ops.topk_encode(x, W, b, k)
    with fastsae.use_backend("reference"):
        expected, expected_index = ops.topk_encode(x, W, b, k)
    assert torch.equal(indices, expected_index) and torch.equal(values, expected)


def test_integer_data_is_identical_to_the_reference(backend, dtype):
    device = device_of(backend)
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-3, 4, (few(backend, 130), 96), generator=g).to(dtype).to(device)
    W = torch.randint(-2, 3, (2051, 96), generator=g).to(dtype).to(device)
    values, indices = ops.topk_encode(x, W, None, 33, activation="identity")
    expected, expected_index = reference.topk_encode(x.cpu(), W.cpu(), None, 33, False, None)
    assert torch.equal(indices.cpu(), expected_index) and torch.equal(values.cpu(), expected)


def test_latents_restrict_the_candidates(backend):
    x, W, b = problem(few(backend, 20), 30, 400, torch.float32, device_of(backend))
    latents = torch.arange(3, 400, 7, device=W.device)
    values, indices = ops.topk_encode(x, W, b, 6, latents=latents)
    v, i = ops.topk_encode(x, W[latents], b[latents], 6)
    assert torch.equal(indices.long(), latents[i.long()]) and torch.equal(values, v)


def test_repeatable(backend, dtype):
    x, W, b = problem(few(backend, 90), 100, 3000, dtype, device_of(backend))
    first, second = (ops.topk_encode(x, W, b, 20) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_gradients(backend):
    device = device_of(backend)
    inputs = [t.requires_grad_() for t in problem(12, 20, 100, torch.float32, device)]
    values, indices = ops.topk_encode(*inputs, 8)
    g = randn(12, 8, seed=5).to(device)
    got = torch.autograd.grad(values, inputs, g)
    x, W, b = (t.detach().double().requires_grad_() for t in inputs)
    dense = (x @ W.T + b).relu().gather(1, indices.long())
    truth = torch.autograd.grad(dense, (x, W, b), g.double())
    for a, t in zip(got, truth, strict=True):
        assert_close(a, t, t.float(), torch.float32, scale=10)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_gradcheck(activation):
    x, W, b = (t.requires_grad_() for t in problem(5, 6, 20, torch.float64, "cpu"))
    encode = lambda *a: ops.topk_encode(*a, 4, activation=activation)[0]  # noqa: E731
    assert torch.autograd.gradcheck(encode, (x, W, b))
    latents = torch.tensor([2, 3, 5, 7, 11, 13])
    subset = lambda *a: ops.topk_encode(*a, 4, latents=latents)[0]  # noqa: E731
    assert torch.autograd.gradcheck(subset, (x, W, b))


def test_double_backward_is_refused():
    x, W, b = (t.requires_grad_() for t in problem(5, 6, 20, torch.float64, "cpu"))
    values, _ = ops.topk_encode(x, W, b, 4)
    with pytest.raises(RuntimeError, match="topk_encode: double backward is not supported"):
        torch.autograd.grad((values**2).sum(), x, create_graph=True)


def test_opcheck(backend):
    args = [t.requires_grad_() for t in problem(6, 10, 30, torch.float32, device_of(backend))]
    torch.library.opcheck(torch.ops.fastsae.topk_encode.default, (*args, 5))
    torch.library.opcheck(torch.ops.fastsae.topk_encode.default, (*args, 5, "identity", None, None))


def test_compile_fullgraph(backend):
    x, W, b = problem(6, 10, 30, torch.float32, device_of(backend))
    W.requires_grad_()

    def step(x, W, b):
        values, indices = ops.topk_encode(x, W, b, 5)
        return ops.sparse_decode(values, indices, W)

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(x, W, b), step(x, W, b))
    g = torch.ones(6, 10, device=x.device)
    assert torch.equal(
        torch.autograd.grad(compiled(x, W, b), W, g)[0], torch.autograd.grad(step(x, W, b), W, g)[0]
    )


def test_autocast_runs_in_the_dtype_of_the_weights(backend):
    x, W, b = problem(6, 10, 30, torch.float32, device_of(backend))
    expected = ops.topk_encode(x.bfloat16().float(), W, b, 5)
    with torch.autocast(x.device.type, torch.bfloat16):
        values, indices = ops.topk_encode(x.bfloat16(), W, b, 5)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(k=0), ValueError, r"k must lie in \[1, 90\]"),
        (dict(k=91), ValueError, r"k must lie in \[1, 90\]"),
        (dict(x=torch.zeros(3, 31)), ValueError, r"x must be \[\.\.\., D\] with D = 30"),
        (dict(x=torch.tensor(1.0)), ValueError, "x must be"),
        (dict(W_enc=torch.zeros(90)), ValueError, r"W_enc must be \[F, D\]"),
        (dict(b_enc=torch.zeros(89)), ValueError, r"b_enc must be \[F\] = \[90\]"),
        (dict(rank_scale=torch.zeros(2, 90)), ValueError, "rank_scale must be"),
        (dict(x=torch.zeros(3, 30, dtype=torch.float64)), TypeError, "x is torch.float64"),
        (dict(x=torch.zeros(3, 30, dtype=torch.int32)), TypeError, "x must be float32"),
        (dict(activation="gelu"), ValueError, "activation must be one of"),
        (dict(latents=torch.zeros(3, dtype=torch.long), k=4), ValueError, "M, the number"),
        (dict(latents=torch.zeros(3)), TypeError, "latents must be int32 or int64"),
        (dict(x=torch.zeros(3, 30).to_sparse()), TypeError, "x must be a dense tensor"),
        (dict(x=torch.zeros(3, 30, device="meta")), ValueError, "on meta"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    args = dict(x=torch.zeros(3, 30), W_enc=torch.zeros(90, 30), b_enc=torch.zeros(90), k=4)
    with pytest.raises(error, match="topk_encode: .*" + message):
        ops.topk_encode(**{**args, **change})
