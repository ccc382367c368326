"""The C++ decode, gradient and Adam kernels at every CPU level, against fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from common import ATOL, DTYPES, assert_close, dtype_id, generator, randn

import fastsae
from fastsae import _library, reference

if _library.CPU_MISSING is not None:
    pytest.skip(_library.CPU_MISSING, allow_module_level=True)

ops = torch.ops.fastsae
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
# N, K, D, F: odd widths around the vector and block sizes, K = 1, K = F, empty in every dimension.
SHAPES = [
    (5, 3, 7, 11),
    (33, 5, 100, 40),
    (1, 1, 1, 1),
    (4, 6, 17, 6),
    (64, 9, 129, 700),
    (2, 130, 16, 9),
    (300, 8, 33, 3),
    (0, 4, 8, 9),
    (7, 0, 8, 9),
    (3, 2, 0, 5),
]
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in ops._cpu_levels().split():
        pytest.skip(f"this CPU has no {request.param}")
    ops._set_cpu_level(request.param)
    yield request.param
    ops._set_cpu_level("auto")


@pytest.fixture(params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Repeated latents within a row are frequent where F is small."""
    N, K, D, F = shape
    return {
        "values": randn(N, K, dtype=dtype, seed=1),
        "indices": torch.randint(0, F, (N, K), generator=generator(2), dtype=torch.int32),
        "rows": randn(N, D, dtype=dtype, seed=3),
        "W": randn(F, D, dtype=dtype, seed=4),
        "bias": randn(D, dtype=dtype, seed=5),
    }


