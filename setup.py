"""Builds `fastsae/_cpu.abi3.so` and `fastsae/_cuda.abi3.so` from csrc/, where they can be built.

They use PyTorch's stable ABI only: one build serves every torch >= 2.10 and Python >= 3.10. Without
torch or a compiler the result is a pure-Python install (Triton and reference backends). The CUDA
library is built where torch has CUDA, by the first nvcc that is of torch's CUDA and works; that
needs no GPU. A CUDA source that does not compile is left out and the others are built. What was
left out, and why, is printed and kept in `fastsae/_not_built.json`, which `fastsae info` reads.

    FASTSAE_BUILD=1     the C++ library is wanted: the build fails where it cannot be built
    FASTSAE_BUILD=0     never compile
    FASTSAE_CUDA=1      the CUDA library is wanted, also for a torch without CUDA: the build fails
                        where it cannot be built or one of its sources does not compile
    FASTSAE_CUDA=0      no CUDA library
    FASTSAE_CUDA_ARCHS  default "80 90a 100a 100+PTX", as far as this nvcc knows them
    CXX, CXXFLAGS, NVCC, NVCCFLAGS   compilers and extra flags
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTSAE_BUILD", "")
CUDA = os.environ.get("FASTSAE_CUDA", "")
# sm_8x, Hopper, Blackwell; later ones from the last PTX (CUDA 12.0 to 12.7 know no Blackwell)
CUDA_ARCHS = ("80", "90a", "90+PTX", "100a", "100+PTX")
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest that the library loads under
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
    "-ffp-contract=off",  # multiply-adds are fused where the source says so: alike on all paths
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # false alarms in g++ 12 intrinsics
    "-Wno-unknown-warning-option",  # clang has not the second
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    f"-ffile-prefix-map={ROOT}/=",  # error messages name csrc/..., not this machine
]  # fmt: skip
# nvcc hands these on by way of a shell and cuts them at commas: a folder with either does without
_MAP = "" if re.search(r"[^\w/.+-]", str(ROOT)) else f",-ffile-prefix-map={ROOT}/="
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    "-Xcompiler", f"-fPIC,-fvisibility=hidden{_MAP}",
]  # fmt: skip
PROBE = """
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(__half* x) { *x = __float2half(1); }
"""
HOW = {
    "_cpu": "install a C++17 compiler (g++ 9+ or clang 14+) and torch>=2.10",
    "_cuda": "install the nvcc of torch's CUDA (nvidia-cuda-nvcc, nvidia-cuda-runtime and "
    "nvidia-cuda-cccl on the package index have CUDA 13's)",
}
REINSTALL = "pip install --no-build-isolation --no-deps --force-reinstall <this package>"


class BuildError(Exception):
    """A library or a source cannot be built here; the message says why."""

    def short(self) -> str:
        """The line that names the fault, of a compiler's long message."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        named = (line for line in lines[1:] if re.search(r"\b(error|fatal|cannot find)\b", line))
        return next(named, lines[0]).replace(f"{ROOT}/", "")


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


