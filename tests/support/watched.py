"""A mode under which nothing may wait for the device."""

from __future__ import annotations

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "equal", "is_nonzero",
}  # fmt: skip


class Watched(TorchDispatchMode):
    """Refuses what waits for the device; notes the shapes of every result."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, name
        if name in ("index", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"{name} by a mask"
        if func.namespace == "fastsae" and not name.endswith("_cuda"):
            # its Python body under this mode as well: no mode is on here
            with self:
                out = importlib.import_module(f"fastsae.ops.{name}")._run(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        shapes = [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.shapes.append((name, shapes))
        return out
