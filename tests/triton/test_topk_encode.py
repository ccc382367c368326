"""The paths of the Triton topk_encode, each forced, and what its keys promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import INTERPRETED, device_of, randn
from selection import assert_is_reference, integers

from fastsae import reference

keys_module = pytest.importorskip("fastsae.triton_kernels.topk_encode.keys")
product_module = pytest.importorskip("fastsae.triton_kernels.topk_encode.product")
chunked = pytest.importorskip("fastsae.triton_kernels.topk_encode.chunked")
bounds = pytest.importorskip("fastsae.triton_kernels.topk_encode.bounded")
encode_module = pytest.importorskip("fastsae.triton_kernels.topk_encode")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and no interpreter", allow_module_level=True)
DEVICE = device_of("triton")


def select(x, W, b, k, scale, chunks):
    keys = chunked.select(x, W, b, k, scale, chunks)
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32).to(DEVICE)
    encode_module.decode_keys(keys, values, indices, False)
    return values, indices


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_that_overlap(monkeypatch, dtype, scaled):
    """F no multiple of the chunk, and a buffer that must be cut many times."""
    small = keys_module.FilterConfig(64, 32, 4)
    monkeypatch.setattr(keys_module, "filter_config", lambda k, rows: small)
    x, W, b, scale = integers(3, 37, 501, dtype)
    scale = scale if scaled else None
    chunks = chunked.Chunks(slab=3 * 112)
    assert chunks.columns(3, 501) < 501 and 501 % chunks.columns(3, 501)
    values, indices = select(x, W, b, 11, scale, chunks)
    pre, rank = x.double() @ W.double().T + b.double(), 1 if scale is None else scale.double()
    order = (pre * rank).sort(dim=1, descending=True, stable=True).indices[:, :11]
    assert torch.equal(indices.long(), order)
    assert torch.equal(values.double(), (pre * rank).gather(1, order))  # keys hold the rank


def test_large_k_merges_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SORTED", 16)
    x, W, b, _ = integers(3, 20, 300, torch.bfloat16)
    got = select(x, W, b, 150, None, chunked.Chunks(slab=3 * 64))
    assert_is_reference(got, x, W, b, 150, False, None)


def test_values_of_ranked_latents():
    x, W, b, scale = integers(3, 530, 90, torch.float32)
    got = encode_module.topk_encode(x, W, b, 20, True, scale)
    assert_is_reference(got, x, W, b, 20, True, scale)


def test_tokens_in_several_passes(monkeypatch):
    table = tuple(replace(d, chunks=chunked.Chunks(rows=2)) for d in encode_module.DESIGNS)
    monkeypatch.setattr(encode_module, "DESIGNS", table)
    x, W, b, _ = integers(5, 24, 70, torch.float16)
    got = encode_module.topk_encode(x, W, b, 6, True, None)
    assert_is_reference(got, x, W, b, 6, True, None)


@pytest.mark.parametrize("tma", [True, False], ids=["TMA", "pointers"])
@pytest.mark.parametrize("tile", ["production", (16, 64, 16, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_low_precision(monkeypatch, dtype, tile, tma):
    """Both ways to load, the tile that a device takes and one that has many of its edges."""
    if not tma:
        monkeypatch.setattr(product_module, "has_tma", lambda x, W: False)
    if tile != "production":
        for name in ("TMA", "TMA_SM100", "LOW"):
            monkeypatch.setattr(product_module, name, product_module.ProductConfig(*tile))
    x, W, b, _ = integers(19, 24, 301, dtype)
    got = select(x, W, b, 9, None, chunked.Chunks(slab=19 * 128))
    assert_is_reference(got, x, W, b, 9, False, None)
    only = torch.zeros(19, dtype=torch.int32, device=DEVICE)
    only[17] = 1
    scores = torch.full((19, 60), torch.nan, device=DEVICE)
    product_module.Product(x, W)(scores, 240, only)
    assert torch.equal(scores[17].cpu(), (x.float() @ W.float().T)[17, 240:300].cpu())


def test_zeros_of_either_sign_tie():
    x = torch.tensor([[1.0]], device=DEVICE)
    W = torch.tensor([[-0.0], [0.0], [-1.0], [-0.0]], device=DEVICE)
    _, indices = encode_module.topk_encode(x, W, None, 3, False, None)
    assert indices.tolist() == [[0, 1, 3]]


def test_nans_tie_and_rank_above_infinity():
    bad = torch.tensor([0x7FC00000, 0x7F800000, 0x7F800001, -0x3FFFFF], dtype=torch.int32)
    b = torch.cat([torch.zeros(3), bad.view(torch.float32)]).to(DEVICE)  # NaN, inf, NaN, NaN
    x, W = torch.ones(1, 2, device=DEVICE), torch.ones(7, 2, device=DEVICE)
    values, indices = encode_module.topk_encode(x, W, b, 5, True, None)
    assert indices.tolist() == [[3, 5, 6, 4, 0]]
    assert values.isnan().tolist() == [[True, True, True, False, False]]


def test_equal_rows_of_one_token_do_not_depend_on_their_neighbours():
    x, W, b = randn(1, 40).to(DEVICE), randn(300, 40).to(DEVICE), randn(300).to(DEVICE)
    one = encode_module.topk_encode(x, W, b, 8, False, None)
    four = encode_module.topk_encode(x.repeat(4, 1), W, b, 8, False, None)
    assert torch.equal(four[1], one[1].repeat(4, 1)) and torch.equal(four[0], one[0].repeat(4, 1))


@pytest.mark.parametrize("n,f,k", [(8192, 131072, 64), (10**6, 2**20, 1024), (8192, 2**24, 4096)])
def test_extra_memory_is_bounded(n, f, k):
    design = encode_module.named("chunked")
    rows, chunks = design.rows_at_once(n, k, 4096), design.chunks
    columns = chunks.columns(rows, f)
    held = 4 * rows * columns
    if k <= keys_module.MAX_SORTED:
        held += rows * keys_module.BestKeys.bytes_per_row(k)
    else:
        held += rows * (8 * columns + keys_module.MergedKeys.bytes_per_row(k))
    assert held <= 256 << 20


@pytest.mark.skipif(not INTERPRETED, reason="counts calls of a device function")
def test_columns_beyond_the_last_are_no_candidates(monkeypatch):
    """A padded block ends as early with a scale as without."""
    calls, append = [], keys_module.append_keys
    monkeypatch.setattr(keys_module, "append_keys", lambda *a: calls.append(a) or append(*a))
    scores = torch.arange(1, 0, -0.01)[None].repeat(2, 1)  # 100 columns
    for scale in (None, torch.ones(100)):
        calls.clear()
        best = keys_module.BestKeys(2, 3, DEVICE, keys_module.FilterConfig(32, 16, 4))
        best.add(scores, None, scale, 0, 0)
        assert len(calls) == 2 * 3  # two rows, until the third block has given a threshold
        assert (best.finish()[:, :3] & 0x7FFFFFFF).tolist() == [
            [0x7FFFFFFF - i for i in range(3)]
        ] * 2


# -- fp32 by the bounds of bf16 scores -----------------------------------------------------------


def bounded(x, W, b, k, scale=None, slab=1 << 23, **chunks):
    keys = bounds.select(x, W, b, k, scale, chunked.Chunks(slab=slab, **chunks))
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32).to(DEVICE)
    encode_module.decode_keys(keys, values, indices, False)
    return values, indices


def assert_selects_fp32(got, x, W, b, k, scale=None):
    """The fp64 selection, but where fp32 scores are closer than they are exact; in order."""
    values, indices = got
    rank = x.double() @ W.double().T
    if b is not None:
        rank = rank + b.double()
    if scale is not None:
        rank = rank * scale.double()
    order = rank.sort(dim=1, descending=True, stable=True)
    got_rank = rank.gather(1, indices.long())
    assert all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(values.double(), got_rank, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_rank, order.values[:, :k], rtol=1e-5, atol=1e-5)
    return (indices.long() == order.indices[:, :k]).float().mean().item()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("d,f,k", [(64, 700, 11), (37, 501, 32), (129, 300, 1)])
def test_bounded_selects_in_fp32(d, f, k, scaled):
    x, W, b = (t.to(DEVICE) for t in (randn(3, d), randn(f, d, seed=1), randn(f, seed=2)))
    scale = randn(f, seed=3).to(DEVICE) if scaled else None
    same = assert_selects_fp32(bounded(x, W, b, k, scale, slab=3 * 256), x, W, b, k, scale)
    assert same > 0.97


def test_bounded_is_exact_where_bf16_scores_are_not():
    """Latents that differ below bf16's precision: their bf16 scores are one number."""
    base = randn(1, 64, seed=4)
    W = (base * (1 + torch.arange(400)[:, None] * 2.0**-20)).to(DEVICE)
    x = base.repeat(2, 1).to(DEVICE)
    assert W.bfloat16().unique(dim=0).shape[0] < 8
    _, indices = bounded(x, W, None, 20, slab=2 * 128)
    assert indices.tolist() == [list(range(399, 379, -1))] * 2


