"""setup.py: which compiler it takes, what it builds, and what it tells when it cannot.

Compilers and torch are stand-ins, of CUDA versions that no machine has; an output holds the command
that made it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastsae import _library

ROOT = Path(__file__).parents[2]
STATIC = "libcudart_static.a"
TOOL = r"""#!/bin/sh
case "$*" in
  *--version*) echo "release {version}, V{version}"; exit ;;
  *--list-gpu-arch*) printf '{archs}'; exit ;;
  *--dryrun*) exit ;;
  {fails}) echo "csrc/x.cu(57): error: identifier is undefined" >&2; exit 1 ;;
esac
line="$*"
while [ "$1" != -o ]; do shift; done
echo "$line" >"$2"
"""
ARCHS = r"compute_80\ncompute_90\ncompute_100\n"


def tool(path: Path, version: str = "1", fails: str = "nothing", archs: str = ARCHS) -> Path:
    """A compiler that fails where its command line matches the pattern `fails`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TOOL.format(version=version, fails=fails, archs=archs))
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path):
    """A copy of the sources, with a torch of CUDA 99.1 and a C++ compiler that writes no code."""
    hidden = shutil.ignore_patterns("*.so", "*.json", "triton_kernels", "__pycache__", "assets")
    for folder in ("fastsae", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=hidden)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, tmp_path)
    torch = tmp_path / "site/torch"
    (torch / "include/torch/csrc/stable").mkdir(parents=True)
    (torch / "include/torch/csrc/stable/tensor.h").touch()
    (torch / "lib").mkdir()
    (torch / "lib/libtorch_cuda.so").touch()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("cuda: Optional[str] = '99.1'\n")
    tool(tmp_path / "g++")
    return tmp_path


def setup(project: Path, *command: str, nvcc: tuple[Path, ...] = (), **env: str):
    """Runs setup.py with these CUDA compilers first on the path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSAE_", "CUDA", "NVCC"))}
    path = os.pathsep.join([*(str(n.parent) for n in nvcc), os.environ["PATH"]])
    site = {"PYTHONPATH": str(project / "site"), "CXX": str(project / "g++"), "PATH": path}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=project, env={**clean, **site, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def inplace(project: Path, **kwargs):
    """The result of a build, the command that linked the CUDA library, and what was left out."""
    run = setup(project, "build_ext", "--inplace", **kwargs)
    cuda, note = project / "fastsae/_cuda.abi3.so", project / "fastsae/_not_built.json"
    return (
        run,
        cuda.read_text() if cuda.exists() else None,
        json.loads(note.read_text()) if note.exists() else {},
    )


def test_an_nvcc_of_another_cuda_hides_none(project):
    other, right = tool(project / "98/nvcc", "98.0"), tool(project / "99/nvcc", "99.2")
    run, cuda, note = inplace(project, nvcc=(other, right), FASTSAE_BUILD="1", FASTSAE_CUDA="1")
    assert run.returncode == 0, run.stderr
    assert f"{other}: is of CUDA 98 and torch was built with CUDA 99" in run.stdout
    assert "topk.o" in cuda and note == {}


@pytest.mark.parametrize("variable", ["NVCC", "CUDA_HOME", "packaged"])
def test_an_nvcc_that_does_not_work_is_passed_over(project, variable):
    """Such as one whose headers are missing, or whose host compiler is not the machine's."""
    broken = tool(project / "broken/bin/nvcc", "99.0", fails="*probe.cu*")
    folder = "site/nvidia/cu99/bin" if variable == "packaged" else "99/bin"
    right = tool(project / folder / "nvcc", "99.1")
    if variable == "packaged":
        (project / "site/nvidia/__init__.py").touch()  # hides this environment's
    env = {"NVCC": {"NVCC": str(right)}, "CUDA_HOME": {"CUDA_HOME": str(right.parent.parent)}}
    run, cuda, _ = inplace(project, nvcc=(broken,), FASTSAE_CUDA="1", **env.get(variable, {}))
    assert run.returncode == 0, run.stderr
    assert cuda and f"fastsae: {right}" in run.stdout


def test_a_source_that_does_not_compile_costs_only_itself(project):
    old = tool(project / "99/nvcc", "99.0", fails="*topk_encode.cu*")
    run, cuda, note = inplace(project, nvcc=(old,), FASTSAE_BUILD="1")
    assert run.returncode == 0, run.stderr
    assert "sparse_decode.o" in cuda and "topk_encode.o" not in cuda
    assert note == {"csrc/cuda/topk_encode.cu": "csrc/x.cu(57): error: identifier is undefined"}
    assert "WITHOUT the kernels of csrc/cuda/topk_encode.cu" in run.stderr

    run, *_ = inplace(project, nvcc=(old,), FASTSAE_CUDA="1")
    assert run.returncode != 0 and "identifier is undefined" in run.stderr


def test_without_a_usable_nvcc_the_cpu_library_is_built(project):
    """As `make quickstart` asks under a torch with CUDA; a library of an earlier build goes."""
    (project / "fastsae/_cuda.abi3.so").touch()
    other = tool(project / "98/nvcc", "98.0")
    run, cuda, note = inplace(project, nvcc=(other,), FASTSAE_BUILD="1")
    assert run.returncode == 0, run.stderr
    assert (project / "fastsae/_cpu.abi3.so").exists() and cuda is None
    assert "WITHOUT its CUDA kernels" in run.stderr and "is of CUDA 98" in note["_cuda"]

    run, *_ = inplace(project, nvcc=(other,), FASTSAE_CUDA="1")
    assert run.returncode != 0 and "is of CUDA 98" in run.stderr


