"""Launches at sizes that no test can run, on tensors without memory: every grid is one that a
device takes, and every configuration is one that is compiled offline."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton_launches

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

N, F = 1 << 20, 1 << 24  # tokens, latents
DTYPES = [torch.float32, torch.bfloat16]


def kernels(op):
    return importlib.import_module(f"fastsae.triton_kernels.{op}")


def made(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_grid_that_no_device_takes_is_refused():
    triton_launches.check_grid((2**31 - 1, 65535, 65535))
    for grid in ((2**31,), (1, 65536), (1, 1, 65536), (0,)):
        with pytest.raises(AssertionError, match="a device takes at most"):
            triton_launches.check_grid(grid)


# shapes of benchmarks/gpu_targets.py, and the largest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n,d,f,k",
    [
        (1, 8, F, 64), (1, 7, F, 64), (300, 24, F, 100_000), (5000, 24, F, 64),
        (8192, 4096, 131072, 64), (8192, 768, 131072, 64), (1024, 8192, 32768, 512),
        (16384, 768, 32768, 16), (33, 72, 1025, 7),
    ],
)  # fmt: skip
def test_topk_encode(n, d, f, k, dtype):
    x, W, scale = made(n, d, dtype=dtype), made(f, d, dtype=dtype), made(f, dtype=dtype)
    encode = kernels("topk_encode")
    slow = n > 1000 and k > 1000
    for design in encode.DESIGNS:
        if design.name == "hopper" or slow or design.refuses(x, W, k) is not None:
            continue
        for b, s in ((None, None), (scale, scale)):
            with triton_launches.dry() as grids:
                values, indices = encode.topk_encode(x, W, b, k, True, s, design=design.name)
            assert grids and values.shape == indices.shape == (n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,d,f,k", [(N, 8, F, 64), (8192, 4096, 131072, 64), (9, 768, F, 10**6)])
def test_sparse_ops(n, d, f, k, dtype):
    values, indices = made(n, k, dtype=dtype), made(n, k, dtype=torch.int32)
    rows, W = made(n, d, dtype=dtype), made(f, d, dtype=dtype)
    moments = made(f, d), made(f, d)
    settings = 1e-3, 0.9, 0.99, 1e-8, 0.0, 3, False, True, None, None, None, None
    with triton_launches.dry() as grids:
        kernels("sparse_decode").sparse_decode(values, indices, W, rows[0])
        kernels("sparse_grad_values").sparse_grad_values(rows, indices, W)
        kernels("sparse_grad_weight").sparse_grad_weight(values, indices, rows, f)
        kernels("sparse_adam_step").sparse_adam_step(W, *moments, values, indices, rows, *settings)
    assert len(grids) >= 4


@pytest.mark.parametrize("n,m,k", [(N, 1 << 14, 64), (4, F, 64), (300, F, 64), (2, F, 2**20)])
def test_topk(n, m, k):
    with triton_launches.dry() as grids:
        kernels("topk").topk(made(n, m, dtype=torch.bfloat16), k)
    assert grids


@pytest.mark.parametrize("n", [1, 5000])
def test_topk_member_is_one_launch_beside_topk_encode(n):
    """However many latents are asked for."""
    x, W = made(n, 64, dtype=torch.bfloat16), made(131072, 64, dtype=torch.bfloat16)
    with triton_launches.dry() as encode:
        kernels("topk_encode").topk_encode(x, W, None, 64, False, None)
    for j in (1, 64, 1000):
        latents = made(n, j, dtype=torch.int32)
        with triton_launches.dry() as grids:
            kernels("topk_member").topk_member(x, W, None, latents, 64, None, True, None, None)
        assert len(grids) == len(encode) + 1


def test_steer():
    x, tables = made(N, 64, dtype=torch.bfloat16), made(3, 64, 64, dtype=torch.bfloat16)
    param, code = made(3, 64, 6), made(3, 64, 3, dtype=torch.int32)
    slots = made(N, dtype=torch.int32)
    with triton_launches.dry() as grids:
        kernels("steer").steer(x, tables, tables, param, code, slots, None, None, 0, 1e-6, x)
    assert grids == [("_steer_kernel", (N,))]
