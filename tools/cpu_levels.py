"""Runs the tests of the C++ kernels at each instruction-set level, and says which ran where.

    python tools/cpu_levels.py [arguments for pytest]

`make test` has run them at the level that is chosen on this machine; its other levels run here. A
level that the machine lacks does not run: qemu is no stand-in, see tools/emulate_arm.py.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import fastsae  # noqa: F401  (registers the operators)
from fastsae import _library

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
NO_TESTS = 5  # pytest's exit status


def on_silicon(level: str, more: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--cpu-kernels"]
    try:
        import xdist  # noqa: F401

        command += ["-n", "auto", "--dist", "worksteal"]
    except ImportError:
        pass
    environment = os.environ | {"FASTSAE_CPU_LEVEL": level}
    return subprocess.run([*command, *more], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    more = sys.argv[1:]
    if _library.CPU_MISSING is not None:
        print(f"cpu_levels.py: no level was run: {_library.CPU_MISSING}")
        return 0
    have = torch.ops.fastsae._cpu_levels().split()
    chosen = torch.ops.fastsae._cpu_level()
    x86 = platform.machine() in ("x86_64", "AMD64")
    summary, failed = [], False
    for level in LEVELS if x86 else LEVELS[:1]:
        if level == chosen:
            summary.append((level, "on this CPU, by make test"))
            continue
        if level not in have:
            summary.append((level, "NOT RUN: this CPU lacks it"))
            continue
        print(f"== CPU level {level}", flush=True)
        code = on_silicon(level, more)
        bad = code not in (0, NO_TESTS if more else 0)
        failed |= bad
        summary.append((level, "on this CPU" + (": FAILED" if bad else "")))
    if x86:
        summary.append(("ARM (portable)", "NOT RUN: make test-arm emulates it"))
    print(f"CPU levels on {processor()}")
    for level, where in summary:
        print(f"  {level:<15} {where}")
    return int(failed)


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
