"""What this installation can do: versions, backends, CPU level, devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _dispatch, _library
from ._version import __version__


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, devices, the compiled CPU level and, per op and device, the backend chosen and why.

    Returns:
        A dict that `json.dumps` takes. `fastsae info [--json]` prints it.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    cpu_built = _library.CPU_MISSING is None
    return {
        "fastsae": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": {
            "built": cpu_built,
            "missing": _library.CPU_MISSING,
            "level": torch.ops.fastsae._cpu_level() if cpu_built else None,
            "levels": torch.ops.fastsae._cpu_levels().split() if cpu_built else [],
            "hooks": _library.CPU_FUNCTIONS is not None,  # a steered site is one C++ call
        },
        "cuda_kernels": {
            "built": _library.CUDA_MISSING is None,
            "missing": _library.CUDA_MISSING,
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FASTSAE_")},
        "ops": {
            op: {
                device: {
                    "backend": _dispatch.chosen(op, device, torch.float32),
                    "others": {
                        c.backend: c.missing or "usable"
                        for c in _dispatch.verdicts(op, device, torch.float32)
                    },
                }
                for device in devices
            }
            for op in _dispatch.OPS
        },
    }
