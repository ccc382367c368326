"""The sweep of strengths: what is sampled and what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae.steer import add_vector, attach
from fastsae.steer.sweep import (
    Point,
    Sampling,
    distinct_bigrams,
    net_effect,
    sample,
    token_share,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def test_sampling_repeats_and_a_vector_of_zero_changes_nothing(model: Any) -> None:
    steerer = attach(model, layer=0)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    settings = Sampling(new_tokens=6, seed=3)
    once = sample(model, prompts, settings)
    assert once.shape == (2, 6)
    assert torch.equal(once, sample(model, prompts, settings))
    nothing = steerer.steer([[add_vector(torch.zeros(16))]])
    assert torch.equal(once, sample(model, prompts, settings, nothing))
    much = steerer.steer([[add_vector(9.0 * torch.arange(16.0))]])
    assert not torch.equal(once, sample(model, prompts, settings, much))
    steerer.detach()


def test_measures() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]])
    assert token_share(tokens, torch.tensor([1])) == 3 / 8
    assert distinct_bigrams(tokens) == pytest.approx((2 / 3 + 1) / 2)
    base = Point("none", 0, 0.1, 0.8, 3.0)
    steered = Point("clamp", 2, 0.2, 0.4, 4.0)
    assert net_effect(steered, base, loss_scale=4.0) == pytest.approx(0.1 - 0.25 - 0.5)
    too_far = Point("clamp", 2, 0.9, 0.8, 3.0)  # gains count up to a quarter of all tokens
    assert net_effect(too_far, base, loss_scale=4.0) == pytest.approx(0.15)
