"""Builds csrc/cuda/<op>.cu as C++ against cuda_on_host.h and loads it: the CUDA kernels on the CPU.

The library registers `fastsae::<op>_cuda` for CPU tensors, so `use_backend("cuda")` runs them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from fastsae import _dispatch

ROOT = Path(__file__).parent.parent
SOURCES = {p.stem: p for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
SHIM = Path(__file__).with_name("cuda_on_host.h")
FLAGS = [
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function",
    "-U_FORTIFY_SOURCE",  # longjmp from fiber to fiber is meant
    "-DFASTSAE_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip


def digest(source: Path, *command: str) -> str:
    """Changes with the source, its headers and how it is compiled."""
    headers = sorted(p for d in ("common", "cuda") for p in (ROOT / "csrc" / d).glob("*.h"))
    files = [source, *headers, Path(__file__), SHIM]
    text = (
        b"".join(p.read_bytes() for p in files) + " ".join([torch.__version__, *command]).encode()
    )
    return hashlib.sha256(text).hexdigest()[:16]


def _build(op: str, cxx: str) -> Path:
    library = ROOT / "build" / "cuda_host" / f"{op}-{digest(SOURCES[op], cxx, *FLAGS)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        home = Path(torch.__file__).parent
        folders = [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}", f"-isystem{home / 'include'}"]
        link = ["-o", str(temporary), f"-L{home / 'lib'}", "-ltorch_cpu"]
        command = [*cxx.split(), *FLAGS, *folders, str(SOURCES[op]), *link]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        assert not built.stderr, f"warnings:\n{built.stderr}"
        os.replace(temporary, library)
    return library


@cache
def load() -> str | None:
    """Builds and loads the kernels of every op; returns why not, or None when they are there."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        return "no C++ compiler to build the CUDA kernels for the CPU"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for library in pool.map(lambda op: _build(op, cxx), SOURCES):
            torch.ops.load_library(str(library))
    _dispatch._missing.cache_clear()
    _dispatch._select.cache_clear()
    return None
