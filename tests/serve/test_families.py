"""serve's engine with every family of models: a row of a batch that changes is a text alone."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from common import randn
from small_models import FAMILIES, LAYER, SLIDING, D, V, tiny, topk_sae

pytest.importorskip("transformers")

from fastsae.serve.engine import CANCELLED, Engine, Sampling
from fastsae.steer import ablate, active, add, attach, clamp, min_clamp, project_out, scale

PROGRAMS = [
    [clamp(3, 6.0)],
    None,
    [min_clamp(7, 4.0), scale(9, 0.5), ablate(11), add(12, 2.0)],
    [project_out(randn(D, seed=1))],
    [clamp(20, -5.0, when=active(3))],
    [add(5, 8.0)],
]
LENGTHS = [(2, 9), (11, 14), (5, 3), (7, 12), (1, 16), (8, 7)]  # of the prompt, of what follows


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, V, (n,), generator=draw).tolist() for n, _ in LENGTHS]


def alone(model, steerer, prompt, program, tokens):
    ids = torch.tensor([prompt])
    how = dict(max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    with torch.no_grad(), steerer.steer([program]):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return out[0, len(prompt) :].tolist()


class Reader:
    """Collects a row's tokens; `then` is called at the third."""

    def __init__(self, then=lambda: None):
        self.tokens, self.end, self.done, self.then = [], None, threading.Event(), then

    def __call__(self, event):
        if event.token is None:
            self.end = event
            self.done.set()
            return
        self.tokens.append(event.token)
        if len(self.tokens) == 3:
            self.then()


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_rows_of_a_changing_batch_are_texts_alone(family):
    """Three places for six sequences and two that are cancelled: rows join and leave throughout."""
    model = tiny(family)
    steerer = attach(model, topk_sae(), layer=LAYER)
    texts = prompts()
    truth = [
        alone(model, steerer, text, program, tokens)
        for text, program, (_, tokens) in zip(texts, PROGRAMS, LENGTHS)
    ]
    plain = [alone(model, steerer, text, None, n) for text, (_, n) in zip(texts, LENGTHS)]
    assert sum(a != b for a, b in zip(truth, plain)) >= 3  # the programs matter
    engine = Engine(model, steerer, rows=3)
    engine.rehearse()
    try:
        greedy, gone = Sampling(temperature=0.0), []

        def submit(text, program, tokens, reader):
            options = dict(program=program, sampling=greedy, max_tokens=tokens)
            return engine.submit(text, reader, **options)

        def visitor():
            reader = Reader(then=lambda: engine.cancel(row))
            row = submit([5, 6, 7, 8], [clamp(1, 9.0)], 500, reader)
            gone.append(reader)

        visitor()
        readers = [Reader(then=visitor if i == 1 else (lambda: None)) for i in range(len(texts))]
        for text, program, (_, tokens), reader in zip(texts, PROGRAMS, LENGTHS, readers):
            submit(text, program, tokens, reader)
        for reader in readers:
            assert reader.done.wait(30)
        assert [r.tokens for r in readers] == truth
        for reader in gone:
            assert reader.done.wait(30) and reader.end.finish == CANCELLED
        assert len(gone) == 2 and engine.load == 0
    finally:
        engine.close()


def switched(model, steerer, prompt, programs, at, tokens):
    """Greedy text whose program is another from the token after `at` tokens on."""
    from transformers import DynamicCache

    ids, cache, out = torch.tensor([prompt]), DynamicCache(), []
    with torch.no_grad():
        while len(out) < tokens:
            with steerer.steer([programs[len(out) >= at]]):
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            out.append(ids.item())
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_program_is_in_force_from_the_next_token(family):
    """The batch keeps its size, so nothing but the program tells the engine."""
    model = tiny(family)
    steerer = attach(model, topk_sae(), layer=LAYER)
    first, second = [clamp(3, 6.0)], [clamp(20, -9.0), add(12, 6.0)]
    texts, tokens = prompts()[:2], 14
    truth = switched(model, steerer, texts[0], (first, second), 3, tokens)
    assert truth[:3] == alone(model, steerer, texts[0], first, tokens)[:3]
    assert truth != alone(model, steerer, texts[0], first, tokens)
    beside = alone(model, steerer, texts[1], first, tokens)
    engine = Engine(model, steerer, rows=2)
    try:
        readers = [Reader(then=lambda: engine.change(rows[0], second)), Reader()]
        rows = engine.submit_all(
            [(text, reader, first) for text, reader in zip(texts, readers)],
            Sampling(temperature=0.0),
            tokens,
            60.0,
        )
        for reader in readers:
            assert reader.done.wait(30)
        assert [r.tokens for r in readers] == [truth, beside]
    finally:
        engine.close()


UNSERVED = {
    "Mamba": dict(hidden_size=D, num_hidden_layers=2, state_size=4),  # wrote wrong text
    "Rwkv": dict(hidden_size=D, num_hidden_layers=2, attention_hidden_size=D),
    "RecurrentGemma": dict(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        attention_window_size=8,
    ),
    "Lfm2": dict(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, layer_types=["conv", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNSERVED)
def test_a_family_that_cannot_be_served_is_refused_before_a_request(family):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=V, **UNSERVED[family])
    engine = Engine(getattr(transformers, f"{family}ForCausalLM")(config).eval(), None, rows=2)
    try:
        with pytest.raises(NotImplementedError, match=f"serve: {family}ForCausalLM cannot be"):
            engine.rehearse()
    finally:
        engine.close()


class Wrapped(torch.nn.Module):
    """A model of another signature; where asked, one that does not see what padding is."""

    def __init__(self, model, blind=False):
        super().__init__()
        self.model, self.blind, self.config = model, blind, model.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, **options):
        if self.blind:
            attention_mask = position_ids = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers 5.24 takes `cache` itself
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, **options,
            )  # fmt: skip


def test_a_model_that_does_not_mask_padding_is_refused():
    engine = Engine(Wrapped(tiny("gpt2"), blind=True), None, rows=2)
    try:
        with pytest.raises(NotImplementedError, match="another text in a padded batch"):
            engine.rehearse()
    finally:
        engine.close()


def test_the_cache_is_given_by_the_name_that_the_model_has_for_it():
    """transformers 5.24 says `cache`, and 5.40 will not take `past_key_values`."""
    engines = [Engine(model, None, rows=2) for model in (Wrapped(tiny("gpt2")), tiny("gpt2"))]
    texts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for engine in engines:
            engine.rehearse()
            reader = Reader()
            engine.submit([5, 6, 7], reader, sampling=Sampling(temperature=0.0), max_tokens=9)
            assert reader.done.wait(30) and reader.end.error is None
            texts.append(reader.tokens)
            engine.close()
    assert texts[0] == texts[1] and len(texts[0]) == 9


def test_the_command_refuses_a_model_that_cannot_be_served(tmp_path):
    import transformers
    from typer.testing import CliRunner

    from fastsae.cli.app import app
    from fastsae.lm.load import EMBEDDED_MODEL
    from fastsae.nn import TopKSAE

    config = transformers.OpenAIGPTConfig(vocab_size=4096, n_embd=D, n_layer=2, n_head=2)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    TopKSAE(D, 32, 4, seed=0).save_pretrained(tmp_path / "sae")
    command = ["serve", "--sae", tmp_path / "sae", "--model", tmp_path / "model", "--layer", "1"]
    run = CliRunner().invoke(app, [*map(str, command), "--port", "0"])
    assert run.exit_code == 2, run.output
    assert "OpenAIGPTLMHeadModel cannot be served" in run.output
    assert "its cache does not hold keys and values" in run.output
    assert "http" not in run.output
