"""What a measurement ran on: device, versions, commit, and the library behind torch's products."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import _library
from .._version import __version__
from ..info import version_of

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, "+" when its kernels are modified; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "fastsae", "csrc"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def cpu_level() -> str:
    if _library.CPU_MISSING is not None:
        return "not built"
    return str(torch.ops.fastsae._cpu_level())


def machine(device: str = "cpu") -> dict[str, Any]:
    """What every row of results carries. For a GPU, its name and the versions around it as well."""
    found = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "level": cpu_level(),
        "torch": torch.__version__,
        "fastsae": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = torch.cuda.get_device_name(device)
        found["capability"] = f"sm_{major}{minor}"
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["triton"] = version_of("triton")
    return found


def header(device: str = "cpu") -> str:
    """One line: device, versions, commit, threads, date."""
    m = machine(device)
    on = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['level']}, "
    if "gpu" in m:
        on = f"{m['gpu']} ({m['capability']}), CUDA {m['cuda']}, triton {m['triton']}, {on}"
    return f"# {on}torch {m['torch']}, fastsae {m['fastsae']} ({m['commit']}), {m['date']}"


@contextlib.contextmanager
def product_library(name: str) -> Iterator[None]:
    """torch's fp32 products through its default library, or through oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if name == "onednn" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def has_onednn_in_fp32() -> bool:
    """Whether products through oneDNN keep fp32's accuracy: where a CPU has AMX, torch lets oneDNN
    multiply in bf16."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=g, dtype=torch.float32) for _ in range(2))
    with product_library("onednn"):
        product = a @ b
    truth = a.double() @ b.double()
    return bool((product - truth).abs().max() <= 1e-4 * truth.abs().max())


@contextlib.contextmanager
def cpu_kernel_level(level: str | None) -> Iterator[None]:
    """fastsae's C++ kernels at a lower level (None: as detected)."""
    if level is None:
        yield
        return
    before = torch.ops.fastsae._cpu_level()
    torch.ops.fastsae._set_cpu_level(level)
    try:
        yield
    finally:
        torch.ops.fastsae._set_cpu_level(before)


def at_level(level: str, run: Callable[[int], Any]) -> Callable[[int], Any]:
    def wrapped(i: int) -> Any:
        with cpu_kernel_level(level):
            return run(i)

    return wrapped


def levels() -> list[str]:
    """The C++ levels this CPU has, lowest first."""
    if cpu_level() == "not built":
        return []
    return re.findall(r"\w+", torch.ops.fastsae._cpu_levels())
