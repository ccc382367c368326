"""Rows beyond 2^31 elements, which 32-bit addresses would miss. Untouched pages cost nothing."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from common import ON_HOST, device_of

import fastsae
from fastsae import _dispatch, ops

D = 2048
ROWS = 2**31 // D + 8
LAST = ROWS - 1


def zeros(device: str) -> torch.Tensor:
    try:
        return torch.zeros(ROWS, D, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"4 GB of addresses: {error}")


@pytest.fixture(params=("cpu", "triton", "cuda"))
def device(request):
    name = request.param
    why = cuda_host.load() if name == "cuda" and ON_HOST else None
    why = why or _dispatch._missing("sparse_decode", name, device_of(name), torch.float16)
    if why is not None:
        pytest.skip(f"{name}: {why}")
    with fastsae.use_backend(name):
        yield device_of(name)


def test_rows_of_the_weights(device):
    W = zeros(device)
    W[LAST] = torch.arange(D, device=device) / 2048
    W[0] = 7
    values = torch.tensor([[2.0, 1.0]], dtype=torch.float16, device=device)
    indices = torch.tensor([[LAST, 1]], dtype=torch.int32, device=device)
    assert torch.equal(ops.sparse_decode(values, indices, W), 2 * W[LAST:])
    grad = torch.zeros(1, D, dtype=torch.float16, device=device)
    grad[0, 1024] = 3
    assert ops.sparse_grad_values(grad, indices, W).tolist() == [[1.5, 0.0]]


def test_rows_of_the_tokens_and_of_candidates():
    """Pieces of Triton's sparse_grad_weight and topk_encode, on hand-made input."""
    pytest.importorskip("triton")
    from fastsae.triton_kernels import _group_by_latent, sparse_grad_weight, topk_encode
    from fastsae.triton_kernels.topk_encode import bounded as bounds
    from fastsae.triton_kernels.topk_encode import keys as keys_module

    device = device_of("triton")
    if _dispatch._missing("sparse_decode", "triton", device, torch.float16) is not None:
        pytest.skip("no GPU and no interpreter")
    rows = zeros(device)
    rows[LAST, ::2] = 1.5
    one = torch.ones(1, dtype=torch.float16, device=device)
    token = torch.tensor([LAST], dtype=torch.int32, device=device)
    groups = _group_by_latent.Groups(
        token * 0, token, one, torch.tensor([0, 1], dtype=torch.int64, device=device)
    )
    assert torch.equal(sparse_grad_weight._launch(groups, rows, None), rows[LAST:])

    x = torch.zeros(1, D, dtype=torch.float16, device=device)
    x[0, 4] = 2
    values = one.new_empty(1, 1)
    topk_encode._selected_values(x, rows, None, token[None], values, True)
    assert values.item() == 3.0

    key = torch.full((1, 16), 0x7FFFFFFF - LAST, dtype=torch.int64, device=device)
    bounds._rescore_kernel[(1, 1)](
        x, rows, None, None, key, token * 0 + 1, D, CAPACITY=16, GROUP=8, BLOCK_D=128
    )
    score, index = one.new_empty(1, 1), token.new_empty(1, 1)
    keys_module.decode_keys(key, score, index, True)
    assert (score.item(), index.item()) == (3.0, LAST)
