"""What every kernel test uses: the one tolerance table, the comparison, devices and random data."""

from __future__ import annotations

import math
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Without a GPU the CUDA kernels run on the CPU, compiled against tests/support/cuda_on_host.h.
ON_HOST = not torch.cuda.is_available()

# Absolute slack on top of twice the reference's own rounding error, for data of order 1.
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(backend: str) -> str:
    on_cpu = {"triton": INTERPRETED, "cuda": ON_HOST}
    return "cpu" if on_cpu.get(backend, True) else "cuda"


def takes_fp64(backend: str) -> bool:
    return backend not in ("triton", "cuda")


def tokens(backend: str, n: int) -> int:
    """Fewer tokens where an interpreter takes 10 ms for each; widths and K stay as they are."""
    return min(n, 9) if backend == "triton" and INTERPRETED else n


def latents(backend: str, f: int) -> int:
    """The same for kernels with a program per latent."""
    return min(f, 37) if backend == "triton" and INTERPRETED else f


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    if truth.numel() == 0:
        return 0.0
    return float((value.double().cpu() - truth.double().cpu()).abs().max())


def assert_close(
    got: torch.Tensor,
    truth: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1,
) -> None:
    """err(got) <= 2 * err(plain low-precision version) + atol * scale, both against fp64."""
    assert got.shape == truth.shape
    assert got.dtype == dtype
    bound = 2 * max_error(plain, truth) + ATOL[dtype] * scale
    error = max_error(got, truth)
    assert not math.isnan(error) and error <= bound, f"error {error:.3g} over {bound:.3g}"
