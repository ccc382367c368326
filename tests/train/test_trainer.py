"""The training loop: learns, reports, and resumes exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastsae.nn import TopKSAE, fvu
from fastsae.optim import FusedAdam
from fastsae.train import TrainConfig, Trainer, train_sae
from fastsae.train.trainer import shuffled

D, F, K = 16, 64, 3


pytestmark = pytest.mark.usefixtures("one_thread")


def data(n=2000, seed=0):
    """Sparse sums of 40 directions: what a TopK SAE can explain."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(
        torch.randn(40, D, generator=torch.Generator().manual_seed(99)), dim=1
    )
    which = torch.rand(n, 40, generator=generator).topk(K).indices
    size = torch.zeros(n, 40).scatter(1, which, torch.rand(n, K, generator=generator) + 0.5)
    return size @ truth + 2


def test_learns_and_reports():
    sae = TopKSAE(D, F, K, seed=0, dead_after=4000)
    records = train_sae(sae, data(), batch_size=100, steps=300, lr=3e-3)
    first, last = records[0], records[-1]
    assert last.step == 300
    assert last.tokens == 30_000
    assert last.fvu < 0.25 < first.fvu
    assert 0 < last.l0 <= K
    assert last.dead_fraction == len(sae.dead_latents()) / F
    assert last.tokens_per_s > 0
    held_out = data(seed=1)
    with torch.no_grad():
        assert fvu(held_out, sae.eval()(held_out)) < 0.3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_aux_loss_revives_dead_latents():
    dead = {}
    for coefficient in (0.0, 1 / 32):
        sae = TopKSAE(D, F, K, seed=0, dead_after=1000, aux_coefficient=coefficient)
        with torch.no_grad():  # half of the latents can never win
            sae.b_enc[::2] = -100
        config = TrainConfig(200, lr=3e-3)
        x = data()
        sae.b_enc.requires_grad_(False)
        if coefficient:
            sae.b_enc.data[::2] = -1
        trainer = Trainer(sae, config)
        trainer.fit(shuffled(x, 100))
        dead[coefficient] = len(sae.dead_latents())
    assert dead[0.0] >= F // 2
    assert dead[1 / 32] < dead[0.0]


def test_other_optimizer_keeps_unit_norm():
    sae = TopKSAE(D, F, K, seed=0)
    trainer = Trainer(sae, TrainConfig(20), torch.optim.AdamW(sae.parameters()))
    records = trainer.fit(shuffled(data(), 100))
    assert records[-1].fvu < records[0].fvu or len(records) == 1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize(
    "moments,dtype", [("fp32", torch.float32), ("8bit", torch.bfloat16)], ids=["fp32", "8bit-bf16"]
)
def test_resumes_exactly(tmp_path, moments, dtype):
    config = TrainConfig(40, lr=1e-2, log_every=10, moments=moments)
    x = data().to(dtype)

    def start():
        sae = TopKSAE(D, F, K, seed=0, dtype=dtype, dead_after=500)
        return sae, Trainer(sae, config)

    whole, trainer = start()
    trainer.fit(shuffled(x, 100))

    _, first = start()
    with pytest.warns(UserWarning, match="ended after 17 of 40 steps"):
        first.fit(itertools.islice(shuffled(x, 100), 17))
    first.save(tmp_path / "run.pt")
    resumed, second = start()
    second.load(tmp_path / "run.pt")
    assert second.step_count == 17
    records = second.fit(shuffled(x, 100, start=17), checkpoint=tmp_path / "run.pt")
    assert [r.step for r in records] == [20, 30, 40]
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    third = start()[1]
    third.load(tmp_path / "run.pt")
    assert third.step_count == 40


def test_a_batch_that_is_not_finite_spoils_nothing(tmp_path):
    batches = list(itertools.islice(shuffled(data(), 100), 12))
    batches[5] = batches[5].clone()
    batches[5][7, 3] = float("nan")

    def start():
        return Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(12, warmup=2, log_every=4))

    stopped, other, skipping = start(), start(), start()
    with pytest.raises(ValueError, match="batch 5 holds NaN or an infinity; the weights are as"):
        stopped.fit(batches, checkpoint=tmp_path / "run.pt", checkpoint_every=5)
    other.load(tmp_path / "run.pt")
    for trainer in (stopped, other):
        assert trainer.step_count == 5
        assert all(p.isfinite().all() for p in trainer.sae.parameters())
    with pytest.raises(ValueError, match="batch 5 holds"):
        other.fit(batches[5:])  # counted from the beginning of the run
    with pytest.warns(UserWarning, match="batch 5 holds NaN or an infinity and is skipped"):
        records = skipping.fit(batches, not_finite="skip")
    assert [r.step for r in records] == [4, 8, 12] and skipping.tokens == 1100
    assert records[-1].fvu < records[0].fvu
    with pytest.raises(ValueError, match="must be raise, skip or ignore"):
        start().fit(batches, not_finite="drop")
    with pytest.warns(UserWarning, match="batch 5 holds"):
        train_sae(TopKSAE(D, F, K, seed=0), iter(batches), steps=12, not_finite="skip")


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path):
    sae = TopKSAE(D, F, K, seed=0)
    trainer = Trainer(sae, TrainConfig(12, warmup=0, log_every=100))
    batches = list(itertools.islice(shuffled(data(), 100), 12))

    def poisoned():
        for i, x in enumerate(batches):
            if i == 7:
                with torch.no_grad():
                    sae.b_dec.fill_(float("inf"))
            yield x

    with pytest.raises(ValueError, match="not finite any more at step 9: the run has diverged"):
        trainer.fit(poisoned(), checkpoint=tmp_path / "run.pt", checkpoint_every=3)
    fresh = Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(12, warmup=0, log_every=100))
    fresh.load(tmp_path / "run.pt")
    assert fresh.step_count == 6 and fresh.sae.b_dec.isfinite().all()


