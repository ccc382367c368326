"""Steering inside generate(): what users of other tools report must not happen here."""

from __future__ import annotations

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from common import randn
from small_models import (
    FAMILIES,
    LAYER,
    PROGRAMS,
    SLIDING,
    D,
    F,
    by_definition,
    prompt,
    tiny,
    topk_sae,
)

import fastsae
from fastsae import _library
from fastsae.lm.sites import edited, find_site
from fastsae.steer import (
    Description,
    ablate,
    active,
    add_vector,
    attach,
    clamp,
    min_clamp,
    positions,
    project_out,
)

pytest.importorskip("transformers")


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny(request.param)


@pytest.fixture
def gpt2() -> torch.nn.Module:
    return tiny("gpt2")


RULES = [
    [(3, lambda f: torch.full_like(f, 6.0))],
    None,
    [
        (7, lambda f: f.clamp(min=4.0)),
        (9, lambda f: f * 0.5),
        (11, lambda f: f * 0),
        (12, lambda f: f + 2),
    ],
]


def run(model, ids, **kwargs):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, **kwargs}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def test_generate_equals_the_definition_cached_or_not(model):
    sae, ids = topk_sae(), prompt()
    steerer = attach(model, sae, layer=LAYER)
    clean, _ = run(model, ids)
    with by_definition(model, sae, RULES):
        want, want_logits = run(model, ids)
    for use_cache in (True, False):
        with steerer.steer(PROGRAMS):
            got, logits = run(model, ids, use_cache=use_cache)
        assert torch.equal(got, want)
        assert (logits - want_logits).abs().max() < 1e-4 * want_logits.abs().max()
    assert not torch.equal(want[0], clean[0]) and not torch.equal(want[2], clean[2])
    assert torch.equal(want[1], clean[1])  # nothing leaks into the sequence left alone
    assert torch.equal(run(model, ids)[0], clean)  # and nothing stays


@torch.no_grad()
def test_every_token_is_edited_the_first_generated_one_too(gpt2):
    """The edit is seen in the hidden states of the prompt and of every decode step."""
    steerer = attach(gpt2, None, layer=LAYER)
    seen = []
    gpt2.transformer.h[LAYER].register_forward_hook(
        lambda m, a, out: seen.append(fastsae.lm.sites.output_of(out).clone())
    )
    vector = randn(D, seed=2)
    with steerer.steer([[add_vector(vector)]]):
        gpt2.generate(prompt(1), max_new_tokens=4, do_sample=False, pad_token_id=1)
    edited_states, seen[:] = list(seen), []
    assert [s.shape[1] for s in edited_states] == [6, 1, 1, 1]
    tokens = gpt2.generate(prompt(1), max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert len(seen) == 4 and tokens.shape[1] == 10
    assert torch.allclose(edited_states[0], seen[0] + vector, atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    sae, short = topk_sae(), prompt(1, 4, seed=5)
    steerer = attach(model, sae, layer=LAYER)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), short], 1)
    ids = torch.cat([padded, prompt(1, 7, seed=6)])
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long()
    where = positions.prompt_and_generated(exclude=("bos", "pad"))
    with steerer.steer([[clamp(3, 6.0)]], where):
        alone, _ = run(model, short)
    with steerer.steer([[clamp(3, 6.0)], [ablate(2)]], where):
        both, _ = run(model, ids, attention_mask=mask)
    assert torch.equal(both[0, 3:], alone[0])


