"""torch.vmap works and equals a loop; torch.func's gradient transforms are refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from common import randn
from torch.autograd import forward_ad

from fastsae import ops
from fastsae.nn import TopKSAE

B, N, D, F, K = 3, 5, 8, 16, 4
X, W, B_ENC = (randn(*s, seed=i) for i, s in enumerate([(B, N, D), (F, D), (F,)]))
VALUES, INDICES = ops.topk_encode(X, W, B_ENC, K)

CALLS = {
    "topk_encode": (lambda x, w: ops.topk_encode(x, w, B_ENC, K), (X, W)),
    "sparse_decode": (lambda v, w: ops.sparse_decode(v, INDICES[0], w), (VALUES, W)),
    "sparse_grad_values": (lambda g, w: ops.sparse_grad_values(g, INDICES[0], w), (X, W)),
    "sparse_grad_weight": (
        lambda r, v: ops.sparse_grad_weight(v, INDICES[0], r, F),
        (X, VALUES[0]),
    ),
}


def same(got, expected):
    if isinstance(got, tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            same(a, b)
    else:
        assert torch.equal(got, expected)


def stacked(outs):
    return tuple(map(torch.stack, zip(*outs))) if isinstance(outs[0], tuple) else torch.stack(outs)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("axis", [0, 1, 2, "weights"])
def test_vmap_equals_a_loop(op, axis):
    call, (data, other) = CALLS[op]
    if axis == "weights":
        others = torch.stack([other, other * 2])
        in_dims, examples = (None, 0), [(data[0], o) for o in others]
        batch = (data[0], others)
    else:
        batch = (data.movedim(0, axis), other)
        in_dims, examples = (axis, None), [(d, other) for d in data]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fallback's loop warns
        got = torch.vmap(call, in_dims)(*batch)
    same(got, stacked([call(*e) for e in examples]))


def test_vmap_inside_ordinary_backward():
    w = W.clone().requires_grad_()
    torch.vmap(lambda x: ops.sparse_decode(*ops.topk_encode(x, w, B_ENC, K), w))(X).sum().backward()
    got, w.grad = w.grad, None
    ops.sparse_decode(*ops.topk_encode(X, w, B_ENC, K), w).sum().backward()
    torch.testing.assert_close(got, w.grad)


def test_a_jacobian_by_batched_backward():
    """What the refusal recommends instead of jacrev."""
    x = X[0, 0].clone().requires_grad_()
    out = ops.sparse_decode(*ops.topk_encode(x, W, B_ENC, K), W)
    (batched,) = torch.autograd.grad(out, x, torch.eye(D), is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(out, x, e, retain_graph=True)[0] for e in torch.eye(D)]
    torch.testing.assert_close(batched, torch.stack(rows))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "jvp", "per_sample"])
def test_gradient_transforms_are_refused(op, transform):
    call, (data, other) = CALLS[op]

    def first(t):
        out = call(t, other)
        return out[0] if isinstance(out, tuple) else out

    run = {
        "grad": lambda: torch.func.grad(lambda t: first(t).sum())(data[0]),
        "jacrev": lambda: torch.func.jacrev(first)(data[0]),
        "jacfwd": lambda: torch.func.jacfwd(first)(data[0]),
        "jvp": lambda: torch.func.jvp(first, (data[0],), (data[0],)),
        "per_sample": lambda: torch.vmap(torch.func.grad(lambda t: first(t).sum()))(data),
    }
    with pytest.raises(RuntimeError, match=f"{op}: .* not supported; use"):
        run[transform]()


def test_gradient_around_vmap_is_refused():
    def total(w):
        return torch.vmap(lambda x: ops.topk_encode(x, w, B_ENC, K)[0])(X).sum()

    with pytest.raises(RuntimeError, match=r"topk_encode: torch\.func\.grad"):
        torch.func.grad(total)(W)


def test_forward_mode_is_refused_not_dropped():
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="topk_encode: forward-mode"),
    ):
        ops.topk_encode(forward_ad.make_dual(X, X), W, B_ENC, K)


def test_frozen_features_inside_a_transform():
    """The SAE is no part of what is differentiated: nothing to refuse."""
    sae = TopKSAE(D, F, K, seed=0).eval().requires_grad_(False)
    probe = randn(K, seed=7)
    got = torch.func.grad(lambda p: (sae.encode(X)[0] @ p).sum())(probe)
    torch.testing.assert_close(got, sae.encode(X)[0].sum((0, 1)))
    with forward_ad.dual_level():
        assert torch.equal(ops.topk_encode(X, W, B_ENC, K)[0], VALUES)
