"""sparse_adam_step on every backend against torch.optim.Adam."""

from __future__ import annotations

import pytest
import torch
from common import device_of, latents, max_error, randn, takes_fp64, tokens
from pairs import problem, weight_gradient

import fastsae
from fastsae import ops
from fastsae.reference import moments as stored_moments

OP = "sparse_adam_step"

HYPER = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8)


def moments(param):
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    return torch.zeros_like(param, dtype=wide), torch.zeros_like(param, dtype=wide)


def steps(param, n, k, count, backend_dtype, **options):
    """`count` steps on fresh factors; yields the factors of each."""
    m, v = moments(param)
    f, d = param.shape
    for t in range(1, count + 1):
        values, indices, _, _ = problem(n, d, f, k, backend_dtype, param.device, seed=10 * t)
        rows = randn(n, d, dtype=backend_dtype, seed=10 * t + 5).to(param.device)
        ops.sparse_adam_step(param, m, v, values, indices, rows, step=t, **{**HYPER, **options})
        yield values, indices, rows, m, v


def project(param, grad):
    square = param.square().sum(1, keepdim=True)
    return grad - (grad * param).sum(1, keepdim=True) / square * param


@pytest.mark.parametrize("unit_norm", [False, True], ids=["plain", "unit-norm"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01], ids=["no-decay", "decay"])
@pytest.mark.parametrize("n,d,f,k", [(40, 33, 29, 5), (3, 64, 45, 2), (1, 1, 1, 1)])
def test_dense_semantics_equal_torch_adam(backend, n, d, f, k, unit_norm, weight_decay):
    if unit_norm and d == 1:
        pytest.skip("a unit row of one element has nothing orthogonal to it")
    start = torch.nn.functional.normalize(randn(f, d, dtype=torch.float64), dim=1)
    param = start.float().to(device_of(backend))
    twin = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([twin], lr=HYPER["lr"], betas=(0.9, 0.99), eps=1e-8)
    options = dict(unit_norm=unit_norm, weight_decay=weight_decay)
    for values, indices, rows, m, v in steps(param, n, k, 4, torch.float32, **options):
        grad = weight_gradient(values, indices, rows, f)
        if unit_norm:
            twin.grad = project(twin.detach(), grad)
        else:
            twin.grad = grad + weight_decay * twin.detach()
        adam.step()
        if unit_norm:
            twin.data = torch.nn.functional.normalize(twin.data, dim=1)
        state = adam.state[twin]
        assert max_error(m, state["exp_avg"]) < 3e-5
        assert max_error(v, state["exp_avg_sq"]) < 3e-4
        # where a gradient cancels to rounding, Adam's sign is noise of size lr
        assert (param.double().cpu() - twin.detach()).abs().quantile(0.99) < 2e-6
        assert max_error(param, twin.detach()) < 2 * HYPER["lr"]
    if unit_norm:
        assert max_error(param.norm(dim=1), torch.ones(f)) < 1e-6


def test_fp64_is_adam_to_the_last_digits(backend):
    if not takes_fp64(backend):
        pytest.skip(f"{backend}: takes fp32, bf16 and fp16")
    param = randn(60, 20, dtype=torch.float64)
    twin = torch.nn.Parameter(param.clone())
    adam = torch.optim.Adam([twin], lr=HYPER["lr"], betas=(0.9, 0.99), eps=1e-8)
    for values, indices, rows, _, _ in steps(param, 30, 4, 8, torch.float64):
        twin.grad = weight_gradient(values, indices, rows, 60)
        adam.step()
        assert max_error(param, twin.detach()) < 1e-12


