"""Clamping: exact, error kept, the same with and without the KV cache, one program per sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastsae
from fastsae.steer.clamp import added, clamp_edit, clamped
from fastsae.steer.sweep import (
    Point,
    Sampling,
    difference_of_means,
    distinct_bigrams,
    net_effect,
    sample,
    token_share,
)
from fastsae.train.activations import activations_at, find_site

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae() -> Any:
    return fastsae.nn.TopKSAE(16, 40, 4, seed=0).eval().requires_grad_(False)


def test_edit_is_the_spliced_sae_with_one_latent_set_and_its_error_kept(sae: Any) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    values, indices = sae.encode(x)
    active = int(indices[0, 0, 0])
    silent = next(j for j in range(40) if j not in indices.unique())
    for latent in (active, silent):
        got = clamp_edit(sae, x, torch.tensor([latent, latent]), torch.tensor([3.0, 3.0]))
        dense = torch.zeros(2, 5, 40).scatter(-1, indices.long(), values)
        error = x - (dense @ sae.W_dec + sae.b_dec)
        dense[..., latent] = 3.0
        torch.testing.assert_close(got, dense @ sae.W_dec + sae.b_dec + error)


def test_a_sequence_left_alone_is_bit_exact(sae: Any) -> None:
    x = torch.randn(2, 3, 16)
    got = clamp_edit(sae, x, torch.tensor([-1, 7]), torch.tensor([5.0, 5.0]))
    assert torch.equal(got[0], x[0])
    assert not torch.equal(got[1], x[1])


def test_generation_with_and_without_cache_agree_and_the_hook_goes(model: Any, sae: Any) -> None:
    _, module = find_site(model, layer=0)
    prompt = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = model.generate(prompt, **options)
    with clamped(module, sae, 3, 8.0):
        cached = model.generate(prompt, use_cache=True, **options)
        uncached = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    assert torch.equal(model.generate(prompt, **options), plain)
    with pytest.raises(RuntimeError, match="stop"), clamped(module, sae, 3, 8.0):
        raise RuntimeError("stop")
    assert not module._forward_hooks


def test_each_sequence_has_its_own_latent(model: Any, sae: Any) -> None:
    _, module = find_site(model, layer=0)
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    before = activations_at(model, module, tokens)
    handle: list[torch.Tensor] = []
    with clamped(module, sae, torch.tensor([-1, 5, 6]), torch.tensor([0.0, 4.0, 4.0])):
        handle.append(activations_at(model, module, tokens))
    after = handle[0]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], after[2])


def test_wrong_arguments_are_named(model: Any, sae: Any) -> None:
    _, module = find_site(model, layer=0)
    with (
        pytest.raises(ValueError, match=r"latent must lie in \[0, 39\]"),
        clamped(module, sae, 40, 1.0),
    ):
        pass
    with (
        clamped(module, sae, torch.tensor([1, 2]), 1.0),
        pytest.raises(ValueError, match="for a batch of 3"),
    ):
        model(torch.ones(3, 2, dtype=torch.long))


def test_sampling_repeats_and_a_vector_of_zero_changes_nothing(model: Any) -> None:
    _, module = find_site(model, layer=0)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    settings = Sampling(new_tokens=6, seed=3)
    once = sample(model, prompts, settings)
    assert once.shape == (2, 6)
    assert torch.equal(once, sample(model, prompts, settings))
    assert torch.equal(once, sample(model, prompts, settings, added(module, torch.zeros(16))))


def test_measures() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]])
    assert token_share(tokens, torch.tensor([1])) == 3 / 8
    assert distinct_bigrams(tokens) == pytest.approx((2 / 3 + 1) / 2)
    base = Point("none", 0, 0.1, 0.8, 3.0)
    steered = Point("clamp", 2, 0.2, 0.4, 4.0)
    assert net_effect(steered, base, loss_scale=4.0) == pytest.approx(0.1 - 0.25 - 0.5)
    too_far = Point("clamp", 2, 0.9, 0.8, 3.0)  # gains count up to a quarter of all tokens
    assert net_effect(too_far, base, loss_scale=4.0) == pytest.approx(0.15)
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert difference_of_means(x, torch.tensor([False, True])).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="no token"):
        difference_of_means(x, torch.tensor([False, False]))
