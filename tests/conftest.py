"""The environment that the tests run in, backends, and fixtures that every folder uses."""

from __future__ import annotations

import importlib.util
import os
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

# Without a GPU the Triton kernels run in Triton's interpreter, asked for before anyone imports it,
# and the CUDA kernels on the CPU, compiled against support/cuda_on_host.h.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' records of checked kernels are not the user's.
os.environ["FASTSAE_CACHE"] = str(Path(__file__).parents[1] / "build" / "cache")

import cuda_host
from common import DTYPES, INTERPRETED, ON_HOST, device_of, dtype_id, takes_fp64

import fastsae
from fastsae import _dispatch

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import triton_launches

    from fastsae.verify import interpreter

    interpreter.repair()
    triton_launches.install()

if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    # of tools/emulate_arm.py, where an example takes seconds
    hypothesis.settings.register_profile(
        "emulated", deadline=None, max_examples=20,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )  # fmt: skip

# Where a test can depend on the C++ kernels' instruction set. Steering and all above it reach the
# kernels by operators that are tested in these folders.
CPU_KERNELS = ("ops", "cpu", "nn", "train")


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
            item.path.parent.name not in CPU_KERNELS
            or item.path.name == "test_headers.py"
            or any(p in ("reference", "triton", "cuda") for p in parameters if isinstance(p, str))
            or "compile" in item.originalname
        )

    config.hook.pytest_deselected(items=[item for item in items if not depends(item)])
    items[:] = [item for item in items if depends(item)]


def _use(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    why = cuda_host.load() if name == "cuda" and ON_HOST else None
    why = why or _dispatch._missing(request.module.OP, name, device_of(name), torch.float32)
    if why is None and device_of(name) == "cuda" and not torch.cuda.is_available():
        why = "no GPU"
    if why is not None:
        pytest.skip(f"{name}: {why}")
    with fastsae.use_backend(name):
        yield name


@pytest.fixture(params=_dispatch.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of the module's OP in turn; one that cannot run here is skipped."""
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
