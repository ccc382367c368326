"""FusedAdam against torch.optim.Adam, and what it promises about memory and ownership."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from dataclasses import replace

import common
import pytest
import torch
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import nn

import fastsae
from fastsae import _library
from fastsae.nn import TopKSAE
from fastsae.ops import _factors
from fastsae.optim import FusedAdam, has_unit_norm, set_unit_norm

N, D, F, K = 48, 16, 96, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def make(dtype=torch.float64, **options):
    return TopKSAE(D, F, K, dtype=dtype, seed=0, **options)


def batches(count, dtype=torch.float64, n=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator, dtype=dtype) for _ in range(count)]


def project(sae):
    """What FusedAdam does to a unit-norm decoder, around a torch optimizer's step."""
    with torch.no_grad():
        w, g = sae.W_dec, sae.W_dec.grad
        g -= (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w


def close(a, b, atol=1e-10):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("normalize", [True, False], ids=["unit_norm", "free"])
@pytest.mark.parametrize("decay", [0.0, 0.01], ids=["plain", "l2"])
def test_equals_torch_adam(normalize, decay):
    ours, theirs = (make(normalize_decoder=normalize) for _ in range(2))
    opt = FusedAdam(ours.parameters(), lr=1e-2, weight_decay=decay)
    # L2 is along a row, so projecting it out is no L2 at all on a unit-norm decoder
    free = [p for n, p in theirs.named_parameters() if n != "W_dec" or not normalize]
    groups = [{"params": free, "weight_decay": decay}]
    if normalize:
        groups.append({"params": [theirs.W_dec]})
    reference = torch.optim.Adam(groups, lr=1e-2)
    for x in batches(20):
        (ours(x) - x).square().mean().backward()
        assert ours.W_enc.grad is None
        assert ours.W_dec.grad is None
        opt.step()
        opt.zero_grad()
        (theirs(x) - x).square().mean().backward()
        if normalize:
            project(theirs)
        reference.step()
        if normalize:
            theirs.normalize_decoder_()
        reference.zero_grad()
    close(ours, theirs)


def test_any_loss_and_microbatches_add_up():
    whole, micro = make(), make()
    opts = [FusedAdam(m.parameters(), lr=1e-2) for m in (whole, micro)]
    for x in batches(6):
        torch.nn.functional.huber_loss(whole(x), x, reduction="sum").backward()
        for part in x.split([16, 30, 2]):
            torch.nn.functional.huber_loss(micro(part), part, reduction="sum").backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    close(whole, micro)


def test_aux_loss_of_another_k_adds_up():
    options = {"normalize_decoder": False, "k_aux": 11, "dead_after": N}
    ours, theirs = make(**options), make(**options)
    opt = FusedAdam(ours.parameters(), lr=1e-2)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for x in batches(8):
        for sae, o in ((ours, opt), (theirs, reference)):
            out = sae(x)
            aux = sae.aux_loss(x, out)
            ((out - x).square().mean() + aux / 32).backward()
            o.step()
            o.zero_grad()
    assert len(ours.dead_latents()) > 11
    close(ours, theirs)


def test_lazy_leaves_untouched_rows():
    sae = make()
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    opt = FusedAdam(sae.parameters(), lr=1e-2, lazy=True)
    for x in batches(2, n=3):
        (sae(x) - x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    alive = sae.last_fired > 0
    assert 0 < alive.sum() < F
    for name in ("W_enc", "W_dec"):
        same = (getattr(sae, name) == before[name]).all(1)
        assert same[~alive].all()
        assert not same[alive].any()


def test_ordinary_gradient_of_an_owned_weight_is_added():
    ours, theirs = make(), make()
    opt = FusedAdam(ours.parameters(), lr=1e-2)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i, x in enumerate(batches(4)):
        for sae in (ours, theirs):
            loss = (sae(x) - x).square().mean()
            if i != 2:  # a term that reaches the weights densely, not through the ops
                loss = loss + sae.W_dec.pow(3).sum() + sae.W_enc.pow(4).sum()
            loss.backward()
        project(theirs)
        for o in (opt, reference):
            o.step()
            o.zero_grad()
        theirs.normalize_decoder_()
    close(ours, theirs)


def test_compiled_module():
    ours, theirs = make(torch.float32), make(torch.float32)
    opt = FusedAdam(ours.parameters(), lr=1e-2)
    reference = FusedAdam(theirs.parameters(), lr=1e-2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for x in batches(3, torch.float32):
        (compiled(x) - x).square().mean().backward()
        assert ours.W_dec.grad is not None
        (theirs(x) - x).square().mean().backward()
        for o in (opt, reference):
            o.step()
            o.zero_grad()
    close(ours, theirs, atol=2e-4)  # Adam's sign-like first steps amplify rounding


def test_no_weight_gradient_and_no_dense_activation_is_allocated():
    if _library.CPU_MISSING:
        pytest.skip(_library.CPU_MISSING)
    n, d, f, k = 512, 128, 16384, 4
    sae = TopKSAE(d, f, k, seed=0)
    opt = FusedAdam(sae.parameters(), lr=1e-3)
    x = torch.randn(n, d)

    def step():
        loss = (sae(x) - x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()

    step()  # moments are allocated here
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        step()
    events = prof.profiler.kineto_results.events()
    largest = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert 0 < largest <= 4 * f * d // 2, f"one allocation of {largest} bytes"
    assert sae.W_enc.grad is None
    assert sae.W_dec.grad is None


def test_scheduler_closure_groups_and_state_dict():
    a, b = make(), make()
    opts = []
    for sae in (a, b):
        weights = [sae.W_enc, sae.W_dec]
        biases = {"params": [sae.b_enc, sae.b_dec], "lr": 3e-2, "betas": (0.8, 0.99)}
        opts.append(FusedAdam([{"params": weights}, biases], lr=1e-2))
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4) for o in opts]
    data = batches(8)

    def run(sae, opt, x):
        def closure():
            opt.zero_grad()
            loss = (sae(x) - x).square().mean()
            loss.backward()
            return loss

        return opt.step(closure)

    for x in data:
        assert run(a, opts[0], x) > 0
        schedulers[0].step()
    for i, x in enumerate(data):
        if i == 4:  # save, make anew, load
            state, rate = opts[1].state_dict(), schedulers[1].state_dict()
            c = copy.deepcopy(b)
            weights = [c.W_enc, c.W_dec]
            opts[1] = FusedAdam([{"params": weights}, {"params": [c.b_enc, c.b_dec]}])
            schedulers[1] = torch.optim.lr_scheduler.LinearLR(opts[1], 0.1, total_iters=4)
            opts[1].load_state_dict(state)
            schedulers[1].load_state_dict(rate)
            b = c
        run(b, opts[1], x)
        schedulers[1].step()
    close(a, b, atol=0)


def test_state_from_and_to_torch_adam():
    ours, theirs = make(normalize_decoder=False), make(normalize_decoder=False)
    a = FusedAdam(ours.parameters(), lr=1e-2)
    b = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i, x in enumerate(batches(9)):
        if i in (3, 6):  # swap the states, both ways
            state_a, state_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
            a.load_state_dict(state_b)
            b = torch.optim.Adam(theirs.parameters(), lr=1e-2)
            b.load_state_dict({**state_a, "param_groups": state_b["param_groups"]})
        for sae, o in ((ours, a), (theirs, b)):
            (sae(x) - x).square().mean().backward()
            o.step()
            o.zero_grad()
    close(ours, theirs)


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "decoupled_weight_decay"])
def test_states_of_other_variants_are_refused(option):
    param = nn.Parameter(torch.zeros(3, 3))
    state = torch.optim.Adam([param], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=option):
        FusedAdam([param]).load_state_dict(state)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("owned", [True, False])
