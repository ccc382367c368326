"""What a release runs: one build of the wheel must pass the operator tests under several torch.

    python tools/release_check.py [--torch 2.13.0 2.10.0] [--keep DIR] [--envs DIR]

Builds the wheel once, with the torch of this interpreter; checks its tag and that its library asks
for nothing of torch but the stable C interface; then, per torch version, makes a virtual
environment, installs that torch and the wheel, and runs the operator tests outside the checkout.
pip's own settings choose where torch comes from; a build with CUDA (several GB) will do, also on a
machine without a GPU. `--envs` keeps the environments for the next run.
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
# The kernels must be there: without them the tests would skip what is to be checked.
WHERE = """
import fastsae, torch
assert fastsae._library.CPU_MISSING is None, fastsae._library.CPU_MISSING
print(torch.__version__, fastsae.__file__)
"""
TESTS = [
    "conftest.py", "triton_interpreter.py", "cuda_host.py",
    "test_sparse_*.py", "test_topk*.py", "test_cpu_*.py", "test_dispatch.py",
]  # fmt: skip


def run(*command: str | Path, **kwargs) -> str:
    """Runs a command, shows it, stops when it fails."""
    print("+", *command, flush=True)
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


def check_symbols(wheel: Path, scratch: Path) -> None:
    """No C++ symbol of torch: those change from release to release."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fastsae/_cpu.abi3.so", scratch)
    symbols = run("nm", "-D", "--undefined-only", library, stdout=subprocess.PIPE).split()
    foreign = [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))]
    if foreign:
        raise SystemExit(f"{library} uses symbols outside the stable interface: {foreign}")


def check_torch(version: str, wheel: Path, envs: Path, scratch: Path) -> str:
    """The operator tests, under this version of torch; returns its full version."""
    python = envs / f"torch-{version}/bin/python"
    if not python.exists():
        run(sys.executable, "-m", "venv", python.parent.parent)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run(*pip, f"torch=={version}", "numpy", "safetensors", "pytest", "hypothesis")
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    home = scratch / version
    tests = home / "tests"
    tests.mkdir(parents=True)
    for pattern in TESTS:
        for file in (ROOT / "tests").glob(pattern):
            shutil.copy(file, tests)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = run(python, "-c", WHERE, cwd=home, env=env, stdout=subprocess.PIPE).split()
    print(*found)
    # the wheel holds the C++ kernels: the others run from sources, whichever torch is there
    mine = ("-k", "not triton and not cuda")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *mine, tests, cwd=home, env=env)
    return found[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=["2.13.0", "2.10.0"], metavar="VERSION")
    parser.add_argument("--keep", type=Path, help="folder for the wheel; default: not kept")
    parser.add_argument("--envs", type=Path, help="folder for the environments; default: not kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = build_wheel(scratch)
        check_symbols(wheel, scratch)
        envs = (args.envs or scratch / "envs").resolve()
        passed = [check_torch(version, wheel, envs, scratch) for version in args.torch]
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, args.keep)
    print(f"{wheel.name} passes under torch {', '.join(passed)}")


if __name__ == "__main__":
    main()