def nvccs() -> list[str]:
    """Every CUDA compiler: $NVCC, CUDA_HOME's, those on the path, in /usr/local, of packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvidia = importlib.util.find_spec("nvidia")  # a namespace package
    wheels = list(nvidia.submodule_search_locations or ()) if nvidia else []
    folders = [f"{home}/bin"] if home else []
    folders += [*os.get_exec_path(), "/usr/local/cuda/bin"]
    for place, pattern in [("/usr/local", "cuda-*/bin"), *((w, "cu*/bin") for w in wheels)]:
        folders += sorted(map(str, Path(place).glob(pattern)), reverse=True)
    found = [os.environ.get("NVCC"), *(shutil.which("nvcc", path=f) for f in folders)]
    once: dict[str, str] = {}  # /usr/local/cuda is a link to another of them
    for tool in filter(None, found):
        once.setdefault(os.path.realpath(tool), tool)
    return list(once.values())


def cuda_archs(compiler: str) -> list[str]:
    """nvcc's -gencode flags."""
    wanted = os.environ.get("FASTSAE_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if not wanted:
        names = output(compiler, "--list-gpu-arch").split()
        known = [a for a in CUDA_ARCHS if f"compute_{a.rstrip('a').partition('+')[0]}" in names]
        wanted = [a for a in known if "+" not in a or a == known[-1]]
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


def toolkit(tool: str) -> Path:
    """The folder of an nvcc's toolkit, which a script or a link of that name hides."""
    top = re.search(r"^#\$ TOP=(.*)", output(tool, "--dryrun", "-shared", "x.o"), re.MULTILINE)
    return Path(os.path.normpath(top[1])) if top else Path(tool).parent.parent


def nvcc_commands(tool: str, torch: Path) -> tuple[list[str], list[str]]:
    """How this nvcc compiles and links; BuildError where it is of another CUDA or does not work."""
    version = output(tool, "--version")
    own = re.search(r"release (\d+)", version)
    if own is None:
        raise BuildError(f"prints no CUDA version: {version.strip()!r}")
    its = re.search(r"^cuda\b.*'(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if its and own[1] != its[1]:
        raise BuildError(f"is of CUDA {own[1]} and torch was built with CUDA {its[1]}")
    compile_to = [tool, *NVCC_FLAGS, *cuda_archs(tool)]
    compile_to += [*shlex.split(os.environ.get("NVCCFLAGS", "")), "-c"]
    link = [tool, "-shared", "-cudart", "static"]
    # The packaged nvcc has the CUDA runtime in lib and looks in lib64.
    libraries = toolkit(tool) / "lib"
    if (libraries / "libcudart_static.a").exists():
        link.append(f"-L{libraries}")
    with tempfile.TemporaryDirectory() as folder:
        source, obj = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(PROBE)
        run([*compile_to, str(source), "-o", str(obj)])
        run([*link, str(obj), "-o", str(obj.with_suffix(".so"))])
    return compile_to, link


def cuda_commands(torch: Path, temp: Path) -> tuple[list[str], list[str]]:
    """The same for the CUDA library, which carries its own CUDA runtime."""
    passed_over = []
    for tool in nvccs():
        try:
            compile_to, link = nvcc_commands(tool, torch)
            break
        except BuildError as error:
            passed_over.append(f"{tool}: {error.short()}")
    else:
        places = "$NVCC, $CUDA_HOME, the path, /usr/local/cuda*, the nvidia-cuda-nvcc package"
        raise BuildError(
            f"no usable nvcc ({'; '.join(passed_over)})"
            if passed_over
            else f"no nvcc found (looked in {places})"
        )
    print(*(f"fastsae: passed over {why}" for why in passed_over), f"fastsae: {tool}", sep="\n")
    folder = torch / "lib"
    if not (folder / "libtorch_cuda.so").exists():
        # A torch without CUDA has the headers; an empty library of that name is enough to link.
        folder, empty = temp, temp / "empty.c"
        temp.mkdir(parents=True, exist_ok=True)
        empty.touch()
        stub = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(temp / "libtorch_cuda.so")]
        run([*compiler(), "-x", "c", str(empty), *stub])
    compile_to += [f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
    link += ["-Xlinker", "--no-as-needed", f"-L{folder}", f"-L{torch / 'lib'}"]
    return compile_to, [*link, "-ltorch_cpu", "-ltorch_cuda"]


LIBRARIES = {"_cpu": cpu_commands, "_cuda": cuda_commands}
KERNELS = {"_cpu": "C++ kernels", "_cuda": "CUDA kernels"}
VARIABLE = {"_cpu": "FASTSAE_BUILD", "_cuda": "FASTSAE_CUDA"}
REQUIRED = {library: os.environ.get(variable) == "1" for library, variable in VARIABLE.items()}


def execute(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None


def output(*command: str) -> str:
    """What a command prints, whether or not it succeeds."""
    result = execute([*command])
    return result.stdout + result.stderr


def run(command: list[str]) -> None:
    """Runs one compiler command; its message becomes the error."""
    result = execute(command)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def failure(command: list[str]) -> BuildError | None:
    """Runs one compiler command; returns its error, None when there was none."""
    try:
        run(command)
    except BuildError as error:
        return error
    return None


def left_out(name: str) -> str | None:
    """Why a library is not even tried; None when it is."""
    if MODE == "0":
        return "FASTSAE_BUILD=0 was set"
    if name == "_cpu" or CUDA == "1":
        return None
    if CUDA == "0":
        return "FASTSAE_CUDA=0 was set"
    try:
        has_cuda = (torch_dir() / "lib/libtorch_cuda.so").exists()
    except BuildError as error:
        return str(error)  # the C++ library has warned of it
    return None if has_cuda else "the torch that it was built with has no CUDA"


def warn(what: str, reason: str, library: str) -> None:
    print(
        f"\nwarning: fastsae is installed WITHOUT {what}: {reason}\n"
        f"To get them: {HOW[library]}, then\n  {REINSTALL}\n"
        f"{VARIABLE[library]}=1 makes this an error that shows the compiler's message.\n",
        file=sys.stderr,
    )


class BuildKernels(build_ext):
    """Compiles the sources in parallel and links them; nothing that is up to date is redone."""

    def build_extensions(self) -> None:
        self.not_built: dict[str, str] = {}
        built = []
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            reason = left_out(name)
            if reason is None:
                try:
                    self.build_extension(ext)
                    built.append(ext)
                    continue
                except BuildError as error:
                    if REQUIRED[name]:
                        raise SystemExit(
                            f"error: fastsae: building the {KERNELS[name]} failed: {error}"
                        ) from None
                    reason = error.short()
                    warn(f"its {KERNELS[name]}", reason, name)
            self.not_built[name] = reason
        self.extensions[:] = built
        self.distribution.ext_modules = self.extensions
        self.settle(Path(self.build_lib, "fastsae"))
        # The wheel's tag was decided before the compilers had their say.
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None and not self.extensions:
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        torch, temp = torch_dir(), Path(self.build_temp).resolve()
        compile_to, link = LIBRARIES[name](torch, temp)
        # Objects of another compiler, other flags or another torch are others.
        made_by = [
            *compile_to,
            output(compile_to[0], "--version"),
            (torch / "version.py").read_text(),
        ]
        objects_dir = temp / hashlib.sha256("\0".join(made_by).encode()).hexdigest()[:12]
        headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl")]
        newest = max(p.stat().st_mtime for p in [*headers, ROOT / "setup.py"])
        objects, stale = {}, {}
        for source in ext.sources:
            obj = objects_dir / Path(source).with_suffix(".o")
            objects[source] = str(obj)
            obj.parent.mkdir(parents=True, exist_ok=True)
            since = max(newest, (ROOT / source).stat().st_mtime)
            if self.force or not obj.exists() or obj.stat().st_mtime <= since:
                stale[source] = [*compile_to, str(ROOT / source), "-o", str(obj)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = dict(zip(stale, pool.map(failure, stale.values())))
        lost = {source: error for source, error in errors.items() if error}
        # The C++ sources call one another; each CUDA source stands alone.
        if lost and (name == "_cpu" or REQUIRED[name] or len(lost) == len(objects)):
            raise BuildError("\n".join(map(str, lost.values())))
        for source, error in lost.items():
            self.not_built[source] = error.short()
            warn(f"the kernels of {source}", error.short(), name)
        whole = [obj for source, obj in objects.items() if source not in lost]
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        run([*link[:1], *whole, "-o", str(library), *link[1:]])

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.settle(ROOT / "fastsae")

    def settle(self, folder: Path) -> None:
        """No library of an earlier build stays, and what was not built is told."""
        for name in set(LIBRARIES) & set(self.not_built):
            (folder / f"{name}.abi3.so").unlink(missing_ok=True)
        note = folder / "_not_built.json"
        note.unlink(missing_ok=True)
        if self.not_built:
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(self.not_built, indent=1) + "\n")


def sources(pattern: str, *folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for d in folders for p in (ROOT / d).glob(pattern))


SOURCES = {
    "fastsae._cpu": sources("*.cpp", "csrc/cpu", "csrc/cpu/support"),
    "fastsae._cuda": sources("*.cu", "csrc/cuda", "csrc/cuda/support"),
}

if __name__ == "__main__":  # tests import the functions above
    setup(
        packages=[
            *find_packages(include=["fastsae", "fastsae.*"], exclude=["fastsae.triton_kernels*"]),
            "fastsae.triton_kernels",
            *(f"fastsae.triton_kernels.{name}" for name in find_packages("triton_kernels")),
        ],
        package_dir={"fastsae.triton_kernels": "triton_kernels"},
        ext_modules=[
            Extension(name, files, py_limited_api=True) for name, files in SOURCES.items()
        ],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
