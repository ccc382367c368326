"""SparseCoder: what every architecture inherits, on TopKSAE and on an architecture made here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from common import randn
from torch import nn

import fastsae
from fastsae.nn import (
    ARCHITECTURES,
    Code,
    CoderConfig,
    Description,
    Loss,
    SparseCoder,
    TopKConfig,
    TopKSAE,
    fvu,
)  # fmt: skip
from fastsae.ops import topk_encode
from fastsae.optim import FusedAdam, has_unit_norm
from fastsae.steer import attach, describe
from fastsae.train import TrainConfig, Trainer, train_sae
from fastsae.train.evaluate import reconstruction

N, D, F, K = 40, 12, 64, 4


pytestmark = pytest.mark.usefixtures("one_thread")


# -- a toy architecture: what a new file in fastsae/nn is ----------------------------------------


@dataclass(frozen=True)
class ScaledConfig(CoderConfig):
    k: int
    decay: float = 0.01

    architecture: ClassVar[str] = "scaled"


class Scaled(SparseCoder):
    """TopK with a learned factor, and a penalty on it."""

    config_class = ScaledConfig
    config: ScaledConfig

    def add_parameters(self, like):
        self.factor = nn.Parameter(torch.ones(1, **like))

    @torch.no_grad()
    def reset_parameters(self, seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.W_dec.normal_(generator=generator)
        self.normalize_decoder_()
        self.W_enc.copy_(self.W_dec)

    def encode(self, x):
        values, indices = topk_encode(self._input(x), self.W_enc, self.b_enc, self.config.k)
        return self._tracked(Code(values * self.factor, indices))

    def loss(self, x, target=None, *, most_dead=None):
        code = self.encode(x)
        out = self.decode(code)
        terms = {"fvu": fvu(self._target(x, target), out), "size": self.factor.square().sum()}
        return Loss(terms["fvu"] + self.config.decay * terms["size"], terms, code, out)

    def describe(self):
        p = {n: p.detach() for n, p in self.named_parameters()}
        gain = p["factor"].expand(self.d_sae)
        return Description(
            p["W_enc"], p["b_enc"], p["W_dec"], p["b_dec"], "topk", k=self.config.k, gain=gain,
            offset=p["b_enc"] * gain, subtract_b_dec=self.config.apply_b_dec_to_input,
        )  # fmt: skip


def test_a_new_architecture_trains_saves_and_is_described(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "scaled", Scaled)
    x = randn(600, D, seed=1) + 2
    sae = Scaled(D, F, K, decay=0.1, dead_after=500, seed=0)
    records = train_sae(sae, x, batch_size=100, steps=80, log_every=20)
    assert records[-1].fvu < 0.9 * records[0].fvu
    factor = float(sae.factor.detach())
    assert records[-1].loss == pytest.approx(records[-1].fvu + 0.1 * factor**2, rel=0.1)
    assert factor != 1
    assert reconstruction(sae.eval(), [x]).l0 <= K
    sae.save_pretrained(tmp_path)
    loaded = SparseCoder.from_pretrained(tmp_path)
    assert type(loaded) is Scaled and loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))
    assert describe(loaded).k == K and describe(loaded).gain is not None
    with pytest.raises(ValueError, match=r"config\.json: holds a Scaled, not a TopKSAE"):
        TopKSAE.from_pretrained(tmp_path)


# -- configs ---------------------------------------------------------------------------------------


def test_a_coder_is_made_of_its_config():
    sae = TopKSAE(TopKConfig(D, F, K, k_aux=7), seed=3)
    same = TopKSAE(D, F, K, k_aux=7, seed=3)
    assert sae.config == same.config and torch.equal(sae.W_dec, same.W_dec)
    assert "k_aux=7" in repr(sae) and "activation" not in repr(sae)
    with pytest.raises(TypeError, match="needs a TopKConfig, got ScaledConfig"):
        TopKSAE(ScaledConfig(D, F, K))
    with pytest.raises(TypeError, match="gate"):
        TopKSAE(D, F, K, gate=1)


def test_numpy_and_torch_scalars_become_numbers(tmp_path):
    config = TopKConfig(np.int64(D), torch.tensor(F), np.int32(K), aux_coefficient=np.float32(0.5),
                        normalize_decoder=np.bool_(False), dead_after=np.int64(9))  # fmt: skip
    assert config == TopKConfig(D, F, K, aux_coefficient=0.5, normalize_decoder=False, dead_after=9)
    assert json.loads(json.dumps(asdict(config)))["k"] == K
    TopKSAE(config).save_pretrained(tmp_path)
    assert TopKSAE.from_pretrained(tmp_path).config == config
    training = TrainConfig(np.int64(5), lr=np.float64(1e-3), betas=[np.float32(0.5), 0.75])
    assert training == TrainConfig(5, lr=1e-3, betas=(0.5, 0.75)) and type(training.lr) is float
    trainer = Trainer(TopKSAE(D, F, K), training)
    trainer.save(tmp_path / "run.pt")
    trainer.load(tmp_path / "run.pt")


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"k": 2.5}, TypeError, "k must be int, got 2.5"),
        ({"k": True}, TypeError, "k must be int, got True"),
        ({"normalize_decoder": 1}, TypeError, "normalize_decoder must be bool"),
        ({"d_out": 5}, ValueError, "apply_b_dec_to_input needs d_out = d_in"),
        ({"d_out": 0, "apply_b_dec_to_input": False}, ValueError, "d_out must be positive"),
        ({"dead_after": 0}, ValueError, "dead_after must be positive"),
        ({"k_aux": 0}, ValueError, "k_aux must be positive"),
        ({"aux_coefficient": float("nan")}, ValueError, "aux_coefficient must be 0 or more"),
    ],
)
def test_bad_configs_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TopKSAE(**({"d_in": D, "d_sae": F, "k": K} | options))


# -- widths that differ ---------------------------------------------------------------------------


def test_a_transcoder_learns_another_width(tmp_path):
    x = randn(600, D, seed=1)
    y = (x @ randn(D, 5, seed=2)).relu() + 1
    sae = TopKSAE(D, F, K, d_out=5, apply_b_dec_to_input=False, seed=0, dead_after=500)
    assert sae.W_dec.shape == (F, 5) and sae.b_dec.shape == (5,) and sae(x).shape == (600, 5)
    sae.initialize_from_data(x, y, seed=0)
    opt = FusedAdam(sae.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        loss = sae.loss(x, y)
        loss.total.backward()
        opt.step()
        opt.zero_grad()
        errors.append(float(loss.terms["fvu"].detach()))
    assert errors[-1] < 0.7 * errors[0]
    assert loss.reconstruction.shape == y.shape and set(loss.terms) == {"fvu", "aux"}
    sae.save_pretrained(tmp_path)
    assert torch.equal(SparseCoder.from_pretrained(tmp_path)(x), sae.eval()(x))
    assert sae.describe().W_enc.shape == (F, D)
    with pytest.raises(NotImplementedError, match="a transcoder reads 12 and writes 5"):
        attach(nn.Sequential(nn.Linear(D, D)), sae, hook="0")
    for bad in (None, x, y[:-1]):
        with pytest.raises(ValueError, match=r"target must be \[600, 5\]"):
            sae.loss(x, bad)


def test_the_loss_is_its_terms():
    sae = TopKSAE(D, F, K, seed=0, aux_coefficient=0.25, dead_after=1)
    x = randn(N, D, seed=1)
    sae(x)
    sae.last_fired[:] = -100
    loss = sae.loss(x)
    assert torch.equal(loss.total, loss.terms["fvu"] + 0.25 * loss.terms["aux"])
    assert torch.equal(loss.terms["fvu"], fvu(x, sae(x)))
    assert torch.equal(loss.reconstruction, sae.decode(loss.code))
    assert set(TopKSAE(D, F, K, aux_coefficient=0).loss(x).terms) == {"fvu"}


# -- what fires ----------------------------------------------------------------------------------


def test_a_negative_activation_fires():
    sae = TopKSAE(D, F, K, activation="identity", seed=0)
    with torch.no_grad():
        sae.b_enc.fill_(-100)  # every activation is negative
    x = randn(N, D, seed=1)
    code = sae(x) is not None and sae.encode(x)
    assert (code.values < 0).all()
    assert (sae.tokens_since_fired()[code.indices.unique().long()] < 2 * N).all()
    found = reconstruction(sae.eval(), [x])
    assert found.l0 == K
    assert found.dead_fraction == 1 - len(code.indices.unique()) / F
    record = Trainer(sae.train(), TrainConfig(1)).fit([x])[0]
    assert record.l0 == K
    stats = fastsae_stats(code)
    assert int(stats.count.sum()) == N * K and len(stats.top(int(code.indices[0, 0]))[0])


def fastsae_stats(code):
    from fastsae.features.stats import FeatureStats

    stats = FeatureStats(F)
    stats.update(code.values[None], code.indices[None], torch.arange(N)[None])
    return stats


# -- files ---------------------------------------------------------------------------------------


def test_tied_weights_stay_tied(tmp_path):
    sae = TopKSAE(D, F, K, seed=0)
    sae.W_enc = sae.W_dec
    sae.save_pretrained(tmp_path)
    loaded = TopKSAE.from_pretrained(tmp_path)
    assert loaded.W_enc is loaded.W_dec and has_unit_norm(loaded.W_dec)
    assert torch.equal(loaded(randn(3, D)), sae.eval()(randn(3, D)))
    other = TopKSAE(D, F, K, seed=0)  # two parameters on one storage
    other.W_enc = nn.Parameter(other.W_dec.detach())
    other.save_pretrained(tmp_path)
    assert TopKSAE.from_pretrained(tmp_path).W_enc is not None


def test_a_save_that_fails_keeps_the_one_before(tmp_path):
    good = TopKSAE(D, F, K, seed=0)
    good.save_pretrained(tmp_path)
    whole = torch.randn(2 * F - 1, D)
    bad = TopKSAE(D, F, K, seed=1)
    bad.W_enc, bad.W_dec = nn.Parameter(whole[:F]), nn.Parameter(whole[F - 1 :])
    with pytest.raises(ValueError, match="W_dec and W_enc share memory"):
        bad.save_pretrained(tmp_path)
    strange = TopKSAE(D, F, K, seed=1)
    object.__setattr__(strange.config, "k", object())  # no number that JSON has
    with pytest.raises(TypeError):
        strange.save_pretrained(tmp_path)
    assert torch.equal(TopKSAE.from_pretrained(tmp_path).W_dec, good.W_dec)


def test_files_of_the_first_format_are_read(tmp_path):
    sae = TopKSAE(D, F, K, seed=0, activation="identity")
    sae.save_pretrained(tmp_path)
    old = {"d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": True, "normalize_decoder": True,
           "activation": "identity", "rank_by_decoder_norm": False}  # fmt: skip
    header = json.loads((tmp_path / "config.json").read_text())
    header |= {"format": "fastsae.TopKSAE", "config": old}
    (tmp_path / "config.json").write_text(json.dumps(header))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "sae.safetensors")
    metadata = {k: str(header[k]) for k in ("format", "format_version", "save_id")}
    save_file(weights, tmp_path / "sae.safetensors", metadata=metadata)
    for kind in (SparseCoder, TopKSAE):
        assert kind.from_pretrained(tmp_path).config == sae.config


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"k": 3}, {"activation": "identity"}, {"apply_b_dec_to_input": False}, {"dead_after": 7},
     {"normalize_decoder": False}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_run_is_not_continued_with_another_coder(tmp_path, change):
    config = TopKConfig(D, F, K)
    Trainer(TopKSAE(config), TrainConfig(5)).save(tmp_path / "run.pt")
    other = Trainer(TopKSAE(replace(config, **change)), TrainConfig(5))
    with pytest.raises(ValueError, match=f"saved by a run with {next(iter(change))} "):
        other.load(tmp_path / "run.pt")


def test_a_run_is_not_continued_with_another_optimizer(tmp_path):
    sae = TopKSAE(D, F, K)
    Trainer(sae, TrainConfig(5)).save(tmp_path / "run.pt")
    other = Trainer(sae, TrainConfig(5), torch.optim.Adam(sae.parameters()))
    with pytest.raises(ValueError, match="optimizer 'FusedAdam' .here 'Adam'"):
        other.load(tmp_path / "run.pt")
    Trainer(sae, TrainConfig(5), FusedAdam(sae.parameters(), weight_decay=0.1)).save(
        tmp_path / "run.pt"
    )
    other = Trainer(sae, TrainConfig(5), FusedAdam(sae.parameters(), lazy=True))
    with pytest.raises(ValueError, match="weight_decay=0.1 .here 0.*lazy=False .here True"):
        other.load(tmp_path / "run.pt")


def test_a_checkpoint_says_what_it_was_saved_by(tmp_path):
    trainer = Trainer(TopKSAE(D, F, K), TrainConfig(5))
    trainer.save(tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    for name in ("sae_config", "optimizer_class"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "part.pt")
        with pytest.raises(ValueError, match=f"part.pt: it lacks {name}"):
            trainer.load(tmp_path / "part.pt")


def test_data_that_end_early_are_told_and_saved(tmp_path):
    trainer = Trainer(TopKSAE(D, F, K), TrainConfig(100))
    with pytest.warns(UserWarning, match="ended after 7 of 100 steps"):
        trainer.fit([randn(N, D, seed=i) for i in range(7)], checkpoint=tmp_path / "run.pt")
    again = Trainer(TopKSAE(D, F, K), TrainConfig(100))
    again.load(tmp_path / "run.pt")
    assert again.step_count == 7


def test_top_level_names():
    assert fastsae.TopKSAE is TopKSAE and fastsae.FusedAdam is FusedAdam