@pytest.mark.parametrize("dtype_", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_params_keep_wide_moments(backend, dtype_):
    start = randn(50, 40, dtype=dtype_).to(device_of(backend))
    param = start.clone()
    for values, indices, rows, m, v in steps(param, 20, 3, 1, dtype_):
        grad = weight_gradient(values, indices, rows, 50)
        assert max_error(m, 0.1 * grad) < 1e-5 and max_error(v, 0.01 * grad**2) < 1e-4
        step = HYPER["lr"] * grad / (grad.abs() + 1e-8)
        expected = start.double().cpu() - step
        assert max_error(param, expected) <= float(start.abs().max()) * torch.finfo(dtype_).eps


def test_lazy_leaves_other_rows_alone(backend):
    start = torch.nn.functional.normalize(randn(60, 24), dim=1).to(device_of(backend))
    param = start.clone()
    dense = start.clone()
    lazy_steps = steps(param, 10, 3, 3, torch.float32, lazy=True, unit_norm=True)
    seen = torch.zeros(60, dtype=torch.bool)
    for t, (_, indices, _, m, v) in enumerate(lazy_steps):  # noqa: B007 (m, v: after the loop)
        seen[indices.long().flatten().cpu()] = True
        if t == 0:  # the first step of touched rows is the dense one
            next(steps(dense, 10, 3, 1, torch.float32, unit_norm=True))
            assert torch.equal(param[seen], dense[seen])
    assert torch.equal(param[~seen], start[~seen]) and not torch.equal(param[seen], start[seen])
    assert (m[~seen] == 0).all() and (v[~seen] == 0).all() and (v[seen] > 0).all()
    assert max_error(param[seen].norm(dim=1), torch.ones(int(seen.sum()))) < 1e-6


@pytest.mark.parametrize("d", [8200, 12289], ids=["two-blocks", "odd"])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["plain", "unit-norm"])
def test_rows_wider_than_a_program(gpu_backend, d, unit_norm):
    start = torch.nn.functional.normalize(randn(3, d), dim=1)
    results = []
    for name in ("reference", gpu_backend):
        param = start.to(device_of(name), copy=True)
        with fastsae.use_backend(name):
            state = list(steps(param, 4, 2, 2, torch.float32, unit_norm=unit_norm))[-1]
        results.append((param, *state[-2:]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-5, atol=2e-6)


def test_triton_and_cuda_touch_no_row_for_an_index_out_of_range(gpu_backend):
    param = randn(20, 8).to(device_of(gpu_backend))
    before = param.clone()
    m, v = moments(param)
    indices = torch.tensor([[-1, 20], [2**31 - 1, 4]], dtype=torch.int32, device=param.device)
    rows = randn(2, 8, seed=3).to(param.device)
    values = torch.ones(2, 2, device=param.device)
    ops.sparse_adam_step(param, m, v, values, indices, rows, step=1, lazy=True, **HYPER)
    changed = (param != before).any(1)
    assert changed.nonzero().flatten().tolist() == [4]


def start_state(f, d, fmt, dtype_, device, *, master=False):
    """A param and moments in the middle of a training run, as keyword arguments."""
    weight = torch.nn.functional.normalize(randn(f, d, seed=1), dim=1)
    # coordinates of very different size, as in a language model's residual stream
    size = randn(1, d, seed=2).mul(2).exp()
    m, v = randn(f, d, seed=3) * size / 10, (randn(f, d, seed=4) * size).square() / 10
    v[0], m[1], v[1] = 0, 0, 0
    stored = stored_moments.store(m, v, fmt, 1, torch.arange(f))
    state = dict(param=weight.to(dtype_), **stored._asdict())
    if master:
        state["master"] = weight
    return {name: t.clone().to(device) for name, t in state.items() if t is not None}


def wide(state):
    """Both moments in fp32."""
    names = stored_moments.Moments._fields
    return stored_moments.load(
        stored_moments.Moments(*(None if n not in state else state[n].cpu() for n in names))
    )


@pytest.mark.parametrize("fmt", ["bf16", "8bit"])
@pytest.mark.parametrize("unit_norm,lazy", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("d", [5, 200, 384])
@pytest.mark.parametrize(
    "dtype_,master", [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16-master"]
)
def test_moments_in_few_bits(backend, fmt, unit_norm, lazy, d, dtype_, master):
    """Every backend stores what the reference stores: the same random bits round the same values,
    so a code differs only where the last bits of the moment decide, and then by one."""
    f = 19
    values, indices, _, _ = problem(30, d, f - 4, 3, dtype_, "cpu", seed=7)
    rows = randn(30, d, dtype=dtype_, seed=8)
    results = []
    for name in ("reference", backend):
        device = device_of(name)
        state = start_state(f, d, fmt, dtype_, device, master=master)
        with fastsae.use_backend(name):
            ops.sparse_adam_step(
                values=values.to(device), indices=indices.to(device), rows=rows.to(device),
                step=7, lazy=lazy, unit_norm=unit_norm, **HYPER, **state,
            )  # fmt: skip
        results.append(state)
    expected, got = results
    for scale in ("exp_avg_scale", "exp_avg_sq_scale"):
        if scale in expected:
            torch.testing.assert_close(got[scale].cpu(), expected[scale].cpu(), rtol=1e-5, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        codes, truth = (
            (s[name].cpu().view(torch.int16) if fmt == "bf16" else s[name].cpu()).long()
            for s in (got, expected)
        )
        different = codes != truth
        # where gradients cancel m is rounding noise of any sign, so not all codes are neighbours
        assert different.float().mean() < 0.01
        assert ((codes - truth).abs() <= 1).float().mean() > 0.998
    tolerance = dict(rtol=1e-5, atol=2e-6)
    if master:
        torch.testing.assert_close(got["master"].cpu(), expected["master"].cpu(), **tolerance)
        assert torch.equal(got["param"], got["master"].to(dtype_))
    else:
        torch.testing.assert_close(got["param"].cpu(), expected["param"].cpu(), **tolerance)
    if lazy:
        untouched = torch.ones(f, dtype=torch.bool)
        untouched[indices.long().flatten()] = False
        assert untouched.any()
        before = start_state(f, d, fmt, dtype_, "cpu", master=master)
        for name, t in before.items():
            assert torch.equal(got[name].cpu()[untouched], t[untouched]), name


@pytest.mark.parametrize("fmt", ["bf16", "8bit"])
def test_the_update_uses_moments_before_they_are_rounded(backend, fmt):
    """From moments that the format holds exactly, the new weights are those of wide moments."""
    device = device_of(backend)
    values, indices, _, _ = problem(20, 150, 11, 3, torch.float32, device, seed=7)
    rows = randn(20, 150, seed=8).to(device)
    few = start_state(11, 150, fmt, torch.float32, device)
    m, v = (t.to(device) for t in wide(few))
    param = few["param"].clone()
    args = dict(values=values, indices=indices, rows=rows, step=3, **HYPER)
    ops.sparse_adam_step(**args, **few)
    ops.sparse_adam_step(param, m, v, **args)
    torch.testing.assert_close(few["param"], param, rtol=1e-5, atol=1e-6)
    rounded_m, rounded_v = wide(few)
    assert not torch.equal(rounded_m, m.cpu())
    step = 2**-7 if fmt == "bf16" else 4 / 128  # of a code of v in the upper half
    most = stored_moments._blocks(v.cpu()).amax(2).repeat_interleave(128, 1)[:, :150]
    upper = (v.cpu() > most / 16) & (v.cpu() > 0)
    assert ((rounded_v - v.cpu()).abs() <= 2 * step * v.cpu())[upper].all()


def test_masters_keep_small_updates(backend):
    """An update of lr = 1e-5 rounds away in bf16 and adds up in a master."""
    device = device_of(backend)
    values, indices, _, _ = problem(12, 40, 9, 9, torch.bfloat16, device)
    rows = randn(12, 40, dtype=torch.bfloat16, seed=5).to(device)
    start = randn(9, 40, dtype=torch.bfloat16).to(device).clamp(min=0.5)
    plain, with_master, master = start.clone(), start.clone(), start.float()
    states = [torch.zeros(9, 40, device=device) for _ in range(4)]
    exact = start.double()
    exact_state = [torch.zeros_like(exact) for _ in range(2)]
    options = HYPER | dict(lr=1e-5)
    for t in range(1, 31):
        args = values, indices, rows
        ops.sparse_adam_step(plain, *states[:2], *args, step=t, **options)
        ops.sparse_adam_step(with_master, *states[2:], *args, step=t, master=master, **options)
        with fastsae.use_backend("reference"):
            doubles = values.double(), indices, rows.double()
            ops.sparse_adam_step(exact, *exact_state, *doubles, step=t, **options)
    assert torch.equal(plain, start)
    assert max_error(master, exact) < 1e-6 and max_error(master, start) > 2.5e-4
    assert torch.equal(with_master, master.to(torch.bfloat16))


@pytest.mark.parametrize("fmt", ["fp32", "8bit"])
def test_step_and_lr_on_the_device(backend, fmt):
    device = device_of(backend)
    values, indices, _, _ = problem(12, 40, 9, 3, torch.float32, device)
    rows = randn(12, 40, seed=5).to(device)
    args = dict(values=values, indices=indices, rows=rows, unit_norm=True)
    options = {k: v for k, v in HYPER.items() if k != "lr"}
    numbers, tensors = (start_state(9, 40, fmt, torch.float32, device) for _ in range(2))
    lr, step = torch.tensor(3e-3, device=device), torch.tensor(0.0, device=device)
    for t in range(1, 5):
        step += 1
        ops.sparse_adam_step(lr=3e-3, step=t, **args, **options, **numbers)
        ops.sparse_adam_step(lr=lr, step=step, **args, **options, **tensors)
    for name, t in numbers.items():
        torch.testing.assert_close(
            tensors[name], t, rtol=1e-6, atol=1e-7 if t.dtype.is_floating_point else 0
        )
    ops.sparse_adam_step(lr=lr, step=5, **args, **options, **tensors)  # one of them a number
    ops.sparse_adam_step(lr=3e-3, step=5, **args, **options, **numbers)
    torch.testing.assert_close(tensors["param"], numbers["param"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fmt", ["bf16", "8bit"])
def test_moments_that_are_not_finite_stay_so(backend, fmt):
    device = device_of(backend)
    state = start_state(3, 300, fmt, torch.float32, device)
    rows = torch.zeros(1, 300, device=device)
    rows[0, 5], rows[0, 290] = float("nan"), float("inf")
    values, indices = torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int32)
    for t in (1, 2):
        ops.sparse_adam_step(
            values=values, indices=indices.to(device), rows=rows, step=t, **HYPER, **state
        )
        rows.zero_()
    m, v = wide(state)
    assert not m[0, [5, 290]].isfinite().any() and not v[0, [5, 290]].isfinite().any()
    assert m[1:].isfinite().all() and v[1:].isfinite().all()
    assert m[0, 128:256].isfinite().all()  # the block between them


def test_zero_rows_stay_zero_under_unit_norm(backend):
    param = torch.zeros(20, 8, device=device_of(backend))
    for (*_,) in steps(param, 0, 2, 2, torch.float32, unit_norm=True):
        assert torch.equal(param, torch.zeros_like(param))


def test_index_out_of_range_writes_nothing():
    param = randn(30, 8)
    before = param.clone()
    m, v = moments(param)
    indices = torch.zeros(4, 2, dtype=torch.int32)
    indices[3, 1] = 30
    with pytest.raises(RuntimeError, match=r"\[0, 30\)"):
        ops.sparse_adam_step(
            param, m, v, torch.ones(4, 2), indices, torch.ones(4, 8), step=1, **HYPER
        )
    assert torch.equal(param, before) and not m.any() and not v.any()


def test_repeatable(backend):
    results = []
    for _ in range(2):
        param = randn(latents(backend, 100), 40).to(device_of(backend))
        for (*_,) in steps(param, tokens(backend, 200), 8, 3, torch.float32):
            pass
        results.append(param)
    assert torch.equal(*results)


def test_opcheck(backend):
    values, indices, W, _ = problem(6, 10, 30, 5, torch.float32, device_of(backend))
    rows = randn(6, 10).to(W.device)
    args = (W, *moments(W), values, indices, rows, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1, False, False)
    torch.library.opcheck(torch.ops.fastsae.sparse_adam_step.default, args)


EIGHT_BIT = dict(
    exp_avg=torch.zeros(9, 5, dtype=torch.int8), exp_avg_sq=torch.zeros(9, 5, dtype=torch.uint8)
)


def SCALES(f, blocks, dtype=torch.float32):
    return dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.zeros(f, blocks, dtype=dtype))


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(lr=-1.0), ValueError, "lr is out of range"),
        (dict(beta2=1.0), ValueError, "beta2 is out of range"),
        (dict(step=0), ValueError, "step is out of range"),
        (dict(exp_avg=torch.zeros(9, 4)), ValueError, "exp_avg .* must match param"),
        (dict(exp_avg=torch.zeros(9, 5).half()), TypeError, r"one of \(float32, float32\)"),
        (dict(exp_avg=torch.zeros(9, 5).bfloat16()), TypeError, r"\(bfloat16, bfloat16\)"),
        (dict(exp_avg_scale=torch.zeros(9, 1)), ValueError, "belongs to int8 and uint8"),
        (dict(EIGHT_BIT), ValueError, "exp_avg_scale belongs to int8 and uint8"),
        (dict(EIGHT_BIT, exp_avg_scale=torch.zeros(9, 1)), ValueError, "exp_avg_sq_scale belongs"),
        (dict(EIGHT_BIT, **SCALES(9, 2)), ValueError, r"exp_avg_scale .* \[9, 1\] is expected"),
        (dict(EIGHT_BIT, **SCALES(9, 1, torch.bfloat16)), TypeError, "exp_avg_scale must be"),
        (dict(master=torch.zeros(9, 5)), TypeError, "master belongs to a bf16 or fp16 param"),
        (dict(step=torch.ones(2)), ValueError, "a tensor as step must have one element"),
        (dict(param=torch.zeros(5, 9).T), ValueError, "must be contiguous"),
        (dict(rows=torch.zeros(4, 6)), ValueError, r"rows must be \[\.\.\., D\]"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    args = dict(
        param=torch.zeros(9, 5),
        exp_avg=torch.zeros(9, 5),
        exp_avg_sq=torch.zeros(9, 5),
        values=torch.zeros(4, 2),
        indices=torch.zeros(4, 2, dtype=torch.int32),
        rows=torch.zeros(4, 5),
        step=1,
        **HYPER,
    )
    with pytest.raises(error, match="sparse_adam_step: .*" + message):
        ops.sparse_adam_step(**{**args, **change})