@pytest.mark.parametrize("rounded", ["x", "W"])
def test_bounded_has_room_for_the_rounding_of_either_side(rounded):
    """The other side is exact in bf16; sums of multiples of 2^-12 are exact in fp32."""
    g = torch.Generator().manual_seed(7)

    def fine(n):
        return 1 + torch.randint(0, 32, (n, 16), generator=g) / 4096

    def exact(n):  # as many 1 as -1: what is left is the rounding
        signs = torch.tensor([1.0, -1.0]).repeat(8)
        return torch.stack([signs[torch.randperm(16, generator=g)] for _ in range(n)])

    x, W = (fine(3), exact(700)) if rounded == "x" else (exact(3), fine(700))
    values, indices = bounded(x.to(DEVICE), W.to(DEVICE), None, 3, slab=3 * 256)
    truth = reference.topk_encode(x, W, None, 3, False, None)
    coarse = (x.bfloat16().float() @ W.bfloat16().float().T).topk(3).indices
    assert not torch.equal(coarse.sort().values, truth[1].long().sort().values)
    assert torch.equal(indices.cpu(), truth[1]) and torch.equal(values.cpu(), truth[0])


def test_bounded_ties_are_canonical():
    x, W, b, scale = integers(3, 24, 501, torch.float32)
    for s in (None, scale):
        got = bounded(x, W, b, 30, s, slab=3 * 128)
        pre = x.double() @ W.double().T + b.double()
        rank = pre if s is None else pre * s.double()
        order = rank.sort(dim=1, descending=True, stable=True)
        assert torch.equal(got[1].long(), order.indices[:, :30])
        assert torch.equal(got[0].double(), order.values[:, :30])


