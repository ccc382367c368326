"""A token's result depends on the other tokens of a call and on the number of threads in no bit.

A target is a backend and how it runs. The sizes of a batch lie around every constant of the C++
sources that a path is chosen by; a target whose kernels are interpreted takes fewer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from common import DTYPES, dtype_id, generator, randn

import fastsae
from fastsae import _dispatch, ops
from fastsae import _steer_codes as rules
from fastsae.nn import TopKSAE
from fastsae.ops.topk_member import Selection
from fastsae.steer import add_vector, attach, clamp, scale

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
MOST, K, D = 300, 12, 100
THREADS = (1, 2, 3, 5)


def switches() -> set[int]:
    """Numbers of rows by which the C++ kernels choose how to compute."""
    sources = (Path(__file__).parents[2] / "csrc/cpu").rglob("*.*")
    found = [
        re.findall(r"constexpr int\w* k\w*(?:Rows|Tokens|Few\w*|Counted) = (\d+);", s.read_text())
        for s in sources
    ]
    return {int(n) for numbers in found for n in numbers}


SIZES = sorted(
    {*range(1, 18), 31, 32, 33, 47, 48, 49, 64, 65, MOST - 1}
    | {n + i for n in switches() for i in (-1, 0, 1) if 1 < n < MOST}
)


class Target(NamedTuple):
    backend: str
    level: str  # of the CPU kernels
    sizes: list[int]


TARGETS = [Target("cpu", level, SIZES) for level in LEVELS]


@pytest.fixture(params=TARGETS, ids=lambda t: f"{t.backend}-{t.level}")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    target: Target = request.param
    missing = _dispatch._missing("topk_encode", target.backend, "cpu", torch.float32)
    if missing is not None:
        pytest.skip(missing)
    if target.level not in torch.ops.fastsae._cpu_levels().split():
        pytest.skip(f"this CPU has no {target.level}")
    torch.ops.fastsae._set_cpu_level(target.level)
    with fastsae.use_backend(target.backend):
        yield target
    torch.ops.fastsae._set_cpu_level("auto")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(result: object) -> list[torch.Tensor]:
    """What is compared: one NaN is like another, +0 is not -0."""
    tensors = result if isinstance(result, tuple) else (result,)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    out = []
    for t in tensors:
        t = t.detach()
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
        out.append(t.view(whole[t.element_size()]))
    return out


def same(got: object, want: object, where: str) -> None:
    for a, b in zip(bits(got), bits(want), strict=True):
        assert a.shape == b.shape and torch.equal(a, b), where


def check(call: Callable[[slice | torch.Tensor], object], sizes: list[int], n: int = MOST) -> None:
    """call(rows) is the op on these of the n tokens: every batch is a part of the whole."""

    def part(whole: object, rows: slice | torch.Tensor) -> object:
        return tuple(t[rows] for t in whole) if isinstance(whole, tuple) else whole[rows]

    whole = call(slice(0, n))
    for size in sizes:
        first = (37 * size) % (n - size + 1)
        rows = slice(first, first + size)
        same(call(rows), part(whole, rows), f"{size} tokens from {first}")
    order = torch.randperm(n, generator=generator(1))
    same(call(order), part(whole, order), "in another order")
    for count in THREADS:
        with threads(count):
            for size in (n, 20, 1):
                rows = slice(n - size, n)
                same(call(rows), part(whole, rows), f"{size} tokens, {count} threads")


def weights(f: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """W [f, d] of which a third repeats another third to the bit or to the last one, so that the
    order of summation decides; b, and a scale of both signs."""
    W = (randn(f, d, seed=1) / d**0.5).to(dtype)
    third = f // 3
    W[third : 2 * third] = W[:third]
    nudged = W[third : 2 * third : 2].view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[W.element_size()]
    )
    nudged[:, d // 2] += 1
    b = randn(f, seed=2).div(10).to(dtype)
    b[third : 2 * third] = b[:third]
    return W, b, (randn(f, seed=3) + 1).to(dtype)


def tokens(d: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary tokens with hostile ones between them."""
    x = randn(MOST, d, seed=4)
    x[5::20] = float("nan")
    x[6::20, 3] = float("inf")
    x[7::20] = 0
    x[8::20] = 1  # ties among equal rows of W
    x[9::20] *= 1e30  # no bound: every pair is rescored
    x[10::20] *= 1e-30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", ["bias", "plain", "scaled"])
