"""What this installation can do: versions, backends, CPU level, devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _dispatch, _explain, _library, _verified, _waiting
from ._version import __version__


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, devices, the compiled CPU level and, per op and device, the backend chosen and why.

    `checked` says which CPU levels have passed their known-answer checks on this processor, and
    `designs` the same for what each op may take: "passed", "failed: why", or "unknown".

    Returns:
        A dict that `json.dumps` takes. `fastsae info [--json]` prints it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    cpu_built = _library.CPU_MISSING is None
    return {
        "fastsae": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "waiting": _waiting.chosen(),  # how idle threads wait; None: they spin for a while
        "cpu_kernels": {
            "built": cpu_built,
            "missing": _library.CPU_MISSING,
            "level": torch.ops.fastsae._cpu_level() if cpu_built else None,
            "levels": torch.ops.fastsae._cpu_levels().split() if cpu_built else [],
            "checked": _checked_levels() if cpu_built else {},
            "hooks": _library.CPU_FUNCTIONS is not None,  # a steered site is one C++ call
        },
        "cuda_kernels": {
            "built": _library.CUDA_MISSING is None,
            "missing": _library.CUDA_MISSING,
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FASTSAE_")},
        "records": {device: str(_verified.record(torch.device(device)).path) for device in devices},
        "ops": {
            op: {
                device: {
                    "designs": _designs(op, device),
                    "backend": _explain.chosen(op, device, torch.float32),
                    "others": {
                        c.backend: c.missing or "usable"
                        for c in _explain.verdicts(op, device, torch.float32)
                    },
                }
                for device in devices
            }
            for op in _dispatch.OPS
        },
    }


def _checked_levels() -> dict[str, str]:
    """Of each CPU level: "passed" (how many of how many checks), "failed: which", "never"."""
    device = torch.device("cpu")
    record = _verified.record(device)
    record.refresh()
    found = {}
    for level in torch.ops.fastsae._cpu_levels().split():
        wanted = [
            _verified.Check(op, "cpu", level, str(dtype).removeprefix("torch."))
            for op in _dispatch.OPS
            for dtype in _dispatch.designs(op, "cpu", device)[level]
        ]
        passed = sum(record[c].state == _verified.PASSED for c in wanted)
        failed = [str(c) for c in wanted if record[c].state == _verified.FAILED]
        if failed:
            found[level] = "failed: " + ", ".join(failed)
        else:
            found[level] = f"passed {passed} of {len(wanted)} checks" if passed else "never"
    return found


def _designs(op: str, device: str) -> dict[str, dict[str, str]]:
    """The record of an op's designs by backend, fp32 and bf16."""
    found: dict[str, dict[str, str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for choice in _explain.verdicts(op, device, dtype):
            for design, state in choice.designs.items():
                name = str(dtype).removeprefix("torch.")
                found.setdefault(choice.backend, {})[f"{design} {name}"] = state
    return found