@pytest.mark.parametrize("slab", [3 * 64, 1 << 23])
def test_bounded_settles_when_nothing_can_be_dropped(monkeypatch, slab):
    """Bounds as wide as the scores: every latent stays a candidate, the buffer is scored in fp32
    again and again, and the result is still exact."""
    small = keys_module.FilterConfig(64, 16, 4)
    monkeypatch.setattr(bounds, "bounds_config", lambda k: small)
    x, W, b = (t.to(DEVICE) for t in (randn(3, 40), randn(300, 40, seed=1), randn(300, seed=2)))
    calls = []
    monkeypatch.setattr(bounds, "accumulation", lambda d: calls.append(d) or 10.0)
    same = assert_selects_fp32(bounded(x, W, b, 9, slab=slab), x, W, b, 9)
    assert calls and same == 1.0


def in_order(x, W, b):
    """Scores [N, F] by the order of `_exact_keys`: places 128 apart, then pairs of neighbours."""
    pad = -x.shape[1] % 128
    x, W = (torch.nn.functional.pad(t, (0, pad)) for t in (x, W))
    sums = torch.zeros(len(x), len(W), 128)
    for d in range(0, x.shape[1], 128):
        sums += x[:, None, d : d + 128] * W[None, :, d : d + 128]
    while sums.shape[2] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums[..., 0] + b


def held_keys(best):
    """Per row columns, orders of the lower and of the upper bounds."""
    for keys, upper, held in zip(
        best.keys.cpu(), best.upper.cpu(), best.held.tolist(), strict=True
    ):
        keys = keys[:held]
        yield 0x7FFFFFFF - (keys & 0x7FFFFFFF), keys >> 32, upper[:held]


@pytest.fixture
def small_bounds(monkeypatch):
    """BoundedKeys that hold 64 candidates and look at 16 scores in one step."""
    monkeypatch.setattr(bounds, "bounds_config", lambda k: keys_module.FilterConfig(64, 16, 4))
    return bounds


def test_a_pair_has_one_score_wherever_it_is_scored(small_bounds):
    """To the bit: a threshold from scores an ulp higher would drop what the last kernel keeps."""
    x, W, b = randn(3, 300).sign(), randn(200, 300, seed=1), randn(200, seed=2)
    scores = in_order(x, W, b)
    best = small_bounds.BoundedKeys(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), None, 9)
    norms = torch.full((2, 200), 1e9, device=DEVICE)  # every latent is a candidate
    best.add(scores.to(DEVICE), norms, 0, 0)
    for row, (columns, lower, upper) in enumerate(held_keys(best)):
        settled = lower == upper
        order = upper[settled]
        got = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
        assert len(got) == 9 and torch.equal(got, scores[row, columns[settled]])
    values, indices = x.new_empty(3, 9), torch.empty(3, 9, dtype=torch.int32)
    values, indices = values.to(DEVICE), indices.to(DEVICE)
    encode_module.decode_keys(best.finish(), values, indices, False)
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices.cpu().long(), order.indices[:, :9])
    assert torch.equal(values.cpu(), order.values[:, :9])


