"""`fastsae steer`: before and after, and one clear line when something is missing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from common import randn

from fastsae.lm.load import EMBEDDED_MODEL, fingerprint, load_subject
from fastsae.nn import TopKConfig, TopKSAE
from fastsae.nn.description import MAX_ACTIVATION
from fastsae.steer import MaxActivations

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")


def run(*arguments: object):
    from fastsae.cli.app import app

    return typer_testing.CliRunner().invoke(app, ["steer", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """An SAE for the embedded model whose latent 3 writes a large, fixed direction."""
    sae = TopKSAE(256, 32, 4, seed=0)
    sae.save_pretrained(tmp_path / "sae")
    MaxActivations(torch.full((32,), 40.0), 1000, "made up", site="transformer.h.2").save(
        tmp_path / "sae" / MAX_ACTIVATION
    )
    return tmp_path / "sae"


def test_prints_both_texts(folder):
    options = ("--sae", folder, "--feature", 3, "--prompt", "import os", "--tokens", 12)
    strong = run(*options, "--strength", 80, "--temperature", 0)
    assert strong.exit_code == 0, strong.output
    assert "before" in strong.output and "latent 3 at 80, 2 times its" in strong.output
    unit = run(*options, "--strength", 2, "--unit", "max", "--temperature", 0)
    assert unit.output == strong.output  # 2 x 40 is 80
    nothing = run(*options, "--strength", 0, "--temperature", 0)
    cells = [line.split("│")[1:3] for line in nothing.output.splitlines() if "│" in line]
    assert cells and strong.output != nothing.output
    befores = [
        [line.split("│")[1] for line in shown.output.splitlines() if "│" in line]
        for shown in (strong, run(*options, "--strength", -80, "--temperature", 0))
    ]
    rows = min(map(len, befores))  # a longer text beside it adds empty lines
    assert befores[0][:rows] == befores[1][:rows]  # unsteered
    long = run(*options, "--strength", 80, "--tokens", 1, "--prompt", "a" * 200)
    assert "…" not in long.output and long.output.count("a") > 400  # folded, nothing cut
    again = run(*options, "--strength", 80, "--seed", 4)
    assert again.output == run(*options, "--strength", 80, "--seed", 4).output


def test_the_strength_in_the_unit_that_is_known():
    from fastsae.cli.steer import _amount

    assert _amount(80, "raw", 40.0) == _amount(2, "max", 40.0) == "80, 2 times its maximum"
    assert _amount(-0.123456, "raw", 3.0) == "-0.1235, -0.0412 times its maximum"
    assert _amount(80, "raw", None) == _amount(80, "raw", 0.0) == "80"  # a latent that never fired


def test_says_what_is_wrong_in_one_line(folder, tmp_path):
    options = ("--feature", 3, "--strength", 2, "--prompt", "import os")
    TopKSAE(TopKConfig(256, 32, 4, d_out=128, apply_b_dec_to_input=False)).save_pretrained(
        tmp_path / "transcoder"
    )
    for arguments, message in (
        (("--sae", tmp_path / "transcoder", "--layer", 1, *options), "transcoder"),
        (("--sae", tmp_path / "nowhere", *options), "no such file"),
        (("--sae", folder, *options, "--feature", 99), "--feature 99: the SAE has 32 latents"),
        (("--sae", folder, *options, "--unit", "sigma"), "unit must be"),
        (("--sae", folder, *options, "--layer", 1, "--hook", "lm_head"), "not both"),
        (("--sae", folder, *options, "--layer", 77), "layer must lie in"),
        (("--sae", folder, *options, "--model", "./nowhere"), "no such folder"),
        (("--sae", folder, *options, "--tokens", 1000), "more than the 256 that the model can"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1
    (folder / MAX_ACTIVATION / "config.json").write_text("{")
    result = run("--sae", folder, *options)
    assert result.exit_code == 2 and "truncated" in result.stderr


def test_statistics_survive_a_round_trip(tmp_path):
    made = MaxActivations(randn(7).abs(), 123, "text", True, "model.layers.3")
    made.save(tmp_path / "s")
    found = MaxActivations.load(tmp_path / "s")
    assert torch.equal(found.values, made.values)
    assert (found.tokens, found.data, found.special_tokens, found.site) == (
        123, "text", True, "model.layers.3",
    )  # fmt: skip
    TopKSAE(4, 8, 2).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="format"):
        MaxActivations.load(tmp_path / "sae")


def other_model(folder, width, *, weights=True):
    """A model of another kind, with the embedded one's tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=4096, n_positions=256, n_embd=width, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if weights:
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


def test_the_folder_knows_its_model_and_site(tmp_path):
    """Neither is asked for, another model is refused, one of another width before it is read."""
    mine, other = other_model(tmp_path / "mine", 64), other_model(tmp_path / "other", 256)
    narrow = other_model(tmp_path / "narrow", 32, weights=False)
    sae = TopKSAE(64, 32, 4, seed=0)
    sae.origin = load_subject(str(mine), layer=1).origin
    assert sae.origin.site == "transformer.h.1"
    sae.save_pretrained(tmp_path / "sae")
    options = ("--sae", tmp_path / "sae", "--feature", 3, "--strength", 5,
               "--prompt", "import os", "--tokens", 3)  # fmt: skip
    done = run(*options)
    assert done.exit_code == 0, done.output
    (mine / "model.safetensors").unlink()
    sae.origin = replace(sae.origin, model=str(other_model(tmp_path / "again", 64)))
    sae.save_pretrained(tmp_path / "sae")
    with torch.no_grad():
        changed = load_subject(sae.origin.model).model
        changed.transformer.wte.weight[0, 0] += 1
        changed.save_pretrained(sae.origin.model)
    for model, message in (
        ((), "was trained on"),
        (("--model", other), "has activations of width 256, and the SAE is of width 64"),
        (("--model", narrow), "has activations of width 32, and the SAE is of width 64"),
    ):
        result = run(*options, *model)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert result.stderr.count("\n") == 1
    assert run(*options, "--any-model").exit_code == 0


def test_one_fingerprint_in_every_dtype():
    model = load_subject().model
    mark = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == mark != fingerprint(model.transformer.h)
    assert fingerprint(copy.deepcopy(model).half()) == ""  # rounded otherwise: nothing is known
    other = copy.deepcopy(model)
    for p in other.parameters():
        if p.dim() == 2:
            p.mul_(1.1)
    assert fingerprint(other) != mark  # matrices count, not only biases and norms
