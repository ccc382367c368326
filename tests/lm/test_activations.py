"""Activations of every supported family, against transformers' own hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae.features.excerpts import Reader
from fastsae.lm.harvest import Windows, activations_at, collect, stream_activations, windows_of
from fastsae.lm.sites import edited, find_site
from fastsae.lm.splice import cross_entropy, splice_loss
from fastsae.nn import TopKSAE

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
FAMILIES = {
    "gpt2": ("GPT2Config", {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}),
    "llama": ("LlamaConfig", GROUPED),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED),
    "qwen2": ("Qwen2Config", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", GROUPED),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    name, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_layer_is_the_residual_stream_after_the_block(model: Any) -> None:
    tokens = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    path, module = find_site(model, layer=1)
    assert path.endswith(".1")
    hooks = len(module._forward_hooks)  # transformers keeps its own
    torch.testing.assert_close(activations_at(model, module, tokens), states[2])
    assert len(module._forward_hooks) == hooks
    assert find_site(model, hook=path) == (path, module)


def test_edit_reaches_the_next_block(model: Any) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    _, module = find_site(model, layer=0)
    _, following = find_site(model, layer=1)
    plain = activations_at(model, following, tokens)
    with edited(module, lambda x: x + 1.5):
        assert not torch.allclose(activations_at(model, following, tokens), plain)
    torch.testing.assert_close(activations_at(model, following, tokens), plain)


def test_sites_that_do_not_exist_are_named() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**FAMILIES["gpt2"][1])
    )
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 2\]"):
        find_site(model, layer=3)
    with pytest.raises(ValueError, match=r"no module 'transformer.h.0.nope'"):
        find_site(model, hook="transformer.h.0.nope")
    with pytest.raises(ValueError, match="one of them"):
        find_site(model)
    with pytest.raises(ValueError, match="blocks are not under"):
        find_site(torch.nn.Linear(2, 2), layer=0)


def test_collect_keeps_the_rows_of_the_stream_and_its_bound() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**FAMILIES["gpt2"][1])
    ).eval()
    _, module = find_site(model, layer=1)
    windows = Windows(torch.randint(40, (5, 8)), list("abcde"))
    rows = torch.cat(
        [b.activations[:, 1:] for b in stream_activations(model, module, windows, batch_windows=2)]
    ).reshape(-1, 16)
    store = collect(model, module, windows, batch_windows=3)
    torch.testing.assert_close(store.activations, rows)
    bounded = collect(model, module, windows, batch_windows=2, max_bytes=3 * 7 * 16 * 4 + 5)
    assert len(bounded.windows) == 3
    torch.testing.assert_close(bounded.activations, rows[:21])


@pytest.mark.parametrize("skip_first", [0, 3, 7])
def test_positions_left_out_are_one_setting(skip_first):
    """Of the windows: what is harvested, spliced and shown follows."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**FAMILIES["gpt2"][1])).eval()
    _, module = find_site(model, layer=1)
    windows = Windows(torch.randint(40, (3, 8)), list("abc"), skip_first)
    whole = activations_at(model, module, windows.tokens)
    store = collect(model, module, windows)
    assert store.windows.skip_first == windows.select([1]).skip_first == skip_first
    torch.testing.assert_close(store.activations, whole[:, skip_first:].reshape(-1, 16))
    sae = TopKSAE(16, 32, 2, seed=0).eval()
    found = splice_loss(model, module, sae, windows)
    edit = lambda x: torch.cat([x[:, :skip_first], sae(x[:, skip_first:])], 1)  # noqa: E731
    assert found.ce_spliced == cross_entropy(model, windows, edited(module, edit))
    place = len(store) - 1
    shown = Reader(store.windows, text=None).wording(place)  # type: ignore[arg-type]
    assert shown[-1] == windows.tokens[2, 7]


@pytest.mark.parametrize("skip_first", [-1, 8, 9])
def test_windows_of_which_nothing_is_left_are_refused(skip_first):
    with pytest.raises(ValueError, match="skip_first must lie in"):
        Windows(torch.zeros(1, 8, dtype=torch.long), ["a"], skip_first)


class Characters:
    bos_token_id = 0
    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_windows_start_with_bos_and_stay_within_a_document() -> None:
    got = windows_of([("a", "abcdefg"), ("b", "xy"), ("c", "pqrst")], Characters(), 4)
    assert got.documents == ["a", "a", "c"]
    assert got.tokens[:, 0].tolist() == [0, 0, 0]
    assert "".join(map(chr, got.tokens[1, 1:].tolist())) == "def"
    spread = windows_of([("a", "x" * 30)], Characters(), 4, per_document=3)
    assert len(spread) == 3
    with pytest.raises(ValueError, match="no document is as long"):
        windows_of([("b", "xy")], Characters(), 4)
