"""logit_effect against the model's own logits, for norms of every parameterisation."""

from __future__ import annotations

import pytest
import torch
from common import randn
from small_models import FAMILIES, SLIDING, D, V, tiny
from torch import nn

pytest.importorskip("transformers")

from fastsae.lm.readout import final_norm_of, logit_effect, measured


class Rms(nn.Module):
    """x / rms(x) times a weight that is stored in one of the ways of the families."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(randn(D, seed=3) / 4 + (kind == "plain"))

    def forward(self, x):
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        scale = {"plain": self.weight, "one more": 1 + self.weight, "exp": self.weight.exp()}
        return (y * scale[self.kind]).to(x.dtype)


class Layer(nn.LayerNorm):
    """With weights and a bias that are not trivial."""

    def __init__(self):
        super().__init__(D)
        with torch.no_grad():
            self.weight.copy_(randn(D, seed=4))
            self.bias.copy_(randn(D, seed=5))


class Model(nn.Module):
    def __init__(self, norm, width=D):
        super().__init__()
        self.embed, self.final, self.head = nn.Embedding(V, D), norm, nn.Linear(width, V)
        self.narrow = nn.Linear(D, width) if width != D else None

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids) * 2
        x = x if self.final is None else self.final(x)
        return self.head((x if self.narrow is None else self.narrow(x))[:, -1:])


def by_the_definition(model, norm, x, direction):
    """The change of the logits along a direction, the token's own norm held fixed."""
    centred = isinstance(norm, nn.LayerNorm)
    held = lambda v: (v - v.mean(-1, keepdim=True)) if centred else v  # noqa: E731
    size = held(x).square().mean().sqrt()
    scaled = held(direction) / size
    zero = norm(torch.zeros(1, 1, D))[0, 0]
    gamma = (norm(x[None, None])[0, 0] - zero) / (held(x) / size)
    change = model.head.weight @ (gamma * scaled) * size
    return change - change.mean()


@pytest.mark.parametrize("kind", ["plain", "one more", "exp", "layer"])
@torch.no_grad()
def test_scale_and_centring_are_measured(kind):
    norm = Layer() if kind == "layer" else Rms(kind)
    model = Model(norm)
    assert final_norm_of(model) is norm
    direction = randn(1, D, seed=7)
    got = logit_effect(model, direction)
    want = by_the_definition(model, norm, randn(D, seed=8) + 1, direction[0])
    torch.testing.assert_close(got[0], want, rtol=1e-2, atol=1e-2)
    assert measured(norm, D)[0] == (kind == "layer")


@torch.no_grad()
def test_without_a_norm_the_unembedding_alone_counts():
    model = Model(None)
    assert final_norm_of(model) is None
    direction = randn(2, D, seed=7)
    effect = direction @ model.head.weight.T
    torch.testing.assert_close(
        logit_effect(model, direction), effect - effect.mean(-1, keepdim=True)
    )


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
@torch.no_grad()
def test_the_families_norms_are_found(family):
    model = tiny(family)
    norm = final_norm_of(model)
    assert norm is not None and "norm" in type(norm).__name__.lower()
    names = {m: n for n, m in model.named_modules()}
    assert names[norm] in ("transformer.ln_f", "model.norm", "gpt_neox.final_layer_norm")
    weight = norm.weight.detach()
    centred, gamma = measured(norm, D)
    assert centred == (type(norm).__name__ == "LayerNorm")
    expected = 1 + weight if "Gemma" in type(norm).__name__ else weight
    torch.testing.assert_close(gamma, expected, rtol=1e-2, atol=1e-2)


def test_a_readout_of_another_width_is_refused():
    with pytest.raises(NotImplementedError, match=r"no matrix \[V, 16\].*\[60, 8\]"):
        logit_effect(Model(Layer(), width=8), randn(1, D))


def test_another_normalisation_is_refused():
    class Strange(nn.Module):
        def forward(self, x):
            return torch.softmax((x / x.norm(dim=-1, keepdim=True)) ** 3, -1)

    with pytest.raises(NotImplementedError, match="Strange before the readout"):
        logit_effect(Model(Strange()), randn(1, D))
