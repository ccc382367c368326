"""steer against its definition: an SAE run in full, its activations changed, its error kept."""

from __future__ import annotations

import gc

import pytest
import torch
from common import assert_close, generator, randn
from steer_tables import CODES, tables
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

import fastsae
from fastsae import _library, ops
from fastsae import _steer_codes as rules
from fastsae.ops._common import FLOATS
from fastsae.ops.steer import Site
from fastsae.ops.topk_member import Selection
from fastsae.reference.steer import edited, normalised

OP = "steer"


def call(x, table, slots, mask=None, member=None, norm="none", eps=1e-5):
    return ops.steer(x, *table, slots, mask, member, norm, eps)


def direct(x, table, slots, mask=None, member=None, norm="none", eps=1e-5):
    rows = x.flatten(0, -2)
    mask = None if mask is None else mask.flatten()
    member = None if member is None else member.flatten(0, -2)
    return edited(rows, *table, slots, mask, member, norm, eps).view(x.shape)


def widened(table):
    return tuple(t.double() if t.is_floating_point() else t for t in table)


@pytest.mark.parametrize(
    "B,T,D,P", [(3, 5, 64, 4), (1, 1, 33, 1), (2, 3, 1, 7), (4, 2, 130, 3)], ids=str
)
@pytest.mark.parametrize("norm", rules.NORMS)
def test_matches_fp64_reference(backend, dtype, B, T, D, P, norm):
    if D == 1 and norm == "layer_norm":
        pytest.skip("one element has no spread: 0 / eps")
    x = randn(B, T, D, dtype=dtype, seed=7)
    table = tables(4, P, D, dtype)
    slots = torch.randint(-1, 4, (B,), generator=generator(3)).int()
    mask = torch.rand(B, T, generator=generator(4)) < 0.7
    member = torch.rand(B, T, P, generator=generator(5)) < 0.5
    got = call(x, table, slots, mask, member, norm)
    # in the storage dtype the tables are what they are: only the arithmetic is compared
    truth = direct(x.double(), widened(table), slots, mask, member, norm)
    plain = direct(x, table, slots, mask, member, norm)
    assert_close(got, truth, plain, dtype, scale=4)


def test_in_place_and_untouched_rows_are_bit_exact(backend, dtype):
    D, P = 40, 3
    x = randn(6, 4, D, dtype=dtype, seed=1)
    x[0, 0, :5] = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), -1.0]).to(dtype)
    enc, dec, param, code = tables(3, P, D, dtype)
    code[0] = torch.tensor([rules.END, 0, -1])  # an empty list
    code[1] = torch.tensor([rules.SCALE, 0, -1])
    param[1, :, 4] = 1.0  # scale by one: every delta is zero
    slots = torch.tensor([-1, 0, 1, 2, 2, 2]).int()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[4] = False
    table = (enc, dec, param, code)
    out = call(x, table, slots, mask)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for row in (0, 1, 2, 4):
        assert torch.equal(out[row].view(bits), x[row].view(bits)), row
    assert not torch.equal(out[5], x[5])
    y = x.clone()
    assert ops.steer_(y, *table, slots, mask) is y
    assert torch.equal(y.view(bits), out.view(bits))
    assert torch.equal(call(x, table, slots, mask).view(bits), out.view(bits))


