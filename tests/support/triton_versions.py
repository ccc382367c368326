"""Runs the tests that compile every Triton kernel under the oldest and the newest supported Triton.

    python tests/support/triton_versions.py                       both (minutes)
    python tests/support/triton_versions.py 3.7.1 -k sparse_decode

Each version is installed once into build/triton-<version>, which needs a package index; what
follows the versions is passed on to pytest. Exits with the number of versions under which a test
fails: something spills, does not compile, or lacks its tensor-core instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# torch 2.10 and 2.11 bring 3.6.0.
OLDEST, NEWEST = "3.6.0", "3.9.0"
ROOT = Path(__file__).parents[2]


def install(version: str) -> Path:
    """The folder of a version, installed if it is not there."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        target = ["--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run([*pip, *target], check=True)
    return folder


def compiles(version: str, arguments: list[str]) -> bool:
    """Whether the tests pass."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(install(version)), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, "-m", "pytest", "-q", "tests/triton/test_compile.py"]
    try:
        import xdist  # noqa: F401

        command += ["-n", "auto", "--dist", "worksteal"]
    except ImportError:
        pass
    print(f"== Triton {version}", flush=True)
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, check=False).returncode == 0


def main() -> None:
    """Exits with the number of versions that fail."""
    versions = [a for a in sys.argv[1:] if re.fullmatch(r"\d+\.\d+\.\d+", a)]
    arguments = [a for a in sys.argv[1:] if a not in versions]
    raise SystemExit(sum(not compiles(v, arguments) for v in versions or (OLDEST, NEWEST)))


if __name__ == "__main__":
    main()
