"""Runs the tests of the C++ kernels on ARM under qemu-user: the portable level, cross-compiled.

    python tools/emulate_arm.py [arguments for pytest]

Needs qemu, a cross compiler and mmdebstrap (on Debian: apt-get install qemu-user-static
g++-aarch64-linux-gnu mmdebstrap). A small Debian with Python and an aarch64 build of torch are
fetched once (170 MB to download, 0.8 GB on disk) and kept in $FASTSAE_EMULATION, else
~/.cache/fastsae/emulation. What is missing is named, with exit status 3.

x86 levels are not emulated: qemu knows no AVX-512, and up to 10.0 its AVX2 faults on a masked load
of no lanes, which reads nothing on a CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(
    os.environ.get("FASTSAE_EMULATION")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsae" / "emulation"
)
NOT_POSSIBLE = 3
# Every C++ kernel. An emulated multiply-add takes some two hundred times as long as one on silicon,
# so only tests are run that this CPU is through with in a moment.
TESTS = [
    "cpu/test_topk_encode", "ops/test_topk", "ops/test_topk_encode", "ops/test_topk_member",
    "ops/test_sparse_decode", "ops/test_sparse_grad_values", "ops/test_sparse_grad_weight",
    "ops/test_sparse_adam_step", "ops/test_steer", "ops/test_moments",
    "cpu/test_backward_kernels", "train/test_fused_adam", "train/test_fused_adam_formats",
]  # fmt: skip

MOST_S = 0.1
# Processes of their own, which import torch anew (a minute), and what does not run a kernel.
LEFT_OUT = ["extra_memory", "opcheck", "two_processes", "never_waits", "rows_in_parts"]

# The oldest torch that fastsae takes; its aarch64 wheel is without CUDA.
TORCH, PYTHON, SUITE = "2.10.0", "3.11", "bookworm"
DEBIAN = [
    f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib",
    f"python{PYTHON}", "libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libexpat1",
    "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1", "media-types",
]  # fmt: skip
WHEELS = [
    f"torch=={TORCH}", "numpy", "safetensors", "typing_extensions", "filelock", "fsspec", "sympy",
    "mpmath", "networkx", "jinja2", "markupsafe", "pytest", "iniconfig", "pluggy", "packaging",
    "pygments", "hypothesis", "sortedcontainers",
]  # fmt: skip
PLATFORMS = ["manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17"]


class NotPossibleError(Exception):
    """The emulation cannot run here; the message says what is missing."""


def find(package: str, *names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise NotPossibleError(
        f"{names[-1]} is missing (on Debian and Ubuntu: apt-get install {package})"
    )


def setup_functions() -> ModuleType:
    """setup.py's functions."""
    spec = importlib.util.spec_from_file_location("fastsae_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def once(name: str, make: list[str]) -> Path:
    """A folder that a command fills; the command is given the folder as its last word."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"emulate_arm.py: fetching {name} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "made"
            done = subprocess.run([*make, str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotPossibleError(f"{make[0]} failed:\n{done.stderr[-2000:]}")
            made.rename(folder)
    return folder


def debian() -> Path:
    """A folder with an aarch64 Python and the libraries that it and torch need."""
    command = [find("mmdebstrap", "mmdebstrap"), "--quiet", "--variant=extract"]
    # The folder comes last but for no mirror: the suite's own is meant.
    command += ["--architectures=arm64", f"--include={','.join(DEBIAN)}", SUITE]
    return once(f"{SUITE}-{digest(*DEBIAN)}", command)


def site() -> Path:
    """A folder with aarch64 wheels."""
    platforms = [word for p in PLATFORMS for word in ("--platform", f"{p}_aarch64")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", "--implementation=cp", "--python-version", PYTHON]
    return once(f"site-{digest(*WHEELS)}", [*command, *platforms, *WHEELS, "--target"])


def digest(*words: str | bytes) -> str:
    total = hashlib.sha256()
    for word in words:
        total.update(word.encode() if isinstance(word, str) else word)
    return total.hexdigest()[:12]


def library(torch: Path) -> Path:
    """The C++ library for aarch64, compiled as setup.py would there."""
    cxx = find("g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++")
    setup = setup_functions()
    os.environ["CXX"] = cxx
    compile_to, link = setup.cpu_commands(torch, CACHE)
    sources = setup.sources("*.cpp", "csrc/cpu", "csrc/cpu/support")
    files = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".h", ".inl")]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    words = [*compile_to, *link, version]
    name = digest(*(p.read_bytes() for p in files), " ".join(words).replace(str(ROOT), ""))
    made = CACHE / f"_cpu-{name}.so"
    if made.exists():
        return made
    print("emulate_arm.py: compiling for aarch64 ...", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:

        def compile_one(source: str) -> str:
            target = str(Path(temporary) / f"{Path(source).stem}.o")
            setup.run([*compile_to, str(ROOT / source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        result = Path(temporary) / made.name
        setup.run([*link[:1], *objects, "-o", str(result), *link[1:]])
        result.rename(made)
    return made


def copy_checkout(into: Path, compiled: Path) -> None:
    """The package, with that library instead of this machine's, and its tests."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    shutil.copytree(ROOT / "fastsae", into / "fastsae", ignore=leave)
    shutil.copytree(ROOT / "triton_kernels", into / "fastsae/triton_kernels", ignore=leave)
    for name in ("tests", "csrc", "triton_kernels"):
        shutil.copytree(ROOT / name, into / name, ignore=leave)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, into)
    shutil.copy(compiled, into / "fastsae" / "_cpu.abi3.so")


