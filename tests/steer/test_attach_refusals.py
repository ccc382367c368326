"""What attach tells and refuses: nothing edited or left out, sites and SAEs of other kinds."""

from __future__ import annotations

import copy
import itertools
import re
from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from common import randn
from small_models import LAYER, D, F, prompt, tiny, topk_sae

import fastsae
from fastsae.lm.sites import output_of
from fastsae.steer import ablate, add, add_vector, attach, clamp, describe, positions, scale

pytest.importorskip("transformers")


@pytest.fixture
def gpt2() -> torch.nn.Module:
    return tiny("gpt2")


@torch.no_grad()
def test_a_block_in_which_nothing_was_edited_says_so(gpt2):
    """A model compiled before attach, another copy, a replayed graph: no edit, and no silence."""
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    for how, expected in (
        ("error", pytest.raises(RuntimeError, match="nothing passed through transformer.h.1")),
        ("warn", pytest.warns(UserWarning, match="nothing passed through")),
        ("ignore", nullcontext()),
    ):
        with expected, steerer.steer([[clamp(3, 6.0)]], unedited=how):
            pass
    with steerer.steer([None, []]):  # nothing was asked for
        pass
    with pytest.raises(KeyError), steerer.steer([[clamp(3, 6.0)]]):
        raise KeyError("the block's own error comes through")
    with pytest.raises(ValueError, match="unedited must be"), steerer.steer([None], unedited="no"):
        pass
    with steerer.steer([[clamp(3, 6.0)], None]):
        gpt2(ids), gpt2(ids)
    assert (steerer.receipt.calls, steerer.receipt.tokens) == (2, 2 * ids.numel())
    with steerer.steer([[clamp(3, 6.0)], None]):
        gpt2(ids)
    assert steerer.receipt.calls == 1 and steerer.receipt.site == "transformer.h.1"
    steerer.detach()


@torch.no_grad()
@pytest.mark.parametrize("where", ["prompt_only", "generated_only"])
@pytest.mark.parametrize("length", [4, 7, 8])
def test_a_prompt_in_chunks_is_not_confused_with_what_is_generated(gpt2, length, where):
    """generate(prefill_chunk_size=), prompt lookup: the last chunk may be one token, and a pass may
    begin with tokens that were proposed."""
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(1, length)
    program, where = [[clamp(3, 6.0)]], getattr(positions, where)()
    whole = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    with steerer.steer(program, where, prompt_length=length):
        want = gpt2.generate(ids, **whole)
    for more in (
        {}, *({"prefill_chunk_size": n} for n in (1, 3, 6)), {"prompt_lookup_num_tokens": 2}
    ):  # fmt: skip
        with steerer.steer(program, where):
            assert torch.equal(gpt2.generate(ids, **more, **whole), want), more
            assert torch.equal(gpt2.generate(input_ids=ids, **more, **whole), want)
    assert "generate" not in vars(gpt2)
    with steerer.steer(program, where, unedited="ignore"):  # by hand: nobody knows
        cache = gpt2(ids[:, :2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="prompt_length="):
            gpt2(ids[:, 2:], past_key_values=cache)
    steerer.detach()


@torch.no_grad()
def test_a_copy_made_inside_a_block_generates_by_itself(gpt2):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(1, 4)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    clean = gpt2.generate(ids, **options)
    with steerer.steer([[clamp(3, 60.0)]], positions.generated_only(), unedited="ignore"):
        copied = copy.deepcopy(gpt2)
    assert torch.equal(copied.generate(ids, **options), clean)
    steerer.detach()


def test_positions_that_leave_every_token_alone_are_told(gpt2):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(1, 4)
    with (
        pytest.raises(RuntimeError, match="4 tokens passed .* left all of them alone"),
        steerer.steer([[clamp(3, 6.0)]], positions.at([100])),
    ):
        gpt2(ids)
    with steerer.steer([[clamp(3, 6.0)]], positions.at([1, 2])):
        gpt2(ids)
    assert int(steerer.receipt.chosen) == 2
    steerer.detach()


def test_padding_that_nobody_can_see_is_refused(gpt2):
    """A BOS or EOS as padding, of several sequences without a mask."""
    steerer, ids = attach(gpt2, None, layer=LAYER, max_batch=2), prompt(2, 4)
    steerer._pad, steerer._eos = None, (9,)
    program, where = [[add_vector(randn(D, seed=1))]] * 2, positions.prompt_only(exclude=["pad"])
    with steerer.steer(program, where):
        gpt2(ids.clamp(min=10))
    ids[0, :2] = 9
    with pytest.raises(ValueError, match="no attention_mask"), steerer.steer(program, where):
        gpt2(ids)
    with pytest.raises(ValueError, match="inputs_embeds"), steerer.steer(program, where):
        gpt2(inputs_embeds=randn(2, 4, D, seed=2))
    with steerer.steer(program, where):
        gpt2(ids, attention_mask=torch.ones(2, 4))
    steerer.detach()


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc", "transformer.wte"])
def test_a_site_of_another_width_or_without_activations_is_named(gpt2, name):
    steerer = attach(gpt2, None, hook=name, inputs=name.endswith("wte"))
    with (
        pytest.raises((ValueError, TypeError), match=re.escape(name)),
        steerer.steer([[add_vector(randn(D, seed=1))]]),
    ):
        gpt2(prompt(1))
    steerer.detach()


def test_a_cache_of_unknown_length_is_refused_where_positions_need_it():
    ids = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "cache_params": SimpleNamespace()}
    where = positions.generated_only()
    with pytest.raises(ValueError, match="does not say how many tokens it holds"):
        positions.token_mask(where, ids, 4, (0,), None)
    ids["cache_position"] = torch.tensor([6])
    assert positions.token_mask(where, ids, 4, (0,), None).all()
    assert not positions.token_mask(positions.prompt_only(), ids, 4, (0,), None).any()

    class NoAttention:
        def get_seq_length(self):
            raise ValueError("get_seq_length can only be called on Attention layers")

    for name, cache in (("past_key_values", NoAttention()), ("state", [torch.zeros(1)])):  # RWKV's
        given = {"input_ids": ids["input_ids"], name: cache}
        with pytest.raises(ValueError, match="does not say how many tokens it holds"):
            positions.token_mask(where, given, 4, (0,), None)


