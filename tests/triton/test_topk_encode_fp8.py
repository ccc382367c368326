"""The design "fp8" of topk_encode: what it rounds, what it selects, where it is refused."""

from __future__ import annotations

import pytest
import torch
from common import INTERPRETED, device_of, randn

import fastsae
from fastsae import ops, reference
from fastsae.nn import TopKSAE

pytest.importorskip("triton")

from fastsae.triton_kernels.topk_encode import fp8 as module
from fastsae.triton_kernels.topk_encode.fp8 import Fp8Rows, LikelyKeys, fp8_product, unavailable

DEVICE = device_of("triton")
pytestmark = pytest.mark.skipif(
    not INTERPRETED and unavailable(torch.device("cuda")) is not None,
    reason="no GPU of sm_89 or later",
)


def unit_rows(f, d, seed=1, dtype=torch.float32):
    return torch.nn.functional.normalize(randn(f, d, seed=seed), dim=1).to(dtype)


def fp8(x, W, b, k, **options):
    args = [None if t is None else t.to(DEVICE) for t in (x, W, b)]
    values, indices = ops.topk_encode(*args, k, design="fp8", **options)
    return values.cpu(), indices.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n,d,f,k",
    [pytest.param(9, 64, 700, 8, marks=pytest.mark.slow),
     pytest.param(3, 33, 1500, 40, marks=pytest.mark.slow), (1, 16, 50, 50)],
)  # fmt: skip
def test_selects_the_exact_latents(dtype, n, d, f, k):
    """Random data: no latent is missed here, and the values are fp32 sums rounded once."""
    x, W = randn(n, d, dtype=dtype, seed=2), unit_rows(f, d, dtype=dtype)
    b = (randn(f, seed=3) / 10).to(dtype)
    values, indices = fp8(x, W, b, k, activation="identity")
    exact = x.double() @ W.double().T + b.double()
    for row in range(n):
        assert len(set(indices[row].tolist())) == k
    got = exact.gather(1, indices.long())
    best = exact.topk(k).values
    torch.testing.assert_close(got, best, rtol=0, atol=1e-5)  # ties of fp32 aside
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(values.double(), got, rtol=tolerance, atol=1e-5)
    assert (values.float().diff(dim=1) <= 0).all()


def test_rank_scale_relu_and_overflowing_rows():
    """Equal latents leave nothing to drop: rows are settled in fp32, ties by lowest index."""
    x = torch.cat([randn(3, 32, seed=4), torch.ones(1, 32)])
    W = unit_rows(1500, 32)
    W[1:1200] = W[0]
    scale = torch.rand(1500, generator=torch.Generator().manual_seed(5)) + 0.5
    scale[:1200] = 1.0
    values, indices = fp8(x, W, None, 20, rank_scale=scale)
    ranks = (x.double() @ W.double().T).float()
    for row in range(4):
        kept = indices[row].long()
        order = (ranks[row] * scale).double()
        assert (order[kept] - order.topk(20).values).abs().max() < 1e-5
        same = [i for i in kept.tolist() if i < 1200]
        assert same == sorted(same)
        torch.testing.assert_close(values[row], ranks[row][kept].relu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e10, 1e30])
