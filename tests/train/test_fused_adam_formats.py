"""FusedAdam with moments in few bits, with masters, and inside a CUDA graph."""

from __future__ import annotations

import copy
import io

import common
import pytest
import torch
import torch.utils.checkpoint
from adam_runs import D, F, K, batches, make

import fastsae
from fastsae.nn import TopKSAE
from fastsae.ops import _factors
from fastsae.optim import FusedAdam

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fmt", ["bf16", "8bit"])
def test_moments_in_few_bits_train_as_well(fmt):
    """The loss of a short run differs by less than 2% from that with fp32 moments, and the state
    has the bytes that the docstring says."""
    losses = {}
    for name in ("fp32", fmt):
        sae = TopKSAE(64, 512, 8, seed=0)
        opt = FusedAdam(sae.parameters(), lr=3e-3, moments=name)
        generator = torch.Generator().manual_seed(5)
        atoms = torch.randn(200, 64, generator=generator)
        last = []
        for t in range(150):
            weights = torch.randn(256, 200, generator=generator).relu()
            weights *= torch.rand(256, 200, generator=generator) < 0.03
            x = weights @ atoms
            loss = (sae(x) - x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            if t == 0:
                first = loss.item()
            if t >= 140:
                last.append(loss.item())
        losses[name] = sum(last) / len(last)
    assert losses["fp32"] < 0.5 * first
    assert abs(losses[fmt] / losses["fp32"] - 1) < 0.02
    state = opt.state[sae.W_enc]
    size = sum(t.nbytes for name, t in state.items() if name != "step") / sae.W_enc.numel()
    assert size == {"bf16": 4, "8bit": 2 + 8 / 64}[fmt]  # 64 columns are half a block
    assert opt.state[sae.b_enc]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("fmt", ["bf16", "8bit"])
def test_an_ordinary_gradient_takes_the_same_step(fmt, monkeypatch):
    """Factors and the same gradient in p.grad round the same moments by the same random bits."""
    from fastsae.optim import _state

    monkeypatch.setattr(_state, "_WIDE_ELEMENTS", 40 * D)  # parts of 40 rows
    saes = [make(torch.float32) for _ in range(2)]
    opts = [FusedAdam(s.parameters(), lr=1e-2, moments=fmt, weight_decay=0.01) for s in saes]
    for x in batches(5, torch.float32):
        (saes[0](x) - x).square().mean().backward()
        (saes[1](x) - x).square().mean().backward()
        for p in (saes[1].W_enc, saes[1].W_dec):
            (f,) = _factors.factors(p)
            p.grad = fastsae.ops.sparse_grad_weight(f.values, f.indices, f.rows, p.shape[0])
            _factors.factors(p).clear()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        names = ("exp_avg", "exp_avg_sq") if fmt == "bf16" else ("exp_avg_8bit", "exp_avg_sq_8bit")
        for name in names:
            for weight in ("W_enc", "W_dec"):
                a, b = (o.state[getattr(s, weight)][name] for o, s in zip(opts, saes, strict=True))
                assert (a != b).float().mean() < 0.01
    for p, q in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        assert (p - q).abs().quantile(0.99) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "8bit"])
def test_a_run_continues_bit_for_bit(fmt, dtype):
    """state_dict and load_state_dict, with masters, in every format."""
    whole = make(dtype)
    opt = FusedAdam(whole.parameters(), lr=1e-2, moments=fmt, master_weights=True)
    xs = batches(6, dtype)

    def train(sae, optimizer, data):
        for x in data:
            (sae(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(whole, opt, xs[:3])
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), opt.state_dict()], buffer)
    train(whole, opt, xs[3:])
    buffer.seek(0)
    weights, state = torch.load(buffer)
    resumed = make(dtype)
    resumed_opt = FusedAdam(resumed.parameters(), lr=7.0, moments=fmt, master_weights=True)
    resumed.load_state_dict(weights)
    resumed_opt.load_state_dict(state)
    train(resumed, resumed_opt, xs[3:])
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, t in opt.state[p].items():
            assert torch.equal(t, resumed_opt.state[q][key]), (name, key)
        if dtype == torch.bfloat16:
            assert torch.equal(p, opt.state[p]["master"].to(dtype))
            assert not torch.equal(p.float(), opt.state[p]["master"])


