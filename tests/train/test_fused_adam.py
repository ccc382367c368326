"""FusedAdam against torch.optim.Adam, and what it promises about memory and ownership."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
import torch.utils.checkpoint
from adam_runs import D, F, N, batches, close, make, project
from torch import nn

import fastsae
from fastsae import _library
from fastsae.nn import TopKSAE
from fastsae.ops import _factors
from fastsae.optim import FusedAdam, has_unit_norm, set_unit_norm

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_is_exported():
    assert fastsae.optim.FusedAdam is FusedAdam