def test_a_run_can_be_extended(tmp_path):
    def start(steps):
        return Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(steps, warmup=2, decay=0.0))

    whole, short, longer = start(10), start(6), start(10)
    whole.fit(shuffled(data(), 100))
    short.fit(shuffled(data(), 100), checkpoint=tmp_path / "run.pt")
    longer.load(tmp_path / "run.pt")
    longer.fit(shuffled(data(), 100, start=longer.step_count))
    assert longer.step_count == 10
    for a, b in zip(whole.sae.state_dict().values(), longer.sae.state_dict().values()):
        assert torch.equal(a, b)


def test_a_run_that_is_done_writes_its_checkpoint_all_the_same(tmp_path):
    trainer = Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(2, warmup=1))
    trainer.fit(shuffled(data(), 100))
    assert trainer.fit(shuffled(data(), 100), checkpoint=tmp_path / "run.pt") == []
    assert (tmp_path / "run.pt").is_file()


def test_checkpoint_from_before_a_field(tmp_path):
    """A file without `moments` was written with the default."""
    trainer = Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(2))
    trainer.save(tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt")
    del state["config"]["moments"]
    for group in state["optimizer"]["param_groups"]:
        del group["moments"], group["master_weights"], group["capturable"]
    torch.save(state, tmp_path / "run.pt")
    trainer.load(tmp_path / "run.pt")
    trainer.step(data()[:50])
    other = Trainer(TopKSAE(D, F, K, seed=0), TrainConfig(2, moments="8bit"))
    with pytest.raises(ValueError, match="moments 'fp32' .here '8bit'"):
        other.load(tmp_path / "run.pt")


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    def trainer(**changes):
        return Trainer(TopKSAE(D, F, K), TrainConfig(**{"steps": 5, **changes}))

    path = tmp_path / "run.pt"
    with pytest.raises(FileNotFoundError, match=r"run\.pt"):
        trainer().load(path)
    trainer().save(path)
    with pytest.raises(ValueError, match=r"run\.pt: saved by a run with lr"):
        trainer(lr=0.5).load(path)
    with pytest.raises(ValueError, match=r"run\.pt: saved by a run with d_sae 64 .here 65."):
        Trainer(TopKSAE(D, F + 1, K), TrainConfig(5)).load(path)
    whole = path.read_bytes()
    for damaged in (whole[:-200], whole[:10], b"", b"\x80\x04N."):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.pt: (truncated|not a)"):
            trainer().load(path)
    for state, why in (
        ({"a": torch.zeros(1)}, "not a fastsae"),
        ({"format": "fastsae.Trainer", "format_version": 9}, "format_version is 9"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=why):
            trainer().load(path)


def test_an_optimizer_made_of_numpy_scalars_is_saved_readably(tmp_path):
    def trainer(kind):
        sae = TopKSAE(D, F, K, seed=0)
        options = {
            "lr": np.float64(1e-3),
            "betas": (np.float64(0.9), 0.99),
            "eps": np.float32(1e-8),
        }
        return Trainer(sae, TrainConfig(3), kind(sae.parameters(), **options))

    for kind in (FusedAdam, torch.optim.Adam):
        first = trainer(kind)
        first.step(data(100))
        first.save(tmp_path / "run.pt")
        again = trainer(kind)
        again.load(tmp_path / "run.pt")
        assert again.step_count == 1 and torch.equal(again.sae.W_enc, first.sae.W_enc)


def test_a_checkpoint_of_tied_weights_is_refused_by_name(tmp_path):
    sae = TopKSAE(D, F, K, seed=0, normalize_decoder=False)
    sae.W_enc = sae.W_dec
    Trainer(sae, TrainConfig(3), torch.optim.Adam(sae.parameters())).save(tmp_path / "run.pt")
    other = TopKSAE(D, F, K, seed=1, normalize_decoder=False)
    before = other.W_enc.detach().clone()
    with pytest.raises(ValueError, match="run.pt: .*parameter groups"):
        Trainer(other, TrainConfig(3), torch.optim.Adam(other.parameters())).load(
            tmp_path / "run.pt"
        )
    assert torch.equal(other.W_enc, before)


def test_schedule():
    config = TrainConfig(100, lr=1.0, warmup=10, decay=0.2)
    rates = [config.lr_at(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert TrainConfig(10, lr=1.0, warmup=0, decay=0).lr_at(9) == 1.0
    with pytest.raises(ValueError, match="decay"):
        TrainConfig(10, decay=2)


def test_shuffled_batches():
    x = torch.arange(10.0)[:, None]
    batches = list(itertools.islice(shuffled(x, 3, seed=1), 7))
    epoch = torch.cat(batches[:3]).flatten()
    assert len(epoch.unique()) == 9
    assert not torch.equal(epoch, torch.cat(batches[3:6]).flatten())
    later = list(itertools.islice(shuffled(x, 3, seed=1, start=4), 3))
    for a, b in zip(batches[4:], later):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="batch of 11"):
        next(shuffled(x, 11))


def test_fvu():
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    assert float(fvu(x, x)) == 0
    assert float(fvu(x, x.mean((0, 1)).expand_as(x))) == pytest.approx(1)
    assert fvu(x.bfloat16(), x).dtype == torch.float32


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    sae = TopKSAE(D, F, K, seed=0)
    Trainer(sae, TrainConfig(3, log_every=2)).fit(shuffled(data(), 100), progress=True)
    assert "3/3" in capsys.readouterr().err
