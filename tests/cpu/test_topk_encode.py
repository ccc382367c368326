"""What only the C++ topk_encode has: CPU levels, three ways to score, a proven error bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from common import dtype_id
from selection import assert_selection

import fastsae  # noqa: F401  (registers the operators)
from fastsae import _library

pytestmark = pytest.mark.skipif(
    _library.CPU_MISSING is not None, reason=str(_library.CPU_MISSING).split(":")[0]
)
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DESIGNS = ["stream", "plain", "bounded"]  # 0, 1, 2 of the statistics; 3: bounded, then plain


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in torch.ops.fastsae._cpu_levels().split():
        pytest.skip(f"this CPU has no {request.param}")
    torch.ops.fastsae._set_cpu_level(request.param)
    yield request.param
    torch.ops.fastsae._set_cpu_level("auto")


@pytest.fixture
def bf16_level():
    if "avx512_bf16" not in torch.ops.fastsae._cpu_levels().split():
        pytest.skip("this CPU has no bf16 products")
    torch.ops.fastsae._set_cpu_level("avx512_bf16")
    yield
    torch.ops.fastsae._set_cpu_level("auto")


def encode(x, W, b, k, design=None, relu=False, scale=None):
    """values, indices, statistics (design, rows, latents, rescored pairs)."""
    with pytest.MonkeyPatch.context() as patch:
        if design is not None:
            patch.setenv("FASTSAE_TOPK_ENCODE_DESIGN", design)
        values, indices = torch.ops.fastsae.topk_encode_cpu(x, W, b, k, relu, scale)
    return values, indices, torch.ops.fastsae._topk_encode_stats().tolist()


def problem(n, d, f, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    W = torch.randn(f, d, generator=g, dtype=torch.float64) / d**0.5
    b = torch.randn(f, generator=g, dtype=torch.float64) / 10
    return x.to(dtype), W.to(dtype), b.to(dtype)


SHAPES = [(1, 33, 515, 515), (3, 65, 1001, 7), (6, 129, 700, 32), (7, 64, 333, 1),
          (15, 40, 257, 31), (29, 1, 40, 3), (61, 131, 1025, 16), (150, 96, 3000, 32),
          (64, 17, 31, 31)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_level_and_design(level, design, dtype):
    for i, (n, d, f, k) in enumerate(SHAPES):
        x, W, b = problem(n, d, f, dtype, seed=i)
        scale = (torch.rand(f, generator=torch.Generator().manual_seed(i)) - 0.3).to(dtype)
        for bias, s, relu in ((b, None, True), (None, None, False), (b, scale, False)):
            values, indices, stats = encode(x, W, bias, k, design, relu, s)
            assert_selection(values, indices, x, W, bias, k, relu, s)
            if design == "bounded" and level == "avx512_bf16" and dtype in DTYPES[::2]:
                assert stats[0] in (2, 3)


def test_all_designs_agree_where_sums_are_exact(level):
    """Small integers: every order of summation gives the same number, so ties are real."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (90, 48), generator=g).float()
    W = torch.randint(-1, 2, (2100, 48), generator=g).float()
    b = torch.randint(-1, 2, (2100,), generator=g).float()
    pre = x @ W.T + b
    for k in (1, 20, 130):
        order = torch.sort(pre, dim=1, descending=True, stable=True)
        for design in DESIGNS:
            values, indices, _ = encode(x, W, b, k, design)
            assert torch.equal(values, order.values[:, :k])
            assert torch.equal(indices.long(), order.indices[:, :k])


@pytest.mark.parametrize("design", DESIGNS)
def test_equal_rows_tie_by_lowest_index(level, design):
    """Copies of a latent, far apart, score the same to the bit on every design."""
    x, W, _ = problem(70, 101, 64)
    W = W.repeat(40, 1)
    values, indices, _ = encode(x, W, None, 160, design)
    first = indices.long()[:, ::40]
    expected = first[:, :, None] + 64 * torch.arange(40)
    assert (first < 64).all()
    assert torch.equal(indices.long(), expected.reshape(70, 160))
    assert (values.reshape(70, 4, 40) == values[:, ::40, None]).all()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "zero"])
