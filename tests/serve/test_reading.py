"""Which latents fire on a text: by the SAE's description, beside the engine that writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from common import randn
from small_models import FAMILIES, LAYER, SLIDING, D, F, V, tiny, topk_sae

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serving import GREEDY
from serving import Reader as Collected

import fastsae
from fastsae.lm.harvest import activations_at
from fastsae.lm.sites import find_site
from fastsae.serve import reading
from fastsae.serve.engine import Engine
from fastsae.serve.reading import Reader, fired
from fastsae.steer import Description, attach, clamp, describe


def dense(found, n_latents):
    """[T, F]"""
    return torch.zeros(len(found.values), n_latents).scatter(1, found.latents.long(), found.values)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "topk-rescaled"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_activations_are_those_of_saelens(kind, norm):
    sae_lens = pytest.importorskip("sae_lens")
    names = {
        "standard": ("StandardSAE", {}),
        "jumprelu": ("JumpReLUSAE", {}),
        "gated": ("GatedSAE", {}),
        "topk": ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": False}),
        "topk-rescaled": ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    }
    name, own = names[kind]
    config = getattr(sae_lens, f"{name}Config")(
        d_in=D, d_sae=F, normalize_activations=norm, apply_b_dec_to_input=True, **own
    )
    sae = getattr(sae_lens, name)(config)
    for i, (label, p) in enumerate(sae.named_parameters()):
        p.copy_(randn(*p.shape, seed=i) / (2 if p.dim() == 1 else D**0.5))
        if label == "threshold":
            p.abs_()
    x = randn(30, D, seed=30)
    truth = sae.encode(x).to_dense()
    found = fired(describe(sae), x, F)
    assert torch.allclose(dense(found, F), truth, atol=2e-5 * float(truth.abs().max()))
    assert torch.equal(found.fires, (truth != 0).sum(1))


def described(kind):
    """A description of random weights, of every activation function that there is."""
    weights = randn(F, D, seed=4) / D**0.5, randn(F, seed=6) / 4, randn(F, D, seed=7), randn(D) / 4
    own = {
        "relu": {},
        "jumprelu": {"threshold": randn(F, seed=8).abs()},
        "gated": {"gain": randn(F, seed=9).exp(), "offset": randn(F, seed=10) / 4},
        "topk": {"k": 5, "gain": randn(F, seed=9).exp(), "offset": randn(F, seed=10) / 4},
    }
    return Description(*weights, kind, **own[kind], subtract_b_dec=True, input_scale=0.7)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
def test_activations_are_those_of_the_formula(kind, norm):
    """In fp64, as `Description` states it."""
    sae, x = replace(described(kind), norm=norm), randn(30, D, seed=30)
    u = x.double()
    if norm == "layer_norm":
        u = (u - u.mean(1, keepdim=True)) / (u.std(1, keepdim=True) + sae.eps)
    elif norm == "constant_norm":
        u = u / u.square().mean(1, keepdim=True).sqrt()
    p = (u * 0.7 - sae.b_dec.double()) @ sae.W_enc.double().T
    score = p + sae.b_enc.double()
    on = score > (0 if sae.threshold is None else sae.threshold)
    if kind == "topk":
        on = torch.zeros_like(on).scatter(1, score.topk(5).indices, True)
    gain, offset = (1, sae.b_enc) if sae.gain is None else (sae.gain, sae.offset)
    truth = torch.where(on, (p * gain + offset).clamp(min=0), 0.0).float()
    assert (truth > 0).any(0).sum() > 15
    assert torch.allclose(dense(fired(sae, x, F), F), truth, atol=2e-5 * float(truth.max()))


@pytest.mark.parametrize("activation", ["relu", "identity"])
@torch.no_grad()
def test_activations_are_the_sae_s_own(activation):
    sae = fastsae.nn.TopKSAE(D, F, 5, activation=activation, rank_by_decoder_norm=True, seed=3)
    x = randn(12, D, seed=1)
    code = sae.encode(x)
    truth = torch.zeros(12, F).scatter(1, code.indices.long(), code.values)
    assert torch.allclose(dense(fired(sae.describe(), x, F), F), truth, atol=1e-5)


@torch.no_grad()
def test_the_strongest_come_first_whatever_the_size_of_the_parts(monkeypatch):
    weights = randn(F, D, seed=4) / D**0.5, randn(F, seed=6) / 8, randn(F, D, seed=7), randn(D)
    sae, x = Description(*weights, "relu", input_scale=0.5), randn(9, D, seed=1)
    whole = fired(sae, x, 4)
    truth = (0.5 * x @ weights[0].T + weights[1]).clamp(min=0)
    assert torch.allclose(whole.values, truth.topk(4).values, atol=1e-5)
    assert whole.values.shape == (9, 4) and torch.equal(whole.fires, (truth > 0).sum(1))
    monkeypatch.setattr(reading, "_ELEMENTS", 2 * F)
    for one, other in zip(whole, fired(sae, x, 4)):
        assert torch.allclose(one.float(), other.float(), atol=1e-6)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(NotImplementedError, match=f"{D} wide, and the model has 12"):
        fired(describe(topk_sae()), randn(3, 12), 4)


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_a_text_is_read_beside_the_engine_as_if_alone(family):
    """While steered text is written, in another thread: neither changes the other."""
    model = tiny(family)
    site, module = find_site(model, LAYER)
    texts = [torch.randint(2, V, (n,)).tolist() for n in (3, 9, 17)]
    truth = [activations_at(model, module, torch.tensor([ids]))[0] for ids in texts]
    reader = Reader(model, site)
    steerer = attach(model, topk_sae(), layer=LAYER)
    engine = Engine(model, steerer, rows=2)
    program = [clamp(3, 6.0)]

    def written(tokens):
        collected = Collected()
        options = dict(program=program, max_tokens=tokens, sampling=GREEDY)
        engine.submit([5, 6, 7], collected, **options)
        return collected

    try:
        alone = written(200).wait().tokens
        beside = written(200)
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(reader, texts * 8))
        assert beside.wait().tokens == alone
    finally:
        engine.close()
    for got, want in zip(read, truth * 8):
        assert torch.allclose(got, want, atol=1e-5)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in reader._model.parameters())  # no weight twice
