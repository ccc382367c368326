"""A token's result does not depend on the other tokens of the call, to the bit: GPU kernels.

Without a GPU, Triton's interpreter (whose products are made the same at every place by
fastsae/verify/interpreter.py) and the CUDA kernels on the CPU. Sizes lie around those of the
tiles.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from common import INTERPRETED, ON_HOST, device_of, randn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsae
from fastsae import ops, reference

ROOT = Path(__file__).parents[2]
SIZES = [1, 15, 17]
N, D, F, K = 18, 40, 200, 7
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and no interpreter", allow_module_level=True)
DEVICE = device_of("triton")

import fastsae.triton_kernels.topk_encode as encode  # noqa: E402
from fastsae.triton_kernels.topk_encode import chunked, fused, product  # noqa: E402


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of tokens and latents, several chunks and passes; on a device its own tiles."""
    if not INTERPRETED:
        return
    tile = product.ProductConfig(16, 64, 16, 4, 2)
    for name in ("FP32", "LOW", "TMA"):
        monkeypatch.setattr(product, name, tile)
    small = fused.FusedConfig(16, 64, 16, 32, 4, 2, records=16)
    monkeypatch.setattr(fused, "fused_config", lambda capability: small)
    chunks = chunked.Chunks(rows=12, slab=12 * 64)
    table = tuple(dataclasses.replace(d, chunks=chunks) for d in encode.DESIGNS)
    monkeypatch.setattr(encode, "DESIGNS", table)


def assert_alone_as_together(call, *per_token):
    """call(*per_token) of some tokens is that of all of them, a part."""
    whole = call(*per_token)
    whole = whole if isinstance(whole, tuple) else (whole,)
    n = len(per_token[0])
    some = [slice(n - size, n) for size in SIZES] + [slice(0, 16)]
    for part in some:
        got = call(*(t[part].clone() for t in per_token))
        got = got if isinstance(got, tuple) else (got,)
        for a, b in zip(got, whole, strict=True):
            assert torch.equal(a, b[part]), part
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(per_token[0].device)
    got = call(*(t[order] for t in per_token))
    for a, b in zip(got if isinstance(got, tuple) else (got,), whole, strict=True):
        assert torch.equal(a, b[order])


def weights(dtype, device=DEVICE):
    """Latents in several copies: their scores tie only where a score is one number."""
    W, b = randn(F, D, seed=1), randn(F, seed=2)
    W[150:], b[150:] = W[:50], b[:50]
    return W.to(device, dtype), b.to(device, dtype)


LONG = pytest.mark.slow


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=LONG)], ids=["", "scaled"])
@pytest.mark.parametrize(
    "design,dtype",
    [
        ("chunked", torch.float32), pytest.param("chunked", torch.bfloat16, marks=LONG),
        ("bounded", torch.float32), ("fused", torch.bfloat16),
        pytest.param("fused", torch.float16, marks=LONG),
        pytest.param("fp8", torch.bfloat16, marks=LONG),
    ],
    ids=str,
)  # fmt: skip
def test_topk_encode(design, dtype, scaled):
    x, (W, b) = randn(N, D).to(DEVICE, dtype), weights(dtype)
    if (why := encode.named(design).refuses(x, W, K)) is not None:
        pytest.skip(why)
    scale = randn(F, seed=3).abs().to(DEVICE, dtype) if scaled else None
    assert_alone_as_together(
        lambda x: encode.topk_encode(x, W, b, K, True, scale, design=design), x
    )


