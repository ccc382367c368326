"""The host ahead of the device: AuxK without its count, late counts, prefetched batches."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from common import randn

from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam
from fastsae.train import ahead
from fastsae.train.ahead import Copies, DeadBound, is_finite, prefetched, rounded
from fastsae.train.trainer import TrainConfig, Trainer, shuffled

N, D, F, K = 40, 12, 64, 4


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- AuxK ---------------------------------------------------------------------------------------


def made(dead, dtype=torch.float32, k_aux=10, **options):
    sae = TopKSAE(D, F, K, seed=0, dtype=dtype, k_aux=k_aux, dead_after=100, **options)
    with torch.no_grad():
        sae.b_enc.copy_(randn(F, seed=1) / 10)
        sae.b_dec.copy_(randn(D, seed=2))
        if options.get("rank_by_decoder_norm"):
            sae.W_dec.mul_(randn(F, seed=3).abs()[:, None] + 0.1)
            sae.W_dec[5] = 0  # its rank is 0 whatever its value is
        sae.W_enc[7] = sae.W_enc[4]  # a tie
        sae.b_enc[7] = sae.b_enc[4]
    sae.tokens_seen.fill_(1000)
    sae.last_fired.fill_(990)
    sae.last_fired[dead] = torch.arange(len(dead)) * 7  # each dead for another time
    return sae.eval()


@pytest.mark.parametrize("optimizer", [True, False], ids=["factors", "gradients"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "rank by norm"])
@pytest.mark.parametrize("n_dead", [0, 1, 9, 22, 64])
@pytest.mark.parametrize("spare", [0, 1, 20, 999], ids=lambda s: f"spare{s}")
def test_a_capacity_gives_what_the_count_gives(n_dead, spare, scaled, activation, optimizer):
    dead = torch.arange(F)[torch.randperm(F, generator=torch.Generator().manual_seed(1))[:n_dead]]
    results = []
    for capacity in (None, n_dead + spare):
        sae = made(dead, rank_by_decoder_norm=scaled, activation=activation)
        owner = FusedAdam(sae.parameters(), lr=1e-2) if optimizer else None
        x = randn(N, D, seed=5)
        out = sae(x)
        loss = sae.aux_loss(x, out, most_dead=capacity)
        (loss + 0 * out.sum()).backward()  # a gradient everywhere
        if owner is not None:
            owner.step()
        results.append([loss.detach(), *(p.grad if owner is None else p.detach()
                                         for p in sae.parameters())])  # fmt: skip
    for counted, fixed in zip(*results, strict=True):
        assert torch.equal(counted, fixed)


def test_too_small_a_capacity_takes_those_longest_dead():
    dead = torch.arange(0, 20)  # latent 0 for the longest time
    x = randn(N, D, seed=5)
    one, two = made(dead, k_aux=4), made(dead[:8], k_aux=4)
    out = one(x)
    assert torch.equal(one.aux_loss(x, out, most_dead=8), two.aux_loss(x, out))


class Fixed(Trainer):
    """Trains on a CPU as on a GPU."""

    capacities: list[int]

    def _most_dead(self, x, n):
        bound = self._bound(n)
        self.capacities.append(bound)
        return bound


@pytest.mark.parametrize("moments,dtype", [("fp32", torch.float32), ("8bit", torch.bfloat16)])
def test_training_by_late_counts_is_training_by_counts(moments, dtype, monkeypatch):
    monkeypatch.setattr(ahead, "LateCount", Slow)
    monkeypatch.setattr(
        "fastsae.train.trainer.rounded", lambda bound, f: min(f, bound + bound % 3)
    )  # of all sizes
    x = randn(800, D, seed=1).to(dtype)
    config = TrainConfig(60, lr=3e-2, moments=moments, log_every=7)
    results, records = [], []
    for kind in (Trainer, Fixed):
        Slow.made.clear()
        sae = TopKSAE(D, F, K, seed=0, dtype=dtype, dead_after=900, k_aux=8)
        with torch.no_grad():
            sae.b_enc[::3] = torch.linspace(-0.5, -3, 22)  # these die, some are revived
        trainer = kind(sae, config)
        trainer.capacities = []
        records.append([(r.loss, r.fvu, r.dead_fraction) for r in trainer.fit(shuffled(x, N))])
        results.append(list(sae.state_dict().values()))
    assert records[0] == records[1] and max(d for _, _, d in records[0]) > 0
    for counted, late in zip(*results, strict=True):
        assert torch.equal(counted, late)
    assert 0 in trainer.capacities and len(set(trainer.capacities)) > 4


class Slow:
    """A count that arrives three steps later."""

    made: ClassVar[list[Slow]] = []
    waited = 0

    def __init__(self, count):
        self.number = int(count)
        Slow.made.append(self)

    def is_there(self):
        return len(Slow.made) - Slow.made.index(self) > 3

    def value(self):
        Slow.waited += not self.is_there()
        return self.number


def test_a_late_count_bounds_the_dead(monkeypatch):
    """Latents that die at once, in crowds, and come back; waited for in the first steps only."""
    monkeypatch.setattr(ahead, "LateCount", Slow)
    Slow.made.clear()
    Slow.waited = 0
    generator = torch.Generator().manual_seed(0)
    bound, last, tokens, tight = DeadBound(600), torch.zeros(F, dtype=torch.int64), 0, 0
    for step in range(300):
        n = 10 if step % 2 else 25  # batches of two sizes
        tokens += n
        share = (0.0, 0.02, 0.5)[step // 20 % 3]
        last[torch.rand(F, generator=generator) < share] = tokens
        found = bound.update(tokens - last, tokens, n)
        dead = int((tokens - last >= 600).sum())
        assert found >= dead
        tight += found == dead
        if step == 8:
            early = Slow.waited
    assert Slow.waited == early and tight > 50


def test_capacities_come_in_few_sizes():
    sizes = {rounded(b, 100_000) for b in range(100_001)}
    assert sizes == {0, 100_000, *(1 << i for i in range(8, 17))}
    assert all(rounded(b, 100_000) >= b for b in (1, 255, 256, 257, 65_537, 99_999))
    assert rounded(3, 64) == 64


# ---- prefetching ---------------------------------------------------------------------------------


class Noted(Copies):
    """A second stream that notes what it is asked for; copies arrive when handed over."""

    def __init__(self):
        self.log, self.coming, self.count = [], {}, 0

    def start(self, x):
        self.log.append(f"copy {int(x.flatten()[0])}")
        there = torch.full_like(x, float("nan"))
        self.coming[id(there)] = (there, x.clone())
        return there

    def hand_over(self, copied):
        there, x = self.coming.pop(id(copied))
        there.copy_(x)
        self.log.append(f"ready {int(x.flatten()[0])}")

    def mark(self):
        log, name = self.log, self.count
        self.count += 1

        class Event:
            def synchronize(self):
                log.append(f"wait {name}")

        return Event()


def test_a_batch_is_copied_while_the_one_before_is_trained_on():
    copies, buffer = Noted(), torch.zeros(3)

    def batches():
        for i in range(6):
            yield buffer.fill_(i)  # whose owner writes to it again

    for x in prefetched(batches(), torch.device("cpu"), copies=copies):
        copies.log.append(f"train {int(x.flatten()[0])}")
    assert copies.log == [
        "copy 0", "ready 0", "copy 1", "train 0", "ready 1", "copy 2", "train 1",
        "ready 2", "copy 3", "train 2", "wait 0", "ready 3", "copy 4", "train 3", "wait 1",
        "ready 4", "copy 5", "train 4", "wait 2", "ready 5", "train 5", "wait 3",
    ]  # fmt: skip


def test_fit_takes_no_batch_that_it_does_not_train_on(monkeypatch):
    monkeypatch.setattr(
        "fastsae.train.trainer.prefetched",
        lambda b, d, refuse: prefetched(b, d, copies=Noted(), refuse=refuse),
    )
    source = iter(randn(10, N, D, seed=1))
    Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(4)).fit(source)
    assert len(list(source)) == 6
    records = Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(9)).fit(randn(3, N, D, seed=1))
    assert records[-1].step == 3


@pytest.mark.parametrize("copies", [None, "noted"])
def test_a_batch_that_is_not_finite_is_refused_in_its_place(copies):
    batches = [torch.full((3,), float(i)) for i in range(5)]
    batches[1][2], batches[4][1] = float("nan"), float("-inf")
    refused = []
    got = prefetched(
        batches, torch.device("cpu"), copies=Noted() if copies else None,
        refuse=lambda: refused.append(len(seen)),
    )  # fmt: skip
    seen = []
    for x in got:
        seen.append(None if x is None else int(x.flatten()[0]))
    assert seen == [0, None, 2, 3, None] and refused == [1, 4]


def test_large_values_are_finite():
    assert is_finite(torch.full((2, 3), 3e38)) and is_finite(torch.empty(0, 3))
    assert is_finite(torch.full((4,), 60000.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")], dtype=torch.bfloat16))


def test_an_error_of_the_source_comes_out():
    def batches():
        yield torch.zeros(3)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(prefetched(batches(), torch.device("cpu"), copies=Noted()))


def test_on_a_cpu_batches_pass_through():
    x = [torch.zeros(3), torch.ones(3)]
    assert [a is b for a, b in zip(prefetched(x, torch.device("cpu")), x)] == [True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_reach_a_gpu_whole():
    device = torch.device("cuda")
    batches = [torch.full((1 << 20,), float(i)).add_(torch.arange(1 << 20) % 7) for i in range(12)]
    batches[5] = batches[5].pin_memory()
    batches[7] = batches[7].cuda()
    for i, x in enumerate(prefetched(iter(batches), device)):
        for _ in range(20):  # keeps the device behind the host
            y = x * 1.0
        assert x.is_cuda and torch.equal(y.cpu(), batches[i].cpu())
