"""torch's default dtype changes nothing where dtypes were given: to the bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from common import randn
from torch.utils._pytree import tree_leaves

import fastsae
from fastsae.bench import checks, run
from fastsae.bench.cases import CASES, Inputs, Size, product
from fastsae.features.stats import FeatureStats
from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam
from fastsae.steer import MaxActivations, attach, clamp, describe, min_clamp, scale
from fastsae.train.plain import PlainTopKStep
from fastsae.train.trainer import train_sae

N, D, F, K = 40, 12, 48, 3


def trained(moments="fp32", dtype=torch.float32):
    """More than 256 steps: where bf16 stops counting. AuxK, dead latents, checkpoint, records."""
    sae = TopKSAE(D, F, K, seed=0, dtype=dtype, dead_after=200, k_aux=8)
    x = randn(400, D, seed=1).to(dtype)
    records = train_sae(sae, x, batch_size=N, steps=262, moments=moments)
    numbers = [[r.loss, r.fvu, r.l0, r.dead_fraction, r.lr] for r in records]
    return [*sae.state_dict().values(), numbers]


def stepped():
    """The optimizer alone, from a saved state and with its rate in a tensor."""
    sae = TopKSAE(D, F, K, seed=0, dtype=torch.float32)

    def made():
        lr = torch.tensor(1 / 3, dtype=torch.float64)
        return FusedAdam(sae.parameters(), lr=lr, capturable=True)

    def steps(optimizer):
        for seed in range(3):
            x = randn(N, D, seed=seed)
            (sae(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():  # torch's own Adam on a CPU refuses capturable
        sae.b_enc.requires_grad_(False), sae.b_dec.requires_grad_(False)
    first = made()
    steps(first)
    saved = first.state_dict()
    saved["param_groups"][0]["lr"] = 0.1234567
    second = made()
    second.load_state_dict(saved)
    for state in second.state.values():
        assert state["step"].dtype == torch.float32
        state["step"].fill_(255)
    steps(second)
    assert {float(s["step"]) for s in second.state.values() if s} == {258.0}
    return [*sae.state_dict().values(), [s["exp_avg"] for s in second.state.values() if s]]


def plain():
    start = TopKSAE(D, F, K, seed=0, dtype=torch.float32)
    step = PlainTopKStep(start.W_enc, start.b_enc, start.W_dec, start.b_dec, K, 1e-2)
    losses = [step(randn(N, D, seed=s)) for s in range(260)]
    assert int(step.steps_since_fired.max()) <= 260
    return [losses, step.W_enc.detach(), step.steps_since_fired.long()]


def sample_of_data():
    sae = TopKSAE(D, 600, K, seed=0, dtype=torch.float32)
    sae.initialize_from_data(torch.cat([randn(60, D, seed=2), torch.zeros(60, D).float()]), seed=3)
    return list(sae.state_dict().values())


def steered():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(D, D, dtype=torch.float32) for _ in range(2)))
    sae = TopKSAE(D, F, K, seed=0, dtype=torch.float32).eval()
    most = MaxActivations(torch.rand(F, dtype=torch.float32) + 1, 100, "made up")
    steerer = attach(model, describe(sae, most), hook="0", max_batch=2)
    program = [clamp(3, 1.5), min_clamp(5, 0.3), scale(7, 1 / 3)]
    with torch.no_grad(), steerer.steer([program, None]):
        return [model(randn(2, 5, D, seed=4))]


def statistics():
    stats = FeatureStats(F, kept=4)
    values, indices, _ = TopKSAE(D, F, K, seed=0, dtype=torch.float32).encode(
        randn(6, 7, D, seed=5)
    )
    stats.update(values, indices, torch.arange(42).view(6, 7))
    tops = [stats.top(j) for j in range(F)]
    return [stats.max, stats.density, stats.mean_active, stats.total, tops]


def sampled():
    pytest.importorskip("transformers")
    from fastsae.serve.engine import Row, Sampling, sample

    rows = [
        Row([1], None, Sampling(0.7, 0.9, s), 1, 0.0, print, torch.Generator().manual_seed(s))
        for s in range(30)
    ]
    return [sample(randn(30, 90, seed=6), rows)]


def benched(backend):
    """Inputs, results and checks of every case: with every backend that runs on a CPU here."""
    size = Size(24, 16, 256, 4)
    given = Inputs(size)
    found = [given.x, given.w, given.b, given.pairs, checks.sample(1000, 300)]
    unit = product(size, given)
    found += [unit.run(0), unit.check(unit.run(0))]
    for op, make in CASES.items():
        if backend in run.usable(op, "cpu", size.dtype):
            with fastsae.use_backend(backend):
                case = make(size, given)
                result = case.run(0)
                found += [result, case.check(result)]
    return found


RUNS = {
    "train": trained,
    "train 8bit": lambda: trained("8bit", torch.bfloat16),
    "optimizer": stepped,
    "plain": plain,
    "initialize": sample_of_data,
    "steer": steered,
    "statistics": statistics,
    "sample": sampled,
    "bench reference": lambda: benched("reference"),
    "bench cpu": lambda: benched("cpu"),
}


def under(dtype, name):
    torch.set_default_dtype(dtype)
    try:
        return tree_leaves(RUNS[name]())
    finally:
        torch.set_default_dtype(torch.float32)


@cache
def expected(name):
    return under(torch.float32, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("name", RUNS)
def test_the_default_dtype_changes_nothing(name, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, other = expected(name), under(dtype, name)
    finally:
        torch.set_num_threads(threads)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b