def test_rows_of_any_size_and_not_finite(scale):
    x, W = randn(6, 48, seed=6), unit_rows(600, 48)
    x[1] = 0
    x[2, 5], x[3, 6] = float("nan"), float("inf")
    W[17, 3] = float("nan")
    values, indices = fp8(x * scale, W, None, 8)
    expected = reference.topk_encode(x * scale, W, None, 8, True, None)
    assert indices[[0, 1, 3, 4, 5], 0].tolist() == [17] * 5  # NaN ranks above all
    for row in range(6):
        assert len(set(indices[row].tolist())) == 8
        assert int(indices[row].min()) >= 0 and int(indices[row].max()) < 600
    for row in (0, 4, 5):
        assert torch.equal(indices[row], expected[1][row])
        torch.testing.assert_close(values[row], expected[0][row], rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(indices[1], expected[1][1])


@pytest.mark.parametrize("in_x,in_W", [(1000, 1), (1000, 30), (1000, 1000)])
def test_outlier_coordinates(in_x, in_W):
    """Roundings of three places are most of every error, as with a language model's activations."""
    x, W = randn(6, 256, seed=9), randn(1500, 256, seed=10)
    x[:, [3, 77, 200]] *= in_x
    W[:, [3, 77, 200]] *= in_W
    W = torch.nn.functional.normalize(W, dim=1)
    _, indices = fp8(x, W, None, 16)
    best = (x.double() @ W.double().T).topk(16).indices
    assert torch.equal(indices.sort(dim=1).values, best.sort(dim=1).values.int())


def test_tiny_products():
    """Scores of 1e-24, where squares of the margin's terms leave fp32's range."""
    x, W = randn(6, 64, seed=11) * 1e-12, unit_rows(1500, 64) * 1e-12
    _, indices = fp8(x, W, None, 16)
    assert torch.equal(indices, reference.topk_encode(x, W, None, 16, True, None)[1])


def test_a_row_of_zeros_is_settled_once():
    """All latents tie and their scores are known: no more than k are held at the end."""
    W = Fp8Rows(1500, 32, torch.device(DEVICE))
    rows = unit_rows(1500, 32).to(DEVICE)
    W.round(rows)
    best = LikelyKeys(torch.zeros(2, 32, device=DEVICE), rows, None, None, 8)
    best.add(torch.zeros(2, 1500, device=DEVICE), W.norms, 0, 0)
    assert best.held.tolist() == [8, 8]
    assert (0x7FFFFFFF - (best.finish()[:, :8] & 0x7FFFFFFF)).tolist() == [list(range(8))] * 2


def test_codes_and_product():
    """A power of two scales a row into e4m3's range; norms bound what is there and what is lost."""
    rows = randn(7, 70, seed=7) * torch.logspace(-8, 8, 7)[:, None]
    room = Fp8Rows(7, 70, torch.device(DEVICE))
    room.round(rows.to(DEVICE))
    codes, units = room.codes.float().cpu(), room.units.cpu()
    assert codes.shape[1] == 80 and not codes[:, 70:].any()
    assert (units.log2() == units.log2().round()).all()
    assert (codes.abs().amax(1) >= 120).all() and (codes.abs().amax(1) <= 256).all()
    low = codes[:, :70] * units[:, None]
    assert torch.equal(codes[:, :70], (rows / units[:, None]).to(torch.float8_e4m3fn).float())
    size, off, spread = room.norms.cpu()
    fourth = torch.maximum(rows.abs(), low.abs()).double().norm(4, dim=1).float()
    torch.testing.assert_close(off, (rows - low).double().norm(4, dim=1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(spread, fourth, rtol=1e-5, atol=0)
    assert (size >= rows.norm(dim=1)).all() and (size >= low.norm(dim=1)).all()
    assert (spread >= fourth).all()
    scores = torch.empty(7, 7, device=DEVICE)
    fp8_product(room, room, scores)
    torch.testing.assert_close(
        scores.cpu().double(), low.double() @ low.double().T, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("n,f,d", [(130, 150, 272), (3, 260, 20)])
def test_product_by_descriptors_and_by_pointers(n, f, d, tma):
    """sm_89 has no TMA: several tiles, none of them full, and nothing read beyond a row's end."""
    if tma and not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA here")
    x, W = Fp8Rows(n, d, torch.device(DEVICE)), Fp8Rows(f, d, torch.device(DEVICE))
    x.round(randn(n, d, seed=12).to(DEVICE))
    W.round(randn(f, d, seed=13).to(DEVICE))
    exact = (x.codes.double() * x.units[:, None]) @ (W.codes.double() * W.units[:, None]).T
    room = torch.full((n, f + 6), torch.nan, device=DEVICE)
    fp8_product(x, W, room[:, 3:-3], tma)
    torch.testing.assert_close(room[:, 3:-3].double(), exact, rtol=1e-4, atol=1e-3)
    assert room[:, :3].isnan().all() and room[:, -3:].isnan().all()


def test_gradients_module_and_refusals():
    sae = TopKSAE(24, 90, 5, seed=0, device=DEVICE)
    twin = TopKSAE(24, 90, 5, seed=0, device=DEVICE)
    sae.design = "fp8"
    x = randn(6, 24, seed=8).to(DEVICE)
    for each in (sae, twin):
        (each(x) - x).square().sum().backward()
    for p, q in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    W = unit_rows(1100, 24).to(DEVICE)
    with pytest.raises(ValueError, match="design must be None or one of .*'chunked', 'fp8'"):
        ops.topk_encode(x, W, None, 5, design="int8")
    for args, why in (
        ((x, W, None, 1025), "it takes k up to 1024, not 1025"),
        ((x.double(), W.double(), None, 5), "the triton kernels do not take torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=f"'fp8' was asked for and cannot run: {why}"):
            ops.topk_encode(*args, design="fp8")
        assert f"'fp8' was asked for and cannot run: {why}" in fastsae.explain(
            "topk_encode", *args, design="fp8"
        )
    torch.library.opcheck(
        torch.ops.fastsae.topk_encode.default,
        (x[:2], W[:40].detach(), None, 5, "relu", None, None, "fp8"),
        test_utils=("test_schema", "test_faketensor"),
    )
    with fastsae.use_backend("reference"):  # a design names its backend itself
        assert torch.equal(
            ops.topk_encode(x, W, None, 5)[1], ops.topk_encode(x, W, None, 5, design="fp8")[1]
        )


@pytest.mark.parametrize("capability,runs", [((8, 0), False), ((8, 6), False), ((8, 9), True)])
def test_older_gpus_are_refused(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert unavailable(torch.device("cuda")) == (None if runs else "A GPU is older than sm_89")


def test_the_choice_is_by_argument_alone(monkeypatch):
    """Nothing but design="fp8" comes here."""
    calls, original = [], module.fp8_product
    monkeypatch.setattr(module, "fp8_product", lambda *a: calls.append(1) or original(*a))
    x, W = randn(3, 32).to(DEVICE), unit_rows(400, 32).to(DEVICE)
    with fastsae.use_backend("triton"):
        ops.topk_encode(x, W, None, 4)
        assert not calls
        ops.topk_encode(x, W, None, 4, design="fp8")
        assert calls