def test_checkpointing(owned, reentrant):
    plain, checkpointed = make(), make()
    x = batches(1)[0].requires_grad_()
    optimizers = [
        (FusedAdam if owned else torch.optim.Adam)(sae.parameters(), lr=1e-2)
        for sae in (plain, checkpointed)
    ]
    for sae, run in ((plain, plain), (checkpointed, None)):
        out = run(x) if run else torch.utils.checkpoint.checkpoint(sae, x, use_reentrant=reentrant)
        (out - x).square().mean().backward()
    for opt in optimizers:
        opt.step()
    close(plain, checkpointed, atol=0)
    assert int(checkpointed.tokens_seen) == N  # the recomputation is no second batch
    assert torch.equal(plain.last_fired, checkpointed.last_fired)


def test_other_gradients_leave_the_weights_alone():
    """As in torch: what asks for the gradient of x adds nothing to the weights'."""
    sae = make()
    opt = FusedAdam(sae.parameters(), lr=1e-2)
    before = copy.deepcopy(sae)
    x = batches(1)[0].requires_grad_()
    (dx,) = torch.autograd.grad(sae(x).square().sum(), x)
    sae(x).square().sum().backward(inputs=[x])
    assert torch.equal(dx, x.grad)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(sae(x).square().sum(), sae.W_enc)
    assert not _factors.factors(sae.W_enc) and not _factors.factors(sae.W_dec)
    opt.step()
    close(sae, before, atol=0)
    sae(x).square().sum().backward(inputs=[sae.W_enc])
    assert len(_factors.factors(sae.W_enc)) == 1 and not _factors.factors(sae.W_dec)