@torch.no_grad()
def test_static_cache_equals_dynamic(model):
    sae, ids = topk_sae(), prompt()
    steerer = attach(model, sae, layer=LAYER)
    where = positions.prompt_and_generated(exclude="bos")
    with steerer.steer(PROGRAMS, where):
        dynamic, _ = run(model, ids)
    with steerer.steer(PROGRAMS, where):
        static, _ = run(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
@pytest.mark.parametrize(
    "where", [positions.prompt_and_generated(("bos", "pad")), positions.at([0, 2, 5])]
)
@torch.no_grad()
def test_padding_is_seen_with_a_static_cache_too(family, where):
    """generate() gives the model a mask of four dimensions then."""
    model = tiny(family)
    ids = torch.cat([torch.ones(1, 3, dtype=torch.long), prompt(1, 4, seed=5)], 1)
    ids = torch.cat([ids, prompt(1, 7, seed=6)])
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long()
    steerer, logits = attach(model, topk_sae(), layer=LAYER), []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with steerer.steer([[clamp(3, 6.0)], [clamp(2, 5.0)]], where):
            logits.append(run(model, ids, attention_mask=mask, **options)[1])
    assert torch.allclose(*logits, atol=1e-4)


@torch.no_grad()
def test_positions_from_whatever_the_model_is_given():
    model = tiny("llama")
    ids = torch.cat([torch.ones(1, 3, dtype=torch.long), prompt(1, 4, seed=5)], 1)
    mask = (torch.arange(7) >= 3).long()[None]
    steerer = attach(model, None, layer=LAYER)
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & mask.bool()
    additive = torch.zeros(7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    for where in (positions.prompt_and_generated("pad"), positions.at([1])):
        with steerer.steer([[add_vector(randn(D, seed=2))]], where):
            want = model(ids, attention_mask=mask, position_ids=place).logits[:, 3:]
            for args in ((ids, mask, place), (ids, causal[None, None], place),
                         (ids, additive[None, None], place)):  # fmt: skip
                assert torch.allclose(model(*args).logits[:, 3:], want, atol=1e-4)
            with pytest.raises(ValueError, match="attention_mask"):
                model(ids, attention_mask=causal[None])
        with (
            steerer.steer([[add_vector(randn(D, seed=2))]], where),
            pytest.raises(RuntimeError, match="called by itself"),
        ):
            model.model(ids)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past_key_value"])
def test_the_cache_is_found_by_the_name_of_any_transformers(name):
    held = SimpleNamespace(get_seq_length=lambda: 7)
    assert positions.past_length({"hidden_states": None, name: held}) == 7
    assert positions.past_length({name: None}) == 0


@torch.no_grad()
def test_beams_and_samples_keep_their_programs(gpt2):
    sae, ids = topk_sae(), prompt()
    steerer = attach(gpt2, sae, layer=LAYER)
    with by_definition(gpt2, sae, [r for r in RULES for _ in range(3)]):
        want, _ = run(gpt2, ids, num_beams=3)
    with steerer.steer(PROGRAMS):
        got, _ = run(gpt2, ids, num_beams=3)
    assert torch.equal(got, want)
    options = {"do_sample": True, "num_return_sequences": 2}
    with by_definition(gpt2, sae, [r for r in RULES for _ in range(2)]):
        torch.manual_seed(0)
        want, _ = run(gpt2, ids, **options)
    with steerer.steer(PROGRAMS):
        torch.manual_seed(0)
        got, _ = run(gpt2, ids, **options)
    assert torch.equal(got, want)


@torch.no_grad()
def test_positions(gpt2):
    steerer = attach(gpt2, None, layer=LAYER)
    vector = randn(D, seed=2)
    changed: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    block = gpt2.transformer.h[LAYER]
    edit = steerer._edit

    def spy(x):
        before.append(x.clone())
        out = edit(x)
        changed.append((out != x).any(-1)[0])
        return out

    steerer._edit = spy
    ids = prompt(1, 5)

    def edited_columns(where, use_cache=True):
        changed.clear()
        with steerer.steer([[add_vector(vector)]], where):
            gpt2.generate(
                ids, max_new_tokens=4, do_sample=False, pad_token_id=1, use_cache=use_cache
            )
        if not use_cache:
            return changed[-1].tolist()
        return torch.cat(changed).tolist()

    y, n = True, False
    for cached in (True, False):
        assert edited_columns(None, cached) == [y] * 8
        assert edited_columns(positions.prompt_only(), cached) == [y] * 5 + [n] * 3
        assert edited_columns(positions.generated_only(), cached) == [n] * 5 + [y] * 3
        no_bos = positions.prompt_and_generated(exclude="bos")
        assert edited_columns(no_bos, cached) == [n] + [y] * 7
        assert edited_columns(positions.at([1, 6]), cached) == [i in (1, 6) for i in range(8)]
    assert block is steerer._module


@torch.no_grad()
def test_two_features_add_up_and_gates_read_the_clean_activation(gpt2):
    sae, ids = topk_sae(), prompt(1, 20)
    steerer = attach(gpt2, sae, layer=LAYER)
    site = gpt2.transformer.h[LAYER]

    def states(program):
        caught = []
        handle = site.register_forward_hook(
            lambda m, a, out: caught.append(fastsae.lm.sites.output_of(out).clone())
        )
        if program is None:
            gpt2(ids)
        else:
            with steerer.steer([program]):
                gpt2(ids)
        handle.remove()
        return caught[0]

    clean = states(None)
    one, two = states([clamp(3, 6.0)]) - clean, states([clamp(4, 5.0)]) - clean
    both = states([clamp(3, 6.0), clamp(4, 5.0)]) - clean
    assert torch.allclose(both, one + two, atol=1e-4)
    values, indices, _ = sae.encode(clean)
    j = int(indices[0, 0, 0])
    fires = ((indices == j) & (values > 0)).any(-1)
    gated = states([clamp(4, 5.0, when=active(j))]) - clean
    assert torch.allclose(gated, torch.where(fires[..., None], two, 0.0), atol=1e-4)
    assert fires.any() and not fires.all()


@torch.no_grad()
def test_several_sites_at_once(gpt2):
    sae, ids = topk_sae(), prompt(2)
    steerers = [attach(gpt2, sae, layer=i) for i in range(2)]
    mlp = attach(gpt2, None, hook="transformer.h.2.mlp")
    r = randn(D, seed=9)
    with steerers[0].steer([[clamp(1, 3.0)], None]), steerers[1].steer([None, [clamp(2, 3.0)]]):
        pair = gpt2(ids).logits
    with steerers[0].steer([[clamp(1, 3.0)], None]):
        first = gpt2(ids).logits
    with steerers[1].steer([None, [clamp(2, 3.0)]]):
        second = gpt2(ids).logits
    assert torch.equal(pair[0], first[0]) and torch.equal(pair[1], second[1])
    caught = []
    gpt2.transformer.h[2].mlp.register_forward_hook(lambda m, a, out: caught.append(out.clone()))
    with mlp.steer([[project_out(r)], None]):
        gpt2(ids)
    along = caught[0] @ (r / r.norm())
    assert along[0].abs().max() < 1e-4 < along[1].abs().max()


@torch.no_grad()
def test_several_saes_at_several_sites_equal_both_definitions(model):
    """A TopK SAE and a ReLU SAE, each with programs of its own, through generate()."""
    topk, ids = topk_sae(), prompt(2)
    W, b = randn(30, D, seed=7) / D**0.5, randn(30, seed=8) / 4
    relu = Description(W, b, W.flip(1), randn(D, seed=9), "relu", subtract_b_dec=True)

    def clamp_relu(x):
        f = ((x[:1] - relu.b_dec) @ W[4] + b[4]).clamp(min=0)
        return torch.cat([x[:1] + (5.0 - f)[..., None] * relu.W_dec[4], x[1:]])

    late = find_site(model, layer=2)[1]
    with by_definition(model, topk, RULES[:2]), edited(late, clamp_relu):
        want, want_logits = run(model, ids)
    first, second = attach(model, topk, layer=LAYER), attach(model, relu, layer=2)
    with first.steer(PROGRAMS[:2]), second.steer([[clamp(4, 5.0)], None]):
        got, logits = run(model, ids)
    assert torch.equal(got, want)
    assert (logits - want_logits).abs().max() < 1e-4 * want_logits.abs().max()
    with first.steer(PROGRAMS[:2]):
        assert (run(model, ids)[1][0] - logits[0]).abs().max() > 0.01  # the second one counted


class Digits:
    """What a text streamer needs of a tokenizer."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


@torch.no_grad()
def test_streamed_tokens_are_the_steered_ones(gpt2):
    streamers = pytest.importorskip("transformers.generation.streamers")
    sae, ids = topk_sae(), prompt(1)
    steerer = attach(gpt2, sae, layer=LAYER)
    clean = run(gpt2, ids)[0][0, 6:].tolist()
    with steerer.steer(PROGRAMS[:1]):
        want = run(gpt2, ids)[0][0, 6:].tolist()
    assert want != clean

    class Kept(streamers.BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    for use_cache in (True, False):
        kept = Kept()
        with steerer.steer(PROGRAMS[:1]):
            run(gpt2, ids, streamer=kept, use_cache=use_cache)
        assert kept.pieces == [ids[0].tolist(), *([t] for t in want)] and kept.ended
    # text from another thread, as a server reads it
    text = streamers.TextIteratorStreamer(Digits(), skip_prompt=True, timeout=60)
    with steerer.steer(PROGRAMS[:1]):
        thread = threading.Thread(target=run, args=(gpt2, ids), kwargs={"streamer": text})
        thread.start()
        heard = "".join(text)
        thread.join()
    assert [int(t) for t in heard.split()] == want


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_tuple_and_tensor_outputs(gpt2, kind):
    """A site that puts out a tuple keeps what else is in it."""
    ids, v, block = prompt(2), randn(D, seed=2), gpt2.transformer.h[LAYER]
    name = {"tensor": "mlp", "tuple": "attn"}[kind]
    site, seen = getattr(block, name), []
    steerer = attach(gpt2, None, hook=f"transformer.h.{LAYER}.{name}")
    before = site.register_forward_hook(lambda m, a, out: seen.append(out), prepend=True)
    after = site.register_forward_hook(lambda m, a, out: seen.append(out))
    with steerer.steer([[add_vector(v)], None]):
        gpt2(ids, output_attentions=False)
    before.remove()
    after.remove()
    clean, moved = seen
    assert isinstance(clean, tuple) == isinstance(moved, tuple) == (kind == "tuple")
    if kind == "tuple":
        assert len(clean) == len(moved) and all(a is b for a, b in zip(clean[1:], moved[1:]))
        clean, moved = clean[0], moved[0]
    assert torch.allclose(moved[0], clean[0] + v, atol=1e-6)
    assert torch.equal(moved[1], clean[1])


def test_compiled_generate_is_steered(gpt2):
    """generate() of a compiled model with a static cache, cached steps included."""
    sae, ids = topk_sae(), prompt(2)
    steerer = attach(gpt2, sae, layer=LAYER)
    with torch.no_grad():
        clean = run(gpt2, ids)[0]
        with steerer.steer(PROGRAMS[:2]):
            want = run(gpt2, ids)[0]
        gpt2.forward = torch.compile(gpt2.forward, backend="eager")
        with steerer.steer(PROGRAMS[:2]):
            got = run(gpt2, ids, cache_implementation="static", disable_compile=True)[0]
        assert torch.equal(got, want) and not torch.equal(want[0], clean[0])
        assert torch.equal(run(gpt2, ids)[0], clean)


def test_compiled_model_is_steered(gpt2):
    sae, ids = topk_sae(), prompt(3)
    steerer = attach(gpt2, sae, layer=LAYER)
    compiled = torch.compile(gpt2, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(ids).logits
        for programs in (PROGRAMS, [[clamp(5, 9.0)], [ablate(1)], None]):
            with steerer.steer(programs):
                assert torch.allclose(compiled(ids).logits, gpt2(ids).logits, atol=1e-3)
                assert not torch.allclose(compiled(ids).logits[0], plain[0], atol=1e-2)
        assert torch.equal(compiled(ids).logits, plain)


def test_steering_is_differentiable(gpt2):
    steerer = attach(gpt2, None, layer=LAYER)
    embeds = randn(1, 4, D, seed=1).requires_grad_()
    with steerer.steer([[project_out(randn(D, seed=2))]]):
        gpt2(inputs_embeds=embeds).logits.square().sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.isfinite().all())
    assert float(embeds.grad.abs().max()) > 0


def test_an_exception_clears_and_bad_use_is_refused(gpt2):
    sae, ids = topk_sae(), prompt(2)
    steerer = attach(gpt2, sae, layer=LAYER)
    with pytest.raises(ValueError, match="attached already"):
        attach(gpt2, sae, layer=LAYER)
    clean = gpt2(ids).logits
    with pytest.raises(KeyError), steerer.steer([[clamp(3, 6.0)], None]):
        raise KeyError
    assert torch.equal(gpt2(ids).logits, clean)
    with steerer.steer([[clamp(3, 6.0)], None]):
        with pytest.raises(RuntimeError, match="already"), steerer.steer([None]):
            pass
        with pytest.raises(ValueError, match="2 programs for a call"):
            gpt2(prompt(3))
        assert not torch.equal(gpt2(ids).logits, clean)  # the refused block changed nothing
    for program, message in (
        ([clamp(F, 1.0)], f"whose SAE has {F}"),
        ([clamp(3, 1.0, unit="max")], "needs the SAE's maximum activations"),
        ([add_vector(randn(D + 1))], f"width {D + 1}"),
        ([clamp(j, 1.0) for j in range(33)], "max_ops is 32"),
    ):
        with pytest.raises(ValueError, match=message), steerer.steer([program, None]):
            pass
    with pytest.raises(TypeError, match="one list of operations per sequence"):
        steerer.set([clamp(3, 6.0), None])
    assert torch.equal(gpt2(ids).logits, clean)
    steerer.detach()
    attach(gpt2, None, layer=LAYER).detach()


def test_backward_after_the_block_is_the_backward_inside(gpt2):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    program, weight = [min_clamp(7, 4.0), clamp(3, 6.0)], next(gpt2.parameters())
    with steerer.steer([program, None]):
        (inside,) = torch.autograd.grad(gpt2(ids).logits.square().sum(), weight)
        loss = gpt2(ids).logits.square().sum()
    with steerer.steer([[ablate(1)], None], unedited="ignore"):  # other tables
        (after,) = torch.autograd.grad(loss, weight)
    assert torch.equal(after, inside)
    steerer.detach()


@torch.no_grad()
def test_one_call_and_two_operators_write_the_same_text(gpt2, monkeypatch):
    """A library that was built without Python.h steers by its operators."""
    ids, found = prompt(3), []
    for functions in (_library.CPU_FUNCTIONS, None):
        monkeypatch.setattr(_library, "CPU_FUNCTIONS", functions)
        steerer = attach(gpt2, topk_sae(), layer=LAYER)
        with steerer.steer(PROGRAMS):
            assert (steerer._fast(torch.zeros(3, 1, D)) is None) == (functions is None)
            found.append(run(gpt2, ids))
        steerer.detach()
    (text, logits), (other_text, other_logits) = found
    assert torch.equal(text, other_text) and torch.equal(logits, other_logits)


def test_equal_programs_share_a_slot(gpt2):
    steerer = attach(gpt2, topk_sae(), layer=LAYER, max_slots=1)
    with steerer.steer([[clamp(3, 6.0)] for _ in range(5)], unedited="ignore"):
        pass
    with (
        pytest.raises(ValueError, match="max_slots"),
        steerer.steer([[clamp(3, 6.0)], [ablate(3)]]),
    ):
        pass
    steerer.detach()


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_an_attached_model_is_not_steered(gpt2, copied):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    clean = gpt2(ids).logits
    assert torch.equal(copied(gpt2)(ids).logits, clean)
    with steerer.steer([[clamp(3, 6.0)], None]):
        steered = gpt2(ids).logits
        inside = copied(gpt2)
        assert torch.equal(inside(ids).logits, clean) and not torch.equal(steered, clean)
        assert torch.equal(gpt2(ids).logits, steered)
    assert torch.equal(copied(gpt2)(ids).logits, clean)
    (hook,) = find_site(inside, layer=LAYER)[1]._forward_hooks.values()
    with hook.__self__.steer([[clamp(3, 6.0)], None]):
        assert torch.equal(inside(ids).logits, steered)
    assert torch.equal(gpt2(ids).logits, clean)
    steerer.detach()


def test_a_detached_steerer_is_refused(gpt2):
    steerer = attach(gpt2, topk_sae(), layer=LAYER)
    steerer.detach()
    with pytest.raises(RuntimeError, match="attach again"), steerer.steer([None]):
        pass


def test_attached_in_inference_mode(gpt2):
    ids = prompt(2)
    with torch.inference_mode():
        sae = topk_sae()
        steerer = attach(gpt2, sae, layer=LAYER)
        with steerer.steer([[clamp(3, 6.0)], None]):
            first = gpt2(ids).logits
    with torch.no_grad(), steerer.steer([[clamp(3, 6.0)], None]):
        assert torch.equal(gpt2(ids).logits, first)
    steerer.detach()


def test_operations_refuse_nonsense():
    for make, message in (
        (lambda: clamp(-1, 2.0), "0 or more"),
        (lambda: clamp(1, float("nan")), "finite"),
        (lambda: clamp(1, 2.0, unit="x"), "unit must be"),
        (lambda: project_out(torch.zeros(4)), "direction is zero"),
        (lambda: add_vector(torch.full((4,), float("inf"))), "NaN or inf"),
        (lambda: positions.at([-1]), "0 or more"),
        (lambda: positions.prompt_only(exclude="eos"), "exclude takes"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError):
        clamp(1.5, 2.0)
