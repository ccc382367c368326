"""The one tolerance table, backends, and the comparison every kernel test uses."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers share the cores: a thread each, or OpenMP's threads wait for one another. Tests of
# threading ask for theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch

# Without a GPU the Triton kernels run in Triton's interpreter: asked for before anyone imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' records of checked kernels are not the user's.
os.environ.setdefault("FASTSAE_CACHE", str(Path(__file__).parent.parent / "build" / "cache"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import cuda_host  # noqa: E402

import fastsae  # noqa: E402
from fastsae import _dispatch  # noqa: E402

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import triton_launches

    from fastsae.verify import interpreter

    interpreter.repair()
    triton_launches.install()

# Without a GPU the CUDA kernels run on the CPU, compiled against tests/cuda_on_host.h.
ON_HOST = not torch.cuda.is_available()

# Absolute slack on top of twice the reference's own rounding error, for data of order 1.
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# What another instruction set cannot change: GPU kernels, compilers, applications.
NOT_CPU_KERNELS = re.compile(
    "test_(triton_|cuda_|serve|quickstart|compare|cli_|sweep|embedded_model|docs|examples|vectors|stdlib_text|bench|"
    "gpu_suite|layout|topk_encode_(triton|fused|fp8|hopper))"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-kernels",
        action="store_true",
        help="only tests that the C++ kernels' instruction set can change (tools/cpu_levels.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--cpu-kernels"):
        return

    def depends(item: pytest.Item) -> bool:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return not (
            NOT_CPU_KERNELS.match(item.path.name)
            or any(p in ("reference", "triton", "cuda") for p in parameters if isinstance(p, str))
            or "compile" in item.originalname
        )

    config.hook.pytest_deselected(items=[item for item in items if not depends(item)])
    items[:] = [item for item in items if depends(item)]


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


def _use(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    op = request.module.__name__.rpartition("test_")[2]
    if op in _dispatch.OPS:
        why = cuda_host.load() if name == "cuda" and ON_HOST else None
        why = why or _dispatch._missing(op, name, device_of(name), torch.float32)
        if why is None and device_of(name) == "cuda" and not torch.cuda.is_available():
            why = "no GPU"
        if why is not None:
            pytest.skip(f"{name}: {why}")
    with fastsae.use_backend(name):
        yield name


@pytest.fixture(params=_dispatch.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn; one that this machine cannot run is skipped with its reason."""
    yield from _use(request)


@pytest.fixture(params=("triton", "cuda"))
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those whose kernels cannot raise without a host sync."""
    yield from _use(request)


@pytest.fixture(params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    if request.param == torch.float64 and not takes_fp64(backend):
        pytest.skip(f"{backend}: takes fp32, bf16 and fp16")
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh allocations come filled with NaN, so that an output not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture(autouse=True)
def _level_in_force() -> Iterator[None]:
    """A level that was asked for stays in force: else a run at a lower one would not be one."""
    yield
    wanted = os.environ.get("FASTSAE_CPU_LEVEL")
    if wanted and fastsae._library.CPU_MISSING is None:
        assert torch.ops.fastsae._cpu_level() == wanted


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For sizes that are too small for two: on a loaded machine threads only wait for one another.

    A file asks for it with `pytestmark = pytest.mark.usefixtures("one_thread")`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
