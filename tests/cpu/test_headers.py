"""csrc by one rule: an .h is guarded and stands alone, an .inl is compiled once per CPU level."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
LEVELS = CSRC / "cpu/foreach_level.h"  # compiles the others, and once for every kernel
HEADERS = sorted(p for p in CSRC.rglob("*.h") if p != LEVELS)


def included(path):
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.M)


@pytest.mark.parametrize("path", HEADERS, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_header_is_guarded_and_includes_nothing_of_a_level(path):
    assert path.read_text().count("#pragma once") == 1
    assert not [name for name in included(path) if name.endswith(".inl")]


def test_the_headers_of_the_cpu_stand_alone():
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-fvisibility=hidden", "-fsyntax-only", f"-I{CSRC}"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-x", "c++", "-"]

    def compile_alone(name):
        source = f'#include "{name}"\nint main() {{ return 0; }}\n'
        run = subprocess.run([*cxx.split(), *flags], input=source, capture_output=True, text=True)
        return run.stderr

    names = [str(p.relative_to(CSRC)) for p in HEADERS if p.parent.name != "cuda"]
    assert len(names) > 10
    with ThreadPoolExecutor(2) as pool:
        assert not [error for error in pool.map(compile_alone, names) if error]


def test_an_inl_is_compiled_once_per_level():
    """It is a kernel that foreach_level.h is told of, or part of one."""
    kernels = {
        name
        for path in CSRC.rglob("*.cpp")
        for name in re.findall(r'^#define FASTSAE_KERNEL "([^"]+)"', path.read_text(), re.M)
    }
    parts = {n for p in [*CSRC.rglob("*.inl"), LEVELS] for n in included(p) if n.endswith(".inl")}
    assert {str(p.relative_to(CSRC)) for p in CSRC.rglob("*.inl")} == kernels | parts
    for path in CSRC.rglob("*.inl"):
        assert "FASTSAE_NS" in path.read_text() or path.name == "topk_encode_bf16.inl", path


def test_what_only_the_cpu_uses_lies_with_it():
    used = {n for p in (CSRC / "cuda").rglob("*.*") for n in included(p)}
    assert not [name for name in used if name.startswith("cpu/")]
    assert {p.name for p in (CSRC / "common").iterdir()} <= {Path(n).name for n in used}