def test_rows_that_overflow_are_redone_by_themselves():
    """Half of the tokens pass every threshold, and are redone; those beside them are not."""
    W = torch.zeros(F, 16)
    W[:, 0] = torch.arange(F) / 512
    W[:, 1:] = randn(F, 15, seed=4) / 64
    x = torch.cat([randn(N, 1).sign(), randn(N, 15, seed=5)], 1)
    x, W = x.to(DEVICE, torch.bfloat16), W.to(DEVICE, torch.bfloat16)
    assert_alone_as_together(
        lambda x: encode.topk_encode(x, W, None, K, False, None, design="fused"), x
    )


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_member_is_topk_encode(dtype, positive):
    """One score for a pair, in both ops and for any number of tokens."""
    x, (W, b) = randn(N, D).to(DEVICE, dtype), weights(dtype)
    latents = torch.arange(-1, F, dtype=torch.int32, device=DEVICE).expand(N, -1)
    with fastsae.use_backend("triton"):
        values, indices = ops.topk_encode(x, W, b, K, activation="identity")
        member = torch.zeros(N, F, dtype=torch.bool, device=DEVICE)
        member.scatter_(1, indices.long(), ~(values <= 0) if positive else True)
        for n in SIZES:
            got = ops.topk_member(x[:n], W, b, latents[:n], K, positive=positive)
            assert torch.equal(got[:, 1:], member[:n]) and not got[:, 0].any()


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if request.param == "cuda":
        import cuda_host

        why = cuda_host.load() if ON_HOST else fastsae._library.CUDA_MISSING
        if why is not None:
            pytest.skip(why)
    with fastsae.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_and_value_gradients(backend, dtype):
    device = device_of(backend)
    W, _ = weights(dtype, device)
    values = randn(N, K, seed=6).to(device, dtype)
    indices = torch.randint(F, (N, K), generator=torch.Generator().manual_seed(1)).int().to(device)
    grad = randn(N, D, seed=7).to(device, dtype)
    assert_alone_as_together(lambda v, i: ops.sparse_decode(v, i, W, W[0]), values, indices)
    assert_alone_as_together(lambda g, i: ops.sparse_grad_values(g, i, W), grad, indices)


def test_topk(backend):
    x = randn(N, 700).mul(4).round().to(device_of(backend))
    assert_alone_as_together(lambda x: ops.topk(x, 20), x)


@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steer(backend, dtype, norm):
    device, entries = device_of(backend), 3
    tables = [randn(2, entries, D, seed=s).to(device, dtype) for s in (8, 9)]
    param = randn(2, entries, 6, seed=10).to(device)
    code = torch.tensor([[[1, 0, -1], [4, 1, -1], [5, 0, -1]]] * 2, dtype=torch.int32).to(device)
    slots = (torch.arange(N, dtype=torch.int32) % 2).to(device)
    steer = fastsae._dispatch._implementation("steer", backend)

    def call(x, slots):
        out = torch.empty_like(x)
        steer(x, *tables, param, code, slots, None, None, norm, 1e-6, out)
        return out

    assert_alone_as_together(call, randn(N, D).to(device, dtype), slots)


PRODUCTS = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "matmul", "linear", "einsum", "tensordot", "inner",
    "mv", "addmv", "_scaled_mm", "_int_mm", "chain_matmul", "cdist",
}  # fmt: skip


def test_no_library_product_on_a_gpu_path():
    """A library chooses the order of its sums by the number of tokens, and obeys torch's settings
    (tf32, reductions and accumulation in fp16, the preferred library)."""
    found = []
    kernels = sorted((ROOT / "triton_kernels").rglob("*.py"))
    assert ROOT / "triton_kernels/topk_encode/product.py" in kernels
    for path in kernels:
        for node in ast.walk(ast.parse(path.read_text())):
            product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
            if product or (isinstance(node, ast.Attribute) and node.attr in PRODUCTS):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    for path in sorted((ROOT / "csrc/cuda").rglob("*.*")):
        found += [path.name] * ("cublas" in path.read_text().lower())
    assert found == []


class Precision(TorchDispatchMode):
    """What the libraries may do to fp32 at each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.out, torch.ops.aten.bmm.default):
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.seen.append([b.fp32_precision for b in backends])
        return func(*args, **(kwargs or {}))


def test_the_reference_sums_in_fp32_whatever_torch_allows():
    x, (W, b) = randn(N, D), weights(torch.float32, "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precision() as products:
            reference.topk_encode(x, W, b, K, True, None)
            latents = torch.zeros(N, 1, dtype=torch.int32)
            reference.topk_member(x, W, b, latents, K, None, False, None, None)
            reference.sparse_grad_values(x, latents, W)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert products.seen == [["ieee", "ieee"]] * 3


def test_interpreted_ties_do_not_rest_on_a_library():
    """Equal latents tie wherever they lie in a tile, whatever BLAS the machine has."""
    W = randn(1, D, seed=11).repeat(F, 1).to(DEVICE)
    truth = torch.arange(K, dtype=torch.int32).expand(N, -1)
    for design in ("chunked", "bounded"):
        got = encode.topk_encode(randn(N, D).to(DEVICE), W, None, K, False, None, design=design)
        assert torch.equal(got[1].cpu(), truth)
