"""Steering in compiled models, and what a captured graph needs: no host sync, fixed addresses.

No GPU captures anything here: a dispatch mode refuses, in the host code around the kernels, what
could not be captured. That kernels replay with new tables is unverified on a GPU.
"""

from __future__ import annotations

import importlib
import os
import shutil

import pytest
import torch
from common import randn
from small_models import LAYER, PROGRAMS, D, F, prompt, tiny, topk_sae
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastsae
from fastsae.steer import (
    Description,
    ablate,
    active,
    add,
    add_vector,
    attach,
    clamp,
    min_clamp,
    positions,
    project_clamp,
    project_out,
    scale,
)

OTHERS = [
    [[clamp(5, 9.0)], [clamp(1, 4.0), ablate(2)], None],
    [
        [add_vector(randn(D, seed=1))],
        [min_clamp(2, 4.0), scale(3, 0.5, when=active(4))],
        [project_out(randn(D, seed=2)), clamp(8, -2.0)],
    ],
    [[add(3, 1.0)], None, [project_clamp(randn(D, seed=3), 2.0)]],  # no latent is read
]


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="inductor needs a C++ compiler",
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_inductor_follows_programs_without_recompiling(family):
    torch._dynamo.reset()
    model, ids = tiny(family), prompt(3)
    steerer = attach(model, topk_sae(), layer=LAYER)
    compiled = torch.compile(model, fullgraph=True)
    plain = model(ids, use_cache=False).logits
    graphs = None
    for programs in (PROGRAMS, *OTHERS, [None] * 3):
        with steerer.steer(programs):
            got = compiled(ids, use_cache=False).logits
            want = model(ids, use_cache=False).logits
        assert torch.allclose(got, want, atol=1e-4)
        for row, program in enumerate(programs):
            same = torch.allclose(got[row], plain[row], atol=1e-4)
            assert same == (program is None)
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


class Site(nn.Module):
    """A model with one module to steer."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.weight = nn.Identity(), nn.Parameter(torch.zeros(1, D))

    def forward(self, inputs_embeds, input_ids=None, attention_mask=None):
        return self.site(inputs_embeds)


SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")
OPERATORS = {
    name: importlib.import_module(f"fastsae.ops.{name}")._run
    for name in ("steer", "topk_member", "topk_encode")
}


class Capturing(TorchDispatchMode):
    """Refuses what a CUDA graph could not hold, in this package's operators too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        self.seen.append(name)
        if name in OPERATORS:
            with self:
                return OPERATORS[name](*args, **kwargs)
        if name in SYNCS or "unique" in name or str(func) == "aten.repeat_interleave.Tensor":
            raise AssertionError(f"{func} waits for the device, or its shape depends on data")
        if name == "lift_fresh":
            raise AssertionError("a constant is copied from the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} by a mask"
        assert kwargs.get("device") in (None, torch.device("cpu"))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert len({t.device for t in tensors}) <= 1, f"{func} copies between devices"
        return func(*args, **kwargs)


@pytest.fixture
def kernels_run_unseen(monkeypatch):
    """What Triton's interpreter does on the host is not what a GPU would run."""
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    launch = executor.__call__

    def hidden(self, *args, **kwargs):
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", hidden)


def described(kind: str) -> Description:
    options: dict = {
        "relu": {},
        "jumprelu": {"threshold": 0.2},
        "gated": {"gain": randn(F, seed=9).exp(), "offset": randn(F, seed=8)},
        "topk": {"k": 5, "rank_scale": randn(F, seed=7).abs() + 0.1},
    }
    rows = [randn(F, D, seed=i) / D**0.5 for i in (1, 2)]
    return Description(
        rows[0], randn(F, seed=3), rows[1], randn(D, seed=4), kind, True, **options[kind]
    )


def addresses(steerer) -> dict[str, int]:
    buffers = vars(steerer._buffers).items()
    return {n: t.data_ptr() for n, t in buffers if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize(
    "kind,length", [("relu", 1), ("jumprelu", 1), ("gated", 1), ("topk", 1), ("topk", 6)]
)
@torch.no_grad()
def test_a_forward_could_be_captured(kind, length, kernels_run_unseen):
    """Every operation and choice of positions; programs only write into buffers that stay."""
    with fastsae.use_backend("triton"):
        check_capture(kind, length)


def check_capture(kind: str, length: int) -> None:
    model, x = Site(), randn(3, length, D, seed=5)
    steerer = attach(model, described(kind), hook="site")
    ids, seen = torch.ones(3, length, dtype=torch.long), torch.ones(3, length)
    steerer._bos = (0,)
    choices = (
        None,
        positions.generated_only(),
        positions.prompt_only(exclude=("bos", "pad")),
        positions.at([0, 2]),
    )
    before = None
    for where in choices if length == 1 else choices[:1]:
        for programs in (PROGRAMS, *OTHERS) if length == 1 else (PROGRAMS, OTHERS[0]):
            with steerer.steer(programs, where, prompt_length=4, unedited="ignore"):
                before = before or addresses(steerer)
                now = addresses(steerer)
                assert all(now[n] == p for n, p in before.items() if n in now)
                want = model(x, input_ids=ids, attention_mask=seen)  # warmed up, as for a capture
                with Capturing() as capturing:
                    got = model(x, input_ids=ids, attention_mask=seen)
            assert torch.equal(got, want) and "steer" in capturing.seen
            if kind == "topk" and programs is PROGRAMS:
                assert "topk_member" in capturing.seen
    assert {"enc", "dec", "param", "code", "current", "_slots", "_wanted", "asked"} <= set(before)


def test_the_refusals_are_seen():
    """The mode above can fail."""
    x = randn(4)
    for wrong in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: bool((x > 0).any()),
        lambda: x.to("meta"),
    ):
        with pytest.raises(AssertionError), Capturing():
            wrong()