def test_topk_encode(target, dtype, kind):
    W, b, s = weights(1500, D, dtype)
    x = tokens(D, dtype)
    b, s = b if kind != "plain" else None, s if kind == "scaled" else None
    activation = "relu" if kind == "bias" else "identity"
    check(
        lambda rows: ops.topk_encode(x[rows], W, b, K, activation=activation, rank_scale=s),
        target.sizes if kind == "bias" else target.sizes[::3],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_topk_encode_beside_tokens_that_end_the_filter(target, dtype):
    """A third of the tokens has no bound, so that the filter gives up after its first latents."""
    f, d = 9000, 64
    W, b, _ = weights(f, d, dtype)
    x = randn(MOST, d, seed=4)
    x[1::3] *= 1e30
    x = x.to(dtype)
    ops.topk_encode(x, W, b, K)
    if target.level == "avx512_bf16":
        assert torch.ops.fastsae._topk_encode_stats()[0] == 3
    check(lambda rows: ops.topk_encode(x[rows], W, b, K), [1, 2, 15, 33, 64, 129])
    ordinary = torch.arange(0, MOST, 3)
    alone, beside = ops.topk_encode(x[ordinary], W, b, K), ops.topk_encode(x, W, b, K)
    same(alone, tuple(t[ordinary] for t in beside), "without the others")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_topk_member_is_what_topk_encode_selects(target, dtype, scaled):
    """Bit for bit, at every size, about the latents that rounding could swap."""
    W, b, s = weights(1500, D, dtype)
    x = tokens(D, dtype)
    s = s if scaled else None
    best = ops.topk_encode(x, W, b, 2 * K, activation="identity", rank_scale=s)[1]
    latents = best[:, K - 4 : K + 4].contiguous()
    expected = (torch.arange(K - 4, K + 4) < K).expand(MOST, -1)
    screens = [None] if dtype == torch.float64 else [None, ops.topk_screen(W)]
    for screen in screens:
        sizes = target.sizes[:: 6 if scaled else 3] if screen is not None else [1, 3, 9, 34, 130]

        def call(rows: slice | torch.Tensor, screen: object = screen) -> torch.Tensor:
            return ops.topk_member(x[rows], W, b, latents[rows], K, s, screen=screen)

        assert torch.equal(call(slice(0, MOST)), expected)
        check(call, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_members_of_subnormal_tokens(target, dtype):
    """Products of bf16 take subnormals for zeros; the screen must not see them either."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    W = (randn(300, 33, seed=1) * 2.0**59).to(dtype)
    x = (randn(40, 33, seed=2).sign() * tiny).to(dtype)
    x[::2, 5] = torch.finfo(dtype).smallest_normal
    indices = ops.topk_encode(x, W, None, 24, activation="identity")[1]
    expected = (torch.arange(24) < K).expand(40, -1)
    for screen in (None, ops.topk_screen(W)):
        for n in (1, 7, 40):
            got = ops.topk_member(x[:n], W, None, indices[:n], K, screen=screen)
            assert torch.equal(got, expected[:n])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk(target, dtype):
    x = (randn(MOST, 700, seed=5) * 8).round().div(8).to(dtype)  # many ties
    x[3::20] = float("nan")
    for k in (1, 33, 700):
        check(lambda rows, k=k: ops.topk(x[rows], k), target.sizes[::4])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_and_value_gradients(target, dtype):
    W, _, _ = weights(500, D, dtype)
    x = tokens(D, dtype)
    values = randn(MOST, 9, seed=6).to(dtype)
    indices = torch.randint(0, 500, (MOST, 9), generator=generator(7), dtype=torch.int32)
    for bias in (W[3], None):
        check(
            lambda rows, bias=bias: ops.sparse_decode(values[rows], indices[rows], W, bias),
            target.sizes[::2],
        )
    check(lambda rows: ops.sparse_grad_values(x[rows], indices[rows], W), target.sizes[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("norm", rules.NORMS)
def test_steer(target, dtype, norm):
    x = tokens(D, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    enc, dec = randn(1, 6, D, seed=8).to(dtype), randn(1, 6, D, seed=9).to(dtype)
    param = randn(1, 6, 6, seed=10).to(wide)
    opcodes = [rules.CLAMP, rules.MIN_CLAMP, rules.CLAMP_IF_ACTIVE, rules.SCALE, rules.ADD,
               rules.PROBE]  # fmt: skip
    code = torch.tensor([[[o, 0, -1] for o in opcodes]], dtype=torch.int32)
    code[0, 1, 2] = 5
    slots = torch.zeros(1, dtype=torch.int32)

    def call(rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = x[rows][None]
        out = ops.steer(part, enc, dec, param, code, slots, norm=norm)
        return out[0], ops.steer_(part.clone(), enc, dec, param, code, slots, norm=norm)[0]

    check(call, target.sizes[::4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("ranked", [False, True], ids=["", "ranked"])
def test_an_sae(target, dtype, ranked):
    W, b, _ = weights(1500, D, dtype)
    sae = TopKSAE(D, 1500, K, rank_by_decoder_norm=ranked, dtype=dtype, seed=0).eval()
    sae.requires_grad_(False)
    sae.W_enc.copy_(W), sae.b_enc.copy_(b), sae.b_dec.copy_(W[0])
    x = tokens(D, dtype)
    check(lambda rows: (*sae.encode(x[rows])[:2], sae(x[rows])), target.sizes[::5])


class Model(torch.nn.Module):
    """A residual stream with one site, which puts out what it is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.site = torch.nn.Identity()
        self.like = torch.nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.site(input_ids)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_steering_a_model(target, dtype):
    """Through the hook, whose ways are several: membership by counting and by selecting."""
    W, b, _ = weights(1500, D, dtype)
    sae = TopKSAE(D, 1500, K, dtype=dtype, seed=0).eval().requires_grad_(False)
    sae.W_enc.copy_(W), sae.b_enc.copy_(b), sae.b_dec.copy_(W[0])
    x = randn(MOST, D, seed=4).to(dtype)
    model = Model(dtype)
    steerer = attach(model, sae, hook="site")
    common = sae.encode(x)[1].flatten().bincount(minlength=1500).topk(3).indices.tolist()
    program = [clamp(common[0], 6.0), scale(common[1], 3.0), scale(common[2], 0.0)]
    program.append(add_vector(randn(D, seed=5), 0.5))
    with torch.no_grad(), steerer.steer([program]):
        check(lambda rows: model(x[rows][None])[0], target.sizes[::3])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_membership_of_listed_latents_in_any_batch(target, dtype):
    W, b, _ = weights(1500, D, dtype)
    x = tokens(D, dtype)
    member = Selection(W, b, K)
    latents = ops.topk_encode(x, W, b, K, activation="identity")[1][::37, 3:6]
    lists = latents.flatten()[None, :16].contiguous()
    check(lambda rows: member(x[rows][None], lists)[0], target.sizes[::5])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_weight_gradients_and_adam_at_any_number_of_threads(target, dtype):
    """Per latent, not per token: a heavy latent must not be split differently."""
    n, f = 700, 90
    values, rows = randn(n, 8, seed=1).to(dtype), randn(n, 65, seed=2).to(dtype)
    indices = torch.randint(0, f, (n, 8), generator=generator(3), dtype=torch.int32)
    indices[:, :3] = 5
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def results() -> tuple[torch.Tensor, ...]:
        out = [ops.sparse_grad_weight(values, indices, rows, f)]
        out += ops.sparse_grad_weight(values, indices, rows, f, layout="rows")
        for lazy in (False, True):
            W = randn(f, 65, seed=4).to(dtype)
            moments = torch.zeros(f, 65, dtype=state), torch.zeros(f, 65, dtype=state)
            for step in (1, 2):
                ops.sparse_adam_step(W, *moments, values, indices, rows, lr=0.1, step=step,
                                     lazy=lazy, unit_norm=True)  # fmt: skip
            out += [W, *moments]
        return tuple(out)

    with threads(1):
        want = results()
    for count in THREADS[1:]:
        with threads(count):
            same(results(), want, f"{count} threads")
