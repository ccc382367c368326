"""Where the activations are: of any rank that can be told apart, offloaded, converted, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from common import randn
from small_models import LAYER, PROGRAMS, D, V, prompt, tiny, topk_sae
from torch import nn

from fastsae._errors import UserError
from fastsae.lm.harvest import Windows, activations_at
from fastsae.lm.load import EMBEDDED_MODEL, load_subject
from fastsae.lm.sites import device_of
from fastsae.lm.splice import splice_loss
from fastsae.steer import add_vector, attach, clamp, positions

pytest.importorskip("transformers")

PROGRAM = [[clamp(3, 6.0)], None]


def steered(model, ids, run=None, program=PROGRAM):
    """Logits of a fresh site, which is taken off again."""
    steerer = attach(model, topk_sae(), layer=LAYER)
    try:
        with torch.no_grad(), steerer.steer(program):
            return (run or model)(ids, use_cache=False).logits
    finally:
        steerer.detach()


class Mixture(nn.Module):
    """A model whose module puts out its tokens in another layout."""

    def __init__(self, layout):
        super().__init__()
        self.embed, self.site, self.layout = nn.Embedding(V, D), nn.Identity(), layout

    def forward(self, input_ids=None, attention_mask=None, **_):
        x = self.embed(input_ids)
        B, T, D = x.shape
        if self.layout == "flat":
            return self.site(x.view(B * T, D)).view(B, T, D)
        if self.layout == "heads":
            return self.site(x[:, None].expand(B, 3, T, D)).mean(1)
        if self.layout == "experts":  # as many of them as sequences, each with some of the tokens
            return self.site(x[:, : T // 2].contiguous())
        return self.site(x.view(B * T, D)[::2])  # the tokens that an expert is given


@torch.no_grad()
@pytest.mark.parametrize("where", [None, positions.generated_only()], ids=["all", "generated"])
def test_flattened_tokens_are_edited_as_what_they_are(where):
    model, ids = Mixture("flat"), prompt(3, 4)
    steerer = attach(model, topk_sae(), hook="site")
    with steerer.steer(PROGRAMS, where, prompt_length=2):
        got = model(ids)
    steerer.detach()
    steerer = attach(model, topk_sae(), hook="embed")
    with steerer.steer(PROGRAMS, where, prompt_length=2):
        want = model(ids)
    steerer.detach()
    assert torch.equal(got, want) and not torch.equal(got, model(ids))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["heads", "experts", "some"])
def test_other_layouts_are_refused_by_name(layout):
    """Each could be cut into as many equal parts as there are programs."""
    model, ids = Mixture(layout), prompt(2, 6)
    steerer = attach(model, topk_sae(), hook="site")
    for program in (PROGRAM, [[add_vector(torch.ones(D))]]):
        refused = pytest.raises(ValueError, match="steer: site puts out .* 2 sequences of 6 tokens")
        with refused, steerer.steer(program):
            model(ids)
    steerer.detach()
    with pytest.raises(ValueError, match="Identity puts out .* 2 sequences of 6 tokens"):
        activations_at(model, model.site, ids)


@torch.no_grad()
def test_a_module_by_itself_must_tell_its_sequences_apart():
    model = Mixture("flat")
    steerer, x = attach(model, topk_sae(), hook="site"), randn(6, D)
    with steerer.steer([[add_vector(torch.ones(D), 2.0)]]):
        torch.testing.assert_close(model.site(x), x + 2.0)
        with pytest.raises(ValueError, match="does not say how many sequences"):
            model.site(x.view(1, 2, 3, D))
    with pytest.raises(ValueError, match="does not say how many"), steerer.steer(PROGRAM):
        model.site(x)
    steerer.detach()


@torch.no_grad()
def test_flattened_tokens_are_harvested_and_spliced_as_what_they_are():
    class LM(Mixture):
        def forward(self, input_ids, **_):
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=super().forward(input_ids) @ self.embed.weight.T)

    model, ids = LM("flat"), prompt(3, 4)
    assert torch.equal(activations_at(model, model.site, ids), model.embed(ids))
    windows, sae = Windows(ids, ["a"] * 3), topk_sae()
    assert splice_loss(model, model.site, sae, windows) == splice_loss(
        model, model.embed, sae, windows
    )


def offloaded(model: nn.Module) -> nn.Module:
    """As accelerate does: parameters are on the meta device but while their module runs."""
    for module in model.modules():
        own = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
        if not own:
            continue

        def bring(module, args, own=own):
            for n, p in own.items():
                module._parameters[n] = nn.Parameter(p, requires_grad=False)

        def take(module, args, output, own=own):
            for n, p in own.items():
                module._parameters[n] = nn.Parameter(p.to("meta"), requires_grad=False)

        take(module, None, None)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offloaded_weights(dtype):
    model, ids = tiny("llama").to(dtype), prompt(2)
    want = steered(model, ids)
    away = offloaded(copy.deepcopy(model))
    assert all(p.is_meta for p in away.parameters()) and device_of(away).type == "cpu"
    assert torch.equal(steered(away, ids), want) and not torch.equal(want, model(ids).logits)
    site = away.model.layers[LAYER]
    assert torch.equal(
        activations_at(away, site, ids), activations_at(model, model.model.layers[LAYER], ids)
    )


@torch.no_grad()
@pytest.mark.parametrize("parameters", [True, False])
def test_parameters_that_do_not_say_where_activations_are(parameters):
    """Of another dtype than what arrives; none at all."""

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()
            self.own = nn.Linear(D, D) if parameters else None

        def forward(self, x):
            return self.site(x.bfloat16())

    model, x = Cast(), randn(1, 3, D)
    steerer = attach(model, topk_sae(), hook="site")
    with steerer.steer([[add_vector(torch.ones(D), 2.0)]]):
        for _ in range(2):
            assert torch.equal(model(x), x.bfloat16() + 2.0)
    steerer.detach()


@torch.no_grad()
def test_a_converted_model_takes_its_buffers_along():
    """Also inside the block, and inside inference mode."""
    model, ids = tiny("gpt2"), prompt(2)
    steerer = attach(model, topk_sae(), layer=LAYER)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        want = steered(copy.deepcopy(model).to(dtype), ids)
        with steerer.steer(PROGRAM):
            model.to(dtype)
            with torch.inference_mode():
                assert torch.equal(model(ids, use_cache=False).logits, want)
            assert torch.equal(model(ids, use_cache=False).logits, want)
        assert not torch.equal(model(ids).logits, want)
    steerer.detach()


def as_wrapper(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def block_in_place(model):
    model.transformer.h[LAYER].compile(backend="eager")
    return model


def block_wrapped(model):
    model.transformer.h[LAYER] = torch.compile(model.transformer.h[LAYER], backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("compiled", [as_wrapper, in_place, block_in_place, block_wrapped])
@pytest.mark.parametrize("when", ["before", "before, and run", "after", "after, and run"])
def test_compiled_in_every_way(compiled, when):
    """A graph that was made before `attach` would not look for its hook."""
    ids = prompt(2)
    want = steered(tiny("gpt2"), ids)
    model = tiny("gpt2")
    clean = model(ids).logits
    if when.startswith("after"):
        steerer = attach(model, topk_sae(), layer=LAYER)
    run = compiled(model)
    if when.endswith("run"):
        run(ids, use_cache=False)
    if when.startswith("before"):
        steerer = attach(model, topk_sae(), layer=LAYER)
    with steerer.steer(PROGRAM):
        got = run(ids, use_cache=False).logits
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(run(ids, use_cache=False).logits, clean)
    steerer.detach()
    steerer = attach(model, topk_sae(), layer=LAYER)  # the graph knows the first one
    with steerer.steer(PROGRAM):
        torch.testing.assert_close(run(ids, use_cache=False).logits, want)
    steerer.detach()


@torch.no_grad()
def test_the_compiled_wrapper_can_be_given():
    model, ids = tiny("gpt2"), prompt(2)
    want, run = steered(tiny("gpt2"), ids), as_wrapper(model)
    run(ids, use_cache=False)
    torch.testing.assert_close(steered(run, ids), want)


def test_scripted_modules_are_refused():
    model = nn.Sequential(nn.Linear(D, D))
    scripted = nn.Sequential(torch.jit.trace(model[0], randn(2, D)))
    with pytest.raises(NotImplementedError, match="attach: 0 is compiled by torch.jit"):
        attach(scripted, topk_sae(), hook="0")


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoder_decoders_are_refused(family, tmp_path):
    import transformers

    sizes = {
        "T5": dict(d_model=D, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "Bart": dict(
            d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        ),
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(vocab_size=V, **sizes)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    path = {"T5": "decoder.block.1", "Bart": "model.decoder.layers.1"}[family]
    refused = pytest.raises(NotImplementedError, match="encoder-decoder model")
    with refused:
        attach(model, topk_sae(), hook=path)
    windows = Windows(prompt(2), ["a", "b"])
    with refused:
        activations_at(model, model.get_submodule(path), windows.tokens)
    with refused:
        splice_loss(model, model.get_submodule(path), topk_sae(), windows)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    with pytest.raises(UserError, match="encoder-decoder model"):
        load_subject(str(tmp_path))