def test_adversarial_orders(level, design, order):
    n, d, f, k = 66, 64, 4000, 24
    x = torch.ones(n, d) + torch.arange(n)[:, None] / 64
    steps = {"ascending": torch.arange(f), "descending": -torch.arange(f),
             "equal": torch.ones(f), "zero": torch.zeros(f)}[order]  # fmt: skip
    W = (steps.float() / 4096)[:, None].expand(f, d).contiguous()
    values, indices, _ = encode(x, W, None, k, design)
    expected = torch.arange(f - 1, f - 1 - k, -1) if order == "ascending" else torch.arange(k)
    assert torch.equal(indices.long(), expected.expand(n, k))
    assert_selection(values, indices, x, W, None, k, relu=False)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_nan_and_inf(level, design, dtype):
    x, W, b = problem(80, 70, 900, dtype)
    W[17, 3] = W[801, 0] = float("nan")  # NaN in every row
    W[500, 5] = float("inf")  # +inf or -inf, by the sign of x
    b[33] = float("inf")
    x[4] = float("nan")
    x[5, 2] = float("inf")
    x[6] = 0  # 0 * inf is NaN
    b[40] = float("-inf")
    k = 10
    values, indices, _ = encode(x, W, b, k, design)
    index = indices.long()
    assert (
        (index.sort(1).values.diff(dim=1) > 0).all() and (index >= 0).all() and (index < 900).all()
    )
    clean = [n for n in range(80) if n not in (4, 5, 6)]
    assert (index[clean, :2] == torch.tensor([17, 801])).all()
    assert values[clean, :2].isnan().all() and not values[clean, 2:].isnan().any()
    assert (values[clean, 2] == float("inf")).all()
    rows = x[clean, 5] > 0
    assert (index[clean, 2][rows] == 33).all() and (index[clean, 3][rows] == 500).all()
    assert torch.equal(index[4], torch.arange(k)) and values[4].isnan().all()
    assert index[6, :3].tolist() == [17, 500, 801]
    rest, plain = [33, 40, 500, 801, 17], torch.ones(900, dtype=torch.bool)
    plain[rest] = False
    keep = plain.nonzero()[:, 0]
    tail = k - 5  # what the special latents leave
    _, i, _ = encode(x[clean], W[keep].contiguous(), b[keep].contiguous(), k, design)
    for r in range(len(clean)):
        got = index[clean[r]][~torch.isin(index[clean[r]], torch.tensor(rest))]
        assert got[:tail].tolist() == keep[i[r, :tail].long()].tolist()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-12, 1e12, 1e18], ids=str)
def test_scales(level, design, size):
    x, W, _ = problem(70, 65, 1500)
    wide = torch.exp2(torch.arange(1500) % 13 - 6.0)[:, None]
    for xs, ws in ((size, 1.0), (1.0, size), (size**0.5, size**0.5)):
        a, w = x * xs, W * wide * ws
        values, indices, _ = encode(a, w, None, 9, design)
        assert_selection(values, indices, a, w, None, 9, relu=False)


def test_overflowing_products(level):
    """Products beyond fp32: some scores are inf or NaN, nothing hangs or leaves the range."""
    x, W, _ = problem(70, 65, 1500)
    for design in DESIGNS:
        values, indices, _ = encode(x * 1e30, W * 1e30, None, 9, design)
        assert (indices.sort(1).values.diff(dim=1) > 0).all()
        assert ((indices >= 0) & (indices < 1500)).all()
        assert not values.isfinite().any()


def test_mixed_scales_beside_each_other(level):
    """Rows and latents that the filter cannot bound do not disturb their neighbours."""
    x, W, b = problem(128, 64, 2000)
    x[::7] *= 1e25
    W[::5] *= 1e-25
    W[3::50] *= 1e10
    want = encode(x, W, b, 12, "plain")
    for design in DESIGNS:
        values, indices, _ = encode(x, W, b, 12, design)
        assert_selection(values, indices, x, W, b, 12, relu=False)
        assert (indices == want[1]).float().mean() > 0.99


def test_filter_equals_exhaustive_rescoring(bf16_level):
    """The filter gives bit for bit the top-k of the fp32 scores of all pairs (design `stream`)."""
    for seed, (n, d, f, k) in enumerate([(100, 96, 5000, 32), (140, 257, 3000, 5),
                                         (64, 64, 9000, 64), (90, 500, 2048, 100)]):  # fmt: skip
        x, W, b = problem(n, d, f, seed=seed)
        x += 0.7  # a common part, as activations have
        got, want = encode(x, W, b, k, "bounded"), encode(x, W, b, k, "stream")
        assert got[2][0] == 2 and want[2][0] == 0
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert got[2][3] < 12 * n * k, "the filter lets too much through"


