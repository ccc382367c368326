"""FusedAdam's state: masters of parameters that others change, and states loaded in few bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam, _state

N, D, F, K = 24, 70, 96, 4
CODES = ("exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_scale", "exp_avg_sq_scale")


class Allocated(TorchDispatchMode):
    """Notes dtype and elements of results that are not views or changes of an argument."""

    def __init__(self):
        super().__init__()
        self.sizes: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for t in tree_leaves(out):
            if is_tensor(t) and t.untyped_storage()._cdata not in given:
                self.sizes.append((t.dtype, t.numel()))
        return out


def is_tensor(t):
    return isinstance(t, torch.Tensor)


def trained(dtype, steps=2, **options):
    sae = TopKSAE(D, F, K, dtype=dtype, seed=0)
    opt = FusedAdam(sae.parameters(), **{"lr": 1e-2, **options})
    train(sae, opt, steps)
    return sae, opt


def train(sae, opt, steps=1, *, dense=False):
    for seed in range(steps):
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
        x = x.to(sae.W_enc.dtype)
        (sae(x) - x).float().square().mean().backward()
        if dense:
            for p in (sae.W_enc, sae.W_dec):
                p.grad = torch.zeros_like(p)
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("dense", [False, True])
def test_a_master_takes_over_what_is_put_in_a_parameters_place(dense):
    """`p.data = t` does not change the parameter's version."""
    sae, opt = trained(torch.bfloat16, master_weights=True)
    sae.W_enc.data = torch.full_like(sae.W_enc, 0.5)
    sae.b_enc.data = torch.full_like(sae.b_enc, 0.25)
    opt.param_groups[0]["lr"] = 0.0
    train(sae, opt, dense=dense)
    assert (sae.W_enc == 0.5).all() and (sae.b_enc == 0.25).all()
    assert (opt.state[sae.W_enc]["master"] == 0.5).all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("fmt", ["fp32", "8bit"])
def test_a_parameter_that_became_wide_has_no_master(fmt, dense):
    sae, opt = trained(torch.bfloat16, master_weights=True, moments=fmt)
    sae.float()
    with torch.no_grad():
        sae.W_enc.fill_(0.5)
        sae.b_enc.fill_(0.25)
    opt.param_groups[0]["lr"] = 0.0
    train(sae, opt, dense=dense)
    assert (sae.W_enc == 0.5).all() and (sae.b_enc == 0.25).all()
    assert not any("master" in opt.state[p] for p in sae.parameters())
    opt.param_groups[0]["lr"] = 1e-2
    train(sae, opt)
    assert not (sae.W_enc == 0.5).all()


def test_codes_are_loaded_as_they_are():
    """Nothing wider than a code is made of them, at any time."""
    sae, opt = trained(torch.float32, moments="8bit")
    saved = copy.deepcopy(opt.state_dict())
    with Allocated() as allocated:
        opt.load_state_dict(saved)
    assert (torch.int8, F * D) in allocated.sizes
    for dtype, size in allocated.sizes:
        assert size < F * D or dtype in (torch.int8, torch.uint8)
    for p in (sae.W_enc, sae.W_dec):
        for name in CODES:
            assert torch.equal(opt.state[p][name], saved["state"][0 if p is sae.W_enc else 2][name])


@pytest.mark.parametrize("before,after", [("fp32", "8bit"), ("8bit", "bf16"), ("8bit", "fp32")])
def test_a_state_is_converted_some_rows_at_a_time(before, after, monkeypatch):
    sae, opt = trained(torch.float32, moments=before)
    twin = copy.deepcopy(sae)
    states = []
    for elements in (1 << 24, 20 * D):
        monkeypatch.setattr(_state, "_WIDE_ELEMENTS", elements)
        other = FusedAdam(twin.parameters(), moments=after)
        with Allocated() as allocated:
            other.load_state_dict(opt.state_dict())
        states.append(other.state[twin.W_enc])
    kept = (torch.int8, torch.uint8) if after == "8bit" else (torch.bfloat16, torch.float32)
    sizes = [s for s in allocated.sizes if s[1] > 20 * 128]  # D is padded to a block
    assert len(sizes) == 4 and all(dtype in kept for dtype, _ in sizes)  # two of each weight
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name


def test_a_master_is_compared_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(_state, "_WIDE_ELEMENTS", 20 * D)
    sae, opt = trained(torch.bfloat16, master_weights=True)
    with torch.no_grad():
        sae.W_enc[F - 1] = 0.5
    master = opt.state[sae.W_enc]["master"].clone()
    with Allocated() as allocated:
        opt._state(sae.W_enc, opt.param_groups[0])
    assert max(size for _, size in allocated.sizes) <= 20 * D
    assert (opt.state[sae.W_enc]["master"][-1] == 0.5).all()
    assert torch.equal(opt.state[sae.W_enc]["master"][:-1], master[:-1])


@pytest.mark.parametrize("fmt", ["fp32", "8bit"])
def test_a_loaded_state_goes_where_a_captured_graph_writes(fmt):
    sae, opt = trained(torch.bfloat16, moments=fmt, master_weights=True, capturable=True)
    saved = copy.deepcopy([sae.state_dict(), opt.state_dict()])
    before = {p: dict(opt.state[p]) for p in sae.parameters()}
    train(sae, opt, 3)
    sae.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    for i, p in enumerate(sae.parameters()):
        assert before[p].keys() == opt.state[p].keys() == saved[1]["state"][i].keys()
        for name, t in opt.state[p].items():
            assert t is before[p][name] and torch.equal(t, saved[1]["state"][i][name])
    other = FusedAdam(copy.deepcopy(sae).parameters(), moments=fmt, master_weights=True)
    other.load_state_dict(opt.state_dict())  # never into what the state dict holds
    pointers = {t.data_ptr() for state in opt.state.values() for t in state.values()}
    assert not any(t.data_ptr() in pointers for s in other.state.values() for t in s.values())


def test_a_number_as_lr_stays_one():
    _, opt = trained(torch.float32, lr=torch.tensor(0.5))
    sae, other = trained(torch.float32, lr=1e-3, capturable=True)
    other.load_state_dict(opt.state_dict())
    lr = other.param_groups[0]["lr"]
    assert isinstance(lr, float) and lr == 0.5
    train(sae, other)


def test_moments_of_another_shape_are_refused():
    _, opt = trained(torch.float32, moments="8bit")
    wider = TopKSAE(D, F + 8, K, seed=0)
    with pytest.raises(ValueError, match=r"saved moments \[96, 70\] are not of .* \[104, 70\]"):
        FusedAdam(wider.parameters(), moments="8bit").load_state_dict(opt.state_dict())
