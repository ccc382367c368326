"""topk on every backend: exact and canonical, so results are compared bit for bit."""

from __future__ import annotations

import pytest
import torch
from common import device_of, randn
from properties import given, settings, st

import fastsae
from fastsae import ops, reference

OP = "topk"

SHAPES = [
    pytest.param(1, 1, 1, id="all-one"),
    pytest.param(3, 1, 1, id="rows-of-one"),
    pytest.param(4, 37, 0, id="k=0"),
    pytest.param(5, 13, 13, id="k=M"),
    pytest.param(7, 517, 1, id="k=1"),
    pytest.param(9, 1037, 32, id="odd"),
    pytest.param(2, 4099, 1500, id="large-k"),
    pytest.param(1, 30011, 64, id="one-long-row"),
    pytest.param(2, 12007, 5003, id="k-beyond-shared-memory"),
    pytest.param(1, 9001, 9001, id="sort"),
]


def assert_topk(x, k):
    """Equal to a stable descending sort, -0 and +0 told apart."""
    values, indices = ops.topk(x, k)
    expected, expected_index = reference.topk(x.cpu(), k)
    assert indices.dtype == torch.int32 and values.dtype == x.dtype
    assert torch.equal(indices.cpu(), expected_index)
    number = ~expected.isnan()
    assert torch.equal(values.cpu().isnan(), ~number)
    for part in (torch.nan_to_num, torch.signbit):
        assert torch.equal(part(values.cpu()[number]), part(expected[number]))


@pytest.mark.parametrize("n,m,k", SHAPES)
def test_selects_the_k_best(backend, dtype, n, m, k):
    assert_topk(randn(n, m, dtype=dtype).to(device_of(backend)), k)


@pytest.mark.parametrize("k", [1, 100, 4500])
@pytest.mark.parametrize("row", ["equal", "zeros", "ascending", "descending", "few", "nan", "-inf"])
def test_ties_and_adversarial_rows(backend, row, k):
    m = 9003
    ramp = torch.arange(m, dtype=torch.float32)
    x = {
        "equal": torch.full((m,), 1.5),
        "zeros": torch.where(ramp % 3 == 0, 0.0, -0.0),
        "ascending": ramp,
        "descending": -ramp,
        "few": (ramp * 7919 % 5) - 2,
        "nan": torch.where(ramp % 2 == 0, float("nan"), ramp),
        "-inf": torch.full((m,), float("-inf")),
    }[row]
    assert_topk(torch.stack([x, x.flip(0)]).to(device_of(backend)), k)


def test_not_finite(backend, dtype):
    x = randn(6, 700, dtype=dtype)
    x[0, ::50] = float("nan")
    x[1, ::3] = float("inf")
    x[2, ::2] = float("-inf")
    x[3, 5], x[3, 6], x[3, 7] = float("inf"), float("nan"), float("-inf")
    x[4] = float("nan")
    x[5] = -x[4]  # NaN with its sign set
    for k in (9, 350, 700):
        assert_topk(x.to(device_of(backend)), k)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.data())
def test_any_size(n, m, data):
    k = data.draw(st.integers(0, m))
    few = data.draw(st.sampled_from([2, 50, 10**6]))
    x = torch.randint(few, (n, m), generator=torch.Generator().manual_seed(m)).float()
    assert_topk(x, k)


def test_leading_dimensions_and_strides(backend):
    x = randn(24, 90).to(device_of(backend))
    values, indices = ops.topk(x, 5)
    v3, i3 = ops.topk(x.view(2, 3, 4, 90), 5)
    assert v3.shape == i3.shape == (2, 3, 4, 5)
    assert torch.equal(v3.view(24, 5), values) and torch.equal(i3.view(24, 5), indices)
    v1, i1 = ops.topk(x[3], 5)
    assert v1.shape == (5,) and torch.equal(i1, indices[3]) and torch.equal(v1, values[3])
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(24, 90)  # rows not aligned
    assert torch.equal(ops.topk(shifted, 5)[1], indices)
    assert torch.equal(ops.topk(x.T.contiguous().T, 5)[1], indices)


@pytest.mark.parametrize("shape", [(0, 30), (3, 0, 30), (4, 0)])
def test_empty(backend, shape):
    k = min(4, shape[-1])
    values, indices = ops.topk(torch.empty(shape, device=device_of(backend)), k)
    assert values.shape == indices.shape == (*shape[:-1], k)