@pytest.mark.parametrize("of", [torch.nan, 0.0])
def test_rows_where_all_tie_are_settled_once(small_bounds, of):
    """Later latents can but tie: they are no candidates, or every latent would be scored."""
    x, W, b = torch.full((2, 40), of, device=DEVICE), randn(300, 40).to(DEVICE), torch.ones(300)
    best = small_bounds.BoundedKeys(x, W, b.to(DEVICE), None, 9)
    norms = torch.empty(2, 300, device=DEVICE)
    small_bounds.round_rows(W, W.bfloat16(), norms)
    best.add(torch.full((2, 300), of, device=DEVICE), norms, 0, 0)
    assert best.held.tolist() == [9, 9]
    for columns, _, _ in held_keys(best):
        assert columns.tolist() == list(range(9))


def test_latents_of_infinite_bias_are_no_candidates(small_bounds):
    """Their score is known, which a margin as large as the bias would hide."""
    x, W, b = randn(2, 40), randn(300, 40, seed=1), randn(300, seed=2)
    b[::2] = -torch.inf
    best = small_bounds.BoundedKeys(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), None, 9)
    copy, norms = W.bfloat16().to(DEVICE), torch.empty(2, 300, device=DEVICE)
    small_bounds.round_rows(W.to(DEVICE), copy, norms)
    best.add((x.bfloat16().float() @ W.bfloat16().float().T).to(DEVICE), norms, 0, 0)
    for columns, _, _ in held_keys(best):
        assert (columns[columns >= 64] % 2 == 1).all()  # the first are taken before a threshold
    b[:] = -torch.inf
    _, indices = bounded(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 9)
    assert indices.tolist() == [list(range(9))] * 2


def test_bounded_not_finite():
    x, W, b, _ = integers(5, 24, 200, torch.float32)
    W[7] = float("nan")
    W[9, 3], W[11, 0] = float("inf"), -float("inf")
    W[13] = 0
    W[13, 0] = 3e38
    x[1, 5] = float("nan")
    x[2, 0] = float("inf")
    x[3] *= 2.0**116
    x[4] = 0
    values, indices = bounded(x, W, b, 12, slab=5 * 64)
    truth, order = reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 12, False, None)
    assert torch.equal(indices.cpu(), order)
    assert torch.equal(values.cpu().nan_to_num(), truth.nan_to_num())


@pytest.mark.parametrize("kind", ["random", "between", "one sign", "wide"])
def test_the_bound_holds(kind):
    """Every pair's lower and upper bound enclose its fp64 score, and are not much wider."""
    n, d, f = 6, 129, 80
    x, W = randn(n, d), randn(f, d, seed=1)
    if kind == "between":  # exactly between two bf16 numbers
        x, W = ((t.bfloat16().float() * (1 + 2.0**-8)) for t in (x, W))
    if kind == "one sign":
        x, W = x.abs(), W.abs()
    if kind == "wide":
        x, W = x * randn(n, d, seed=2).mul(5).exp(), W * randn(f, d, seed=3).mul(5).exp()
    x, W = x.to(DEVICE), W.to(DEVICE)
    copies, norms = [], []
    for rows in (x, W):
        copies.append(torch.empty_like(rows, dtype=torch.bfloat16))
        norms.append(torch.empty(2, len(rows), device=DEVICE))
        bounds.round_rows(rows, copies[-1], norms[-1])
        size, off = norms[-1].double()
        true_off = (rows.double() - copies[-1].double()).norm(dim=1)
        assert torch.equal(copies[-1], rows.bfloat16())
        assert (size >= rows.double().norm(dim=1)).all() and (off >= true_off).all()
        assert (size <= rows.double().norm(dim=1) * 1.02).all()
        assert (off <= true_off * 1.001 + 1e-17).all()
    g = bounds.accumulation(d)
    (xs, xo), (ws, wo) = (t.double() for t in norms)
    margin = (xo + g * xs)[:, None] * ws + xs[:, None] * wo
    error = (copies[0].double() @ copies[1].double().T - x.double() @ W.double().T).abs()
    assert (error <= margin).all() and (margin <= 0.01 * xs[:, None] * ws).all()


def test_fp32_takes_the_bounds_where_they_pay():
    for n, d, f, design in (
        (256, 64, 240, "bounded"), (1, 64, 240, "bounded"), (256, 64, 230, "chunked"),
        (8, 63, 240, "chunked"),
    ):  # fmt: skip
        x, W = (torch.empty(rows, d, device="meta") for rows in (n, f))
        assert encode_module.design_of(x, W, 10).name == design


@pytest.mark.parametrize("n,d,f,k", [(8192, 4096, 131072, 64), (10**6, 16384, 2**20, 1024)])
def test_bounded_extra_memory(n, d, f, k):
    design = encode_module.named("bounded")
    rows, chunks = design.rows_at_once(n, k, d), design.chunks
    columns = min(chunks.columns(rows, f), chunks.copy_bytes // (2 * d))
    held = 4 * rows * columns + rows * bounds.BoundedKeys.bytes_per_row(k, d)
    assert rows >= 1000 and held + columns * (2 * d + 8) <= 256 << 20
