"""Steering without an SAE: a direction found in prompts, added, or ablated everywhere."""

from __future__ import annotations

import pytest
import torch
from common import generator, randn
from small_models import FAMILIES, SLIDING, D, Letters, V, tiny

from fastsae.lm.sites import blocks_of, output_of
from fastsae.steer import (
    ablate_direction,
    add_vector,
    attach,
    attach_everywhere,
    difference_of_means,
    positions,
    project_out,
    prompt_activations,
)

pytest.importorskip("transformers")


def streams(model: torch.nn.Module, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream before every block and after the last."""
    caught: list[torch.Tensor] = []
    blocks = blocks_of(model)[1]
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks
    ]
    handles.append(blocks[-1].register_forward_hook(lambda *a: caught.append(output_of(a[2]))))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return caught


def written(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every attention and MLP writes."""
    caught: list[torch.Tensor] = []
    names = ("attn", "self_attn", "attention", "mlp")
    parts = [m for b in blocks_of(model)[1] for n, m in b.named_children() if n in names]
    handles = [
        m.register_forward_hook(lambda *a: caught.append(output_of(a[2]).clone())) for m in parts
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return caught


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(2, V, (B, T), generator=generator(0))


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])  # gemma2 norms what its MLP wrote
def test_ablated_everywhere_the_stream_has_no_component(family):
    model, r, ids = tiny(family), randn(D, seed=1), tokens(2, 7)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 1:  # a norm that only scales would keep the stream's component at zero
                p.add_(randn(*p.shape, seed=i) / 2)
    unit = r / r.norm()
    clean, clean_parts = streams(model, input_ids=ids), written(model, ids)
    assert len(clean) == 4 and len(clean_parts) == 6
    size = max(float(x.abs().max()) for x in clean)
    assert all(float((x @ unit).abs().max()) > 0.01 for x in clean + clean_parts)
    # the hooks that look are registered inside the block: they see what was edited
    with ablate_direction(model, r):
        ablated, parts = streams(model, input_ids=ids), written(model, ids)
        assert torch.equal(ablated[0], streams(model, input_ids=ids)[0])
    for x in ablated + parts:
        assert float((x @ unit).abs().max()) < 1e-6 * size
    rest = clean[0] - (clean[0] @ unit)[..., None] * unit
    assert torch.allclose(ablated[0], rest, atol=1e-6 * size)  # only that component is gone
    assert all(torch.equal(a, b) for a, b in zip(streams(model, input_ids=ids), clean))


