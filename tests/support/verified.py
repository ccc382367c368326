"""What the tests of verified kernels share."""

from __future__ import annotations

import pytest
import torch

from fastsae import _library
from fastsae._verified import Check

CPU = torch.device("cpu")
BUILT = _library.CPU_MISSING is None
LEVELS = torch.ops.fastsae._cpu_levels().split() if BUILT else []
ONE = Check("sparse_decode", "cpu", "portable", "float32")

built = pytest.mark.skipif(not BUILT, reason=str(_library.CPU_MISSING))