def test_a_site_that_runs_twice_a_pass_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Linear(D, D)

        def forward(self, x):
            return self.block(self.block(x))

    model = Twice()
    steerer, x = attach(model, topk_sae(), hook="block"), randn(1, 3, D)
    with torch.no_grad(), steerer.steer([[clamp(3, 6.0)]]):
        model.block(x), model.block(x)  # by itself, outside a pass
        for run in (model, torch.compile(model, backend="eager")):
            with pytest.raises(RuntimeError, match="block runs more than once in a pass"):
                run(x)
    steerer.detach()


@torch.no_grad()
def test_what_is_to_be_left_out_must_be_there(gpt2):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    program = [[clamp(3, 6.0)]] * 2
    without = ids.clamp(min=2)
    steerer.detach()
    for bos in (0, [99, 0]):  # a list, as some configurations have
        gpt2.config.__dict__["bos_token_id"] = bos
        steerer = attach(gpt2, topk_sae(), layer=LAYER)
        where = positions.prompt_and_generated(exclude="bos")
        with steerer.steer(program, where):
            gpt2(ids)
        with (
            pytest.raises(
                ValueError, match="in a sequence of this call no token is the model's BOS"
            ),
            steerer.steer(program, where),
        ):
            gpt2(torch.cat([ids[:1], without[1:]]))  # of one of two
        steerer.detach()
    gpt2.config.pad_token_id, padded = 1, ids.clone()
    padded[0, :2] = 1
    steerer = attach(gpt2, topk_sae(), layer=LAYER)
    where = positions.prompt_and_generated(exclude="pad")
    with steerer.steer(program, where):
        gpt2(ids.clamp(min=2))  # no padding, no mask
        gpt2(padded, attention_mask=(padded != 1).long())
    with (
        pytest.raises(ValueError, match="exclude='pad', and the call has tokens 1.*no attention"),
        steerer.steer(program, where),
    ):
        gpt2(padded)
    steerer.detach()
    gpt2.config.__dict__ |= {"bos_token_id": 1, "eos_token_id": 1}  # doubles as padding
    steerer = attach(gpt2, topk_sae(), layer=LAYER)
    with pytest.raises(ValueError, match="no attention_mask"), steerer.steer(program, where):
        gpt2(padded)
    padded[0, 1], padded[1, 0] = 2, 1  # a BOS in front
    with steerer.steer(program, where):
        gpt2(padded)
    where = positions.prompt_and_generated(exclude="bos")
    with steerer.steer(program, where):  # a call that continues a cache brings no BOS
        cache = gpt2(padded, use_cache=True).past_key_values
    with steerer.steer(program, where):
        gpt2(without[:, :2], past_key_values=cache)
    steerer.detach()
    again = ids.clone()
    again[:, 3] = 0  # a second document in the sequence
    seen = positions.token_mask(
        positions.prompt_and_generated(exclude="bos"), {"input_ids": again}, 6, (0,), None
    )
    assert torch.equal(seen, again != 0)


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping", "output", "named"])
def test_outputs_of_every_kind_are_edited(kind):
    from transformers.modeling_outputs import BaseModelOutput

    Named = namedtuple("Named", "states rest")

    class Site(torch.nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            kinds = {
                "tuple": (x, 1), "list": [x, 1], "mapping": {"states": x, "rest": 1},
                "output": BaseModelOutput(last_hidden_state=x), "named": Named(x, 1),
            }  # fmt: skip
            return kinds[kind]

    model = torch.nn.Sequential(Site(D, D))
    steerer, x = attach(model, topk_sae(), hook="0"), randn(2, 3, D)
    plain = model(x)
    with torch.no_grad(), steerer.steer([[add_vector(torch.ones(D), 2.0)]] * 2):
        got = model(x)
    assert type(got) is type(plain)
    states, before = output_of(got), output_of(plain)
    torch.testing.assert_close(states, before + 2.0)
    if kind == "output":
        assert got.last_hidden_state is states
    steerer.detach()


def test_a_module_without_hidden_states_is_refused_by_name(gpt2):
    class Site(torch.nn.Linear):
        def forward(self, x):
            return {"loss": 3.0}

    model = torch.nn.Sequential(Site(D, D))
    steerer = attach(model, topk_sae(), hook="0")
    with (
        pytest.raises(TypeError, match="steer: 0 cannot be steered: .* begins with float"),
        steerer.steer([[clamp(3, 6.0)]]),
    ):
        model(randn(1, 3, D))


def saelens(kind, metadata=None, **options):
    """An object that looks like SAELens's, whose package need not be here."""
    sae = type("SAE", (torch.nn.Module,), {"__module__": "sae_lens.saes"})()
    sae.W_enc = torch.nn.Parameter(randn(D, F, seed=1))
    sae.W_dec = torch.nn.Parameter(randn(F, D, seed=2))
    sae.b_dec, sae.b_enc = (
        torch.nn.Parameter(randn(D, seed=3)),
        torch.nn.Parameter(randn(F, seed=4)),
    )
    sae.r_mag, sae.b_mag = (
        torch.nn.Parameter(randn(F, seed=5) / 4),
        torch.nn.Parameter(randn(F, seed=6)),
    )
    sae.b_gate = torch.nn.Parameter(randn(F, seed=7))
    sae.cfg = SimpleNamespace(
        architecture=lambda: kind, apply_b_dec_to_input=True, normalize_activations="none",
        reshape_activations="none", metadata=SimpleNamespace(model_from_pretrained_kwargs=metadata),
    )  # fmt: skip
    for name, value in options.items():
        setattr(sae.cfg, name, value)
    return sae


@pytest.mark.parametrize("kind", ["standard", "gated"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("centring", [True, False, None])
def test_saes_of_centred_activations_read_uncentred_ones(kind, subtract, centring):
    options = {} if centring is None else {"center_writing_weights": centring}
    sae = saelens(kind, options, apply_b_dec_to_input=subtract)
    x = randn(1, 5, D, seed=9) + 2
    seen = x - x.mean(-1, keepdim=True) if centring else x
    p = (seen - sae.b_dec if subtract else seen) @ sae.W_enc
    f = (p + sae.b_enc).relu()
    if kind == "gated":
        f = (p + sae.b_gate > 0) * (sae.r_mag.exp() * p + sae.b_mag).relu()
    model = torch.nn.Sequential(torch.nn.Linear(D, D))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(D)), model[0].bias.zero_()
    steerer = attach(model, sae, hook="0")
    with torch.no_grad(), steerer.steer([[ablate(3)]]):
        got = model(x)
    steerer.detach()
    torch.testing.assert_close(got, x - f[..., 3:4] * sae.W_dec[3], rtol=1e-4, atol=1e-4)


def test_a_scale_that_was_never_folded_is_refused():
    with pytest.raises(NotImplementedError, match="fold_activation_norm_scaling_factor"):
        describe(saelens("standard", normalize_activations="expected_average_only_in"))


@torch.no_grad()
def test_a_sequence_without_a_program_counts_as_no_edit(gpt2):
    """Positions that only such a sequence has leave nothing edited."""
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    seen = torch.ones_like(ids)
    seen[0] = 0  # the first, whose program there is, is padding
    where = positions.prompt_and_generated(exclude=("pad",))
    alone = pytest.raises(RuntimeError, match="positions left all of them alone")
    with alone, steerer.steer([[add(3, 2.0)], None], where):
        gpt2(ids, attention_mask=seen)
    with steerer.steer([None, [add(3, 2.0)]], where):
        gpt2(ids, attention_mask=seen)
    assert int(steerer.receipt.chosen) == ids.shape[1]
    steerer.detach()


@torch.no_grad()
def test_a_block_ends_clean_where_generate_was_replaced(gpt2):
    steerer, ids = attach(gpt2, topk_sae(), layer=LAYER), prompt(2)
    with steerer.steer([[add(3, 2.0)], None], positions.prompt_only()):
        gpt2(ids)
        gpt2.generate = mine = lambda *args: None
    assert gpt2.generate is mine
    plain = gpt2(ids).logits
    with steerer.steer([[add(3, 2.0)], None]):  # the block before is over
        assert not torch.equal(gpt2(ids).logits, plain)
    with pytest.raises((RuntimeError, OverflowError, ValueError)):
        steerer.set([[add(3, 2.0)], None], positions.at([2**70]))
    assert torch.equal(gpt2(ids).logits, plain)  # nothing was put in force
    steerer.detach()


@pytest.mark.parametrize("kind", ["own", "standard", "topk"])
@torch.no_grad()
def test_the_steerer_follows_its_coder(gpt2, kind):
    """`.to` puts other tensors in place of those that were described, of which some were copies."""
    sae = topk_sae() if kind == "own" else saelens(kind, k=3, rescale_acts_by_decoder_norm=False)
    ids, program = prompt(2), [add(3, 2.0), *(scale(j, 3.0) for j in range(5, 30))]
    steerer = attach(gpt2, sae, layer=LAYER)
    texts = []
    for change in (lambda: sae.double(), lambda: sae.W_dec.mul_(-3), lambda: sae.W_enc.mul_(-1)):
        change()
        with steerer.steer([program, None]):
            got = gpt2(ids).logits
        steerer.detach()
        fresh = attach(gpt2, sae, layer=LAYER)
        with fresh.steer([program, None]):
            want = gpt2(ids).logits
        fresh.detach()
        steerer = attach(gpt2, sae, layer=LAYER)
        assert torch.equal(got, want)
        texts.append(got)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(texts))


@torch.no_grad()
def test_the_steerer_ranks_by_the_norms_of_now(gpt2):
    sae, ids = fastsae.nn.TopKSAE(D, F, 3, seed=3, rank_by_decoder_norm=True).eval(), prompt(2)
    steerer = attach(gpt2, sae, layer=LAYER)
    with steerer.steer([[scale(3, 2.0)], None]):
        gpt2(ids)
    sae.W_dec.mul_(torch.linspace(0.1, 4, F)[:, None])
    found = []
    for one in (steerer, None):
        one = one or attach(gpt2, sae, layer=LAYER)
        with one.steer([[ablate(j) for j in range(8)], None]):
            found.append(gpt2(ids).logits)
        one.detach()
    assert torch.equal(*found)


def test_tables_are_of_the_sites_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(D, D).bfloat16(), torch.nn.Linear(D, D))
    steerer = attach(model, topk_sae(), hook="1")
    x = randn(1, 3, D)
    plain = model[1](x)
    with torch.no_grad(), steerer.steer([[clamp(3, 6.0)]]):
        edited = model[1](x)
    assert steerer._buffers.enc.dtype == edited.dtype == torch.float32
    assert steerer.receipt.calls == 1 and not torch.equal(edited, plain)
    steerer.detach()
