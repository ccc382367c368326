"""What a kernel module declares about its launches, so that tests compile each one offline.

Every module with kernels defines `configurations()`; `tests/triton/test_compile.py` compiles what
it returns for every architecture, and fails when a kernel that the module launches is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel, as a launch with these types would build it."""

    kernel: Any
    label: str  # shape and dtype that it stands for, e.g. "bf16 D=4096"
    # Runtime arguments: "*bf16" (pointers count as 16-byte aligned), "i64", "fp32",
    # "i32:16" for an integer divisible by 16, "tensordesc<bf16[128,64]>" for a TMA descriptor.
    signature: dict[str, str]
    # The rest; arguments in neither take their defaults. An integer that is 1 belongs here too:
    # a launch turns it into a constant.
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False  # expects HMMA / HGMMA / UTCMMA / MFMA
    tma: bool = False  # expects TMA loads on sm_90 and later
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
