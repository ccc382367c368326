"""topk_member: the same answer as selecting, on every backend; the screen's bound holds."""

from __future__ import annotations

import common
import pytest
import torch
from common import device_of, randn, tokens
from properties import given, settings, st

import fastsae
from fastsae import _dispatch, ops, reference
from fastsae._stamp import stamp
from fastsae.ops.topk_member import Selection

OP = "topk_member"

CPU_LEVELS = (
    torch.ops.fastsae._cpu_levels().split()
    if not _dispatch._missing("topk_member", "cpu", "cpu", torch.float32)
    else []
)


def whole(n, d, f, seed=0):
    """Small integers: every sum is exact in every order, and ties are many."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-3, 4, (n, d), generator=g).float(),
        torch.randint(-3, 4, (f, d), generator=g).float(),
        torch.randint(-3, 4, (f,), generator=g).float(),
    )


def expected(x, w, b, latents, k, scale=None, positive=False):
    wide = [None if t is None else t.double().cpu() for t in (x, w, b, scale)]
    return reference.topk_member(*wide[:3], latents.cpu(), k, wide[3], positive, None, None)


def every_latent(n, f):
    return torch.arange(-1, f, dtype=torch.int32).expand(n, -1)


def screens(w, backend):
    """Without a screen, and with it where the backend reads it."""
    yield None
    if backend == "cpu" and w.dtype != torch.float64:
        yield ops.topk_screen(w)


@pytest.mark.parametrize(
    "n,d,f,k", [(1, 8, 40, 5), (5, 33, 517, 32), (3, 1, 9, 9), (7, 260, 70, 1)]
)
@pytest.mark.parametrize("positive", [False, True])
def test_every_latent_of_every_token(backend, dtype, n, d, f, k, positive):
    device, n, f = device_of(backend), tokens(backend, n), common.latents(backend, f)
    k = min(k, f)
    x, w, b = (t.to(device=device, dtype=dtype) for t in whole(n, d, f))
    for bias, scale in ((b, None), (None, None), (b, (b.abs() + 1) * torch.where(b > 1, -1, 1))):
        latents = every_latent(n, f).to(device)
        truth = expected(x, w, bias, latents, k, scale, positive)
        for screen in screens(w, backend):
            got = ops.topk_member(x, w, bias, latents, k, scale, positive, screen)
            assert got.dtype == torch.bool and torch.equal(got.cpu(), truth)
        if not positive:
            assert (truth.sum(1) == k).all()


def test_agrees_with_topk_encode_on_real_numbers(backend):
    """Each latent but those that rounding could swap."""
    n, d, f, k = 4, 96, 300 if backend == "triton" else 1500, 32
    x, w, b = (
        t.to(device_of(backend)) for t in (randn(n, d), randn(f, d, seed=1), randn(f, seed=2))
    )
    scores = x.double() @ w.double().T + b.double()
    kth = scores.topk(k + 1, dim=1).values[:, k - 1 :].mean(1, keepdim=True)
    clear = (scores - kth).abs() > 1e-4
    latents = torch.arange(f, dtype=torch.int32, device=x.device).expand(n, -1)
    chosen = torch.zeros(n, f, dtype=torch.bool, device=x.device)
    chosen.scatter_(1, ops.topk_encode(x, w, b, k)[1].long(), True)
    for screen in screens(w, backend):
        got = ops.topk_member(x, w, b, latents, k, screen=screen)
        assert torch.equal(got[clear], chosen[clear]) and clear.float().mean() > 0.99


def test_many_tokens_are_selected(backend):
    x, w, b = (t.to(device_of(backend)) for t in whole(tokens(backend, 70), 16, 90))
    latents = every_latent(len(x), 90).to(x.device)
    for n in (len(x), min(len(x), 3)):  # on both sides of the choice
        for positive in (False, True):
            got = ops.topk_member(x[:n], w, b, latents[:n], 7, positive=positive)
            truth = expected(x[:n], w, b, latents[:n], 7, positive=positive)
            assert torch.equal(got.cpu(), truth)


@pytest.mark.parametrize("active", ["in few tokens", "in all"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_counting_gives_way_to_selecting(active, kind):
    """Few tokens left are counted to the end, many are selected: one answer."""
    n, f, k = 150, 1500, 20
    x, w, b = (t.to(kind) for t in whole(n, 40, f))
    latents = torch.randint(-1, f, (n, 3), generator=torch.Generator().manual_seed(1)).int()
    best = ops.topk_encode(x, w, b, 2 * k)[1].int()
    every = slice(None) if active == "in all" else slice(0, 100, 10)
    latents[every, 1:] = best[every, k - 1 : k + 1]  # the last member and the first that is none
    truth = expected(x, w, b, latents, k)
    for screen in screens(w, "cpu"):
        assert torch.equal(ops.topk_member(x, w, b, latents, k, screen=screen), truth)
    assert truth[every, 1].all() and not truth[every, 2].any()


def test_lists_are_shared_by_neighbours(backend):
    x, w, b = (t.to(device_of(backend)) for t in whole(6, 16, 90))
    lists = torch.tensor([[3, -1, 80], [5, 5, 7]], dtype=torch.int32, device=x.device)
    for shape in ((2, 3, 16), (2, 1, 3, 16)):
        with fastsae.use_backend(backend):
            got = Selection(w, b, 9)(x.view(shape), lists)
        truth = expected(x, w, b, lists.repeat_interleave(3, 0), 9)
        assert got.shape == (*shape[:-1], 3) and torch.equal(got.flatten(0, -2).cpu(), truth)
    assert torch.equal(Selection(w, b, 9)(x[:2], lists).cpu(), expected(x[:2], w, b, lists, 9))
    assert Selection(w, b, 9)(x.view(2, 3, 16)[:, :0], lists).shape == (2, 0, 3)


def test_not_finite(backend):
    x, w, b = whole(4, 24, 300)
    w[7] = float("nan")
    w[9, 3], w[11, 0] = float("inf"), -float("inf")
    w[13] = 0
    w[13, 0] = 3e38  # finite, its square is not
    x[1, 5] = float("nan")
    x[2, 0] = float("inf")
    x[3] *= 2.0**116
    x, w, b = (t.to(device_of(backend)) for t in (x, w, b))
    latents = every_latent(4, 300).to(x.device)
    with fastsae.use_backend("reference"):
        truth = ops.topk_member(x, w, b, latents, 12).cpu()
    for screen in screens(w, backend):
        got = ops.topk_member(x, w, b, latents, 12, screen=screen).cpu()
        assert torch.equal(got, truth)


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_cpu_level(level):
    x, w, b = whole(6, 37, 600)
    torch.ops.fastsae._set_cpu_level(level)
    try:
        for screen in (None, ops.topk_screen(w)):
            with fastsae.use_backend("cpu"):
                got = ops.topk_member(x, w, b, every_latent(6, 600), 20, screen=screen)
            assert torch.equal(got, expected(x, w, b, every_latent(6, 600), 20))
    finally:
        torch.ops.fastsae._set_cpu_level("auto")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.data())
def test_any_size(n, d, data):
    f = data.draw(st.integers(1, 700))
    k = data.draw(st.integers(1, f))
    x, w, b = whole(n, d, f, seed=d)
    latents = torch.randint(-1, f, (n, 3), generator=torch.Generator().manual_seed(f))
    got = ops.topk_member(x, w, b, latents, k, screen=ops.topk_screen(w))
    assert torch.equal(got, expected(x, w, b, latents, k))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e18]), st.integers(0, 99))
def test_the_screen_bounds_every_score(d, size, seed):
    w = randn(50, d, seed=seed) * randn(50, 1, seed=seed + 1).exp().pow(4) * size
    x = randn(20, d, seed=seed + 2) * randn(1, d, seed=seed + 3).exp()
    codes, bounds = ops.topk_screen(w)
    step, margin, fine, largest = bounds.double()
    coarse = codes[0].double() * step[:, None]
    closer = coarse + codes[1].double() * step[:, None] / 254
    for approximation, limit in ((coarse, margin), (closer, fine)):
        off = x.double() @ (approximation - w.double()).T
        assert (off.abs() <= limit * x.double().norm(dim=1, keepdim=True)).all()
        assert (approximation.norm(dim=1) <= largest).all()


def test_the_screen_is_tight():
    """A margin that settles nothing would still be right, and slow."""
    w = randn(400, 512)
    codes, bounds = ops.topk_screen(w)
    norm = w.norm(dim=1)
    assert (bounds[1] < 0.02 * norm).all() and (bounds[2] < 2e-4 * norm).all()
    assert (bounds[3] < 1.1 * norm).all() and codes.dtype == torch.int8
    assert torch.equal(codes[0].abs().amax(1), torch.full((400,), 127, dtype=torch.int8))
    assert codes[1].abs().amax() > 120


@pytest.mark.parametrize("level", CPU_LEVELS)
@pytest.mark.parametrize("d", [31, 256, 1000, 20000])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_scores_closer_than_the_codes_tell(level, d, kind):
    """Rows that differ by less than either code resolves, x with coordinates 1000 times larger,
    signs that let no product cancel: the largest sums that int32 lanes see."""
    base = randn(1, d).sign()
    w = base * (1 + torch.logspace(-8, -1, 300)[:, None] * (0.5 + randn(300, d, seed=1).abs()))
    w, b = w.to(kind), torch.zeros(300, dtype=kind)
    x = torch.cat([base, base * randn(1, d, seed=2).abs(), base.clone(), randn(1, d, seed=3)])
    x[2, :: max(1, d // 8)] *= 1000
    x = x.to(kind)
    torch.ops.fastsae._set_cpu_level(level)
    try:
        with fastsae.use_backend("cpu"):
            latents = every_latent(len(x), 300)
            plain = ops.topk_member(x, w, b, latents, 40)
            screened = ops.topk_member(x, w, b, latents, 40, screen=ops.topk_screen(w))
    finally:
        torch.ops.fastsae._set_cpu_level("auto")
    assert torch.equal(screened, plain) and (plain.sum(1) == 40).all()


def test_leading_dimensions_strides_and_empty(backend):
    x, w, b = (t.to(device_of(backend)) for t in whole(6, 16, 90))
    latents = torch.randint(-1, 90, (6, 4), generator=torch.Generator().manual_seed(0)).to(x.device)
    flat = ops.topk_member(x, w, b, latents, 9)
    assert torch.equal(
        ops.topk_member(x.view(2, 3, 16), w, b, latents.view(2, 3, 4), 9).view(6, 4), flat
    )
    assert torch.equal(ops.topk_member(x[1], w, b, latents[1], 9), flat[1])
    wide = w.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(ops.topk_member(x, wide, b, latents.t().contiguous().t(), 9), flat)
    assert ops.topk_member(x[:0], w, b, latents[:0], 9).shape == (0, 4)
    assert ops.topk_member(x, w, b, latents[:, :0], 9).shape == (6, 0)


def bounded(x, w, level):
    """Is the screened answer about each latent being the best that of the scores themselves?"""
    latents = every_latent(len(x), len(w))
    torch.ops.fastsae._set_cpu_level(level)
    try:
        plain = ops.topk_member(x, w, None, latents, 1)
        return torch.equal(
            ops.topk_member(x, w, None, latents, 1, screen=ops.topk_screen(w)), plain
        )
    finally:
        torch.ops.fastsae._set_cpu_level("auto")


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_the_screen_of_a_subnormal_token(level):
    """|x| = 2^0.5 * 2^-149 is no fp32: rounded down it is 0.7 of itself."""
    x, w = torch.full((1, 2), 2.0**-149), torch.tensor([[1.8, 0.0], [1.0, 1.0]]) * 2.0**59
    assert bounded(x, w, level)


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_the_screen_of_sums_that_overflow_before_they_cancel(level):
    """inf - inf: NaN ranks first, and the codes see a 0."""
    x, w = torch.full((1, 2), 10.0), torch.tensor([[1e36, 0], [1e38, -1e38], [0, 2e36]])
    assert ops.topk_member(x, w, None, every_latent(1, 3), 1).tolist() == [
        [False, False, True, False]
    ]
    assert bounded(x, w, level)


def test_bad_input_is_refused(backend):
    device = device_of(backend)
    x, w, b = (t.to(device) for t in whole(2, 8, 20))
    ok = torch.zeros(2, 1, dtype=torch.int32, device=device)
    codes, bounds = ops.topk_screen(w)
    for error, match, args, options in (
        (ValueError, "D >= 1", (x[:, :0], w[:, :0], b, ok, 3), {}),
        (ValueError, "k must lie", (x, w, b, ok, 0), {}),
        (ValueError, "k must lie", (x, w, b, ok, 21), {}),
        (ValueError, "leading dimensions", (x, w, b, ok[:1], 3), {}),
        (TypeError, "int32 or int64", (x, w, b, ok.float(), 3), {}),
        (ValueError, "with D = 8", (x[:, :7], w, b, ok, 3), {}),
        (TypeError, "one dtype", (x, w.half(), b, ok, 3), {}),
        (ValueError, "screen's codes", (x, w, b, ok, 3), {"screen": (codes[1:], bounds)}),
        (ValueError, "screen's bounds", (x, w, b, ok, 3), {"screen": (codes, bounds[:1])}),
    ):
        with pytest.raises(error, match=match):
            ops.topk_member(*args, **options)
    with pytest.raises(TypeError, match="fp64"):
        ops.topk_screen(w.double())


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-2, 20, 2**31, -(2**33)])
@pytest.mark.parametrize("n", [2, 60])
def test_a_latent_out_of_range(name, bad, n):
    x, w, b = whole(n, 8, 20)
    latents = torch.zeros(n, 2, dtype=torch.int64)
    latents[1, 1] = bad
    with fastsae.use_backend(name), pytest.raises(RuntimeError, match="must lie in"):
        ops.topk_member(x, w, b, latents, 3)


def test_a_gpu_kernel_follows_no_latent_out_of_range(gpu_backend):
    x, w, b = (t.to(device_of(gpu_backend)) for t in whole(2, 8, 20))
    latents = torch.tensor([[-2, 20, 2**31 - 1], [-(2**31), 0, 21]], dtype=torch.int32)
    got = ops.topk_member(x, w, b, latents.to(x.device), 20)
    assert got.tolist() == [[False] * 3, [False, True, False]]


def test_opcheck_and_compile():
    x, w, b = whole(3, 8, 20)
    latents = torch.tensor([[1, -1], [5, 6], [7, 19]], dtype=torch.int32)
    args = (x, w, b, latents, 4, None, True, *ops.topk_screen(w))
    torch.library.opcheck(torch.ops.fastsae.topk_member.default, args)
    compiled = torch.compile(
        lambda x: ops.topk_member(x, w, b, latents, 4), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.topk_member(x, w, b, latents, 4))


def test_other_memory_is_another_version():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    known = [stamp(weight)]
    for change in (
        lambda: weight.data.copy_(weight),  # not seen: `.data` counts its own writes
        lambda: setattr(weight, "data", torch.zeros(3, 4)),
        lambda: weight.detach().add_(1),
        lambda: weight.share_memory_(),
    ):
        change()
        known.append(stamp(weight))
    assert known[1] == known[0] and len(set(known)) == 4
