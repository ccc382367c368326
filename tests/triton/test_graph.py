"""No Triton launcher waits for the device or allocates by data: what a CUDA graph asks for.

The launchers are called as they are, so that the mode sees every torch operator inside; under the
public op it would see one. sparse_grad_weight_rows is left out: its result's size is its data's.
"""

from __future__ import annotations

import cuda_host
import pytest
import torch
from common import INTERPRETED, generator, randn
from steer_tables import tables
from watched import Watched

from fastsae import _dispatch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: graphs are captured")

N, D, F, K = 5, 24, 70, 3
KINDS = ("random", "equal", "ascending")
DATA_DEPENDENT = {"sparse_grad_weight_rows"}


def floats(kind, *shape, seed=0):
    if kind == "equal":
        return torch.ones(shape)
    if kind == "ascending":
        return torch.arange(shape[-1], dtype=torch.float32).expand(shape).contiguous()
    return randn(*shape, seed=seed)


def indices(kind, bound=F):
    if kind == "equal":  # every token has the same latents
        return torch.arange(K, dtype=torch.int32).expand(N, K).contiguous()
    if kind == "ascending":
        return torch.full((N, K), bound, dtype=torch.int32)  # none is in range
    return torch.randint(bound, (N, K), generator=generator(3), dtype=torch.int32)


def encoder(kind, dtype=torch.float32):
    W = floats(kind, F, D, seed=1)
    if kind == "ascending":  # every score beats those before it
        W = torch.arange(F)[:, None] * torch.ones(1, D)
    return floats(kind, N, D).to(dtype), W.to(dtype), floats(kind, F, seed=2).to(dtype)


def encode(kind, design, dtype=torch.float32, scale=False):
    return (*encoder(kind, dtype), K, True, torch.ones(F, dtype=dtype) if scale else None, design)


def adam(kind):
    moments = torch.zeros(F, D), torch.zeros(F, D)
    return (
        randn(F, D), *moments, floats(kind, N, K), indices(kind), floats(kind, N, D),
        1e-3, 0.9, 0.999, 1e-8, 0.0, 1, False, False, None, None, None, None,
    )  # fmt: skip


def steer(kind):
    slots = torch.full((N,), -1 if kind == "equal" else 0, dtype=torch.int32)
    x = floats(kind, N, D)
    return (x, *tables(2, 4, D, torch.float32), slots, None, None, 0, 1e-5, torch.empty_like(x))


CASES = {
    "topk": lambda kind: (floats(kind, N, 300), K),
    "topk large k": lambda kind: (floats(kind, 2, 2100), 1500),
    "topk_encode chunked": lambda kind: encode(kind, "chunked"),
    "topk_encode chunked bf16 scaled": lambda kind: encode(kind, "chunked", torch.bfloat16, True),
    "topk_encode bounded": lambda kind: encode(kind, "bounded"),
    "topk_encode fused": lambda kind: encode(kind, "fused", torch.bfloat16),
    "topk_encode hopper": lambda kind: encode(kind, "hopper", torch.bfloat16),
    "topk_encode fp8": lambda kind: encode(kind, "fp8"),
    "topk_member": lambda kind: (*encoder(kind), indices(kind), K, None, True, None, None),
    "sparse_decode": lambda kind: (floats(kind, N, K), indices(kind), randn(F, D), randn(D)),
    "sparse_grad_values": lambda kind: (floats(kind, N, D), indices(kind), randn(F, D)),
    "sparse_grad_weight": lambda kind: (floats(kind, N, K), indices(kind), floats(kind, N, D), F),
    "sparse_adam_step": adam,
    "steer": steer,
}


def test_every_op_has_a_case():
    assert {name.split()[0] for name in CASES} == set(_dispatch.OPS) - DATA_DEPENDENT


@pytest.mark.parametrize("name", CASES)
def test_neither_waits_nor_allocates_by_data(name):
    if "hopper" in name and (why := cuda_host.load()) is not None:
        pytest.skip(why)
    launch = _dispatch._implementation(name.split()[0], "triton")
    noted = []
    for kind in KINDS:
        arguments = CASES[name](kind)
        with Watched() as watched:
            launch(*arguments)
        noted.append(sorted(watched.shapes))
    assert noted[0] == noted[1] == noted[2]
    if name != "steer":  # writes into what it is given
        assert noted[0]


def test_a_launcher_that_waits_is_found():
    with pytest.raises(AssertionError, match="nonzero"), Watched():
        _dispatch._implementation("sparse_grad_weight_rows", "triton")(
            floats("random", N, K), indices("random"), floats("random", N, D), F
        )