def dense_sae(kind: str, D: int, F: int, k: int):
    """W_enc, b_enc, theta, gain, offset of an SAE, and its activations in full."""
    W = randn(F, D, dtype=torch.float64, seed=11) / D**0.5
    V = randn(F, D, dtype=torch.float64, seed=12) / D**0.5
    b = randn(F, dtype=torch.float64, seed=13) / 4
    theta, gain, offset = torch.zeros(F).double(), torch.ones(F).double(), b.clone()
    if kind == "jumprelu":
        theta = torch.rand(F, generator=generator(14)).double()
    if kind == "gated":
        gain = torch.rand(F, generator=generator(15)).double() + 0.5
        offset = randn(F, dtype=torch.float64, seed=16) / 4

    def activations(u: torch.Tensor) -> torch.Tensor:
        p = u @ W.T
        f = torch.where(p + b > theta, (gain * p + offset).clamp(min=0), 0.0)
        if kind == "topk":
            kept = torch.zeros_like(f, dtype=torch.bool)
            kept.scatter_(-1, ops.topk_encode(u, W, b, k)[1].long(), True)
            f = torch.where(kept, f, 0.0)
        return f

    return W, V, b, theta, gain, offset, activations


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("norm", rules.NORMS)
def test_equals_the_edit_inside_the_sae_with_its_error_kept(kind, norm):
    """x' = decode(f edited) + (x - decode(f)), run in full in fp64."""
    D, F, k, P = 24, 60, 8, 6
    W, V, b, theta, gain, offset, activations = dense_sae(kind, D, F, k)
    x = randn(2, 9, D, dtype=torch.float64, seed=20)
    u, back = (t.view(2, 9, -1) for t in normalised(x.view(-1, D), norm, 1e-5))
    f = activations(u)
    # latents that are active somewhere, so that every rule has work to do
    latents = f.flatten(0, 1).sum(0).topk(P).indices
    opcodes = torch.tensor(CODES)
    values = torch.tensor([3.0, 0.4, 2.0, 0.0, 1.5, 0.0], dtype=torch.float64)
    gate = torch.tensor([-1, -1, -1, 5, -1, -1])  # the ablation only where latent 5 is above tau
    tau = 0.05
    changed = f.clone()
    for o, j in enumerate(latents.tolist()):
        v, old = values[o], f[..., j]
        new = {
            rules.CLAMP: v.expand_as(old),
            rules.MIN_CLAMP: old.clamp(min=float(v)),
            rules.CLAMP_IF_ACTIVE: torch.where(old > 0, v, old),
            rules.SCALE: v * old,
            rules.ADD: old + v,
            rules.PROBE: old,
        }[int(opcodes[o])]
        if gate[o] >= 0:
            new = torch.where(f[..., latents[gate[o]]] > tau, new, old)
        changed[..., j] = new
    error = x - f @ V * back
    truth = changed @ V * back + error
    flags = torch.full((P,), rules.MEMBER if kind == "topk" else 0)
    picked = [t[latents] for t in (b, theta, gain, offset)]
    param = torch.stack([*picked, values, torch.full((P,), tau).double()], -1)[None]
    member = None
    if kind == "topk":
        chosen = ops.topk_encode(u, W, b, k)[1]
        member = (chosen[..., None] == latents.int()).any(-2)
    code = torch.stack([opcodes, flags, gate], -1)[None].int()
    slots = torch.zeros(2, dtype=torch.int32)
    table = (W[latents][None], V[latents][None], param, code)
    got = call(x, table, slots, None, member, norm)
    assert (got - truth).abs().max() < 1e-12
    assert (got - x).abs().max() > 0.1


def test_directions_are_read_and_written_raw():
    """project_out and project_clamp: CLAMP of the projection itself, whatever the SAE's norm."""
    x = randn(2, 5, 16, dtype=torch.float64, seed=1)
    r = torch.nn.functional.normalize(randn(16, dtype=torch.float64, seed=2), dim=0)
    inf = float("inf")
    param = torch.tensor([[[0, -inf, 1, 0, 0, 0]], [[0, -inf, 1, 0, 2.5, 0]]]).double()
    code = torch.tensor([[[rules.CLAMP, rules.RAW | rules.SIGNED, -1]]] * 2).int()
    rows = r.expand(2, 1, -1).contiguous()
    got = call(x, (rows, rows, param, code), torch.tensor([0, 1]).int(), norm="layer_norm")
    assert (got[0] - (x[0] - (x[0] @ r)[:, None] * r)).abs().max() < 1e-14
    assert (got[1] @ r - 2.5).abs().max() < 1e-13


@pytest.mark.parametrize("norm", rules.NORMS)
def test_gradcheck(norm):
    x = randn(2, 3, 6, dtype=torch.float64, seed=1).requires_grad_()
    enc, dec, param, code = tables(2, 6, 6, torch.float64, seed=3)
    code[0] = torch.tensor([[c, rules.SIGNED, -1] for c in CODES])  # each one, and none is off
    param[0, :, 1] = -9
    slots = torch.tensor([0, 1]).int()
    leaves = [t.requires_grad_() for t in (enc, dec, param)]
    assert torch.autograd.gradcheck(
        lambda x, e, d, p: ops.steer(x, e, d, p, code, slots, norm=norm), (x, *leaves)
    )


