"""The paths of the Triton topk_encode, each forced, and what its keys promise."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED, device_of, randn

from fastsae import reference

keys_module = pytest.importorskip("fastsae.triton_kernels._topk_encode_keys")
encode_module = pytest.importorskip("fastsae.triton_kernels.topk_encode")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and no interpreter", allow_module_level=True)
DEVICE = device_of("triton")


def integers(n, d, f, dtype, seed=0):
    """Every order of summation is exact, so selections must be identical."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d), generator=g).to(dtype)
    W = torch.randint(-2, 3, (f, d), generator=g).to(dtype)
    b = torch.randint(-2, 3, (f,), generator=g).to(dtype)
    scale = torch.randint(-1, 3, (f,), generator=g).to(dtype)  # zero and negative too
    return x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), scale.to(DEVICE)


def assert_is_reference(got, x, W, b, k, relu, scale):
    values, indices = reference.topk_encode(
        x.cpu(), W.cpu(), None if b is None else b.cpu(), k, relu,
        None if scale is None else scale.cpu(),
    )  # fmt: skip
    assert torch.equal(got[1].cpu(), indices)
    assert torch.equal(got[0].cpu(), values)


def select(x, W, b, k, scale, chunks):
    keys = encode_module.select_chunked(x, W, b, k, scale, chunks)
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32).to(DEVICE)
    encode_module.decode_keys(keys, values, indices, False)
    return values, indices


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_that_overlap(monkeypatch, dtype, scaled):
    """F no multiple of the chunk, and a buffer that must be cut many times."""
    small = keys_module.FilterConfig(64, 32, 4)
    monkeypatch.setattr(keys_module, "filter_config", lambda k: small)
    x, W, b, scale = integers(3, 37, 501, dtype)
    scale = scale if scaled else None
    chunks = encode_module.Chunks(slab=3 * 112)
    assert chunks.columns(3, 501) < 501 and 501 % chunks.columns(3, 501)
    values, indices = select(x, W, b, 11, scale, chunks)
    pre, rank = x.double() @ W.double().T + b.double(), 1 if scale is None else scale.double()
    order = (pre * rank).sort(dim=1, descending=True, stable=True).indices[:, :11]
    assert torch.equal(indices.long(), order)
    assert torch.equal(values.double(), (pre * rank).gather(1, order))  # keys hold the rank


def test_large_k_merges_chunks(monkeypatch):
    monkeypatch.setattr(encode_module, "MAX_SORTED", 16)
    x, W, b, _ = integers(3, 20, 300, torch.bfloat16)
    got = select(x, W, b, 150, None, encode_module.Chunks(slab=3 * 64))
    assert_is_reference(got, x, W, b, 150, False, None)


def test_values_of_ranked_latents():
    x, W, b, scale = integers(3, 530, 90, torch.float32)
    got = encode_module.topk_encode(x, W, b, 20, True, scale)
    assert_is_reference(got, x, W, b, 20, True, scale)


def test_tokens_in_several_passes(monkeypatch):
    monkeypatch.setattr(encode_module, "_rows_at_once", lambda n, k, chunks: 2)
    x, W, b, _ = integers(5, 24, 70, torch.float16)
    got = encode_module.topk_encode(x, W, b, 6, True, None)
    assert_is_reference(got, x, W, b, 6, True, None)


def test_library_product_is_given_the_same_chunks(monkeypatch):
    """torch.mm has an fp32 result on GPUs only: here its stand-in checks what it is handed."""
    shapes = []

    def library(x, W_T, *, out_dtype, out):
        shapes.append((tuple(x.shape), tuple(W_T.shape), tuple(out.shape), out_dtype))
        out.copy_(torch.matmul(x.float(), W_T.float()))

    product = encode_module.product.__globals__
    monkeypatch.setitem(product, "has_library_product", lambda x: True)
    monkeypatch.setattr(product["torch"], "mm", library)
    x, W, b, _ = integers(3, 24, 101, torch.bfloat16)
    got = select(x, W, b, 9, None, encode_module.Chunks(slab=3 * 32))
    monkeypatch.undo()
    assert len(shapes) > 1 and len(set(shapes)) == 1
    assert shapes[0][3] == torch.float32
    assert_is_reference(got, x, W, b, 9, False, None)


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
    chunks = encode_module.Chunks()
    rows = encode_module._rows_at_once(n, k, chunks)
    columns = chunks.columns(rows, f)
    held = 4 * rows * columns
    if k <= keys_module.MAX_SORTED:
        held += rows * keys_module.BestKeys.bytes_per_row(k)
    else:
        held += rows * (8 * columns + keys_module.MergedKeys.bytes_per_row(k))
    assert held <= 256 << 20
