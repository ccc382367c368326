"""Builds csrc/cuda/<op>.cu as C++ against cuda_on_host.h and loads it: the CUDA kernels on the CPU.

The library registers `fastsae::<op>_cuda` for CPU tensors, so `use_backend("cuda")` runs them; that
of topk_encode has a part of it only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import artefacts
import torch

from fastsae import _dispatch

ROOT = Path(__file__).parents[2]
SOURCES = {p.stem: p for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
SHIM = [Path(__file__).with_name(name) for name in ("cuda_on_host.h", "hopper_on_host.h")]
REGISTERED = {op: f"fastsae::{op}_cuda" for op in SOURCES} | {
    "topk_encode": "fastsae::topk_encode_record_cuda"
}
FLAGS = [
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function",
    "-U_FORTIFY_SOURCE",  # longjmp from fiber to fiber is meant
    "-DFASTSAE_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip


def digest(source: Path, tool: list[str], *flags: str) -> str:
    """Changes with the source, its headers, torch's version, and how and by what it is compiled."""
    headers = sorted(p for d in ("common", "cuda") for p in (ROOT / "csrc" / d).glob("*.h"))
    words = [torch.__version__, artefacts.version(*tool), " ".join(flags)]
    return artefacts.digest(source, *headers, Path(__file__), *SHIM, *words)


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(source: Path, cxx: str) -> Path:
    tool = cxx.split()
    home = Path(torch.__file__).parent
    folders = [f"-I{ROOT / 'tests/support'}", f"-I{ROOT / 'csrc'}", f"-isystem{home / 'include'}"]

    def compile_to(library: Path) -> None:
        link = ["-o", str(library), f"-L{home / 'lib'}", "-ltorch_cpu"]
        command = [*tool, *FLAGS, *folders, str(source), *link]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        assert not built.stderr, f"warnings:\n{built.stderr}"

    name = f"{source.stem}-{digest(source, tool, *FLAGS)}.so"
    return artefacts.kept(f"cuda_host/{name}", compile_to)


@cache
def load() -> str | None:
    """Builds and loads the kernels of every op; returns why not, or None when they are there."""
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler to build the CUDA kernels for the CPU"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for library in pool.map(lambda source: build(source, cxx), SOURCES.values()):
            torch.ops.load_library(str(library))
    _dispatch.forget()
    return None
