"""Steering by SAEs of every kind, and what their statistics are worth."""

from __future__ import annotations

import pytest
import torch
from common import randn
from small_models import LAYER, D, F, by_definition, prompt, tiny, topk_sae

import fastsae
from fastsae.steer import (
    Description,
    MaxActivations,
    ablate,
    active,
    attach,
    clamp,
    describe,
    scale,
)

pytest.importorskip("transformers")


@pytest.fixture
def gpt2() -> torch.nn.Module:
    return tiny("gpt2")


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "topk-rescaled"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_equals_saelens_error_term(gpt2, kind, norm):
    """Its own error-term path, latents set by its own hook, on the same activations."""
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
    x = randn(1, 40, D, seed=30)
    j, k = sae.encode(x)[0].to_dense().sum(0).topk(2).indices.tolist()
    sae.use_error_term = True

    def set_latents(acts, hook=None):
        acts = acts.to_dense().clone() if acts.is_sparse else acts.clone()
        acts[..., j], acts[..., k] = 3.0, acts[..., k] * 0.5
        return acts

    sae.hook_sae_acts_post.add_hook(set_latents)
    truth = sae(x)
    block = gpt2.transformer.h[LAYER]
    steerer = attach(gpt2, sae, layer=LAYER)
    with steerer.steer([[clamp(j, 3.0), scale(k, 0.5)]]):
        got = steerer._edit(x)
    assert block is steerer._module
    assert (got - truth).abs().max() < 2e-5 * truth.abs().max()
    assert (got - x).abs().max() > 0.1


def test_a_description_is_enough(gpt2):
    with pytest.raises(ValueError, match="jumprelu needs threshold"):
        Description(randn(F, D), randn(F), randn(F, D), randn(D), "jumprelu")
    with pytest.raises(TypeError, match="Description"):
        attach(gpt2, object(), layer=LAYER)


@torch.no_grad()
def test_latents_ranked_by_decoder_norm_are_members_as_the_sae_selects_them(gpt2):
    sae = fastsae.nn.TopKSAE(D, F, 5, rank_by_decoder_norm=True, seed=3)
    sae.W_enc.copy_(randn(F, D, seed=4) / D**0.5)
    sae.W_dec.mul_(torch.linspace(0.2, 5, F)[:, None])
    ids, program = prompt(2), [ablate(j) for j in range(25, 40)]
    with by_definition(gpt2, sae, [[(j, lambda f: f * 0) for j in range(25, 40)], None]):
        want = gpt2(ids).logits
    with attach(gpt2, sae, layer=LAYER).steer([program, None]):
        assert torch.allclose(gpt2(ids).logits, want, atol=1e-4)


@torch.no_grad()
def test_latents_selected_below_zero_keep_their_sign(gpt2):
    """A TopK SAE without ReLU."""
    sae = fastsae.nn.TopKSAE(D, F, 35, activation="identity", seed=3)
    ids, program = prompt(2), [ablate(j) for j in range(20)]
    with by_definition(gpt2, sae, [[(j, lambda f: f * 0) for j in range(20)], None]):
        want = gpt2(ids).logits
    with attach(gpt2, sae, layer=LAYER).steer([program, None]):
        assert torch.allclose(gpt2(ids).logits, want, atol=1e-4)