def test_a_cpp_source_that_does_not_compile_is_an_error_where_it_is_asked_for(project):
    tool(project / "g++", fails="*topk.cpp*")
    run, _, note = inplace(project, FASTSAE_CUDA="0")
    assert run.returncode == 0 and "WITHOUT its C++ kernels" in run.stderr
    assert "identifier is undefined" in note["_cpu"] and "FASTSAE_CUDA=0" in note["_cuda"]
    run, *_ = inplace(project, FASTSAE_BUILD="1", FASTSAE_CUDA="0")
    assert run.returncode != 0 and "identifier is undefined" in run.stderr


def test_objects_of_another_architecture_are_not_linked(project):
    nvcc = (tool(project / "99/nvcc", "99.0"),)
    _, first, _ = inplace(project, nvcc=nvcc, FASTSAE_CUDA_ARCHS="80")
    _, second, _ = inplace(project, nvcc=nvcc)
    obj = next(part for part in second.split() if part.endswith("topk.o"))
    assert obj not in first and "code=sm_90a" in Path(obj).read_text()


@pytest.mark.parametrize("archs,ptx", [(ARCHS, "100"), (r"compute_80\ncompute_90\n", "90")])
def test_devices_of_later_architectures_find_the_newest_ptx(project, archs, ptx):
    nvcc = (tool(project / "99/nvcc", "99.0", archs=archs),)
    _, cuda, _ = inplace(project, nvcc=nvcc)
    command = Path(next(p for p in cuda.split() if p.endswith("topk.o"))).read_text()
    assert [p for p in command.split() if "code=compute" in p] == [
        f"arch=compute_{ptx},code=compute_{ptx}"
    ]


def test_wheels_hold_what_was_built_and_no_more(project):
    def wheel(**env):
        shutil.rmtree(project / "dist", ignore_errors=True)
        run = setup(project, "bdist_wheel", nvcc=(tool(project / "99/nvcc", "99.0"),), **env)
        assert run.returncode == 0, run.stderr
        (file,) = (project / "dist").glob("*.whl")
        return file.name, set(zipfile.ZipFile(file).namelist())

    cpu, cuda, note = (f"fastsae/{n}" for n in ("_cpu.abi3.so", "_cuda.abi3.so", "_not_built.json"))
    name, files = wheel()
    assert "-cp310-abi3-" in name and {cpu, cuda} <= files and note not in files
    assert {"fastsae/triton_kernels/topk.py", "fastsae/py.typed"} <= files
    assert {
        f"fastsae/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").rglob("*.py")
    } <= files
    name, files = wheel(FASTSAE_CUDA="0")
    assert "-cp310-abi3-" in name and {cpu, note} <= files and cuda not in files
    name, files = wheel(FASTSAE_BUILD="0")
    assert "-py3-none-any" in name and note in files and not {cpu, cuda} & files


def test_metadata_needs_no_compiler(project):
    """An sdist is made where there is neither torch nor a compiler."""
    shutil.rmtree(project / "site/torch")
    (project / "site/torch.py").touch()  # hides this environment's
    run = setup(project, "--version", FASTSAE_BUILD="1")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", ["plain", "with a space, and a comma"])
def test_the_packaged_compiler_links(tmp_path, monkeypatch, folder):
    """Its libraries are in lib, where it does not look: the real nvcc, laid out like it."""
    checkout = tmp_path / folder
    checkout.mkdir()
    shutil.copy(ROOT / "setup.py", checkout)
    (checkout / "fastsae").mkdir()
    shutil.copy(ROOT / "fastsae/_version.py", checkout / "fastsae")
    spec = importlib.util.spec_from_file_location("fastsae_setup", checkout / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("FASTSAE_CUDA_ARCHS", "80")
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    for nvcc in module.nvccs():
        top = module.toolkit(nvcc)
        libraries = next((f for f in ("lib64", "lib") if (top / f / STATIC).exists()), None)
        if libraries:
            break
    else:
        pytest.skip("no nvcc with its runtime")
    home = tmp_path / "cu"
    (home / "bin").mkdir(parents=True)
    for file in (top / "bin").iterdir():
        copy = shutil.copy if file.name in ("nvcc", "nvcc.profile") else os.symlink
        copy(file, home / "bin" / file.name)
    os.symlink(top / "nvvm", home / "nvvm")
    os.symlink(top / "include", home / "include")
    os.symlink(top / libraries, home / "lib")
    _, link = module.nvcc_commands(str(home / "bin/nvcc"), tmp_path)  # compiles and links
    assert f"-L{home / 'lib'}" in link


def test_what_was_not_built_is_told(monkeypatch):
    monkeypatch.setattr(_library, "CUDA_MISSING", None)
    monkeypatch.setattr(_library, "NOT_BUILT", {"csrc/cuda/topk.cu": "nvcc is too old", "_x": "no"})
    assert "topk was not built: nvcc is too old" in _library.cuda_missing("topk")
    assert "no CUDA C++ kernel" in _library.cuda_missing("steer")
    assert "were not built: no. To get them: do this" in _library._load("_x", "X", "do this")
