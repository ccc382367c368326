"""`fastsae steer`: before and after, and one clear line when something is missing."""

from __future__ import annotations

import pytest
import torch
from common import randn

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
    strong = run(*options, "--strength", 2, "--temperature", 0)
    assert strong.exit_code == 0, strong.output
    assert "before" in strong.output and "latent 3 at 2 max" in strong.output
    unit = run(*options, "--strength", 80, "--unit", "raw", "--temperature", 0)
    text = [
        line.replace("latent 3 at 80 raw", "latent 3 at 2 max ")
        for line in unit.output.splitlines()
    ]
    assert text == strong.output.splitlines()  # 2 x 40 is 80
    nothing = run(*options, "--strength", 0, "--temperature", 0)
    cells = [line.split("│")[1:3] for line in nothing.output.splitlines() if "│" in line]
    assert cells and strong.output != nothing.output
    befores = [
        [line.split("│")[1] for line in shown.output.splitlines() if "│" in line]
        for shown in (strong, run(*options, "--strength", -2, "--temperature", 0))
    ]
    rows = min(map(len, befores))  # a longer text beside it adds empty lines
    assert befores[0][:rows] == befores[1][:rows]  # unsteered
    long = run(*options, "--strength", 2, "--tokens", 1, "--prompt", "a" * 200)
    assert "…" not in long.output and long.output.count("a") > 400  # folded, nothing cut
    again = run(*options, "--strength", 2, "--seed", 4)
    assert again.output == run(*options, "--strength", 2, "--seed", 4).output


def test_says_what_is_wrong_in_one_line(folder, tmp_path):
    options = ("--feature", 3, "--strength", 2, "--prompt", "import os")
    TopKSAE(TopKConfig(256, 32, 4, d_out=128, apply_b_dec_to_input=False)).save_pretrained(
        tmp_path / "transcoder"
    )
    for arguments, message in (
        (("--sae", tmp_path / "transcoder", "--layer", 1, *options), "transcoder"),
        (("--sae", tmp_path / "nowhere", *options), "no such file"),
        (("--sae", folder, *options, "--feature", 99), "whose SAE has 32"),
        (("--sae", folder, *options, "--unit", "sigma"), "unit must be"),
        (("--sae", folder, *options, "--layer", 1, "--hook", "lm_head"), "not both"),
        (("--sae", folder, *options, "--layer", 77), "layer must lie in"),
        (("--sae", folder, *options, "--model", "./nowhere"), "no such folder"),
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