@pytest.mark.parametrize("family", FAMILIES)
def test_everywhere_takes_a_program_for_each_sequence(family):
    """Also while it generates with a cache; nothing leaks into the sequence left alone."""
    model, r, ids = tiny(family), randn(D, seed=1), tokens(2, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    clean = model.generate(ids, **options)
    everywhere = attach_everywhere(model)
    seen: list[torch.Tensor] = []
    handle = blocks_of(model)[1][1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with everywhere.steer([[project_out(r)], None]):
        got = model.generate(ids, **options)
    handle.remove()
    assert len(everywhere.receipts) == 3 * 3 + 1 and all(one.calls for one in everywhere.receipts)
    with everywhere.steer([[project_out(r)], None], positions.generated_only()):
        model.generate(ids, **options)  # one prompt for ten watchers
    assert "generate" not in vars(model)
    with everywhere.steer([[project_out(r)], None], unedited="ignore"):
        pass
    along = torch.cat(seen, 1) @ (r / r.norm())  # [2, 9]
    assert along.shape == (2, 9)
    assert float(along[0].abs().max()) < 1e-4 < float(along[1].abs().mean())
    assert torch.equal(got[1], clean[1])
    everywhere.detach()
    assert torch.equal(model.generate(ids, **options), clean)


def test_attach_everywhere_leaves_nothing_behind_when_refused():
    model = tiny("llama")
    taken = attach(model, layer=1)
    with pytest.raises(ValueError, match="layers.1 is attached already"):
        attach_everywhere(model)
    taken.detach()
    with pytest.raises(KeyError), ablate_direction(model, randn(D)):
        raise KeyError
    attach_everywhere(model).detach()
    del model.model.layers[2].mlp
    with pytest.raises(ValueError, match="has no MLP under mlp"):
        attach_everywhere(model)
    attach(model, layer=0).detach()


def test_inputs_and_output_of_a_block_are_two_sites():
    model, ids, v = tiny("gpt2"), tokens(1, 4), randn(D, seed=3)
    given, put_out = attach(model, layer=0, inputs=True), attach(model, layer=0)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, layer=0, inputs=True)
    clean = streams(model, input_ids=ids)
    with given.steer([[add_vector(v)]]):
        moved = streams(model, input_ids=ids)
        by_name = {"hidden_states": clean[0]}
        assert torch.equal(given._on_inputs(given._module, (), by_name)[1]["hidden_states"],
                           given._edit(clean[0]))  # fmt: skip
    assert not torch.allclose(moved[1], clean[1] + v, atol=1e-3)  # the block saw it
    with put_out.steer([[add_vector(v)]]):
        moved = streams(model, input_ids=ids)
    assert torch.allclose(moved[1], clean[1] + v, atol=1e-5)
    given.detach()
    again = attach(model, layer=0, inputs=True)
    given.detach()  # the second time does not free what another holds
    with pytest.raises(ValueError, match="attached already"):
        attach(model, layer=0, inputs=True)
    again.detach()


@pytest.mark.parametrize("position", ["last", "mean"])
def test_prompt_activations(position):
    model = tiny("pythia")
    prompts = ["ab", "a long one", "x", "four"]
    got = prompt_activations(model, Letters(), prompts, layer=1, position=position, batch=3)
    assert got.shape == (4, D)
    for text, row in zip(prompts, got):
        ids = torch.tensor([[0, *Letters()(text)["input_ids"]]])
        x = streams(model, input_ids=ids)[2][0]
        want = x[-1] if position == "last" else x[1:].mean(0)
        assert torch.allclose(row, want, atol=1e-5)
    for prompts, options, message in (
        ([], {}, "none of them empty"),
        (["a", ""], {}, "none of them empty"),
        (["a"], {"position": "first"}, "'last' or 'mean'"),
        (["a"], {"layer": 9}, "layer must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_activations(model, Letters(), prompts, **{"layer": 1, **options})


def test_difference_of_means():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]])
    assert difference_of_means(x[1:], x[:1]).tolist() == [3.0, 1.5]
    low = randn(500, D, seed=1).bfloat16()
    assert difference_of_means(low, low[:3]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="0 positive and 3 negative"):
        difference_of_means(x[:0], x)
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 1\]"):
        difference_of_means(x, x[:, :1])


def test_added_vector_moves_one_set_to_the_other():
    """Contrastive activation addition: added after the prompt, at every generated position."""
    model, ids = tiny("qwen"), tokens(1, 5)
    texts = (["ba", "ca", "da"], ["bz", "cz", "dz"])
    means = [prompt_activations(model, Letters(), some, layer=1) for some in texts]
    v = difference_of_means(*means)
    assert torch.allclose((means[1] + v).mean(0), means[0].mean(0), atol=1e-5)
    steerer, seen = attach(model, layer=1), []
    edit = steerer._edit

    def spy(x):
        out = edit(x)
        seen.append(out - x)
        return out

    steerer._edit = spy
    with torch.no_grad(), steerer.steer([[add_vector(v, 2.0)]], positions.generated_only()):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    moved = torch.cat(seen, 1)[0]
    assert moved.shape == (8, D) and not moved[:5].any()
    assert torch.allclose(moved[5:], 2 * v.expand(3, D), atol=1e-3 * float(v.abs().max()) + 1e-4)