@pytest.mark.parametrize("kind", ["signed", "zero", "nan", "denormal", "huge", "minus-one"])
def test_filter_under_any_rank_scale(bf16_level, kind):
    """Negative, zero, NaN and extreme scales: still bit for bit the exhaustive answer."""
    g = torch.Generator().manual_seed(2)
    x, W, b = problem(80, 70, 1700)
    x[::9] *= 1e11
    scale = torch.randn(1700, generator=g)
    if kind == "zero":
        scale.zero_()
    elif kind == "nan":
        scale[::7], scale[::11] = float("nan"), 0
    elif kind == "denormal":
        scale *= 1e-42
    elif kind == "huge":
        scale *= 1e30
        scale[::13] = float("inf")
    elif kind == "minus-one":
        scale.fill_(-1)
    got = encode(x, W, b, 70, "bounded", scale=scale)  # 70: rows are no whole number of vectors
    want = encode(x, W, b, 70, "stream", scale=scale)
    if got[2][0] == 3:  # the rest was summed in another order
        assert (got[1] == want[1]).float().mean() > 0.99
    else:
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0].nan_to_num(0.5), want[0].nan_to_num(0.5))


def halfway(shape, g):
    """Numbers exactly between two bf16 neighbours, where rounding loses most."""
    bits = torch.randint(0x3F00, 0x4080, shape, generator=g, dtype=torch.int32)
    return ((bits << 16) | 0x8000).view(torch.float32)


@pytest.mark.parametrize("kind", ["random", "halfway", "same-sign", "above-half", "wide"])
def test_the_error_bound_holds(bf16_level, kind):
    """|s~ - e| <= m for every pair, on data that rounds as badly as it can."""
    g = torch.Generator().manual_seed(1)
    for d in (64, 129, 768):
        x, W = torch.randn(256, d, generator=g), torch.randn(4096, d, generator=g)
        if kind == "halfway":
            x, W = x.sign() * halfway(x.shape, g), W.sign() * halfway(W.shape, g)
        elif kind == "same-sign":
            x, W = x.abs(), W.abs()
        elif kind == "above-half":  # every element rounds the same way
            x = (halfway(x.shape, g).view(torch.int32) + 1).view(torch.float32)
            W = (halfway(W.shape, g).view(torch.int32) + 1).view(torch.float32)
        elif kind == "wide":
            x = x * torch.exp2(torch.randint(-30, 30, x.shape, generator=g).float())
            W = W * torch.exp2(torch.randint(-30, 30, W.shape, generator=g).float())
        b = torch.randn(4096, generator=g)
        lower, upper, exact = torch.ops.fastsae._topk_encode_bounds(x, W, b)
        assert (lower <= exact).all() and (exact <= upper).all()
        truth = x.double() @ W.double().T + b.double()
        assert (lower.double() <= truth).all() and (truth <= upper.double()).all()


def test_bounds_of_no_rows(bf16_level):
    bounds = torch.ops.fastsae._topk_encode_bounds(
        torch.empty(0, 64), torch.zeros(40, 64), torch.zeros(40)
    )
    assert [list(b.shape) for b in bounds] == [[0, 40]] * 3


def test_gives_up_the_filter_when_it_does_not_pay(bf16_level):
    """Latents that differ by less than the bound: the rest goes the plain way, still exact."""
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(128, 256, generator=g) / 1000
    W = 1 + torch.rand(60000, 256, generator=g) / 1000
    W[40000:40010] = W[:10]
    values, indices, stats = encode(x, W, None, 16, "bounded")
    assert stats[0] == 3
    assert_selection(values, indices, x, W, None, 16, relu=False)


def test_threads_do_not_change_the_result(level):
    x, W, b = problem(100, 80, 2000)
    before = torch.get_num_threads()
    try:
        for design in DESIGNS:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(encode(x, W, b, 20, design))
            for values, indices, _ in results[1:]:
                assert torch.equal(values, results[0][0]) and torch.equal(indices, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_empty():
    values, indices, _ = encode(torch.empty(0, 5), torch.ones(7, 5), None, 3)
    assert values.shape == indices.shape == (0, 3)


@pytest.mark.parametrize(
    "n,d,f,k,limit",
    [
        pytest.param(3000, 64, 500_000, 32, 64, id="many-latents"),
        pytest.param(60_000, 64, 4096, 16, 64, id="many-tokens"),
        pytest.param(300, 64, 20_000, 20_000, 64, id="k=F"),
    ],
)
@pytest.mark.parametrize("design", ["plain", "bounded"])
def test_extra_memory(design, n, d, f, k, limit):
    """Peak memory beyond inputs and outputs, in a process of its own."""
    code = f"""
import resource, torch, fastsae
torch.set_num_threads(2)
x, W = torch.randn({n}, {d}), torch.randn({f}, {d})
op = torch.ops.fastsae.topk_encode_cpu
op(x[:100], W[:1000], None, 3, True, None)
def peak():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) for l in f if l.startswith("VmHWM")) / 1024
before = peak()
values, indices = op(x, W, None, {k}, True, None)
print(peak() - before - values.numel() * 8 / 2**20)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    env = os.environ | {"FASTSAE_TOPK_ENCODE_DESIGN": design}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= limit