def moments(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    acc = torch.float64 if W.dtype == torch.float64 else torch.float32
    return torch.zeros(W.shape, dtype=acc), torch.zeros(W.shape, dtype=acc)


def adam_step(W, m, v, p, step, lazy=False, unit_norm=False, weight_decay=0.0) -> None:
    ops.sparse_adam_step_cpu(
        W, m, v, p["values"], p["indices"], p["rows"],
        *ADAM.values(), weight_decay, step, lazy, unit_norm,
    )  # fmt: skip


def test_products_match_fp64(level: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_products(dtype, shape)


def check_products(dtype: torch.dtype, shape) -> None:
    p = problem(shape, dtype)
    F = shape[3]
    wide = {k: t if k == "indices" else t.double() for k, t in p.items()}
    scale = 4 * max(1, shape[0] * shape[1] / F) ** 0.5  # sums of that many terms of order 1

    def check(got: torch.Tensor, op, *names: str, **extra) -> None:
        truth = op(*(wide[n] for n in names), **extra)
        assert_close(got, truth, op(*(p[n] for n in names), **extra), dtype, scale)

    v, i, rows, W = p["values"], p["indices"], p["rows"], p["W"]
    pairs = ("values", "indices")
    got = ops.sparse_decode_cpu(v, i, W, p["bias"])
    check(got, reference.sparse_decode, *pairs, "W", "bias")
    check(ops.sparse_decode_cpu(v, i, W, None), reference.sparse_decode, *pairs, "W", b_dec=None)
    got = ops.sparse_grad_values_cpu(rows, i, W)
    check(got, reference.sparse_grad_values, "rows", "indices", "W")
    dense = ops.sparse_grad_weight_cpu(v, i, rows, F)
    check(dense, reference.sparse_grad_weight, *pairs, "rows", n_latents=F)
    latents, grads = ops.sparse_grad_weight_rows_cpu(v, i, rows, F)
    assert latents.dtype == torch.int32
    assert torch.equal(latents.long(), i.long().unique())
    assert torch.equal(dense[latents.long()], grads)


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
def test_adam_matches_fp64(level: str, dtype: torch.dtype, lazy: bool, unit_norm: bool) -> None:
    for shape in SHAPES:
        check_adam(dtype, shape, lazy, unit_norm)


def check_adam(dtype: torch.dtype, shape, lazy: bool, unit_norm: bool) -> None:
    p = problem(shape, dtype)
    wide = {k: t if k == "indices" else t.double() for k, t in p.items()}
    W, W64 = p["W"].clone(), p["W"].double().clone()
    (m, v), (m64, v64) = moments(W), moments(W64)
    # A start away from zero: m / sqrt(v) of a first step is +-1 for a gradient of rounding noise.
    for t, t64, seed in ((m, m64, 6), (v, v64, 7)):
        t64.copy_(randn(*t.shape, seed=seed).abs() + 0.5)
        t.copy_(t64)
        t64.copy_(t)
    for step in (7, 8, 9):
        adam_step(W, m, v, p, step, lazy, unit_norm, weight_decay=0.1)
        reference.sparse_adam_step(
            W64, m64, v64, wide["values"], wide["indices"], wide["rows"],
            *ADAM.values(), 0.1, step, lazy, unit_norm,
        )  # fmt: skip
    scale = 8 * max(1, shape[0] * shape[1] / shape[3])
    # Low-precision parameters round at each of the three steps.
    torch.testing.assert_close(W.double(), W64, atol=ATOL[dtype], rtol=4 * ATOL[dtype])
    state = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype == state:
        torch.testing.assert_close(m, m64.to(state), atol=ATOL[state] * scale, rtol=1e-5)
        torch.testing.assert_close(v, v64.to(state), atol=ATOL[state] * scale**2, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dense_adam_is_torch_adam(level: str, dtype: torch.dtype, weight_decay: float) -> None:
    W = torch.nn.Parameter(randn(40, 37, dtype=dtype))
    ours = W.detach().clone()
    m, v = moments(ours)
    adam = torch.optim.Adam([W], lr=0.01, weight_decay=weight_decay)
    for step in range(1, 11):
        p = problem((9, 4, 37, 40), dtype)
        p["values"] = randn(9, 4, dtype=dtype, seed=100 + step)
        p["indices"] = (p["indices"] + step) % 40
        W.grad = reference.sparse_grad_weight(p["values"], p["indices"], p["rows"], 40)
        adam.step()
        adam_step(ours, m, v, p, step, weight_decay=weight_decay)
    atol = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(ours, W.detach(), atol=atol, rtol=1e-5)
    state = adam.state[W]
    torch.testing.assert_close(m, state["exp_avg"], atol=atol, rtol=1e-5)
    torch.testing.assert_close(v, state["exp_avg_sq"], atol=atol, rtol=1e-5)


def test_lazy_leaves_other_rows_alone(level: str, dtype: torch.dtype) -> None:
    p = problem((6, 2, 19, 50), dtype)
    W, (m, v) = p["W"].clone(), moments(p["W"])
    m.fill_(0.5), v.fill_(0.25)
    adam_step(W, m, v, p, 3, lazy=True, unit_norm=True)
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[p["indices"].long().unique()] = False
    assert torch.equal(W[untouched], p["W"][untouched])
    assert (m[untouched] == 0.5).all()
    assert (v[untouched] == 0.25).all()
    assert (m[~untouched] != 0.5).any(1).all()


def test_unit_norm(level: str, dtype: torch.dtype) -> None:
    p = problem((20, 4, 31, 12), dtype)
    W, (m, v) = p["W"].clone(), moments(p["W"])
    W[3] = 0  # a zero row has no direction: Adam moves it, then it has
    W[5] = p["W"][5] = 0
    p["indices"][p["indices"] == 5] = 4
    adam_step(W, m, v, p, 1, unit_norm=True)
    norms = W.double().norm(dim=1)
    norms[5] += 1  # no gradient either: it stays zero
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=tolerance, rtol=0)


def test_repeatable_at_any_number_of_threads(level: str) -> None:
    p = problem((500, 24, 65, 300), torch.float32)
    results = []
    for n in (1, 2, 3, 2):
        torch.set_num_threads(n)
        W, (m, v) = p["W"].clone(), moments(p["W"])
        adam_step(W, m, v, p, 1, unit_norm=True)
        adam_step(W, m, v, p, 2, lazy=True)
        results.append([
            W, m, v,
            ops.sparse_decode_cpu(p["values"], p["indices"], p["W"], p["bias"]),
            ops.sparse_grad_values_cpu(p["rows"], p["indices"], p["W"]),
            ops.sparse_grad_weight_cpu(p["values"], p["indices"], p["rows"], 300),
            *ops.sparse_grad_weight_rows_cpu(p["values"], p["indices"], p["rows"], 300),
        ])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("F", [70_000, 2**20 + 3])
def test_grouping_of_many_latents(F: int) -> None:
    """Both digits of the counting sort in use, latents at both ends, heavy repetition."""
    indices = torch.randint(0, F, (4000, 8), generator=generator(), dtype=torch.int32)
    indices[::3, 0], indices[1::3, 1] = F - 1, 0
    values, rows = randn(4000, 8), randn(4000, 2, seed=1)
    latents, grads = ops.sparse_grad_weight_rows_cpu(values, indices, rows, F)
    want, inverse = indices.long().unique(return_inverse=True)
    truth = torch.zeros(len(want), 2, dtype=torch.float64)
    for k in range(8):
        truth.index_add_(0, inverse[:, k], values[:, k, None].double() * rows.double())
    assert torch.equal(latents.long(), want)
    torch.testing.assert_close(grads.double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31)])