def test_a_pickled_module_gets_ordinary_gradients():
    """Nothing would ever consume its factors."""
    sae = make()
    opt = FusedAdam(sae.parameters())
    x = batches(1)[0]
    sae(x).square().mean().backward()
    again = pickle.loads(pickle.dumps(sae))
    again(x).square().mean().backward()
    assert again.W_enc.grad is not None and again.W_dec.grad is not None
    buffer = io.BytesIO()
    torch.save(list(sae.parameters()), buffer)
    buffer.seek(0)
    assert len(torch.load(buffer, weights_only=True)) == 4
    opt.step()


def test_low_precision_keeps_fp32_moments():
    sae = make(torch.bfloat16)
    opt = FusedAdam(sae.parameters(), lr=1e-2)
    x = batches(1, torch.bfloat16)[0]
    (sae(x) - x).square().mean().backward()
    opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    for i, param in enumerate(sae.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            assert opt.state[param][name].dtype == torch.float32
            assert torch.equal(opt.state[param][name], saved["state"][i][name])
    assert sae.W_dec.dtype == torch.bfloat16


def test_other_owner_gets_ordinary_gradients():
    sae = make()
    x = batches(1)[0]
    opt = FusedAdam(sae.parameters())
    (sae(x) - x).square().mean().backward()
    assert len(_factors.factors(sae.W_enc)) == 1
    assert sae.W_enc.grad is None
    sae.zero_grad()
    assert len(_factors.factors(sae.W_enc)) == 0
    del opt
    gc.collect()
    assert _factors.factors(sae.W_enc) is None
    (sae(x) - x).square().mean().backward()
    assert sae.W_enc.grad.shape == (F, D)
    assert sae.W_dec.grad.shape == (F, D)

    opt = FusedAdam(sae.parameters())
    opt.release()
    sae.zero_grad()
    (sae(x) - x).square().mean().backward()
    assert sae.W_enc.grad is not None


def test_newest_optimizer_owns():
    sae = make()
    x = batches(1)[0]
    old = FusedAdam(sae.parameters())
    new = FusedAdam(sae.parameters())
    (sae(x) - x).square().mean().backward()
    with pytest.raises(RuntimeError, match="another FusedAdam took"):
        old.step()
    del old
    gc.collect()  # must not disown what the new one owns
    new.step()
    assert _factors.factors(sae.W_enc) == []


def test_ownership_is_asked_in_backward():
    """An optimizer made or lost between forward and backward: the gradient is not lost with it."""
    owned, plain = make(), make()
    x = batches(1)[0]
    expected = (plain(x) - x).square().mean()
    expected.backward()
    opt = FusedAdam(owned.parameters())
    loss = (owned(x) - x).square().mean()
    opt.release()
    loss.backward()
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(getattr(owned, name).grad, getattr(plain, name).grad)
    owned.zero_grad()
    old = FusedAdam(owned.parameters(), lr=1e-2)
    loss = (owned(x) - x).square().mean()
    new = FusedAdam(owned.parameters(), lr=1e-2)
    loss.backward()
    assert owned.W_enc.grad is None
    new.step()
    project(plain)
    torch.optim.Adam(plain.parameters(), lr=1e-2).step()
    plain.normalize_decoder_()
    close(owned, plain)
    with pytest.raises(RuntimeError, match="another FusedAdam took"):
        old.step()


def test_a_weight_frozen_before_backward_stays():
    sae = make()
    opt = FusedAdam(sae.parameters(), lr=1e-2)
    x = batches(1)[0]
    loss = (sae(x) - x).square().mean()
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    loss.backward()
    opt.step()
    assert torch.equal(sae.W_dec, before)


def test_deepcopied_optimizer_and_module():
    sae = make()
    x = batches(1)[0]
    opt = FusedAdam(sae.parameters(), lr=1e-2)
    (sae(x) - x).square().mean().backward()
    opt.step()
    opt.zero_grad()
    pair = copy.deepcopy({"sae": sae, "opt": opt})
    for s, o in ((sae, opt), (pair["sae"], pair["opt"])):
        (s(x) - x).square().mean().backward()
        assert s.W_enc.grad is None
        o.step()
    close(sae, pair["sae"], atol=0)
    alone = copy.deepcopy(sae)
    assert _factors.factors(alone.W_enc) is None
    assert has_unit_norm(alone.W_dec)


def test_refusals():
    sae = make()
    x = batches(1)[0]
    for options, name in (
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"moments": "4bit"}, "moments"),
        ({"moments": "bf16"}, "moments='bf16' is not for float64"),
    ):
        with pytest.raises(ValueError, match=f"FusedAdam: {name}"):
            FusedAdam(sae.parameters(), **options)
    bias = nn.Parameter(torch.zeros(3))
    set_unit_norm(bias)
    with pytest.raises(ValueError, match="unit-norm"):
        FusedAdam([bias])

    opt = FusedAdam(sae.parameters())
    buffer = x.clone()
    sae.config = replace(
        sae.config, apply_b_dec_to_input=False
    )  # then the encoder's rows are the buffer itself
    (sae(buffer) - x).square().mean().backward()
    buffer.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        opt.step()
    opt.zero_grad()

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((sae(x) - x).square().mean()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(opt)
    opt.zero_grad()
    (sae(x) - x).square().mean().backward()
    opt.step()  # usable again


def test_a_refused_group_changes_nothing():
    sae = make()
    extra = nn.Parameter(torch.zeros(3, 3))
    opt = FusedAdam([sae.W_enc, sae.b_enc], lr=1e-2)
    for options, message in (
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 2.0)}, "betas"),
        ({"betas": 3}, "unpack"),
        ({"lr": "fast"}, "fast"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            opt.add_param_group({"params": [extra], **options})
        assert len(opt.param_groups) == 1
        assert _factors.factors(extra) is None
    opt.add_param_group({"params": [extra]})
    assert len(opt.param_groups) == 2
    x = batches(1)[0]
    (sae(x) - x).square().mean().backward()
    opt.step()

    # a constructor that refuses takes nothing from the present owner
    (sae(x) - x).square().mean().backward()
    with pytest.raises(ValueError, match="lr") as refused:
        FusedAdam([{"params": [sae.W_enc]}, {"params": [sae.W_dec], "lr": -1.0}])
    opt.step()
    del refused


def test_parameters_without_gradient_are_skipped():
    sae = make()
    before = sae.W_dec.detach().clone()
    opt = FusedAdam(sae.parameters(), lr=1.0, weight_decay=0.1)
    opt.step()
    assert torch.equal(sae.W_dec, before)
    assert not opt.state


# -- two processes ------------------------------------------------------------------------------


def _shares(mode):
    """Per step, the rows of the batch that each rank has; None: the rank runs no backward."""
    even = [(slice(0, 27), slice(27, 54))] * 6
    if mode == "ddp":
        return even
    uneven = [(slice(0, 20), slice(20, 54))] * 4
    # one rank without a token, then an empty batch beside none at all, then nobody, then all again
    nothing = slice(0, 0)
    return [*uneven, (slice(0, 54), None), (nothing, None), (None, None), (None, nothing), *uneven]


def _loop(rank, mode):
    sae = make()
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(sae)
        opt = torch.optim.Adam(sae.parameters(), lr=1e-2)
    else:
        group = torch.distributed.group.WORLD
        model, opt = sae, FusedAdam(sae.parameters(), lr=1e-2, process_group=group)
    shares = _shares(mode)
    for x, share in zip(batches(len(shares), n=N + 6), shares, strict=True):
        if share[rank] is not None:
            part = x[share[rank]]
            # unequal numbers of backward calls as well
            for piece in part.chunk(rank + 1) if mode == "fused" else [part]:
                ((model(piece) - piece).square().sum() * 2 / x.numel()).backward()
        opt.step()
        opt.zero_grad()
    return {n: p.detach() for n, p in sae.named_parameters()}


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        torch.save({mode: _loop(rank, mode) for mode in ("fused", "ddp")}, f"{folder}/{rank}.pt")
        sae = make()
        model = nn.parallel.DistributedDataParallel(sae)
        opt = FusedAdam(sae.parameters())
        with pytest.raises(RuntimeError, match="process_group"):
            model(batches(1)[0])
        del opt
    finally:
        torch.distributed.destroy_process_group()


def _other_rank(_, folder):
    _rank(1, folder)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path):
    """All that needs two ranks: this process is one, because starting another is what costs."""
    other = mp.spawn(_other_rank, (str(tmp_path),), nprocs=1, join=False)
    try:
        _rank(0, str(tmp_path))
    except BaseException:
        other.processes[0].kill()  # it would wait for this one
        raise
    other.join()
    states = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    for mode, cls in (("fused", FusedAdam), ("ddp", torch.optim.Adam)):
        single = make()
        opt = cls(single.parameters(), lr=1e-2)
        shares = _shares(mode)
        for x, share in zip(batches(len(shares), n=N + 6), shares, strict=True):
            rows = [x[s] for s in share if s is not None]
            if rows:
                part = torch.cat(rows)
                ((single(part) - part).square().sum() / x.numel()).backward()
            opt.step()
            opt.zero_grad()
        for name, param in single.named_parameters():
            assert torch.equal(states[0][mode][name], states[1][mode][name])
            torch.testing.assert_close(states[0][mode][name], param.detach(), atol=1e-9, rtol=0)


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


def test_is_exported():
    assert fastsae.optim.FusedAdam is FusedAdam
