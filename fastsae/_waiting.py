"""How the idle threads of a command wait.

OpenMP's threads spin while they wait for work. Where other programs share the cores, a spinning
thread holds the core that a working one needs. OpenMP reads its settings when it is loaded, with
torch, so a command makes them before. A program that imports fastsae keeps its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Whoever has set one of these has chosen.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def is_command() -> bool:
    """Whether this process is `fastsae ...` or `python -m fastsae ...`."""
    if sys.argv[:1] == ["-m"]:  # while the package is being imported
        after = sys.orig_argv.index("-m") + 1
        return sys.orig_argv[after : after + 1] == ["fastsae"]
    return bool(sys.argv) and Path(sys.argv[0]).stem == "fastsae"


def wait_passively() -> None:
    """Lets this process's idle threads sleep, if nobody chose and torch is not loaded yet."""
    if is_command() and "torch" not in sys.modules and not chosen():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def chosen() -> str | None:
    """The setting in force, as NAME=value; None: idle threads spin for a while."""
    return next((f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ), None)