@pytest.mark.parametrize("opcode,neutral", [(rules.ADD, 0.0), (rules.SCALE, 1.0)])
def test_a_neutral_strength_has_a_gradient(backend, opcode, neutral):
    """It moves nothing, and training starts there."""
    x, enc, dec = randn(1, 2, 8), randn(1, 1, 8, seed=1), randn(1, 1, 8, seed=2)
    value = torch.tensor(neutral, requires_grad=True)
    # bias, theta, gain, offset, v, tau
    param = torch.tensor([[[0.0, -1e9, 1.0, 9.0, 0.0, 0.0]]]) + value * torch.eye(6)[4]
    code = torch.tensor([[[opcode, rules.SIGNED, -1]]]).int()
    out = call(x, (enc, dec, param, code), torch.zeros(1).int())
    assert torch.equal(out, x)
    (out * x).sum().backward()
    active = (x @ enc[0, 0] + 9) if opcode == rules.SCALE else torch.ones(1, 2)
    torch.testing.assert_close(value.grad, (active * (x @ dec[0, 0])).sum())


def test_forward_mode_is_refused(backend):
    """Its tangents would be dropped."""
    table, slots = tables(2, 3, 8, torch.float32), torch.tensor([0, 1]).int()
    x = randn(2, 4, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            call(dual, table, slots)


def test_opcheck_and_double_backward():
    x = randn(2, 3, 6, seed=1).requires_grad_()
    enc, dec, param, code = tables(2, 4, 6, torch.float32)
    slots = torch.tensor([0, -1]).int()
    args = (x, enc.requires_grad_(), dec, param.requires_grad_(), code, slots)
    torch.library.opcheck(torch.ops.fastsae.steer.default, args)
    plain = tuple(t.detach() for t in args)
    torch.library.opcheck(torch.ops.fastsae.steer_.default, plain)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(ops.steer(*args).square().sum(), x, create_graph=True)


def test_compiles_whole(backend):
    x = randn(2, 3, 8, seed=1)
    table, slots = tables(2, 4, 8, torch.float32), torch.tensor([0, 1]).int()
    want = call(x, table, slots)
    got = torch.compile(lambda x: call(x, table, slots) + 1, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, want + 1)


@pytest.mark.skipif(_library.CPU_FUNCTIONS is None, reason="needs the C++ kernels and Python.h")
class TestSite:
    """The bits of the operators, or None."""

    B, OPS, D, F, K = 3, 4, 24, 300, 100

    def site(self, dtype=torch.float32, b_dec=True, members=True, scale=None):
        table = tables(3, self.OPS, self.D, dtype)
        slots = torch.tensor([2, 0, -1]).int()
        if not members:
            return Site(*table, slots), table, slots, None, None, None
        w, b = randn(self.F, self.D, seed=5).to(dtype), randn(self.F, seed=6).to(dtype)
        centre = randn(self.D, seed=7).to(dtype) if b_dec else None
        wanted = torch.randint(-1, self.F, (self.B, self.OPS), generator=generator(8)).int()
        selection = Selection(w, b, self.K, scale, positive=True)
        made = Site(*table, slots, "none", 1e-5, selection, wanted, centre)
        return made, table, slots, selection, wanted, centre

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("b_dec", [False, True])
    def test_equals_the_operators(self, dtype, b_dec):
        scale = (randn(self.F, seed=9).abs() + 0.5).to(dtype)
        made, table, slots, selection, wanted, centre = self.site(dtype, b_dec, scale=scale)
        for run in (1, 10):
            x = randn(self.B, run, self.D, seed=1).to(dtype)
            member = selection(x if centre is None else x - centre, wanted)
            assert member.any()
            for mask in (None, torch.rand(self.B, run, generator=generator(2)) < 0.6):
                got = made(x, mask)
                assert torch.equal(got, call(x, table, slots, mask, member))
                assert not torch.equal(got, x)

    def test_tables_and_lists_are_read_at_every_call(self):
        made, table, slots, selection, wanted, centre = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        before = made(x)
        table[2].mul_(2)
        wanted.copy_(wanted.roll(1, 0))
        want = call(x, table, slots, None, selection(x - centre, wanted))
        assert torch.equal(made(x), want) and not torch.equal(want, before)

    @pytest.mark.parametrize("norm", rules.NORMS)
    def test_without_membership_any_number_of_tokens(self, norm):
        made, table, slots, *_ = self.site(members=False)
        made = Site(*table, slots, norm, 1e-4)
        x = randn(self.B, 500, self.D, seed=1)
        assert torch.equal(made(x), call(x, table, slots, norm=norm, eps=1e-4))

    def test_declines(self):
        made, table, slots, selection, wanted, _ = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        assert made(x) is not None
        for other in (
            x[:, :0],
            x[:2],
            x[..., :8].contiguous(),
            x.double(),
            x.mT.contiguous().mT,
            x.clone().requires_grad_(),
            torch._neg_view(x),
            x.to_sparse(),
        ):
            assert made(other) is None
        assert made(x, torch.ones(self.B, 3, dtype=torch.bool)) is None
        assert made(x, torch.ones(self.B, 2)) is None
        with fastsae.use_backend("reference"):
            assert made(x) is None
        with FakeTensorMode():
            assert made(x) is None
        with torch.no_grad():
            assert made(x.clone().requires_grad_()) is not None
        wrapped = []
        torch.vmap(lambda t: wrapped.append(made(t)) or t)(torch.stack([x, x]))
        torch.func.grad(lambda t: wrapped.append(made(t)) or t.sum())(x)
        torch.func.functionalize(lambda t: wrapped.append(made(t)) or t.clone())(x)
        assert wrapped == [None] * 3
        with forward_ad.dual_level():
            assert made(forward_ad.make_dual(x, x)) is None
        torch.jit.trace(lambda t: wrapped.append(made(t)) or t, x, check_trace=False)
        assert wrapped[3:] == [None]
        assert Site(*table, slots, "layer_norm", 1e-5, selection, wanted)(x) is None

    @pytest.mark.parametrize("moved", ["the tables", "the weights"])
    def test_shared_memory_is_other_memory(self, moved):
        made, table, slots, selection, wanted, centre = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        table[2][..., 1] = -torch.inf
        table[3].copy_(torch.tensor([rules.CLAMP, rules.MEMBER | rules.SIGNED, -1]))
        before = made(x)
        w, b, _ = selection.weights
        for t in (*table, slots, wanted) if moved == "the tables" else (w, b, centre):
            t.share_memory_()
        (table[2] if moved == "the tables" else b).mul_(-2)
        want = call(x, table, slots, None, selection(x - centre, wanted))
        assert torch.equal(made(x), want) and not torch.equal(want, before)

    def test_replaced_memory_is_kept(self):
        made, table, *_ = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        before = made(x)
        sizes = [t.numel() * t.element_size() for t in table]
        for t in table:
            t.data = torch.zeros_like(t)
        # memory that was freed would be these tensors' now
        _ = [torch.full((n,), 77, dtype=torch.uint8) for n in sizes for _ in range(8)]
        assert torch.equal(made(x), before)

    def test_memory_of_other_kinds_is_not_pointed_into(self):
        _, table, slots, selection, wanted, centre = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        for args in ((selection, wanted.to("meta")), (selection, wanted, centre.to("meta"))):
            assert Site(*table, slots, "none", 1e-5, *args)(x) is None
        assert Site(torch._neg_view(-table[0]), *table[1:], slots)(x) is None

    def test_many_tokens_are_left_to_selecting(self):
        """And up to there those that all fire are counted to the end."""
        table, slots = tables(3, self.OPS, self.D, torch.float32), torch.tensor([2, 0, -1]).int()
        w, wanted = randn(3000, self.D, seed=5), torch.zeros(self.B, self.OPS).int()
        selection = Selection(w, 10 * w[:, 0].argsort().float(), 1500)
        made = Site(*table, slots, "none", 1e-5, selection, wanted)
        x = randn(self.B, 43, self.D, seed=1)
        assert made(x) is None
        x = x[:, :42].contiguous()
        member = selection(x, wanted)
        assert member.any(-1).sum() > 32
        assert torch.equal(made(x), call(x, table, slots, None, member))

    def test_bad_tables_are_refused(self):
        made, _, slots, _, wanted, _ = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        wanted[0, 0] = self.F
        with pytest.raises(RuntimeError, match="latents must lie in"):
            made(x)
        wanted[0, 0] = -1
        slots[0] = 3
        with pytest.raises(RuntimeError, match="slots must lie in"):
            made(x)

    def test_the_operator_checks_what_it_points_into(self):
        _, table, slots, selection, wanted, centre = self.site()
        good = (*table, slots, 0, 1e-5, wanted, centre, *selection.weights, *selection.screen, 5)
        names = [
            "enc", "dec", "param", "code", "slots|wanted", "", "", "wanted", "centre",
            "W_enc|b_enc", "b_enc", "", "codes", "bounds",
        ]  # fmt: skip
        make = torch.ops.fastsae._steer_site
        for i, name in enumerate(names):
            if not name:
                continue
            t = good[i]
            for bad in (
                t[1:] if i else t[:, 1:],
                t.to(torch.int16),
                t.new_empty(2, *t.shape)[..., 0],
            ):
                with pytest.raises(RuntimeError, match=f"({name}|dtype Short)"):
                    make(*good[:i], bad, *good[i + 1 :], False)
        for i, bad, message in (
            (5, 1, "normalises nothing"),
            (7, None, "half a membership"),
            (12, None, "a screen has two parts"),
            (14, self.F + 1, "do not fit"),
        ):
            with pytest.raises(RuntimeError, match=message):
                make(*good[:i], bad, *good[i + 1 :], False)
        with pytest.raises(ValueError, match="contiguous and need no gradient"):
            Site(table[0].requires_grad_(), *table[1:], slots)

    def test_memory_lives_as_long_as_the_site(self):
        made, *own = self.site()
        x = randn(self.B, 2, self.D, seed=1)
        before, handle = made(x), made._site
        table, _, selection, *_ = own
        memory = [StorageWeakRef(t.untyped_storage()) for t in (*table, selection.weights[0])]
        functions, out = _library.CPU_FUNCTIONS, torch.empty_like(x)
        del made, own, table, selection, _
        gc.collect()
        assert not any(m.expired() for m in memory)
        assert functions.steer(handle, x.data_ptr(), 0, 6, out.data_ptr())
        assert torch.equal(out, before)
        del handle
        assert all(m.expired() for m in memory)


def test_empty_and_bad_input(backend):
    table = tables(2, 3, 8, torch.float32)
    slots = torch.tensor([0, 1]).int()
    assert call(randn(2, 0, 8), table, slots).shape == (2, 0, 8)
    assert call(randn(0, 4, 8), table, slots[:0]).shape == (0, 4, 8)
    x = randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"steer: x must be \[B, ..., D\] with D = 8"):
        call(randn(2, 4, 9), table, slots)
    with pytest.raises(ValueError, match="steer: slots must be"):
        call(x, table, slots[:1])
    with pytest.raises(TypeError, match="steer: slots must be torch.int32"):
        call(x, table, slots.long())
    with pytest.raises(ValueError, match="steer: norm must be one of"):
        call(x, table, slots, norm="l2")
    with pytest.raises(ValueError, match="contiguous"):
        ops.steer_(randn(2, 8, 4).mT, *table, slots)
    with pytest.raises(ValueError, match="a slot and an entry"):
        call(x, tuple(t[:, :0] for t in table), slots)
    for bad in (2, -2):
        if backend in ("reference", "cpu"):
            with pytest.raises(RuntimeError, match=r"slots must lie in \[-1, 2\)"):
                call(x, table, torch.tensor([0, bad]).int())
        else:  # kernels that cannot raise leave the sequence alone
            assert torch.equal(call(x, table, torch.tensor([0, bad]).int())[1], x[1])