def test_gradient_is_the_scatter_of_grad_values(backend):
    x = randn(12, 100).to(device_of(backend)).requires_grad_()
    values, indices = ops.topk(x, 8)
    g = randn(12, 8, seed=5).to(x.device)
    (got,) = torch.autograd.grad(values, x, g)
    assert torch.equal(got, torch.zeros_like(x).scatter(1, indices.long(), g))
    assert not indices.requires_grad


def test_gradcheck_to_second_order():
    x = randn(3, 4, 20, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.topk(x, 6)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: ops.topk(x, 6)[0] ** 2, x)


def test_opcheck(backend):
    x = randn(6, 30).to(device_of(backend)).requires_grad_()
    torch.library.opcheck(torch.ops.fastsae.topk.default, (x, 5))
    torch.library.opcheck(torch.ops.fastsae.topk.default, (x, 0))


def test_compile_fullgraph(backend):
    x = randn(6, 30).to(device_of(backend)).requires_grad_()
    compiled = torch.compile(lambda x: ops.topk(x, 5)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(x), ops.topk(x, 5)[0] * 2)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad((ops.topk(x, 5)[0] * 2).square().sum(), x)
    assert torch.equal(got, expected)


def test_vmap_is_one_call_and_functional_gradients_are_refused():
    x = randn(3, 4, 30)
    values, indices = torch.vmap(lambda row: ops.topk(row, 5), 1)(x)
    expected, expected_index = ops.topk(x.movedim(1, 0), 5)
    assert torch.equal(values, expected) and torch.equal(indices, expected_index)
    with pytest.raises(RuntimeError, match="topk: torch.func.grad"):
        torch.func.grad(lambda row: ops.topk(row, 5)[0].sum())(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m,k", [(1, 1), (2, 1), (513, 1), (2500, 40), (40000, 7)])
def test_triton_selects_by_digits_for_small_k(monkeypatch, dtype, m, k):
    """The path of a few long rows: one that spans programs, ties at the k-th, signs and NaN."""
    module = pytest.importorskip("fastsae.triton_kernels.topk")
    monkeypatch.setattr(module, "filter_pays", lambda *sizes: False)
    x = randn(2, m, dtype=dtype)
    x[1] = x[1].round()
    x[1, ::3] = -0.0
    x[0, m // 2] = float("nan")
    with fastsae.use_backend("triton"):
        assert_topk(x.to(device_of("triton")), k)


@pytest.mark.parametrize("k", [8, 30])
def test_triton_takes_rows_in_parts(monkeypatch, k):
    module = pytest.importorskip("fastsae.triton_kernels.topk")
    monkeypatch.setattr(module, "MAX_SORTED", 16)
    monkeypatch.setattr(module, "_WORKSPACE", 1 << 15)
    with fastsae.use_backend("triton"):
        assert_topk(randn(9, 50).to(device_of("triton")), k)


def test_every_cpu_level():
    if fastsae._library.CPU_MISSING is not None:
        pytest.skip(fastsae._library.CPU_MISSING)
    before = torch.ops.fastsae._cpu_level()
    try:
        for level in torch.ops.fastsae._cpu_levels().split():
            torch.ops.fastsae._set_cpu_level(level)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                with fastsae.use_backend("cpu"):
                    assert_topk(randn(5, 3001, dtype=dtype), 40)
    finally:
        torch.ops.fastsae._set_cpu_level(before)


@pytest.mark.parametrize(
    "x,k,error,message",
    [
        (torch.zeros(3, 30), -1, ValueError, r"k must lie in \[0, 30\]"),
        (torch.zeros(3, 30), 31, ValueError, r"k must lie in \[0, 30\]"),
        (torch.tensor(1.0), 0, ValueError, r"x must be \[\.\.\., M\]"),
        (torch.zeros(3, 30, dtype=torch.int32), 2, TypeError, "x must be float32"),
        (torch.empty(1, 2**31, device="meta"), 2, ValueError, "M must be below 2"),
    ],
)
def test_bad_input(x, k, error, message):
    with pytest.raises(error, match="topk: .*" + message):
        ops.topk(x, k)