@pytest.mark.parametrize("before", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("after", ["fp32", "bf16", "8bit"])
def test_a_state_is_converted_to_the_format_of_its_loader(before, after):
    sae = make(torch.float32)
    opt = FusedAdam(sae.parameters(), moments=before)
    for x in batches(3, torch.float32):
        (sae(x) - x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    other = FusedAdam(copy.deepcopy(sae).parameters(), moments=after)
    other.load_state_dict(opt.state_dict())
    for group in other.param_groups:
        assert group["moments"] == after
    from fastsae.reference import moments as formats

    names = {"8bit": ("exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_scale", "exp_avg_sq_scale")}
    plain = ("exp_avg", "exp_avg_sq")
    for p, q in zip(sae.parameters(), other.param_groups[0]["params"], strict=True):
        wide = []
        for o, param, fmt in ((opt, p, before), (other, q, after)):
            fmt = fmt if param.dim() == 2 else "fp32"
            kept = [o.state[param][n] for n in names.get(fmt, plain)]
            assert (kept[0].dtype, kept[1].dtype) == formats.dtypes(fmt)
            wide.append(formats.load(formats.Moments(*kept)))
        (m, v), (m2, v2) = wide
        torch.testing.assert_close(m2, m, rtol=0.01, atol=0.02 * float(m.abs().max()))
        torch.testing.assert_close(v2, v, rtol=0.02, atol=0.04 * float(v.max()))
    if before == "8bit":
        theirs = torch.optim.Adam(sae.parameters())
        theirs.load_state_dict(opt.state_dict())
        for p in sae.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(KeyError, match="exp_avg"):
            theirs.step()


def test_a_master_takes_over_what_others_write():
    sae = make(torch.bfloat16)
    opt = FusedAdam(sae.parameters(), lr=1e-3, master_weights=True)

    def step():
        x = batches(1, torch.bfloat16)[0]
        (sae(x) - x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step()
    before = opt.state[sae.W_enc]["master"].clone()
    with torch.no_grad():
        sae.W_enc[3] = 0.5
    for group in opt.param_groups:
        group["lr"] = 0.0
    step()
    master = opt.state[sae.W_enc]["master"]
    assert torch.equal(master[3], torch.full_like(master[3], 0.5))
    others = torch.arange(F) != 3
    assert torch.equal(master[others], before[others])  # nothing of theirs rounds away
    assert torch.equal(sae.W_enc, master.to(torch.bfloat16))


@pytest.mark.parametrize("fmt", ["fp32", "8bit"])
def test_capturable_never_waits_for_the_device(fmt):
    """With step and lr on the device nothing is read back, so a CUDA graph can hold the step: here
    by the Triton kernels in their interpreter, under a mode that refuses what would wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in {
                "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2",
                "bincount", "equal", "is_nonzero",
            }, name  # fmt: skip
            return func(*args, **(kwargs or {}))

    saes = [TopKSAE(D, 24, K, dtype=torch.float32, seed=0) for _ in range(2)]  # interpreted: small
    lr = torch.tensor(1e-2)
    opts = [
        FusedAdam(saes[0].parameters(), lr=lr, capturable=True, moments=fmt),
        FusedAdam(saes[1].parameters(), lr=1e-2, moments=fmt),
    ]
    x = batches(1, torch.float32, n=8)[0]
    for t in range(3):
        for sae, opt in zip(saes, opts, strict=True):
            with fastsae.use_backend("triton" if common.INTERPRETED else None):
                (sae(x) - x).square().mean().backward()
                if opt is opts[0]:
                    for p in (sae.b_enc, sae.b_dec):  # torch's own Adam reads a step on the CPU
                        p.grad = None
                    with NoSync():
                        opt.step()
                else:
                    for p in (sae.b_enc, sae.b_dec):
                        p.grad = None
                    opt.step()
            opt.zero_grad()
        if t == 0:  # a schedule writes into the tensor that a graph would read
            lr.mul_(0.5)
            opts[1].param_groups[0]["lr"] *= 0.5
    for p, q in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(lr)
    restored = FusedAdam(saes[0].parameters(), lr=torch.tensor(3.0), capturable=True, moments=fmt)
    kept = restored.param_groups[0]["lr"]
    restored.load_state_dict(opts[0].state_dict())
    assert restored.param_groups[0]["lr"] is kept and float(kept) == float(lr)
