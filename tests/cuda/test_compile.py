"""Every CUDA file compiles for every architecture without spills; the host shim finds errors."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import artefacts
import cuda_host
import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNEL = re.compile(r"Compiling entry function '\w+' for '(\w+)'")
SPILL = re.compile(r"properties for (\w+)\s+\d+ bytes stack frame, ([1-9]\d*) bytes spill stores")


# all that setup.py builds: the ops, and what serves them
SOURCES = {p.stem: p for p in sorted((ROOT / "csrc/cuda").rglob("*.cu"))}


def build():
    """setup.py's functions."""
    spec = importlib.util.spec_from_file_location("fastsae_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The architectures, and what ptxas says about every kernel: {op: file}."""
    setup, objects = build(), tmp_path_factory.mktemp("objects")
    setup.CUDA_ARCHS = tuple(a for a in setup.CUDA_ARCHS if "+" not in a)  # PTX has no registers
    try:
        command, _ = setup.cuda_commands(setup.torch_dir(), tmp_path_factory.mktemp("stub"))
    except setup.BuildError as error:
        pytest.skip(str(error))
    command = [*command, "-Xptxas", "-v"]
    # the same wherever the checkout and torch lie
    flags = " ".join(command[1:]).replace(str(setup.torch_dir()), "").replace(str(ROOT), "")

    def compile_one(op):
        source = SOURCES[op]

        def compile_to(path):  # half a minute a file
            made = path.with_suffix(".o")
            run = subprocess.run(
                [*command, str(source), "-o", str(made)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert run.returncode == 0, run.stderr
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as both:
                both.write(made, "object")
                both.writestr("report", run.stdout + run.stderr)

        name = f"cuda_ptxas/{op}-{cuda_host.digest(source, command[:1], flags)}.zip"
        with zipfile.ZipFile(artefacts.kept(name, compile_to)) as both:
            (objects / f"{op}.o").write_bytes(both.read("object"))
            (objects / f"{op}.txt").write_bytes(both.read("report"))
        return op, objects / f"{op}.txt"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        archs = {f"sm_{a}" for a in re.findall(r"code=sm_(\w+)", " ".join(command))}
        return archs, dict(pool.map(compile_one, SOURCES))


@pytest.mark.slow
def test_compiles_without_spills_for_every_architecture(reports):
    archs, outputs = reports
    assert archs and outputs
    for op, path in outputs.items():
        text = path.read_text()
        assert "warning" not in text, text
        assert set(KERNEL.findall(text)) == archs, op
        assert SPILL.findall(text) == [], op


@pytest.mark.slow
def test_the_product_of_topk_encode_is_what_was_counted(reports):
    """As benchmarks/notes/topk_encode.md says: tensor cores fed from shared memory, no fence of all
    memory."""
    archs, outputs = reports
    if "sm_90a" not in archs:
        pytest.skip("this nvcc does not know sm_90a")
    tool = Path(triton_tools()) / "cuobjdump"
    path = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    command = [tool, "-sass", "-arch", "sm_90a", outputs["topk_encode"].with_suffix(".o")]
    text = subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout
    kernels = text.split("Function : ")[1:]
    assert len(kernels) == 4  # bf16, fp16; with rank_scale and without
    for kernel in kernels:
        name, *_ = kernel.split()
        code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?(\w+)(\S*)", kernel)
        products = [i for i, (what, _) in enumerate(code) if what == "HGMMA"]
        loop = {what for what, _ in code[products[0] : products[-1]]}
        assert all(code[i][1].startswith(".64x256x16.F32") for i in products), name
        assert not loop & {"MEMBAR", "CCTL", "STL", "LDL", "STG"}, (name, loop)
        loads = {kind for what, kind in code if what == "UTMALDG"}
        assert loads == {".2D", ".2D.MULTICAST"}, name
        vote = next(i for i, (what, _) in enumerate(code) if what == "VOTE")
        # for 128 scores of a thread, of which most are not recorded
        assert vote - products[-1] <= (400 if "Lb0" in name else 560), name


def triton_tools() -> Path:
    nvidia = pytest.importorskip("triton.backends.nvidia")
    return Path(nvidia.__file__).parent / "bin"


TORCH_CUDA = r"""
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }
void torch_c10_cuda_check_msg(int e, const char* f, const char* g, unsigned l, int b, char** m) {}
void torch_c10_cuda_free_error_msg(char* m) {}
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the library itself is loaded")
def test_links_and_registers_every_op(reports, tmp_path):
    """Each source alone, because a build leaves out one that fails, and all together. With a
    stand-in for the functions of libtorch_cuda that the library needs."""
    setup = build()
    assert {Path(p).stem for p in setup.SOURCES["fastsae._cuda"]} == set(SOURCES)
    _, link = setup.cuda_commands(setup.torch_dir(), tmp_path)
    objects = {op: str(path.with_suffix(".o")) for op, path in reports[1].items()}
    libraries = []
    for op, some in [*((op, [path]) for op, path in objects.items()), ("all", objects.values())]:
        libraries.append(str(tmp_path / f"{op}.so"))
        setup.run([*link[:1], *some, "-o", libraries[-1], *link[1:]])
    whole = libraries.pop()
    stub = tmp_path / "libtorch_cuda.so"
    (tmp_path / "stub.c").write_text(TORCH_CUDA)
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub)]
    setup.run([*setup.compiler(), "-x", "c", str(tmp_path / "stub.c"), *flags])
    code = f"""
import torch, fastsae
for library in LIBRARIES:
    torch.ops.load_library(library)
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [op for op in {list(cuda_host.REGISTERED.values())} if not has(op, "CUDA")]
print(missing, has("fastsae::_cuda_image", "CompositeExplicitAutograd"))
"""
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_BIND_NOW": "1"}
    for some in (libraries, [whole]):
        run = subprocess.run(
            [sys.executable, "-c", code.replace("LIBRARIES", str(some))],
            env=env, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.stdout.strip() == "[] True", run.stderr


SHIM_TEST = r"""
#include "cuda_on_host.h"
namespace {
using cuda_on_host::Queue;
struct Shared { int v[64]; };
void reverse(int* x, bool barrier) {
  Shared& s = cuda_on_host::dynamic_shared<Shared>();
  const int t = threadIdx.x;
  s.v[t] = x[t];
  if (barrier) __syncthreads();
  x[t] = s.v[63 - t] + 100 * __shfl_xor_sync(~0u, t, 1);
}
void diverges(int* x, bool) {
  if (threadIdx.x < 7) __syncthreads();
  x[0] = __ballot_sync(~0u, threadIdx.x % 2);
}
}
extern "C" int run(int which, int* x) {
  try {
    Queue(0).launch(which == 2 ? diverges : reverse, 1, 64, sizeof(Shared), x, which == 0);
  } catch (const std::exception&) { return 1; }
  return 0;
}
"""


def test_the_shim_finds_missing_and_divergent_barriers(tmp_path):
    cxx = os.environ.get("CXX", "g++").split()
    if shutil.which(cxx[0]) is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "shim.cpp").write_text(SHIM_TEST)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    flags += [f"-I{ROOT / 'tests/support'}"]
    library = tmp_path / "shim.so"
    subprocess.run([*cxx, *flags, str(tmp_path / "shim.cpp"), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run
    right = [63 - t + 100 * (t ^ 1) for t in range(64)]

    def call(which):
        x = (ctypes.c_int * 64)(*range(64))
        return run(which, x), list(x)

    assert call(0) == (0, right)
    code, got = call(1)  # without the barrier some read poison
    assert code == 0 and got != right
    assert call(2)[0] == 1
    assert call(0) == (0, right), "usable after an error"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the ops use the GPU")
def test_every_cuda_file_runs_on_the_cpu():
    assert cuda_host.load() is None
    for key in cuda_host.REGISTERED.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(key, "CPU")