def takes_long(command: list[str], files: list[str]) -> list[str]:
    """Those tests of `files` that take this CPU more than MOST_S, by running them."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        words = ["-n", "auto", f"--junitxml={report}", "-o", "junit_family=xunit1", *files]
        environment = os.environ | {"FASTSAE_CPU_LEVEL": "portable", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise NotPossibleError("the tests fail on this CPU, or there are none: see above")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found = []
    for case in cases:
        module = case.attrib["file"].removesuffix(".py").replace("/", ".")
        within = case.attrib["classname"].removeprefix(module).replace(".", "::")
        if float(case.attrib["time"]) > MOST_S:
            found.append(f"{case.attrib['file']}{within}::{case.attrib['name']}")
    lost = {file for file in files if not any(
        case.attrib["file"] == file and float(case.attrib["time"]) <= MOST_S for case in cases
    )}  # fmt: skip
    if lost:
        raise NotPossibleError(f"too busy to tell quick tests from slow ones in {sorted(lost)}")
    print(f"emulate_arm.py: {len(found)} of {len(cases)} tests take more than {MOST_S} s: left out")
    return found


def run(python: list[str], folder: Path, environment: dict[str, str], more: list[str]) -> int:
    """pytest in as many processes as there are cores; xdist would start workers of its own kind."""
    words = ["-m", "pytest", "-q", "-m", "not slow", "--cpu-kernels", "-p", "no:cacheprovider"]
    words += more
    if "-k" not in more:
        words += ["-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    if any(word.startswith("tests/") for word in more):
        parts: list[list[str]] = [[]]
    else:
        cores = os.cpu_count() or 1
        files = [f"tests/{name}.py" for name in TESTS if (folder / f"tests/{name}.py").exists()]
        parts = [files[i::cores] for i in range(min(cores, len(files)))]
        for test in takes_long([sys.executable, *words], files):
            words += ["--deselect", test]
    command = [*python, *words, "--hypothesis-profile=emulated"]
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}

    def one(files: list[str]) -> int:
        tests = subprocess.Popen(
            [*command, *files], cwd=folder, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert tests.stdout is not None
        for line in tests.stdout:  # as it comes: lines of the parts between one another
            print(line, end="", flush=True)
        return tests.wait()

    with ThreadPoolExecutor(len(parts)) as pool:
        codes = list(pool.map(one, parts))
    # a part in which -k leaves no test is no failure, if another has some
    return next((c for c in codes if c not in (0, 5)), 0 if 0 in codes else codes[0])


def arm(more: list[str]) -> int:
    qemu = find("qemu-user-static", "qemu-aarch64", "qemu-aarch64-static")
    root, packages = debian(), site()
    compiled = library(packages / "torch")
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        copy_checkout(folder, compiled)
        python = [qemu, "-L", str(root), f"{root}/usr/bin/python{PYTHON}"]
        return run(python, folder, {"PYTHONPATH": f"{folder}:{packages}"}, more)


def main() -> int:
    try:
        return arm(sys.argv[1:])
    except NotPossibleError as why:
        print(f"emulate_arm.py: not run: {why}")
        return NOT_POSSIBLE


if __name__ == "__main__":
    sys.exit(main())
