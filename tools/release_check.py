"""What a release runs: one build of the wheel must pass the tests under old and new torch.

    python tools/release_check.py [--torch 2.10.0@python3.12 2.15.0] [--envs DIR] [--keep DIR]
                                  [--bare] [--compile] [pytest arguments]

Builds the wheel once, with the torch of this interpreter; checks its tag and that its library asks
for nothing of torch but the stable C interface. Then, per version of torch (and interpreter, after
an @), makes an environment with that torch and the Triton it brings, installs the wheel, uses it
outside the checkout, and runs the tests on a copy of the checkout with the wheel's library.

The environments are kept (several GB each: a torch with CUDA will do, also on a machine without a
GPU), so that the next run starts at once. `--bare` makes some of their own with nothing but torch,
NumPy, safetensors and pytest: what needs more must skip. `--compile` runs the tests that compile
for GPUs too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["2.10.0", "2.15.0"]  # the oldest that is supported, the newest that was tried
ENVS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastsae/release_check"
LIBRARY = "fastsae/_cpu.abi3.so"
COMPILE_TESTS = ("tests/triton/test_compile.py", "tests/cuda/test_compile.py")
# The kernels must be there: without them the tests would skip what is to be checked.
USE = """
import torch, fastsae
assert fastsae._library.CPU_MISSING is None, fastsae._library.CPU_MISSING
assert "site-packages" in fastsae.__file__, fastsae.__file__
x, w = torch.randn(8, 64), torch.randn(512, 64)
values, indices = fastsae.ops.topk_encode(x, w, None, 4)
assert torch.equal(indices.long(), (x.double() @ w.double().T).topk(4).indices)
import fastsae.triton_kernels
from importlib.resources import files
assert (files("fastsae") / "assets/tiny_python_lm/model.safetensors").is_file()
print("torch", torch.__version__, "triton", fastsae.info()["triton"])
"""


def run(*command: str | Path, **kwargs) -> str:
    """Runs a command, shows it, stops when it fails."""
    print("+", *(c for c in map(str, command) if "\n" not in c), flush=True)
    return subprocess.run(list(map(str, command)), check=True, text=True, **kwargs).stdout


def build_wheel(out: Path) -> Path:
    """The wheel, built by this interpreter; a build without kernels is an error."""
    env = os.environ | {"FASTSAE_BUILD": "1"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(*pip, "-q", "-w", out, ROOT, env=env)
    (wheel,) = out.glob("fastsae_kernels-*.whl")
    if "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"{wheel.name}: the tag must be cp310-abi3")
    return wheel


def check_symbols(library: Path) -> None:
    """No C++ symbol of torch: those change from release to release."""
    symbols = run("nm", "-D", "--undefined-only", library, stdout=subprocess.PIPE).split()
    foreign = [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))]
    if foreign:
        raise SystemExit(f"{library} uses symbols outside the stable interface: {foreign}")


def checkout(folder: Path, library: Path) -> None:
    """A copy of the sources as they are now, with this library."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in run(*listed, cwd=ROOT, stdout=subprocess.PIPE).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(library, folder / LIBRARY)
    (folder / "fastsae/triton_kernels").symlink_to("../triton_kernels")


def environment(version: str, interpreter: str, bare: bool, wheel: Path, envs: Path) -> Path:
    """The interpreter of an environment with this torch and the wheel."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    tag = run(interpreter, "-c", code, stdout=subprocess.PIPE).strip()
    home = envs / f"torch-{version}-python-{tag}{'-bare' if bare else ''}"
    python = home / "bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        run(interpreter, "-m", "venv", home)
        run(*pip, f"torch=={version}", "pytest")
        (home / "complete").touch()
    run(*pip, wheel if bare else f"{wheel}[test]", f"torch=={version}")
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    return python


def check_torch(python: Path, home: Path, arguments: list[str], bare: bool) -> str:
    """Uses the installed wheel, then runs the tests; returns the versions."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = run(python, "-c", USE, cwd="/", env=env, stdout=subprocess.PIPE).strip()
    print(found)
    if not bare:
        run(python.with_name("fastsae"), "info", cwd="/", env=env)
    workers = [] if bare else ["-n", "auto", "--dist", "loadfile"]
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest, *workers, *arguments, cwd=home, env={**env, "PYTHONPATH": str(home)})
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=VERSIONS, metavar="VERSION[@PYTHON]")
    parser.add_argument("--envs", type=Path, default=ENVS, help=f"default: {ENVS}")
    parser.add_argument("--keep", type=Path, help="folder for the wheel; default: not kept")
    parser.add_argument("--bare", action="store_true", help="without the optional packages")
    parser.add_argument("--compile", action="store_true", help="compile for GPUs too")
    args, arguments = parser.parse_known_args()
    if not args.compile:
        arguments += [f"--ignore={file}" for file in COMPILE_TESTS]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = build_wheel(scratch)
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract(LIBRARY, scratch / "wheel"))
        check_symbols(library)
        checkout(scratch / "checkout", library)
        passed = []
        for wanted in args.torch:
            version, _, interpreter = wanted.partition("@")
            python = environment(
                version, interpreter or sys.executable, args.bare, wheel, args.envs.resolve()
            )
            passed.append(check_torch(python, scratch / "checkout", arguments, args.bare))
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, args.keep)
    print(f"{wheel.name} passes under {'; '.join(passed)}")


if __name__ == "__main__":
    main()
