"""Builds `fastsae/_cpu.abi3.so` and `fastsae/_cuda.abi3.so` from csrc/, where they can be built.

They use PyTorch's stable ABI only: one build serves every torch >= 2.10 and Python >= 3.10. Without
torch or a compiler the result is a pure-Python install (Triton and reference backends). The CUDA
library is built where torch has CUDA and nvcc is found; compiling it needs no GPU.

    FASTSAE_BUILD=1     a build that cannot be done is an error, with the compiler's message
    FASTSAE_BUILD=0     never compile
    FASTSAE_CUDA=1      the CUDA library is wanted, also for a torch without CUDA
    FASTSAE_CUDA=0      no CUDA library
    FASTSAE_CUDA_ARCHS  default "80 90a 100a 100+PTX", as far as this nvcc knows them
    CXX, CXXFLAGS, NVCC, NVCCFLAGS   compilers and extra flags
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTSAE_BUILD", "")
CUDA = os.environ.get("FASTSAE_CUDA", "")
CUDA_ARCHS = ("80", "90a", "100a", "100+PTX")  # sm_8x, Hopper, Blackwell; later ones from the PTX
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest that the library loads under
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
    "-ffp-contract=off",  # a fused multiply-add only where the source has one: the same on all paths
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false alarms in g++ 12 intrinsics
    "-Wno-unknown-warning-option",  # clang has not the second
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    f"-ffile-prefix-map={ROOT}/=",  # error messages name csrc/..., not this machine
]  # fmt: skip
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    "-Xcompiler", f"-fPIC,-fvisibility=hidden,-ffile-prefix-map={ROOT}/=",
]  # fmt: skip
HOW = (
    "To get the C++ kernels: install a C++17 compiler (g++ 9+ or clang 14+) and torch>=2.10, then\n"
    "  pip install --no-build-isolation --no-deps --force-reinstall <this package>\n"
    "FASTSAE_BUILD=1 makes a build that fails an error and shows why."
)


class BuildError(Exception):
    """A library cannot be built here; the message says why."""


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


def nvcc(torch: Path) -> str:
    """The CUDA compiler: $NVCC, CUDA_HOME's, the one on the path, or the one that pip installs."""
    home = os.environ.get("CUDA_HOME")
    nvidia = importlib.util.find_spec("nvidia")  # a namespace package
    wheels = list(nvidia.submodule_search_locations or ()) if nvidia else []
    places = [f"{home}/bin"] if home else []
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    places += [f"{wheel}/cu13/bin" for wheel in wheels]
    found = os.environ.get("NVCC") or shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise BuildError(
            "no nvcc found (looked in $NVCC, $CUDA_HOME, the path, the nvidia-cuda-nvcc package)"
        )
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    own = re.search(r"release (\d+)", version)
    its = re.search(r"^cuda\b.*'(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if own and its and own[1] != its[1]:
        raise BuildError(f"{found} is of CUDA {own[1]} and torch was built with CUDA {its[1]}")
    return found


def cuda_archs(compiler: str) -> list[str]:
    """nvcc's -gencode flags."""
    wanted = os.environ.get("FASTSAE_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if not wanted:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout
        wanted = [a for a in CUDA_ARCHS if f"compute_{a.rstrip('a').partition('+')[0]}\n" in known]
    flags = []
    for arch in wanted:
        number, _, ptx = arch.partition("+")
        flags += ["-gencode", f"arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"]
    return flags


def cpu_commands(torch: Path, temp: Path) -> tuple[list[str], list[str]]:
    """How a source is compiled, and the objects linked, to the CPU library."""
    flags = [*FLAGS, f"-I{ROOT / 'csrc'}", f"-isystem{torch / 'include'}"]
    flags.append(f"-isystem{sysconfig.get_paths()['include']}")  # Python.h, where there is one
    cxx = compiler()
    # torch is imported first, so its libraries are found by name: no rpath.
    link = [*cxx, *shlex.split(os.environ.get("LDFLAGS", "")), "-shared"]
    return (
        [*cxx, *flags, *shlex.split(os.environ.get("CXXFLAGS", "")), "-c"],
        [*link, f"-L{torch / 'lib'}", "-ltorch_cpu"],
    )


def cuda_commands(torch: Path, temp: Path) -> tuple[list[str], list[str]]:
    """The same for the CUDA library, which carries its own CUDA runtime."""
    tool = nvcc(torch)
    flags = [*NVCC_FLAGS, *cuda_archs(tool), f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(torch / "include")]
    flags += shlex.split(os.environ.get("NVCCFLAGS", ""))
    folder = torch / "lib"
    if not (folder / "libtorch_cuda.so").exists():
        # A torch without CUDA has the headers; an empty library of that name is enough to link.
        folder, empty = temp, temp / "empty.c"
        temp.mkdir(parents=True, exist_ok=True)
        empty.touch()
        stub = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(temp / "libtorch_cuda.so")]
        run([*compiler(), "-x", "c", str(empty), *stub])
    link = [tool, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
    return (
        [tool, *flags, "-c"],
        [*link, f"-L{folder}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"],
    )


LIBRARIES = {"fastsae._cpu": cpu_commands, "fastsae._cuda": cuda_commands}


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


def skip(name: str, reason: object) -> None:
    """A build that cannot be done: an error under FASTSAE_BUILD=1, else a notice."""
    kernels = {"fastsae._cpu": "C++", "fastsae._cuda": "CUDA"}[name] + " kernels"
    if MODE == "1":
        raise SystemExit(f"error: fastsae: building the {kernels} failed: {reason}")
    print(
        f"\nwarning: fastsae is installed WITHOUT its {kernels}: {reason}\n{HOW}\n",
        file=sys.stderr,
    )


class BuildKernels(build_ext):
    """Compiles the sources in parallel and links them; nothing that is up to date is redone."""

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except BuildError as error:
                skip(ext.name, error)
                self.extensions.remove(ext)
        self.distribution.ext_modules = self.extensions
        # The wheel's tag was decided before the compilers had their say.
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None and not self.extensions:
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        objects_dir = Path(self.build_temp).resolve()
        compile_to, link = LIBRARIES[ext.name](torch_dir(), objects_dir)
        headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl")]
        newest = max(p.stat().st_mtime for p in [*headers, ROOT / "setup.py"])
        objects, stale = [], []
        for source in map(ROOT.joinpath, ext.sources):
            obj = objects_dir / source.relative_to(ROOT).with_suffix(".o")
            objects.append(str(obj))
            obj.parent.mkdir(parents=True, exist_ok=True)
            fresh = obj.exists() and obj.stat().st_mtime > max(newest, source.stat().st_mtime)
            if self.force or not fresh:
                stale.append([*compile_to, str(source), "-o", str(obj)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, stale))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        run([*link[:1], *objects, "-o", str(output), *link[1:]])


def sources(pattern: str, *folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for d in folders for p in (ROOT / d).glob(pattern))


def cuda_wanted(torch: Path) -> bool:
    if CUDA in ("0", "1"):
        return CUDA == "1"
    try:
        return (torch / "lib/libtorch_cuda.so").exists() and bool(nvcc(torch))
    except BuildError:
        return False


def extensions() -> list[Extension]:
    """The libraries to build; a notice when torch or the C++ compiler is missing."""
    if MODE == "0":
        return []
    try:
        torch, _ = torch_dir(), compiler()
    except BuildError as error:
        skip("fastsae._cpu", error)
        return []
    found = {"fastsae._cpu": sources("*.cpp", "csrc/common", "csrc/cpu")}
    if cuda_wanted(torch):
        found["fastsae._cuda"] = sources("*.cu", "csrc/cuda")
    return [Extension(name, files, py_limited_api=True) for name, files in found.items()]


if __name__ == "__main__":  # tests import the functions above
    setup(
        packages=[*find_packages(include=["fastsae", "fastsae.*"]), "fastsae.triton_kernels"],
        package_dir={"fastsae.triton_kernels": "triton_kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