@torch.no_grad()
def test_a_threshold_takes_the_place_of_membership(gpt2):
    weights = randn(F, D, seed=4) / D**0.5, randn(F, seed=6) / 8, randn(F, D, seed=7), randn(D)
    ids, found = prompt(2), []
    for kind, own in (
        ("topk", {"k": 5, "threshold": 0.7}),
        ("jumprelu", {"threshold": torch.full((F,), 0.7)}),
        ("topk", {"k": 5}),
    ):
        steerer = attach(gpt2, Description(*weights, kind, **own), layer=LAYER)
        with steerer.steer([[ablate(j) for j in range(20)], None]):
            found.append(gpt2(ids).logits)
        steerer.detach()
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["relu", "topk"])
@torch.no_grad()
def test_a_low_precision_model_is_edited_with_one_rounding(gpt2, dtype, kind):
    """The site's states in generate() against fp64: within half a unit in the last place."""
    shapes = ((F, D), (F,), (F, D), (D,))
    W, b, W_dec, b_dec = (randn(*s, seed=i).to(dtype) / 4 for i, s in enumerate(shapes))
    sae = Description(W, b, W_dec, b_dec, kind, subtract_b_dec=True, k=5)
    steerer, seen = attach(gpt2.to(dtype), sae, layer=LAYER), []
    keep = lambda m, a, out: seen.append(fastsae.lm.sites.output_of(out))  # noqa: E731
    for first in (True, False):
        steerer._module.register_forward_hook(keep, prepend=first)
    with steerer.steer([[clamp(3, 6.0), *(scale(j, 0.5) for j in range(8, 30))]]):
        gpt2.generate(prompt(1), max_new_tokens=5, do_sample=False, pad_token_id=1)
    x, got = torch.cat(seen[::2], 1), torch.cat(seen[1::2], 1)
    assert x.shape == (1, 10, D) and got.dtype == dtype
    f = ((x.double() - b_dec.double()) @ W.double().T + b.double()).clamp(min=0)
    if kind == "topk":
        chosen = fastsae.ops.topk_encode(x - b_dec, W, b, 5)[1].long()
        f = f * torch.zeros_like(f).scatter_(-1, chosen, 1.0)
    delta = torch.zeros_like(f)
    delta[..., 3], delta[..., 8:30] = 6.0 - f[..., 3], -0.5 * f[..., 8:30]
    truth = x.double() + delta @ W_dec.double()
    assert delta[..., 8:30].any()
    bound = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5 * truth.abs().max()
    assert bool(((got.double() - truth).abs() <= bound).all())


def test_statistics_of_another_sae_are_refused():
    with pytest.raises(ValueError, match=r"\[3\] of another SAE, this one has 40"):
        describe(topk_sae(), MaxActivations(torch.ones(3), 9, "text"))


@torch.no_grad()
def test_units_of_a_latents_own_maximum(gpt2):
    sae = describe(topk_sae(20), MaxActivations(torch.linspace(0.2, 2.0, F), 9, "text"))
    steerer, ids, gated = attach(gpt2, sae, layer=LAYER), prompt(2), 0

    def logits(*program):
        with steerer.steer([program, program]):
            return gpt2(ids).logits

    for j in range(0, F, 5):
        of = sae.max_activation.values[j].item()
        assert torch.equal(logits(clamp(j, 1.5, unit="max")), logits(clamp(j, 1.5 * of)))
        found = [
            logits(clamp(7, 4.0, when=active(j, above, unit)))
            for above, unit in ((0.5, "max"), (0.5 * of, "raw"), (0.5, "raw"))
        ]
        assert torch.equal(found[0], found[1])
        gated += not torch.equal(found[0], found[2])
    assert gated  # the unit of a gate is no formality here


@torch.no_grad()
@pytest.mark.parametrize("architecture,extra", [("relu", {}), ("topk", {"k": 5})])
def test_a_constant_that_the_input_is_multiplied_by(gpt2, architecture, extra):
    """f(s x) decoded by W_dec / s: the SAE whose encoder is s W_enc and whose decoder W_dec / s."""
    s, ids, found = 2.5, prompt(2), []
    W, W_dec, b = randn(F, D, seed=4) / D**0.5, randn(F, D, seed=7), randn(F, seed=6) / 8
    b_dec = randn(D, seed=5) / 4
    for scaled in (True, False):
        sae = (
            Description(W, b, W_dec, b_dec, architecture, input_scale=s, **extra)
            if scaled
            else Description(W * s, b, W_dec / s, b_dec / s, architecture, **extra)
        )
        steerer = attach(gpt2, sae, layer=LAYER)
        with steerer.steer([[scale(j, 2.0) for j in range(30)], [clamp(3, 6.0)]]):
            found.append(gpt2(ids).logits)
        steerer.detach()
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gpt2(ids).logits, found[0], rtol=1e-2, atol=1e-2)