def test_index_out_of_range(bad: int, dtype: torch.dtype) -> None:
    p = problem((6, 4, 9, 40), dtype)
    p["indices"][5, 3] = bad
    v, i, rows, W = p["values"], p["indices"], p["rows"], p["W"]
    with pytest.raises(RuntimeError, match=r"sparse_decode: indices must lie in \[0, 40\)"):
        ops.sparse_decode_cpu(v, i, W, None)
    with pytest.raises(RuntimeError, match="sparse_grad_values: indices must lie"):
        ops.sparse_grad_values_cpu(rows, i, W)
    with pytest.raises(RuntimeError, match="sparse_grad_weight: indices must lie"):
        ops.sparse_grad_weight_cpu(v, i, rows, 40)
    with pytest.raises(RuntimeError, match="sparse_grad_weight_rows: indices must lie"):
        ops.sparse_grad_weight_rows_cpu(v, i, rows, 40)
    before, (m, s) = W.clone(), moments(W)
    with pytest.raises(RuntimeError, match="sparse_adam_step: indices must lie"):
        adam_step(W, m, s, p, 1)
    assert torch.equal(W, before)
    assert not m.any()
    assert not s.any()


def test_no_latents_at_all() -> None:
    """F = 0 with pairs is out of range, without pairs it is empty."""
    empty = torch.empty(0, 5)
    with pytest.raises(RuntimeError, match=r"\[0, 0\)"):
        ops.sparse_decode_cpu(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), empty, None)
    none = torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int32)
    assert ops.sparse_decode_cpu(*none, empty, None).tolist() == [[0.0] * 5] * 2
    assert ops.sparse_grad_weight_cpu(*none, torch.ones(2, 5), 0).shape == (0, 5)
    latents, grads = ops.sparse_grad_weight_rows_cpu(*none, torch.ones(2, 5), 0)
    assert latents.shape == (0,)
    assert grads.shape == (0, 5)


def test_rounding_of_sixteen_bit_stores(level: str) -> None:
    """Every finite bf16 and fp16 survives a load and a store; halfway cases go to even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    one = torch.zeros(1, 1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        every = bits.view(dtype)
        every = every[every.isfinite()][None]
        ones = torch.ones(1, 1, dtype=dtype)
        got = ops.sparse_decode_cpu(ones, one, every, None)
        assert torch.equal(got, every)
        third = torch.full((1, 1), 1 / 3, dtype=dtype)
        got = ops.sparse_decode_cpu(third, one, every, None)
        assert torch.equal(got, (third.float() * every.float()).to(dtype))
        special = torch.tensor([[float("nan"), float("inf"), -float("inf")]], dtype=dtype)
        got = ops.sparse_decode_cpu(ones, one, special.repeat(1, 9), None)
        assert torch.equal(got.isnan(), special.repeat(1, 9).isnan())
        assert torch.equal(got.isinf(), special.repeat(1, 9).isinf())


def test_level_names() -> None:
    available = ops._cpu_levels().split()
    assert available == list(LEVELS[: len(available)])
    with pytest.raises(RuntimeError, match=r"unknown CPU level nope; available: portable"):
        ops._set_cpu_level("nope")
    assert ops._cpu_level() in available
    assert fastsae.info()["cpu_kernels"]["level"] == ops._cpu_level()
