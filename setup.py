"""Builds `fastsae/_cpu.abi3.so` from csrc/ when torch and a C++ compiler are there.

The library uses PyTorch's stable ABI only: one build serves every torch >= 2.10 and Python >= 3.10.
Without torch or a compiler the result is a pure-Python install (Triton and reference backends).

    FASTSAE_BUILD=1  a build that cannot be done is an error, with the compiler's message
    FASTSAE_BUILD=0  never compile
    CXX, CXXFLAGS    compiler and extra flags
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTSAE_BUILD", "")
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest that the library loads under
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false alarms in g++ 12 intrinsics
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    f"-ffile-prefix-map={ROOT}/=",  # error messages name csrc/..., not this machine
]  # fmt: skip
HOW = (
    "To get the C++ kernels: install a C++17 compiler (g++ 9+ or clang 14+) and torch>=2.10, then\n"
    "  pip install --no-build-isolation --no-deps --force-reinstall <this package>\n"
    "FASTSAE_BUILD=1 makes a build that fails an error and shows why."
)


class BuildError(Exception):
    """The C++ kernels cannot be built here; the message says why."""


def torch_dir() -> Path:
    """Where torch lives, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not importable in the build environment (an isolated build has none: pass "
            "--no-build-isolation)"
        )
    path = Path(next(iter(spec.submodule_search_locations)))
    if not (path / "include/torch/csrc/stable/tensor.h").exists():
        raise BuildError(f"torch at {path} has no stable ABI headers: torch>=2.10 is needed")
    return path


def compiler() -> list[str]:
    """The C++ compiler's command line."""
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")


def run(command: list[str]) -> None:
    """Runs one compiler command; its message becomes the error."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def skip(reason: object) -> None:
    """A build that cannot be done: an error under FASTSAE_BUILD=1, else a notice."""
    if MODE == "1":
        raise SystemExit(f"error: fastsae: building the C++ kernels failed: {reason}")
    print(
        f"\nwarning: fastsae is installed WITHOUT its C++ kernels: {reason}\n{HOW}\n",
        file=sys.stderr,
    )


class BuildKernels(build_ext):
    """Compiles the sources in parallel and links them; nothing that is up to date is redone."""

    def run(self) -> None:
        try:
            super().run()
        except BuildError as error:
            skip(error)
            self.extensions = self.distribution.ext_modules = []
            # The wheel's tag was decided before the compiler had its say.
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        torch, cxx = torch_dir(), compiler()
        flags = [*FLAGS, f"-I{ROOT / 'csrc'}", f"-isystem{torch / 'include'}"]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl")]
        newest = max(p.stat().st_mtime for p in [*headers, ROOT / "setup.py"])
        objects_dir = Path(self.build_temp).resolve()
        objects, stale = [], []
        for source in map(ROOT.joinpath, ext.sources):
            obj = objects_dir / source.relative_to(ROOT).with_suffix(".o")
            objects.append(str(obj))
            obj.parent.mkdir(parents=True, exist_ok=True)
            fresh = obj.exists() and obj.stat().st_mtime > max(newest, source.stat().st_mtime)
            if self.force or not fresh:
                stale.append([*cxx, *flags, "-c", str(source), "-o", str(obj)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, stale))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # torch is imported first, so its libraries are found by name: no rpath.
        link = ["-shared", *objects, "-o", str(output), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        run([*cxx, *shlex.split(os.environ.get("LDFLAGS", "")), *link])


def extensions() -> list[Extension]:
    """The one CPU library, or none and a notice when it cannot be built here."""
    if MODE == "0":
        return []
    try:
        torch_dir()
        compiler()
    except BuildError as error:
        skip(error)
        return []
    folders = [ROOT / "csrc" / name for name in ("common", "cpu")]
    sources = sorted(str(p.relative_to(ROOT)) for d in folders for p in d.glob("*.cpp"))
    return [Extension("fastsae._cpu", sources, py_limited_api=True)]


setup(
    packages=[*find_packages(include=["fastsae", "fastsae.*"]), "fastsae.triton_kernels"],
    package_dir={"fastsae.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
